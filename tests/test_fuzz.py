"""Hypothesis looks for inputs that break names, footprints, recalls and the search; PROFILE bounds the time."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from datasets.names import CORNER_FIELDS, ImageName
from datasets.overlap import degenerate, intersections, share_ground
from retrieval.recall import first_of_each, is_correct, recall_at
from retrieval.search import search
from utils import geo

PROFILE = settings(max_examples=60, deadline=None, derandomize=True, database=None)

latitudes = st.floats(-90, 90) | st.sampled_from([-90.0, 90.0, 0.0, 89.99999])
longitudes = st.floats(-180, 180) | st.sampled_from([-180.0, 180.0, 179.99999, -179.99999, 0.0])
footprints = st.lists(st.tuples(latitudes, longitudes), min_size=4, max_size=4)


@st.composite
def rectangles(draw, count=1):
    """(count, 4, 2): north-up, up to 60 degrees wide, over the antimeridian and to the poles; BL, TL, TR, BR."""
    made = []
    for _ in range(count):
        south, west = draw(st.floats(-90, 89)), draw(st.floats(-180, 180))
        north, width = min(90.0, south + draw(st.floats(0.01, 30))), draw(st.floats(0.01, 60))
        east = float(geo.wrap_longitude(west + width))
        made.append([(south, west), (north, west), (north, east), (south, east)])
    return np.array(made)


# Names


@given(st.text(max_size=200) | st.builds("@".join, st.lists(st.text(max_size=12), min_size=16, max_size=19)))
@PROFILE
def test_any_text_is_a_name_or_a_value_error(text):
    try:
        name = ImageName.parse(text)
    except ValueError:
        return
    assert "/" not in str(name)


IDS = st.text(st.characters(exclude_characters="@/", exclude_categories=("Cs",)), min_size=1, max_size=12)


@given(
    footprints,
    IDS,
    st.sampled_from(["2018", "2021", "20200102"]),
    latitudes,
    longitudes,
    st.integers(0, 900_000),
    st.floats(-180, 180),
)
@PROFILE
def test_a_name_survives_being_written_and_read(corners, image_id, timestamp, lat, lon, area, orientation):
    name = ImageName(tuple(corners), image_id, timestamp, (lat, lon), area, orientation)
    again = ImageName.parse(f"some/where@/{name}")
    decimals = 5 if name.is_database else 6
    assert np.allclose(again.footprint, corners, rtol=0, atol=0.6 * 10.0**-decimals)
    assert (again.image_id, again.timestamp, again.area) == (image_id, timestamp, area)
    assert abs(again.orientation - orientation) <= (0.5 if name.is_database else 0.05) + 1e-6
    assert str(ImageName.parse(str(again))) == str(again)


@given(st.integers(0, 7), st.sampled_from(["nan", "inf", "-inf", "1e9", "181", "", "x", "--1", "0x10"]))
@PROFILE
def test_a_corner_that_is_no_place_is_named(field, text):
    values = ["0"] * 8 + ["9_1_1", "2021", "0", "0", "1", "0"]
    values[field] = text
    with pytest.raises(ValueError, match=CORNER_FIELDS[field]):
        ImageName.parse("@" + "@".join(values) + "@.jpg")


# Footprints


@given(hnp.arrays(np.float64, (3, 4, 2), elements=st.floats(-180, 180) | st.just(math.nan)), rectangles(2))
@PROFILE
def test_any_footprints_share_ground_symmetrically(wild, boxes):
    wild[..., 0] /= 2
    both = np.concatenate([wild, boxes])
    shared = share_ground(both, both)
    assert shared.dtype == bool and np.array_equal(shared, shared.T)
    assert not shared[degenerate(both)].any()


@given(rectangles(2))
@PROFILE
def test_sharing_ground_agrees_with_intervals(boxes):
    """For rectangles it is two overlaps of intervals, one of them around a circle."""
    (south, west), (north, _), (_, east) = boxes[:, 0].T, boxes[:, 1].T, boxes[:, 2].T
    width = (east - west) % 360
    tall = min(north) - max(south)
    gap = (west[1] - west[0]) % 360  # from the first's west edge to the second's
    wide = max(min(width[0], gap + width[1]) - gap, min(width[1], 360 - gap + width[0]) - (360 - gap))
    if min(abs(tall), abs(wide)) < 1e-3:  # touching, within the names' decimals
        return
    assert share_ground(boxes[:1], boxes[1:])[0, 0] == (tall > 0 and wide > 0)


@given(rectangles(4))
@PROFILE
def test_the_tree_finds_what_the_dense_test_finds(boxes):
    pairs, iou = intersections(boxes[:2], boxes[2:])
    assert ((iou > 0) & (iou <= 1 + 1e-9)).all()
    found, dense = np.zeros((2, 2), dtype=bool), share_ground(boxes[:2], boxes[2:])
    found[tuple(pairs.T)] = True
    for query, image in np.argwhere(found != dense):  # only where hardly anything is shared may they differ
        points = geo.unwrap_footprints(boxes[[query, 2 + image]])
        points[1, :, 1] += 360 * np.round((points[0, :, 1].mean() - points[1, :, 1].mean()) / 360)
        overlap = np.minimum(points[0].max(0), points[1].max(0)) - np.maximum(points[0].min(0), points[1].min(0))
        assert overlap.min() < 0.02, (boxes[query], boxes[2 + image])


@given(st.tuples(latitudes, longitudes), st.tuples(latitudes, longitudes))
@PROFILE
def test_distances_are_finite_symmetric_and_at_most_half_way_round(a, b):
    km = float(geo.distance_km(a, b))
    assert 0 <= km <= math.pi * geo.EARTH_RADIUS_KM + 1e-6
    assert km == pytest.approx(float(geo.distance_km(b, a)), abs=1e-6)
    assert geo.distance_km(a, a) == 0


@given(footprints)
@PROFILE
def test_centres_lie_on_earth(corners):
    lat, lon = geo.centers(np.array([corners]))[0]
    assert -90 <= lat <= 90 and -180 <= lon <= 180
    assert np.isfinite(geo.unwrap_footprints(np.array([corners]))).all()


# Recall


@given(st.data())
@PROFILE
def test_recall_agrees_with_sets(data):
    images, queries = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 5))
    length = data.draw(st.integers(0, 12))
    predictions = data.draw(hnp.arrays(np.int64, (queries, length), elements=st.integers(-1, images - 1)))
    positives = [data.draw(st.sets(st.integers(0, images - 1))) for _ in range(queries)]
    ks = (1, 2, 5, 50)
    found = recall_at(predictions, positives, ks)
    for k in ks:
        hits = sum(bool(set(row[:k].tolist()) & right) for row, right in zip(predictions, positives))
        assert found[k] == pytest.approx(100 * hits / queries)
    assert is_correct(predictions, positives).shape == predictions.shape


@given(
    hnp.arrays(np.int64, hnp.array_shapes(min_dims=2, max_dims=2, max_side=8), elements=st.integers(-1, 5)),
    st.integers(1, 10),
)
@PROFILE
def test_first_of_each_agrees_with_a_loop(images, k):
    for row, found in zip(images.tolist(), first_of_each(images, k).tolist()):
        expected = [place for place, image in enumerate(row) if image >= 0 and image not in row[:place]][:k]
        assert found == expected + [-1] * (k - len(expected))


# Search


@given(st.data())
@PROFILE
def test_search_agrees_with_sorting(data):
    """k > n, n = 0, no queries, equal rows, any block."""
    n, q, d = data.draw(st.integers(0, 12)), data.draw(st.integers(0, 4)), data.draw(st.integers(1, 4))
    k, block = data.draw(st.integers(1, 15)), data.draw(st.integers(1, 13))
    values = st.integers(-4, 4).map(float)
    database = data.draw(hnp.arrays(np.float32, (n, d), elements=values))
    queries = data.draw(hnp.arrays(np.float32, (q, d), elements=values))
    scores, indices = search(database, queries, k, block=block)
    assert scores.shape == indices.shape == (q, k)
    exact = queries.astype(np.float64) @ database.T.astype(np.float64)
    for row in range(q):
        there = min(k, n)
        assert scores[row, :there].tolist() == sorted(exact[row], reverse=True)[:there]
        assert [exact[row, i] for i in indices[row, :there]] == scores[row, :there].tolist()
        assert len(set(indices[row, :there].tolist())) == there
        assert (indices[row, there:] == -1).all() and (scores[row, there:] == -np.inf).all()


@given(st.sampled_from([np.nan, np.inf, -np.inf]), st.booleans(), st.integers(0, 5))
@PROFILE
def test_search_refuses_what_is_not_finite(value, in_queries, row):
    database, queries = np.ones((6, 3), dtype=np.float32), np.ones((6, 3), dtype=np.float32)
    (queries if in_queries else database)[row, 1] = value
    with pytest.raises(ValueError, match=f"{'query' if in_queries else 'database'} descriptors.*row {row}"):
        search(database, queries, 2)
