"""Shared ground against shapely and small numbers, at the antimeridian too; the intersections file."""

import pathlib

import numpy as np
import pytest
import shapely
import torch

from datasets import grid, listing, overlap
from datasets.names import Catalogue, ImageName
from datasets.overlap import (
    INTERSECTIONS_FILE,
    Positives,
    degenerate,
    intersections,
    intersections_table,
    load_intersections,
    load_positives,
    save_intersections,
    self_crossing,
    share_ground,
)
from experiments import positives as on_sphere
from utils.flags import call


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
    return (
        shapely.area(shapely.intersection(np.array(first)[:, None], np.array(second)[None])),
        shapely.area(first),
        shapely.area(second),
    )


def equal_area(lat):
    return np.degrees(np.sin(np.radians(lat)))


@pytest.mark.parametrize("size", [1, 4, 12])
@pytest.mark.parametrize("middle", [0, 179.5, -180])
def test_share_ground_against_shapely(size, middle):
    a, b = (random_quadrilaterals(seed, 60, size, middle) for seed in (1, 2))
    areas, _, _ = shapely_areas(a, b, equal_area)
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


def test_footprints_that_say_nothing_are_degenerate():
    around_the_pole = [(80, -135), (80, -45), (80, 45), (80, 135)]
    bad = np.array(
        [
            around_the_pole,
            np.roll(around_the_pole, 1, axis=0),
            box(80, 0, 91, 2),
            [(0, -120), (2, 0), (2, 120), (0, 10)],
        ],
        float,
    )
    good = np.array([box(70, 100, 80, -170), box(-2, 170, 2, -170), box(-90, 0, -80, 2)], float)
    assert degenerate(bad).all() and not degenerate(good).any()
    assert not share_ground(bad, bad).any() and len(intersections(bad, good)[0]) == 0


@pytest.mark.parametrize("middle", [0, 179.7])
def test_bow_ties_are_recognised_and_put_in_order(middle):
    corners = random_quadrilaterals(5, 50, 3, middle)
    for order, expected in (
        ([0, 1, 2, 3], False),
        ([2, 1, 0, 3], False),
        ([3, 0, 1, 2], False),
        ([0, 2, 1, 3], True),
        ([1, 0, 2, 3], True),
    ):
        assert (self_crossing(corners[:, order]) == expected).all()
        assert np.allclose(intersections(corners[:, order], corners)[1], intersections(corners, corners)[1])
    assert not self_crossing(np.array([[(1, 1)] * 4], float)).any()


def test_blocks_and_threads_change_nothing():
    a, b = (random_quadrilaterals(seed, 60, 4, 180) for seed in (1, 2))
    whole, cut = intersections(a, b), intersections(a, b, block=7, num_threads=3)
    assert np.array_equal(whole[0], cut[0]) and np.array_equal(whole[1], cut[1])
    assert intersections(a[:0], b)[0].shape == intersections(a, b[:0])[0].shape == (0, 2)


def test_the_spherical_reference_itself():
    octant = [(0, 0), (90, 0), (0, 90)]
    assert on_sphere.spherical_area(octant) == pytest.approx(np.pi / 2)
    strip = on_sphere.along_parallels(np.array(box(50, 175, 56, -179), float), steps=2000)
    exact = np.radians(6) * (np.sin(np.radians(56)) - np.sin(np.radians(50)))
    assert on_sphere.spherical_area(strip) == pytest.approx(exact, rel=1e-6)
    # By counting points: a slanted photo and a region, both near 50 N.
    photo, region = np.array([(48, 10), (51, 8), (52.5, 13), (49, 14.5)], float), np.array(box(49, 9, 52, 12), float)
    rng = np.random.default_rng(0)
    points = np.stack(
        [np.degrees(np.arcsin(rng.uniform(*np.sin(np.radians([47, 54])), 400_000))), rng.uniform(7, 16, 400_000)],
        axis=1,
    )
    vectors, corners = (on_sphere.geo.to_unit_vectors(each) for each in (points, photo))
    sides = [vectors @ np.cross(a, b) for a, b in zip(corners, np.roll(corners, -1, axis=0))]
    inside = (np.array(sides) < 0).all(axis=0)
    boxed = (points > (49, 9)).all(axis=1) & (points < (52, 12)).all(axis=1)
    assert on_sphere.spherical_iou(photo, region) == pytest.approx(
        (inside & boxed).sum() / (inside | boxed).sum(), abs=4e-3
    )


@pytest.mark.parametrize("middle", [0, 179.7])
def test_iou_is_that_of_the_sphere_but_for_a_hundredth(middle):
    """Photos of the public kind: up to 5 degrees wide, within ±55 degrees, and regions of zoom 9 and 10."""
    rng = np.random.default_rng(0)
    queries = random_quadrilaterals(7, 150, 2.5, middle)
    columns = np.arange(496, 512, 2) if middle else np.arange(248, 264, 2)
    regions = grid.footprints([(9, row, col) for row in range(150, 360, 2) for col in columns])
    pairs, iou = intersections(queries, regions)
    some = rng.permutation(len(pairs))[:150]
    exact = [on_sphere.spherical_iou(queries[q], regions[d]) for q, d in pairs[some]]
    assert len(some) == 150 and np.abs(iou[some] - exact).max() < 0.01 and np.abs(iou[some] - exact).mean() < 0.002


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
    call(overlap.main, [str(own_world.path)])
    assert load_intersections(own_world.path / INTERSECTIONS_FILE) == expected
    assert "10 of 10 queries have a positive among 24 images" in capsys.readouterr().out


