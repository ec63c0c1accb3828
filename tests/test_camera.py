import numpy as np
import pytest

from datasets.build import camera as cameras
from datasets.build.camera import Camera
from utils import geo

U, V = np.meshgrid(np.linspace(0, 1, 7), np.linspace(0, 1, 5))


def ground_angle(off_nadir, altitude_km, radius=6371.0):
    """Angle at Earth's centre between the nadir and what is seen `off_nadir` radians from straight down (sine rule)."""
    return np.arcsin((radius + altitude_km) / radius * np.sin(off_nadir)) - off_nadir


def random_camera(rng):
    return Camera(
        (rng.uniform(-51, 51), rng.uniform(-180, 180)),
        rng.uniform(370, 450),
        rng.uniform(0, 40),
        rng.uniform(0, 360),
        rng.uniform(-180, 180),
        rng.uniform(28, 200),
    )


def test_nadir_shot_sees_its_corners_at_the_known_distance():
    camera = Camera((10.0, 20.0), 400, tilt=0, azimuth=0, roll=0, focal_mm=24)
    off_nadir = np.arctan(np.hypot(36 / 2, 23.9 / 2) / 24)
    expected = 6371.0 * ground_angle(off_nadir, 400)
    np.testing.assert_allclose(geo.distance_km(cameras.footprint(camera), (10.0, 20.0)), expected, rtol=1e-9)


def test_corners_come_bottom_left_top_left_top_right_bottom_right():
    corners = cameras.footprint(Camera((0.0, 0.0), 400, tilt=0, azimuth=0, roll=0, focal_mm=50))
    assert (np.sign(corners) == [(-1, -1), (1, -1), (1, 1), (-1, 1)]).all()


def test_tilted_boresight_hits_ground_along_the_azimuth():
    camera = Camera((0.0, 30.0), 400, tilt=50, azimuth=90, roll=33, focal_mm=50)
    expected = (0.0, 30 + np.degrees(ground_angle(np.radians(50), 400)))
    np.testing.assert_allclose(cameras.ground_points(camera, 0.5, 0.5), expected, atol=1e-9)


@pytest.mark.parametrize("seed", range(20))
def test_project_inverts_ground_points(seed):
    camera = random_camera(np.random.default_rng(seed))
    u, v = cameras.project(camera, cameras.ground_points(camera, U, V))
    np.testing.assert_allclose(u, U, atol=1e-9)
    np.testing.assert_allclose(v, V, atol=1e-9)


def test_rays_over_the_horizon_are_nan():
    horizon = np.degrees(np.arcsin(6371 / 6771))  # from straight down
    camera = Camera((0.0, 0.0), 400, tilt=horizon, azimuth=0, roll=0, focal_mm=50)
    points = cameras.ground_points(camera, 0.5, np.array([0.49, 0.51]))
    assert np.isnan(points[0]).all() and np.isfinite(points[1]).all()


def test_points_behind_earth_do_not_project():
    camera = Camera((0.0, 0.0), 400, tilt=0, azimuth=0, roll=0, focal_mm=50)
    u, v = cameras.project(camera, np.array([(0.0, 180.0), (0.0, 60.0), (0.0, 0.0)]))
    assert np.isnan(u[:2]).all() and u[2] == pytest.approx(0.5) and v[2] == pytest.approx(0.5)


def test_footprint_over_the_antimeridian_is_continuous_after_unwrapping():
    here = cameras.footprint(Camera((-17.0, 179.5), 400, tilt=10, azimuth=80, roll=15, focal_mm=35))
    there = cameras.footprint(Camera((-17.0, 0.0), 400, tilt=10, azimuth=80, roll=15, focal_mm=35))
    assert np.ptp(here[:, 1]) > 180
    shifted = there + (0, 179.5)
    np.testing.assert_allclose(np.diff(geo.unwrap_footprints(here), axis=0), np.diff(shifted, axis=0), atol=1e-9)


@pytest.mark.parametrize("seed", range(20))
def test_orientation_is_minus_the_azimuth_of_the_photos_up(seed):
    camera = random_camera(np.random.default_rng(seed))
    lat0, lon0 = np.radians(cameras.ground_points(camera, 0.5, 0.5))
    lat1, lon1 = np.radians(cameras.ground_points(camera, 0.5, 0.5 - 1e-5))
    bearing = np.degrees(
        np.arctan2(
            np.sin(lon1 - lon0) * np.cos(lat1),
            np.cos(lat0) * np.sin(lat1) - np.sin(lat0) * np.cos(lat1) * np.cos(lon1 - lon0),
        )
    )
    found = cameras.orientation(camera)
    assert -180 <= found < 180
    assert (found + bearing + 180) % 360 - 180 == pytest.approx(0, abs=0.01)


def test_nadir_shot_with_north_to_the_right_has_orientation_90():
    # Rolled 90 degrees anticlockwise, the photo's up is west, so north lies 90 degrees clockwise of up.
    camera = Camera((0.0, 0.0), 400, tilt=0, azimuth=0, roll=-90, focal_mm=50)
    assert cameras.orientation(camera) == pytest.approx(90)
    u, v = cameras.project(camera, np.array((0.5, 0.0)))
    assert u > 0.5 and v == pytest.approx(0.5)


def test_impossible_camera_is_refused():
    with pytest.raises(ValueError, match="altitude_km"):
        Camera((0.0, 0.0), -1, tilt=0, azimuth=0, roll=0, focal_mm=50)
