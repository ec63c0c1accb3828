"""Shared ground against shapely and small numbers, at the antimeridian too; the intersections file."""

import pathlib

import numpy as np
import pytest
import shapely
import torch

from datasets import overlap
from datasets.metadata import Catalogue
from datasets.overlap import (INTERSECTIONS_FILE, degenerate, intersections, intersections_table, load_intersections,
                              save_intersections, share_ground)


def box(bottom, left, top, right):
    return [(bottom, left), (top, left), (top, right), (bottom, right)]


def random_quadrilaterals(seed, count, size, middle):
    """Convex, corners on circles around places near the meridian `middle`; (count, 4, 2), longitudes in [-180, 180)."""
    rng = np.random.default_rng(seed)
    centers = np.stack([rng.uniform(-50, 50, count), middle + rng.uniform(-2 * size, 2 * size, count)], axis=1)
    angles = np.sort(rng.uniform(0, 2 * np.pi, (count, 4)), axis=1)
    corners = centers[:, None] + rng.uniform(0.3, size, (count, 1, 1)) * np.stack([np.sin(angles), np.cos(angles)], -1)
    corners[..., 1] = (corners[..., 1] + 180) % 360 - 180
    return corners.round(5)


def shapely_areas(a, b, project):
    """Areas of the intersections (N, M), whole areas of a and of b; each footprint is put near the meridian of its
    pair by hand."""
    def polygon(footprint, near):
        lon = np.array([point[1] for point in footprint])
        lon = lon[0] + (lon - lon[0] + 180) % 360 - 180
        lon += 360 * np.round((near - lon.mean()) / 360)
        return shapely.MultiPoint([(x, project(lat)) for x, (lat, _) in zip(lon, footprint)]).convex_hull
    near = a[0][0][1]
    first, second = ([polygon(footprint, near) for footprint in each] for each in (a, b))
    return (shapely.area(shapely.intersection(np.array(first)[:, None], np.array(second)[None])), shapely.area(first),
            shapely.area(second))


def equal_area(lat):
    return np.degrees(np.sin(np.radians(lat)))


@pytest.mark.parametrize("size", [1, 4, 12])
@pytest.mark.parametrize("middle", [0, 179.5, -180])
def test_share_ground_against_shapely(size, middle):
    a, b = (random_quadrilaterals(seed, 60, size, middle) for seed in (1, 2))
    areas, _, _ = shapely_areas(a, b, lambda lat: lat)
    found = share_ground(a, b)
    assert found[areas > 1e-3].all() and not found[areas == 0].any()
    assert (areas > 1e-3).sum() > 10
    assert np.array_equal(found, share_ground(b, a).T)


@pytest.mark.parametrize("size", [1, 4, 12])
@pytest.mark.parametrize("middle", [0, 179.5, -180])
def test_intersections_against_shapely(size, middle):
    a, b = (random_quadrilaterals(seed, 60, size, middle) for seed in (1, 2))
    areas, whole_a, whole_b = shapely_areas(a, b, equal_area)
    expected = areas / (whole_a[:, None] + whole_b - areas)
    pairs, iou = intersections(a, b)
    found = np.zeros_like(expected)
    found[tuple(pairs.T)] = iou
    assert np.allclose(found[areas > 1e-3], expected[areas > 1e-3], atol=1e-9)
    assert not found[areas == 0].any()
    assert pairs.tolist() == sorted(pairs.tolist())


def test_the_two_tests_agree_but_for_slivers():
    """Their edges are straight in different maps, so they may only differ where next to nothing is shared."""
    a, b = (random_quadrilaterals(seed, 150, 4, 180) for seed in (3, 4))
    pairs, _ = intersections(a, b)
    table = np.zeros((150, 150), dtype=bool)
    table[tuple(pairs.T)] = True
    areas, whole_a, whole_b = shapely_areas(a, b, lambda lat: lat)
    different = table != share_ground(a, b)
    assert different.sum() < 5
    assert (areas < 0.01 * np.minimum(whole_a[:, None], whole_b))[different].all()


def test_half_overlap_is_an_iou_of_a_third():
    pairs, iou = intersections(np.array([box(0, 0, 2, 2)], float), np.array([box(0, 1, 2, 3), box(0, 0, 2, 2)], float))
    assert pairs.tolist() == [[0, 0], [0, 1]] and np.allclose(iou, [1 / 3, 1])