def query(number, corners):
    return str(ImageName(tuple(map(tuple, corners)), f"T-E-{number}", "20200101", (0, 0), 1, 0.0))


def test_the_command_takes_lists_of_names_and_lists_bad_footprints(tmp_path, capsys):
    names = [
        query(0, box(29, -96, 31, -94)),
        query(1, [(5, 5)] * 4),
        query(2, [(29, -96), (31, -94), (31, -96), (29, -94)]),
        query(3, box(-2, 179, 2, -179)),
    ]
    (tmp_path / "queries.txt").write_text("\n".join(names))
    images = [grid.image_path(9, 210, 120, year) for year in (2018, 2021)] + [grid.image_path(9, 254, 508, 2021)]
    (tmp_path / "database.txt").write_text("\n".join(images))
    flags = ["--queries", str(tmp_path / "queries.txt"), "--database", str(tmp_path / "database.txt")]
    call(overlap.main, [str(tmp_path), *flags])
    table = load_intersections(tmp_path / INTERSECTIONS_FILE)
    assert [[path for path, _ in table[name]] for name in names] == [images[1:2], [], images[1:2], images[2:]]
    assert table[names[0]] == table[names[2]]
    text = capsys.readouterr().out
    assert "1 queries have a degenerate" in text and f"    {names[1]}" in text
    assert "1 queries list their corners" in text
    with pytest.raises(FileNotFoundError, match="nowhere: no such folder.*--output"):
        call(overlap.main, [str(tmp_path / "nowhere"), *flags])
    with pytest.raises(ValueError, match="is a folder; name the file to write"):
        call(overlap.main, [str(tmp_path), *flags, "--output", str(tmp_path)])
    with pytest.raises(ValueError, match="is no name of database.*timestamp is a year"):
        call(overlap.main, [str(tmp_path), "--queries", flags[1], "--database", flags[1]])
    with pytest.raises(FileNotFoundError, match="nowhere: no such folder or file.*text file"):
        call(overlap.main, [str(tmp_path), "--queries", str(tmp_path / "nowhere")])


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


@pytest.mark.parametrize(
    "entries", [["path"], [("path",)], [(3, 0.5)], [("path", "half")], [("a", 0.1), None], [("path", 0.5, 1)]]
)
def test_a_wrong_entry_names_the_file_and_the_query(tmp_path, entries):
    save_intersections(tmp_path / INTERSECTIONS_FILE, {"good": [("path", 0.5)], "bad one": entries})
    with pytest.raises(ValueError, match=f"{INTERSECTIONS_FILE}: query bad one has the entry .*expected"):
        load_intersections(tmp_path / INTERSECTIONS_FILE)


def test_a_folder_in_place_of_the_file_says_which_file(tmp_path):
    with pytest.raises(ValueError, match=f"is a folder.*{tmp_path / INTERSECTIONS_FILE}.*overlap {tmp_path} "):
        load_intersections(tmp_path)


TABLE = {"b": [("x/1", 0.5), ("x/2", 0.25)], "none": [], "a": [("x/2", torch.tensor(1.0))]}


def test_positives_are_the_table_in_columns():
    positives = Positives.from_table(TABLE)
    assert positives.queries == ["b", "none", "a"] and positives.images == ["x/1", "x/2"]
    assert positives.pairs.tolist() == [[0, 0], [0, 1], [2, 1]] and positives.iou.tolist() == [0.5, 0.25, 1]
    empty = Positives.from_table({"a": []})
    assert empty.pairs.shape == (0, 2) and len(empty.images) == 0


def test_positives_are_kept_in_an_index_until_the_file_changes(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(listing, "RACY_SECONDS", -1)
    path, read = tmp_path / INTERSECTIONS_FILE, []
    real = load_intersections
    monkeypatch.setattr(overlap, "load_intersections", lambda path: (read.append(path), real(path))[1])

    def check(table, times):
        positives = load_positives(path, min_pairs=1)
        assert len(read) == times
        assert {
            name: [
                (positives.images[d], iou) for (q, d), iou in zip(positives.pairs.tolist(), positives.iou) if q == row
            ]
            for row, name in enumerate(positives.queries)
        } == table

    save_intersections(path, TABLE)
    check(TABLE, 1)
    check(TABLE, 1)
    save_intersections(path, {"c": [("x/3", 0.5)]})
    check({"c": [("x/3", 0.5)]}, 2)
    check({"c": [("x/3", 0.5)]}, 2)
    kept = tmp_path / "index_positives.parquet"
    kept.write_bytes(kept.read_bytes()[:-30])
    check({"c": [("x/3", 0.5)]}, 3)
    assert "index_positives.parquet: cannot be used" in caplog.text
    path.unlink()
    with pytest.raises(FileNotFoundError, match=f"{INTERSECTIONS_FILE}.*python -m datasets.overlap"):
        load_positives(path)


def test_small_or_fresh_positives_get_no_index(tmp_path):
    save_intersections(tmp_path / INTERSECTIONS_FILE, TABLE)
    load_positives(tmp_path / INTERSECTIONS_FILE, min_pairs=1)  # written a moment ago: it could change unnoticed
    load_positives(tmp_path / INTERSECTIONS_FILE)
    assert [path.name for path in tmp_path.iterdir()] == [INTERSECTIONS_FILE]


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
