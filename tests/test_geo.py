"""Spherical geometry against the plain formulas."""

import math

import numpy as np

from utils import geo


def test_a_degree_along_a_great_circle_is_111_km():
    degree = 6371.0 * math.pi / 180
    assert np.isclose(geo.distance_km((0, 0), (0, 1)), degree)
    assert np.isclose(geo.distance_km((10, 20), (11, 20)), degree)
    assert np.isclose(geo.distance_km((60, 0), (60, 1e-3)), degree * 1e-3 / 2, rtol=1e-6)


def test_distance_across_the_antimeridian_is_short():
    assert np.isclose(geo.distance_km((0, 179.5), (0, -179.5)), geo.distance_km((0, 0), (0, 1)))


def test_antipodes_and_equal_points():
    assert np.isclose(geo.distance_km((30, 40), (-30, -140)), math.pi * 6371.0)
    assert geo.distance_km((12.3, 45.6), (12.3, 45.6)) == 0


def test_distance_against_the_cosine_formula_and_broadcasts():
    rng = np.random.default_rng(0)
    a, b = rng.uniform((-90, -180), (90, 180), (5, 2)), rng.uniform((-90, -180), (90, 180), (7, 2))
    found = geo.distance_km(a[:, None], b)
    assert found.shape == (5, 7)
    for i, (lat_a, lon_a) in enumerate(np.radians(a)):
        for j, (lat_b, lon_b) in enumerate(np.radians(b)):
            cosine = math.sin(lat_a) * math.sin(lat_b) + math.cos(lat_a) * math.cos(lat_b) * math.cos(lon_a - lon_b)
            assert math.isclose(found[i, j], 6371.0 * math.acos(cosine), rel_tol=1e-6)


def test_wrap_longitude():
    assert geo.wrap_longitude([0, 180, -180, 190, -190, 540, 359]).tolist() == [0, -180, -180, -170, 170, -180, -1]


def test_unwrapped_footprint_has_no_jump():
    footprint = np.array([[0, 179], [1, 179], [1, -179], [0, -179]], dtype=float)
    assert geo.unwrap_footprints(footprint)[:, 1].tolist() == [179, 179, 181, 181]
    assert footprint[2, 1] == -179  # the argument stays as it was
    assert np.array_equal(geo.unwrap_footprints(footprint + [0, 5])[:, 1], [184, 184, 186, 186])


def test_unit_vectors_round_trip():
    assert np.allclose(geo.to_unit_vectors([[0, 0], [0, 90], [90, 0]]), np.eye(3))
    points = np.random.default_rng(1).uniform((-89, -179), (89, 179), (20, 2))
    vectors = geo.to_unit_vectors(points)
    assert np.allclose(np.linalg.norm(vectors, axis=-1), 1)
    assert np.allclose(geo.from_unit_vectors(3 * vectors), points)


def test_center_of_a_footprint_over_the_antimeridian():
    lat, lon = geo.centers(np.array([[-1, 179], [1, 179], [1, -179], [-1, -179]], dtype=float))
    assert abs(lat) < 1e-9 and np.isclose(abs(lon), 180)
