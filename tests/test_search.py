"""Every search against float64 by hand and against the plain one: which rows, in which order, with which scores."""

import numpy as np
import pytest
import torch

from retrieval import search as searches
from retrieval.search import CompressedSearch, ExactSearch, FlatSearch, make_search

KINDS = ("flat", "exact", "exact bfloat16", "exact float16")


def make(kind, database, **more):
    """Low precision is forced where the name says so: these tests hold on any hardware."""
    if kind.startswith("exact "):
        return ExactSearch(database, dtype=getattr(torch, kind.split()[1]), **more)
    return make_search(kind, database)


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def photos(count, dim=64, queries=20, seed=0, dtype=np.float16):
    """Descriptors in 16 directions and some noise; queries are noisy copies of some of them."""
    rng = np.random.default_rng(seed)
    database = unit(rng.normal(size=(count, 16)) @ rng.normal(size=(16, dim)) + rng.normal(size=(count, dim)))
    near = database[rng.integers(count, size=queries)] + 0.05 * rng.normal(size=(queries, dim))
    return database.astype(dtype), unit(near).astype(np.float32)


def expected(database, queries, k, rows=None):
    """Plain, in float64 -> scores and indices, ties by index."""
    rows = np.arange(len(database)) if rows is None else np.asarray(rows)
    scores = queries.astype(np.float64) @ database[rows].astype(np.float64).T
    order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(scores, order, axis=1), order


def agree(found, right):
    """Whether scores are the same, and rows but where scores are closer than float32 tells."""
    (scores, indices), (right_scores, right_indices) = found, right
    gaps = np.abs(np.diff(right_scores, axis=1)) > 4e-6
    clear = np.pad(gaps, ((0, 0), (1, 0)), constant_values=True)
    clear &= np.pad(gaps, ((0, 0), (0, 1)), constant_values=True)
    same_rows = clear.mean() > 0.8 and np.array_equal(indices[clear], right_indices[clear])
    return same_rows and scores == pytest.approx(right_scores, abs=2e-6)


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize("kind", KINDS)
def test_the_nearest_are_those_of_float64(kind, dtype):
    database, queries = photos(3000, dtype=dtype)
    rows = np.sort(np.random.default_rng(1).choice(3000, 1500, replace=False))
    index = make(kind, database)
    for k in (1, 30, 400):
        assert agree(index.search(queries, k), expected(database, queries, k))
        assert agree(index.search(queries, k, rows), expected(database, queries, k, rows))
    assert agree(index.search(queries, 5, rows[::-1]), expected(database, queries, 5, rows[::-1]))
    assert getattr(index, "fallbacks", 0) == 0  # none came to its result by the plain way


def test_blocks_do_not_matter():
    database, queries = photos(1000)
    for block in (7, 100, 999, 5000):
        assert agree(make("exact bfloat16", database, block=block).search(queries, 10), expected(database, queries, 10))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_scores_that_low_precision_cannot_tell_apart_are_searched_the_plain_way(dtype):
    """2,000 descriptors within 1e-3 of each other: rounding shuffles them, the result is exact all the same."""
    rng = np.random.default_rng(2)
    database = unit(rng.normal(size=64) + 1e-3 * rng.normal(size=(2000, 64))).astype(np.float32)
    queries = unit(rng.normal(size=64) + rng.normal(size=(8, 64))).astype(np.float32)
    index = make(f"exact {dtype}", database)
    scores, indices = index.search(queries, 5)
    assert scores == pytest.approx(expected(database, queries, 5)[0], abs=1e-6)
    low = torch.from_numpy(queries).to(index.vectors) @ index.vectors.T
    best = low.float().topk(5, dim=1).indices.numpy()
    assert (best != indices).any()  # what low precision alone would have answered
    assert dtype == "float16" or index.fallbacks == 8


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_bound_on_the_error_of_low_precision_holds_and_is_not_idle(dtype):
    for dim, seed in ((16, 0), (64, 1), (1024, 2)):
        database, queries = photos(800, dim, 50, seed, np.float32)
        index = make(f"exact {dtype}", database)
        low = (torch.from_numpy(queries).to(index.vectors) @ index.vectors.T).float().numpy()
        error = np.abs(low - queries.astype(np.float64) @ database.T.astype(np.float64)).max(axis=1)
        bound = index._error(queries, low)
        assert (error <= bound).all() and bound.max() < 30 * error.max()


