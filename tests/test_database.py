"""What a photo is compared with: which places are in reach, and which are found."""

import sys

import numpy as np
import pytest
import torch

from datasets import grid
from datasets.sets import read_database
from retrieval.database import Dataset, Index, Places, best_rotations, search_near
from retrieval.prior import SPREADS, log_prior
from retrieval.store import Rows
from utils import geo


def unit(rng, *shape):
    values = rng.normal(size=shape)
    return (values / np.linalg.norm(values, axis=-1, keepdims=True)).astype(np.float32)


def within_reach(footprints, point, km, steps=400):
    """(N,) bool: a point of the outlines is so near, by the law of cosines, or the point lies inside. Map-aligned."""
    share = np.linspace(0, 1, steps)[:, None]
    lat, lon = np.radians(point)
    near = []
    for corners in geo.unwrap_footprints(footprints):
        outline = np.concatenate([a + share * (b - a) for a, b in zip(corners, np.roll(corners, -1, axis=0))])
        south, west, north, east = *corners.min(axis=0), *corners.max(axis=0)
        inside = south <= point[0] <= north and any(west <= point[1] + turn <= east for turn in (-360, 0, 360))
        la, lo = np.radians(outline.T)
        cosines = np.sin(la) * np.sin(lat) + np.cos(la) * np.cos(lat) * np.cos(lo - lon)
        near.append(inside or 6371 * np.arccos(cosines.clip(-1, 1)).min() <= km)
    return np.array(near)


def some_regions(count=400, seed=0):
    rng = np.random.default_rng(seed)
    zooms = rng.choice([6, 7, 9], count)
    rows, columns = (
        (2.0**zooms * rng.uniform(0.3, 0.65, count)).astype(int),
        (2.0**zooms * rng.random(count)).astype(int),
    )
    return np.stack([zooms, rows, columns], axis=1)


def test_places_are_the_best_images_among_the_rows_each_in_its_best_rotation():
    """Against plain loops. Few dimensions: an image often has two of the best scores, and the best row is often out."""
    rng = np.random.default_rng(0)
    photos, images = unit(rng, 9, 3), unit(rng, 4, 30, 3)
    rows = np.sort(rng.choice(30, 12, replace=False))
    scores, found, rotations = best_rotations(photos, images, rows, 5)
    for photo, given in zip(photos, zip(scores, found, rotations)):
        best = sorted(
            ((max((float(photo @ images[turn, row]), 90 * turn) for turn in range(4)), row) for row in rows.tolist()),
            reverse=True,
        )[:5]
        for ((score, rotation), row), (a, b, c) in zip(best, zip(*given), strict=True):
            assert (a, b, c) == (pytest.approx(score, abs=1e-5), row, rotation)


def test_with_fewer_images_than_places_the_rest_is_nothing():
    rng = np.random.default_rng(1)
    scores, found, _ = best_rotations(unit(rng, 3, 8), unit(rng, 4, 30, 8), np.array([4, 7]), 5)
    assert (np.sort(found[:, :2]) == [4, 7]).all() and (found[:, 2:] == -1).all()
    assert np.isfinite(scores[:, :2]).all() and np.isneginf(scores[:, 2:]).all()


@pytest.mark.parametrize("km", [3, 300, 2500, 21000])
def test_near_are_those_whose_ground_is_so_near_at_any_place(km):
    """Beside points all along every outline, at poles and on both sides of the antimeridian."""
    footprints = grid.footprints(some_regions())
    places = Places("x", footprints, range(400), np.zeros(400))
    counts = []
    for point in [(0, 0), (10, 179.9), (-40, -179.9), (90, 0), (-90, 50), tuple(footprints[7, 0]), (52, 100)]:
        expected = np.flatnonzero(within_reach(footprints, point, km))
        near = places.near(point, km)
        assert near.tolist() == expected.tolist()
        counts.append(len(near))
    assert km < 300 or max(counts) > 5
    assert places.near(None, km).tolist() == list(range(400))