def test_touching_edges_and_corners_share_nothing():
    a = np.array([box(0, 0, 2, 2)], float)
    b = np.array([box(0, 2, 2, 4), box(2, 2, 4, 4), box(0, 1.99999, 2, 4), box(0, 1.999, 2, 4)], float)
    assert share_ground(a, b).tolist() == [[False, False, False, True]]
    assert intersections(a, b)[0].tolist() == [[0, 3]]


def test_overlap_across_the_antimeridian():
    a = np.array([box(0, 179, 2, -179)], float)
    b = np.array([box(1, -179.5, 3, -178), box(1, 178, 3, 179.5), box(1, -178.9, 3, -178), box(1, -1, 3, 1)], float)
    assert share_ground(a, b).tolist() == [[True, True, False, False]]
    assert intersections(a, b)[0].tolist() == [[0, 0], [0, 1]]
    assert intersections(b, a)[0].tolist() == [[0, 0], [1, 0]]


def test_the_order_of_the_corners_does_not_matter():
    corners = np.array(box(0, 0, 2, 2), float)
    other = np.array([box(1, 1, 3, 3)], float)
    for order in ([0, 1, 2, 3], [3, 2, 1, 0], [2, 0, 3, 1], [1, 3, 2, 0]):
        assert share_ground(corners[None, order], other).all()
        assert np.isclose(intersections(corners[None, order], other)[1], 1 / 7, atol=1e-3)


def test_degenerate_footprints_share_nothing():
    bad = np.array([[(1, 1)] * 4, [(0, 0), (1, 1), (2, 2), (3, 3)], [(np.nan, 0), (1, 0), (1, 1), (0, 1)]], float)
    good = np.array([box(0, 0, 3, 3)], float)
    assert degenerate(bad).all() and not degenerate(good).any()
    assert not share_ground(bad, good).any() and not share_ground(bad, bad).any()
    assert len(intersections(bad, good)[0]) == len(intersections(good, bad)[0]) == 0
    assert intersections(np.concatenate([bad, good]), np.concatenate([bad, good]))[0].tolist() == [[3, 3]]


def test_table_of_the_tiny_world(world):
    table = load_intersections(world.path / INTERSECTIONS_FILE)
    database = Catalogue.read(world.path, "database", 2021)
    assert len(table) == 10 and set(table) == {path.name for path in (world.path / "queries").iterdir()}
    for found in table.values():
        assert found and {path for path, _ in found} <= set(database.paths)
        # A query is the middle 0.75 × 0.75 of one region: 0.5625 of it.
        assert np.isclose(max(iou for _, iou in found), 0.5625, atol=2e-3)


def test_the_command_writes_the_file(own_world, capsys):
    expected = load_intersections(own_world.path / INTERSECTIONS_FILE)
    (own_world.path / INTERSECTIONS_FILE).unlink()
    overlap.main(overlap.parse_arguments([str(own_world.path)]))
    assert load_intersections(own_world.path / INTERSECTIONS_FILE) == expected
    assert "10 of 10 queries have a positive among 24 images" in capsys.readouterr().out


def test_a_query_without_a_positive_has_an_empty_list(world):
    queries, database = Catalogue.read(world.path, "queries"), Catalogue.read(world.path, "database", 2021)
    table = intersections_table(queries.select([0]), database.select([]))
    assert table == {queries.names[0]: []}


def test_errors_name_the_file_and_the_command(tmp_path):
    path = tmp_path / INTERSECTIONS_FILE
    with pytest.raises(FileNotFoundError, match=f"{INTERSECTIONS_FILE}.*python -m datasets.overlap"):
        load_intersections(path)
    save_intersections(path, [1, 2])
    with pytest.raises(ValueError, match=f"{INTERSECTIONS_FILE}.*python -m datasets.overlap"):
        load_intersections(path)
    save_intersections(path, {"name": [("path", 0.5)]})
    assert load_intersections(path) == {"name": [("path", 0.5)]}
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match=INTERSECTIONS_FILE):
        load_intersections(path)


class Trap:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return pathlib.Path.touch, (self.path,)


def test_a_malicious_file_leaves_no_trace(tmp_path):
    torch.save({"name": Trap(tmp_path / "trace")}, tmp_path / INTERSECTIONS_FILE)
    with pytest.raises(ValueError, match=INTERSECTIONS_FILE):
        load_intersections(tmp_path / INTERSECTIONS_FILE)
    assert not (tmp_path / "trace").exists()