def test_equal_descriptors():
    database = np.repeat(unit(np.ones((1, 32))), 3000, axis=0).astype(np.float16)
    for kind in KINDS:
        scores, indices = make(kind, database).search(database[:2].astype(np.float32), 4)
        assert scores == pytest.approx(np.ones((2, 4)), abs=1e-3)
        assert all(len(set(row)) == 4 for row in indices.tolist())


@pytest.mark.parametrize("kind", KINDS)
def test_more_than_there_is_none_and_nobody(kind):
    database, queries = photos(6)
    index = make(kind, database)
    scores, indices = index.search(queries, 9)
    assert (indices[:, 6:] == -1).all() and np.isneginf(scores[:, 6:]).all()
    assert np.array_equal(np.sort(indices[:, :6], axis=1), np.tile(np.arange(6), (len(queries), 1)))
    scores, indices = index.search(queries, 3, np.zeros(0, dtype=int))
    assert (indices == -1).all() and indices.shape == (len(queries), 3)
    assert index.search(queries[:0], 3)[1].shape == (0, 3)
    assert (make(kind, database[:0]).search(queries, 2)[1] == -1).all()


@pytest.mark.parametrize("kind", KINDS)
def test_nan_is_refused_unless_its_row_is_left_out(kind):
    database, queries = photos(2000)
    database[7, 3] = np.nan
    index = make(kind, database)
    with pytest.raises(ValueError, match="1 database descriptors are not finite.*row 7"):
        index.search(queries, 2)
    with pytest.raises(ValueError, match="1 database descriptors are not finite.*row 7"):
        index.search(queries, 2, [3, 7, 9])
    rows = np.delete(np.arange(2000), 7)
    assert agree(index.search(queries, 3, rows), expected(database, queries, 3, rows))
    queries[4, 0] = np.inf
    with pytest.raises(ValueError, match="1 query descriptors are not finite.*row 4"):
        index.search(queries, 2, rows)


def test_a_memory_map_is_searched_where_it_lies(tmp_path):
    database, queries = photos(3000)
    np.save(tmp_path / "database.npy", database)
    for kind in KINDS:
        assert agree(
            make(kind, np.load(tmp_path / "database.npy", mmap_mode="r")).search(queries, 4),
            expected(database, queries, 4),
        )


def test_without_hardware_for_low_precision_exact_is_flat(monkeypatch):
    database, _ = photos(50)
    monkeypatch.setattr(searches, "low_precision", lambda device: None)
    assert isinstance(make_search("exact", database), FlatSearch)
    monkeypatch.setattr(searches, "low_precision", lambda device: torch.bfloat16)
    assert isinstance(make_search("exact", database), ExactSearch)
    with pytest.raises(ValueError, match="--search fast: unknown; choose one of exact, flat, compressed"):
        make_search("fast", database)


@pytest.fixture(scope="module")
def compressed():
    """12,000 photos in 48 values, 24 of them kept; built once."""
    database, queries = photos(12_000, 48, 60, seed=5)
    return database, queries, CompressedSearch(database, dim=24, lists=32, probes=12, exact_below=500)


def test_compressed_finds_nearly_all_and_scores_them_exactly(compressed):
    database, queries, index = compressed
    rows = np.random.default_rng(3).permutation(12_000)[:5000]
    for chosen in (None, np.sort(rows), rows):
        scores, indices = index.search(queries, 10, chosen)
        right_scores, right = expected(database, queries, 10, chosen)
        among = database if chosen is None else database[chosen]
        products = np.einsum("qkd,qd->qk", among[indices].astype(np.float64), queries.astype(np.float64))
        assert scores == pytest.approx(products, abs=1e-6) and (np.diff(scores, axis=1) <= 0).all()
        assert (indices[:, 0] == right[:, 0]).mean() >= 0.95
        assert np.mean([len(set(a) & set(b)) / 10 for a, b in zip(indices.tolist(), right.tolist())]) > 0.85
        assert all(len(set(row)) == 10 for row in indices.tolist())
    assert index.bytes_in_memory < 0.75 * database.nbytes  # 24 bytes and a number of 8, of 96, and the lists' centers