def test_each_photo_is_searched_near_its_own_nadir():
    rng = np.random.default_rng(2)
    regions = some_regions()
    footprints, images, photos = grid.footprints(regions), unit(rng, 4, 400, 16), unit(rng, 1, 8, 16)
    asked = []

    class Some(Places):
        def prepare(self, rows):
            asked.append(rows)
            return rows[rows != 11]  # cannot be read

        def search(self, photos, rows, k):
            return best_rotations(photos[0], images, rows, k)

    places = Some("x", footprints, range(400), np.zeros(400))
    empty = (-89.0, 0.0)
    points = [(0.0, 0.0), None, (30.0, 179.0), (0.0, 0.0), empty, (30.0, 179.0), (-20.0, 60.0), (0.0, 0.0)]
    scores, found, rotations = search_near(places, photos, points, 1500, 6)
    for photo, point in enumerate(points):
        near = within_reach(footprints, point, 1500) if point else np.ones(400, bool)
        best = {
            row: max((float(photos[0, photo] @ images[turn, row]), 90 * turn) for turn in range(4))
            for row in np.flatnonzero(near).tolist()
            if row != 11
        }
        expected = sorted(best, key=lambda row: -best[row][0])[:6]
        assert found[photo].tolist() == expected + [-1] * (6 - len(expected))
        for place, row in enumerate(expected):
            assert (scores[photo, place], rotations[photo, place]) == (
                pytest.approx(best[row][0], abs=1e-5),
                best[row][1],
            )
    assert (found[4] == -1).all() and len(asked[0]) == 400  # all that is needed, at once


@pytest.mark.parametrize("most", [sys.maxsize, 40])
def test_with_the_prior_places_near_the_nadir_come_first_among_those_that_look_as_alike(most):
    """Against plain loops; where a search finds so many at most, of these."""
    rng = np.random.default_rng(5)
    footprints, images, photos = grid.footprints(some_regions()), unit(rng, 4, 400, 16), unit(rng, 1, 3, 16)

    class Some(Places):
        def search(self, photos, rows, k):
            assert k <= most
            return best_rotations(photos[0], images, rows, k)

    Some.most = most
    places, points = Some("x", footprints, range(400), np.zeros(400)), [(0.0, 0.0), None, (30.0, 179.0)]
    scores, found, rotations = search_near(places, photos, points, 2500, 6, "archive")
    for photo, point in enumerate(points):
        near = np.flatnonzero(within_reach(footprints, point, 2500)) if point else np.arange(400)
        looks = {row: max(float(photos[0, photo] @ images[turn, row]) for turn in range(4)) for row in near.tolist()}
        kept = sorted(looks, key=lambda row: -looks[row])[: most if point else None]
        step = SPREADS * np.std([looks[row] for row in kept])
        away = {row: geo.distance_km(places.centers[row], point) if point else 0 for row in kept}
        likely = {row: looks[row] + step * float(log_prior(away[row])) for row in kept}
        expected = sorted(kept, key=lambda row: -likely[row])[:6]
        assert found[photo].tolist() == expected
        np.testing.assert_allclose(scores[photo], [looks[row] for row in expected], atol=1e-5)
        for row, rotation in zip(expected, rotations[photo]):
            assert photos[0, photo] @ images[rotation // 90, row] == pytest.approx(looks[row], abs=1e-5)
    assert found[0].tolist() != search_near(places, photos, points, 2500, 6)[1][0].tolist()


def test_images_are_described_when_they_are_first_needed_and_once(world):
    """Each call describes what it is asked for; what was found before keeps its place."""
    catalogue = read_database(world.path)
    vectors, asked = unit(np.random.default_rng(3), 4 * 24, 8).astype(np.float16), []

    def describe(rows):
        asked.append(rows.tolist())
        index = np.full((4, len(catalogue)), len(vectors))
        index[:, rows] = rows + 24 * np.arange(4)[:, None]
        return Rows(vectors, index), [(row, "broken") for row in rows.tolist() if row == 5]

    places = Dataset(catalogue, describe)
    assert places.prepare(np.array([1, 2, 5])).tolist() == [1, 2]
    assert places.prepare(np.array([2, 3, 5])).tolist() == [2, 3]
    assert places.prepare(np.array([1, 3])).tolist() == [1, 3]
    assert asked == [[1, 2, 5], [3]]
    photos = unit(np.random.default_rng(4), 1, 2, 8)
    found = places.search(photos, np.array([1, 2, 3]), 3)
    expected = best_rotations(photos[0], vectors.reshape(4, 24, 8).astype(np.float32), np.array([1, 2, 3]), 3)
    for given, wanted in zip(found, expected):
        np.testing.assert_allclose(given, wanted, atol=1e-6)
    picture = places.picture(0, 32)
    assert picture.shape == (3, 32, 32) and picture.dtype == torch.uint8


def test_an_index_has_names_areas_and_pictures_of_the_blue_marble():
    class Made:
        regions = some_regions(5)
        footprints = grid.footprints(regions)

        def search(self, photos, rows, k):
            return photos, rows, k

    places = Index(Made(), "earth.index")
    assert places.names == ["_".join(map(str, region)) for region in Made.regions.tolist()]
    for area, footprint in zip(places.areas, places.footprints):
        assert area == pytest.approx(grid.quadrilateral_area(footprint), rel=1e-4)
    assert places.picture(0, 8).shape == (3, 8, 8) and places.turns == (0, 90, 180, 270)
    assert places.search(1, 2, 3) == (1, 2, 3)
