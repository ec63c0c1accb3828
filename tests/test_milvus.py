"""Milvus by its embedded file, against float64 by hand."""

import sys

import numpy as np
import pytest

from retrieval import milvus
from retrieval.database import Index, MilvusIndex, search_near
from retrieval.earth_index import compress
from retrieval.locator import Locator
from retrieval.milvus import MilvusSearch
from utils import geo

pytest.importorskip("pymilvus")
pytest.importorskip("milvus_lite")
COUNT, DIM = 600, 16


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def everywhere(count, seed=0):
    """Points spread evenly over the sphere -> (count, 2) degrees."""
    return geo.from_unit_vectors(np.random.default_rng(seed).normal(size=(count, 3)))


@pytest.fixture(scope="module")
def filled(tmp_path_factory):
    vectors = unit(np.random.default_rng(1).normal(size=(COUNT, DIM))).astype(np.float32)
    search = milvus.MilvusSearch.fill(tmp_path_factory.mktemp("milvus") / "a.db", vectors, everywhere(COUNT), "flat")
    yield search, vectors, everywhere(COUNT)
    search.close()


def expected(vectors, queries, k, rows):
    scores = queries.astype(np.float64) @ vectors[rows].astype(np.float64).T
    order = np.argsort(-scores, axis=1)[:, :k]
    return np.take_along_axis(scores, order, axis=1), order


def queries_of(count=7):
    return unit(np.random.default_rng(2).normal(size=(count, DIM))).astype(np.float32)


def test_neighbours_are_those_of_float64(filled):
    search, vectors, _ = filled
    queries = queries_of()
    for rows in (None, np.random.default_rng(3).permutation(COUNT)[:50]):
        scores, found = search.search(queries, 20, rows)
        right, order = expected(vectors, queries, 20, np.arange(COUNT) if rows is None else rows)
        assert np.array_equal(found, order) and scores == pytest.approx(right, abs=1e-5)
    scores, found = search.search(queries, 5, np.array([8, 3]))
    assert (found[:, 2:] == -1).all() and np.isneginf(scores[:, 2:]).all() and set(found[0, :2]) == {0, 1}
    assert (search.search(queries, 5, np.array([], dtype=int))[1] == -1).all()


@pytest.mark.parametrize("near", [(10, 20), (0, 179.5), (55, -179), (89, 40), (-80, 100), (45, 541)])
@pytest.mark.parametrize("km", [1500, 4000])
def test_only_what_lies_in_the_circle_is_found(filled, near, km):
    search, vectors, centers = filled
    rows = np.flatnonzero(geo.distance_km(centers, near) <= km)
    scores, found = search.search(queries_of(), 12, near=near, km=km)
    right, order = expected(vectors, queries_of(), 12, rows)
    count = min(12, len(rows))
    assert count and np.array_equal(found[:, :count], rows[order[:, :count]]) and (found[:, count:] == -1).all()
    assert scores[:, :count] == pytest.approx(right[:, :count], abs=1e-5)


def test_a_box_full_of_better_ones_outside_the_circle_is_asked_again(tmp_path):
    """All that is most alike lies in the box's corners."""
    centers = np.array([[17.0, 17.0]] * 80 + [[1.0, 1.0]] * 5)
    vectors = np.full((85, 4), 0.5, np.float32)
    vectors[80:] = unit(np.array([1, 1, 1, 0.9]))
    search = milvus.MilvusSearch.fill(tmp_path / "a.db", vectors, centers, "flat")
    _, found = search.search(vectors[:1], 3, near=(0, 0), km=2200)
    assert geo.distance_km([17, 17], [0, 0]) > 2200 and set(found[0]) <= set(range(80, 85))
    search.close()


def test_what_was_put_in_comes_back_with_its_bits(filled):
    search, vectors, centers = filled
    rows = np.array([5, 599, 0, 17])
    back, where = search.read(rows)
    assert np.array_equal(back, vectors[rows]) and np.array_equal(where, centers[rows])
    with pytest.raises(ValueError, match="has no row 600, it has 600 rows"):
        search.read([1, 600])


def test_bytes_for_values_find_nearly_the_same_also_when_opened_again(tmp_path):
    rng = np.random.default_rng(4)
    vectors = unit(rng.normal(size=(3000, 8)) @ rng.normal(size=(8, 32))).astype(np.float16)
    milvus.MilvusSearch.fill(tmp_path / "a.db", vectors, everywhere(3000), "sq8").close()
    search = milvus.MilvusSearch(tmp_path / "a.db", probes=milvus.lists_for(3000))
    assert len(search) == 3000 and search.dim == 32
    queries = vectors[::100].astype(np.float32)
    scores, found = search.search(queries, 10)
    _, order = expected(vectors, queries, 10, np.arange(3000))
    assert (found[:, 0] == np.arange(0, 3000, 100)).all() and scores[:, 0] == pytest.approx(1, abs=0.02)
    assert np.mean([len(set(a) & set(b)) / 10 for a, b in zip(found, order)]) > 0.8
    search.close()