def test_compressed_reading_everything_is_exact(compressed):
    """All components, all lists, and as many re-scored as it takes: the flat result."""
    database, queries, _ = compressed
    index = CompressedSearch(database[:3000], dim=48, lists=4, probes=4, rescored=1500, exact_below=0)
    assert agree(index.search(queries, 8), expected(database[:3000], queries, 8))
    rows = np.flatnonzero(np.arange(3000) % 3)
    assert agree(index.search(queries, 8, rows), expected(database[:3000], queries, 8, rows))


def test_compressed_is_exact_in_a_small_part_and_where_there_is_little(compressed):
    database, queries, index = compressed
    rows = np.arange(100, 400)
    assert agree(index.search(queries, 30, rows), expected(database, queries, 30, rows))
    scores, indices = index.search(queries, 9, [5, 3])
    assert np.array_equal(np.sort(indices[:, :2], axis=1), np.tile([0, 1], (60, 1))) and (indices[:, 2:] == -1).all()
    assert index.search(queries[:0], 3)[0].shape == (0, 3)
    assert not isinstance(make_search("compressed", database[:4999]), CompressedSearch)
    assert isinstance(make_search("compressed", database[:5000]), CompressedSearch)


def test_compressed_refuses_nan_unless_its_row_is_left_out(compressed):
    database, queries, _ = compressed
    database = database[:6000].copy()
    database[[0, 77], 3] = np.nan
    index = CompressedSearch(database, dim=24, lists=16, probes=16, exact_below=100)
    with pytest.raises(ValueError, match="2 database descriptors are not finite.*row 0"):
        index.search(queries, 2)
    rows = np.delete(np.arange(6000), [0, 77])
    scores, indices = index.search(queries, 5, rows)
    assert np.isfinite(scores).all() and (indices[:, 0] == expected(database, queries, 1, rows)[1][:, 0]).mean() > 0.9
    with pytest.raises(ValueError, match="1 query descriptors are not finite"):
        index.search(np.full((1, 48), np.nan), 5, rows)
    with pytest.raises(ValueError, match="diverged"):
        CompressedSearch(np.full((6000, 8), np.nan, dtype=np.float16))


def test_compressed_is_built_the_same_way_twice(compressed):
    database, queries, index = compressed
    again = CompressedSearch(database, dim=24, lists=32, probes=12, exact_below=500)
    assert np.array_equal(index.search(queries, 20)[1], again.search(queries, 20)[1])


@pytest.mark.parametrize("kind", searches.SEARCHES)
def test_any_k_and_dimension_will_do(kind):
    """A dimension that is odd, or 1; k up to more than there are; nobody gets a neighbour that is not there."""
    for dim in (1, 3, 17):
        database, queries = photos(5100, dim, 4, dim, np.float32)
        index = make_search(kind, database)
        for k in (1, 2000, 5100, 5101):
            scores, indices = index.search(queries, k)
            assert scores.shape == indices.shape == (4, k) and indices.max() < 5100
            there = indices >= 0
            assert all(len(set(row[row >= 0])) == (row >= 0).sum() >= min(k, 5100) for row in indices)
            products = np.einsum("qkd,qd->qk", database[np.maximum(indices, 0)].astype(np.float64), queries)
            assert scores[there] == pytest.approx(products[there], abs=1e-6) and np.isneginf(scores[~there]).all()
        for other in (queries[:, :-1], np.pad(queries, ((0, 0), (0, 1))), queries[0]):
            with pytest.raises(ValueError, match=f"queries of shape .*: the database's descriptors have {dim} values"):
                index.search(other, 3)


def test_compressed_learns_from_few_and_says_when_there_are_too_few():
    database, queries = photos(6000, 16, 4)
    database[40:] = np.nan
    rows = np.arange(40)
    assert agree(make_search("compressed", database).search(queries, 5, rows), expected(database, queries, 5, rows))
    index = CompressedSearch(database, exact_below=0, rescored=20, probes=1000)
    assert agree(index.search(queries, 5, rows), expected(database, queries, 5, rows))
    database[10:] = np.nan
    with pytest.raises(ValueError, match="--search compressed: only 10 .* finite.*--search exact"):
        make_search("compressed", database)


def test_a_database_that_does_not_fit_names_the_other_searches(monkeypatch):
    def empty(*shape, **more):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch, "empty", empty)
    with pytest.raises(ValueError, match="--search exact: 0.00 GB .* do not fit on cpu; --search flat and compressed"):
        ExactSearch(photos(100)[0])
