"""What predict.py writes: footprints as GeoJSON wherever they lie, and how far a footprint is."""

import math

import numpy as np
import pytest
from shapely.geometry import Polygon, shape

from retrieval.predictions import area, distances_to_footprints
from utils import geo


def rings(geometry):
    """GeoJSON -> its rings as arrays (N, 2), lon and lat."""
    parts = [geometry["coordinates"]] if geometry["type"] == "Polygon" else geometry["coordinates"]
    assert all(len(part) == 1 for part in parts)
    return [np.array(part[0]) for part in parts]


def shoelace(ring):
    return np.sum(ring[:-1, 0] * ring[1:, 1] - ring[1:, 0] * ring[:-1, 1]) / 2


def test_a_footprint_over_the_antimeridian_is_two_areas():
    split = area(np.array([(10, 179), (12, 179), (12, -179), (10, -179)]))
    assert split["type"] == "MultiPolygon"
    assert sorted(shape({"type": "Polygon", "coordinates": part}).bounds for part in split["coordinates"]) == [
        (-180, 10, -179, 12),
        (179, 10, 180, 12),
    ]
    for touching in (180, -180):  # an edge on it is not beyond it
        corners = np.array([(10, 179), (12, 179), (12, touching), (10, touching)])
        for listed in (corners, np.roll(corners, 2, axis=0)):
            whole = area(listed)
            assert whole["type"] == "Polygon" and shape(whole).bounds == (179, 10, 180, 12)


def test_areas_show_the_same_ground_in_rings_as_rfc_7946_wants_them():
    rng = np.random.default_rng(0)
    kinds = set()
    for _ in range(200):
        middle = rng.uniform((-60, 176), (60, 184))
        angles = np.radians(np.sort(rng.uniform(0, 360) + rng.uniform(-9, 9, 4) + (0, 80, 190, 260)))
        corners = middle + rng.uniform(0.5, 3) * np.stack([np.sin(angles), np.cos(angles)], axis=1)
        plain = Polygon(corners[:, ::-1])  # with longitudes over 180
        listed = np.roll(corners[:: rng.choice([-1, 1])], rng.integers(4), axis=0)
        listed[:, 1] = geo.wrap_longitude(listed[:, 1])
        geometry = area(listed)
        kinds.add(geometry["type"])
        for ring in rings(geometry):
            assert (ring[0] == ring[-1]).all() and shoelace(ring) > 0 and (np.abs(ring[:, 0]) <= 180).all()
        assert sum(map(shoelace, rings(geometry))) == pytest.approx(plain.area)
        for turn in (0, 360):  # nothing of it lies outside, on either side
            moved = Polygon(corners[:, ::-1] - [turn, 0]).buffer(1e-9)
            assert shape(geometry).intersection(moved).area == pytest.approx(
                sum(shoelace(ring) for ring in rings(geometry) if (ring[:, 0].mean() < 0) == bool(turn)), abs=1e-6
            )
    assert kinds == {"Polygon", "MultiPolygon"}


@pytest.mark.parametrize("lat", [80, -80])
@pytest.mark.parametrize("lon", [(0, 90, 180, -90), (-100, 170, 80, -10), (180, 90, 0, -90), (-180, -90, 0, 90)])
def test_a_footprint_around_a_pole_reaches_from_edge_to_edge(lat, lon):
    """Its other edge is the pole's: all longitudes between latitude 80 and 90."""
    geometry = area(np.array([(lat, each) for each in lon], dtype=float))
    assert all(shoelace(ring) > 0 for ring in rings(geometry))
    found = shape(geometry)
    assert found.area == pytest.approx(360 * 10)
    assert found.bounds == ((-180, 80, 180, 90) if lat > 0 else (-180, -90, 180, -80))


def test_corners_listed_crosswise_are_put_in_order():
    assert sum(map(shoelace, rings(area(np.array([(0, 179), (2, -179), (2, 179), (0, -179)]))))) == pytest.approx(4)


def loop_distance(a, b):
    """Spherical law of cosines with radius 6371 km, one pair."""
    la, lo, lb, mo = map(math.radians, (*a, *b))
    cosine = math.sin(la) * math.sin(lb) + math.cos(la) * math.cos(lb) * math.cos(lo - mo)
    return 6371.0 * math.acos(max(-1.0, min(1.0, cosine)))


def test_distance_to_a_footprint_is_that_to_the_nearest_point_of_its_outline():
    """Map-aligned boxes, as those of the database: who is inside is told by latitude and longitude."""
    rng = np.random.default_rng(1)
    inside = 0
    for _ in range(40):
        (south, west), (height, width) = rng.uniform((-60, 170), (58, 180)), rng.uniform(0.5, 3, 2)
        point = (south + height / 2 + height * rng.uniform(-1, 1), west + width / 2 + width * rng.uniform(-1, 1))
        share = np.linspace(0, 1, 301)
        outline = [(south + s * height, west + side * width) for s in share for side in (0, 1)]
        outline += [(south + side * height, west + s * width) for s in share for side in (0, 1)]
        within = south <= point[0] <= south + height and west <= point[1] <= west + width
        inside += within
        expected = 0 if within else min(loop_distance(point, each) for each in outline)
        box = np.array([(south, west), (south + height, west), (south + height, west + width), (south, west + width)])
        box[:, 1] = geo.wrap_longitude(box[:, 1])
        found = distances_to_footprints(np.stack([box, box[::-1]]), (point[0], geo.wrap_longitude(point[1])))
        assert found == pytest.approx([expected] * 2, abs=0.1)
    assert 2 < inside < 20