def test_what_does_not_fit_is_said(filled, tmp_path, monkeypatch):
    search, vectors, centers = filled
    with pytest.raises(ValueError, match="16 values"):
        search.search(np.ones((2, 5)), 3)
    with pytest.raises(ValueError, match="1 to 16384"):
        search.search(queries_of(), 0)
    with pytest.raises(ValueError, match="has a collection earthloc already"):
        milvus.MilvusSearch.fill(search.uri, vectors, centers)
    with pytest.raises(ValueError, match="has no collection other"):
        milvus.MilvusSearch(search.uri, "other")
    with pytest.raises(ValueError, match="milvus-lite has no IVF_PQ"):
        milvus.MilvusSearch.fill(search.uri, vectors, centers, "pq", "other")
    with pytest.raises(ValueError, match="give a center for each"):
        milvus.MilvusSearch.fill(search.uri, vectors, centers[1:], name="other")
    broken = vectors.copy()
    broken[450, 2] = np.nan
    with pytest.raises(ValueError, match="row 450 is not finite"):
        milvus.MilvusSearch.fill(search.uri, broken, centers, name="other")
    assert not search.client.has_collection("other")
    monkeypatch.setitem(sys.modules, "pymilvus", None)
    with pytest.raises(RuntimeError, match="pip install pymilvus milvus-lite"):
        milvus.connect(tmp_path / "b.db")


def test_a_circle_and_rows_are_the_rows_in_the_circle(filled):
    search, vectors, centers = filled
    inside = np.flatnonzero(geo.distance_km(centers, (20, 30)) <= 5000)
    rows = np.random.default_rng(5).permutation(COUNT)[:300]
    both = np.intersect1d(inside, rows)
    _, found = search.search(queries_of(), 6, rows, near=(20, 30), km=5000)
    _, order = expected(vectors, queries_of(), 6, both)
    assert 10 < len(both) < len(inside) and np.array_equal(rows[found], both[order])


@pytest.fixture(scope="module")
def earth():
    regions = np.array([(5, row, col) for row in range(8, 24, 2) for col in range(0, 32, 2)])
    rng = np.random.default_rng(6)
    return compress(regions, unit(rng.normal(size=(len(regions), DIM))).astype(np.float32), DIM, "x")


def test_an_index_in_milvus_finds_what_it_finds_in_memory(earth, tmp_path, caplog):
    caplog.set_level("INFO")
    photos = unit(np.random.default_rng(7).normal(size=(4, 3, DIM))).astype(np.float32)
    points = [(40, 175), None, (-10, 20)]
    wanted = search_near(Index(earth, "i"), photos, points, 3000, 7)
    for filling in (1, 0):  # the second time it is there
        places = MilvusIndex(earth, "i", str(tmp_path / "a.db"), key="flat")
        found = search_near(places, photos, points, 3000, 7)
        assert found[0] == pytest.approx(wanted[0], abs=1e-5)
        assert np.array_equal(found[1], wanted[1]) and np.array_equal(found[2], wanted[2])
        places.engine.close()
        assert sum("are put in" in line for line in caplog.messages) == filling
        caplog.clear()


def test_bytes_in_milvus_miss_nothing_near_a_photo_unlike_all_places(tmp_path):
    regions = np.array([(7, row, col) for row in range(20, 100, 2) for col in range(0, 128, 2)])
    rng = np.random.default_rng(8)
    earth = compress(regions, unit(rng.normal(size=(len(regions), DIM))).astype(np.float32), DIM, "x")
    photos = unit(rng.normal(size=(4, 5, DIM))).astype(np.float32)
    points = [(40, 175)] * 5
    wanted = search_near(Index(earth, "i"), photos, points, 3000, 10)
    places = MilvusIndex(earth, "i", str(tmp_path / "a.db"))
    found = search_near(places, photos, points, 3000, 10)
    places.engine.close()
    assert np.mean([len(set(a) & set(b)) / 10 for a, b in zip(found[1], wanted[1])]) >= 0.95
    assert found[0] == pytest.approx(wanted[0], abs=0.02)


def test_another_index_is_another_collection_and_half_a_one_is_an_error(earth, tmp_path):
    file = tmp_path / "a.db"
    MilvusSearch.of_index(file, earth, "flat").close()
    other = MilvusSearch.of_index(file, compress(earth.regions[:40], earth.vectors[:40], DIM, "x"), "flat")
    assert len(other) == 40 and len(other.client.list_collections()) == 2
    (name,) = set(other.client.list_collections()) - {other.name}
    other.client.delete(name, ids=[3, 4])
    other.client.flush(name)
    other.close()
    with pytest.raises(ValueError, match="has 126 of 128 vectors.*remove it"):
        MilvusSearch.of_index(file, earth, "flat")


def test_a_data_set_is_not_searched_in_milvus():
    with pytest.raises(ValueError, match="--milvus: an index is searched there, not a data set"):
        Locator.from_files("w", "data", milvus="a.db")


def test_a_clusters_index_by_the_same_code(monkeypatch):
    """PQ divides the values evenly; the client is asked for no server."""
    from pymilvus import MilvusClient

    for dim, parts in ((256, 64), (512, 128), (30, 6), (7, 1)):
        (index,) = milvus._index(MilvusClient, "pq", dim, 1_000_000)
        told = index.to_dict()
        assert told["index_type"] == "IVF_PQ" and told["metric_type"] == "IP"
        assert (told["nlist"], told["m"], told["nbits"]) == (1500, parts, 8)
