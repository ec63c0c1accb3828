"""Web Mercator and homographies, against rasterio's projection and a loop."""

import numpy as np
import pytest
from rasterio.warp import transform

from utils import geo
from utils.geo import from_mercator, to_mercator
from utils.mercator import apply, homography, photo_to_ground, require_view

VIEW = np.array([(10.0, 20.0), (11.0, 20.1), (11.1, 21.4), (10.2, 21.0)])


def test_it_is_the_projection_that_rasterio_knows():
    points = np.random.default_rng(0).uniform((-85, -180), (85, 180), (50, 2))
    x, y = transform("EPSG:4326", "EPSG:3857", points[:, 1], points[:, 0])
    assert to_mercator(points) == pytest.approx(np.stack([x, y], axis=1), abs=1e-3)
    assert from_mercator(to_mercator(points)) == pytest.approx(points, abs=1e-9)


def test_a_known_homography_comes_out_of_four_points_far_from_the_origin():
    true = np.array([[30.0, 4.0, 9e6], [-3.0, 41.0, -5e6], [1e-5, -2e-5, 1.0]])
    corners = np.array([(0, 0), (0, 3000), (4000, 3000), (4000, 0)], dtype=float)
    moved = []
    for x, y in corners:  # by hand
        w = true[2, 0] * x + true[2, 1] * y + true[2, 2]
        moved.append(
            ((true[0, 0] * x + true[0, 1] * y + true[0, 2]) / w, (true[1, 0] * x + true[1, 1] * y + true[1, 2]) / w)
        )
    found = homography(corners, moved)
    assert found / found[2, 2] == pytest.approx(true, rel=1e-6)


def test_three_corners_in_line_are_refused():
    with pytest.raises(ValueError, match="in line"):
        homography([(0, 0), (0, 1), (1, 1), (1, 0)], [(0, 0), (1, 1), (2, 2), (3, 3)])


def test_the_photos_corners_land_on_its_footprint_in_its_own_order():
    matrix = photo_to_ground(VIEW, 300, 200)
    for pixel, corner in zip([(0, 200), (0, 0), (300, 0), (300, 200)], VIEW):
        assert from_mercator(apply(matrix, np.array(pixel, dtype=float))) == pytest.approx(corner, abs=1e-9)


def test_views_keep_their_order_and_do_not_jump_at_the_antimeridian():
    over = VIEW + [0, 159.2]
    wrapped = np.stack([over[:, 0], geo.wrap_longitude(over[:, 1])], axis=1)
    assert (np.abs(wrapped[:, 1]) < 180).all() and np.ptp(wrapped[:, 1]) > 300
    assert require_view(wrapped) == pytest.approx(over)
    for turns in range(4):
        assert require_view(np.roll(VIEW, turns, axis=0)) == pytest.approx(np.roll(VIEW, turns, axis=0))


@pytest.mark.parametrize(
    ("corners", "told"),
    [
        (VIEW[::-1], "mirrored: its corners run counter-clockwise; give bottom left, top left"),
        (VIEW[[0, 2, 1, 3]], "folded"),
        ([(10, 20), (11, 20), (10.2, 20.2), (10, 21)], "not convex"),  # a dart
        ([(10, 20), (10, 20), (11, 21), (10, 21)], "not convex"),  # a side of no length
        ([(10, 20), (np.nan, 20), (11, 21), (10, 21)], "four places"),
        ([(10, 20), (11, 21), (10, 21)], "four places"),
        ([(84, 20), (86, 20), (86, 21), (84, 21)], "85.05"),
    ],
)
def test_what_no_camera_sees_is_refused(corners, told):
    with pytest.raises(ValueError, match=told):
        require_view(np.array(corners, dtype=float))
