"""The grid of regions against the Mercator formula written another way, and against areas by integration."""

import math

import numpy as np
import pytest

from datasets import grid
from datasets.names import ImageName


def edge(zoom, row):
    """Latitude of a tile's upper edge by the inverse Gudermannian."""
    return math.degrees(2 * math.atan(math.exp(math.pi * (1 - 2 * row / 2**zoom))) - math.pi / 2)


def test_footprint_corners_are_bottom_left_top_left_top_right_bottom_right():
    corners = grid.footprints([(9, 200, 100)])[0]
    top, bottom, left, right = edge(9, 200), edge(9, 204), 100 / 512 * 360 - 180, 104 / 512 * 360 - 180
    assert np.allclose(corners, [(bottom, left), (top, left), (top, right), (bottom, right)], atol=5.1e-6)


def test_neighbours_overlap_by_half():
    a, right, below = grid.footprints([(9, 200, 100), (9, 200, 102), (9, 202, 100)])
    assert np.isclose(right[0, 1], (a[0, 1] + a[2, 1]) / 2)
    assert np.isclose(below[1, 0], edge(9, 202), atol=5.1e-6) and a[0, 0] < below[1, 0] < a[1, 0]


def test_area_of_a_rectangle_by_integration():
    corners = grid.footprints([(9, 150, 300)])[0]
    lat = np.radians(np.linspace(corners[0, 0], corners[1, 0], 20001))
    strip = np.cos((lat[1:] + lat[:-1]) / 2) * np.diff(lat)
    expected = 6378.137**2 * strip.sum() * math.radians(corners[2, 1] - corners[1, 1])
    assert np.isclose(grid.quadrilateral_area(corners), expected, rtol=1e-7)


def test_the_whole_earth_has_its_area():
    halves = [[(-90, lon), (90, lon), (90, lon + 180), (-90, lon + 180)] for lon in (-180, 0)]
    assert np.isclose(grid.quadrilateral_area(halves).sum(), 4 * math.pi * 6378.137**2)


def test_path_says_year_zoom_and_tens_of_degrees():
    path = grid.image_path(9, 252, 256, 2018)
    folder, year_zoom, tens, name = path.split("/")
    assert (folder, year_zoom) == ("database", "2018_09")
    parsed = ImageName.parse(name)
    assert tens == f"{round(parsed.nadir[0] / 10) * 10}_{round(parsed.nadir[1] / 10) * 10}"
    assert (parsed.image_id, parsed.year, parsed.orientation) == ("09_0252_0256", 2018, 0)
    assert str(grid.image_name(9, 252, 256, 2018)) == name
    assert parsed.in_year(2021) == ImageName.parse(grid.image_path(9, 252, 256, 2021))


def test_land_regions_hold_land_and_stay_within_the_latitudes():
    pytest.importorskip("global_land_mask")
    regions = grid.land_regions([5, 6], max_latitude=40)
    assert regions.tolist() == sorted(regions.tolist()) and len(set(map(tuple, regions))) == len(regions)
    corners = grid.footprints(regions)
    middle = (corners[:, 0, 0] + corners[:, 1, 0]) / 2
    assert np.abs(middle).max() <= 40 and (regions[:, 1:] % 2 == 0).all()

    def covered(lat, lon):
        inside = (corners[:, 0] < (lat, lon)).all(axis=1) & ((lat, lon) < corners[:, 2]).all(axis=1)
        return set(regions[inside, 0].tolist())

    assert covered(23, 15) == {5, 6}  # Libya
    assert covered(-30, -130.3) == set()  # the emptiest Pacific
    assert len(grid.land_regions([6], 40, min_land=0.5)) < (regions[:, 0] == 6).sum()


@pytest.mark.parametrize(
    "zoom, row, col, area", [(9, 276, 272, 91197), (10, 356, 324, 11178), (10, 566, 906, 21824), (11, 1098, 0, None)]
)
def test_areas_are_those_of_single_precision_corners(zoom, row, col, area):
    """The three numbers are of public names; double precision gives 91196, 11177 and 21825."""
    name = grid.image_name(zoom, row, col, 2021)
    lat = [math.radians(float(np.float32(name.footprint[k][0]))) for k in (0, 1)]
    lon = [math.radians(float(np.float32(name.footprint[k][1]))) for k in (0, 2)]
    expected = 6378.137**2 * (lon[1] - lon[0]) * (math.sin(lat[1]) - math.sin(lat[0]))
    assert name.area == int(expected) == (area or int(expected))


def test_land_is_asked_at_any_longitude_and_shape():
    pytest.importorskip("global_land_mask")
    lat, lon = np.array([[30.0], [0.0]]), np.array([-97.0, 263.0, -457.0])
    assert grid.is_land(lat, lon).tolist() == [[True] * 3, [False] * 3]  # Texas; the Pacific
    assert grid.is_land(65, 180) == grid.is_land(65, -180)
