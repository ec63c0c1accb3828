"""Each thing that can be wrong is planted in a copy of the tiny world and must be found, and only that."""

import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from datasets import grid
from datasets.build import __main__ as build
from datasets.build import check
from datasets.build.check_names import check_queries, corner_orientations, parse_names
from datasets.names import YEARS, ImageName
from datasets.overlap import INTERSECTIONS_FILE, load_intersections, save_intersections, self_crossing

NAMES = Path(__file__).resolve().parents[2] / "shared" / "names"


def found(path, **options):
    """-> {what: items} of the problems."""
    report = check.check(path, num_workers=1, **options)
    return {
        finding.what: finding.items
        for finding in report["findings"]
        if finding.items and finding.level == check.PROBLEM
    }


def only(problems, text):
    """The items of the one problem there is, whose description holds the text."""
    assert len(problems) == 1 and text in next(iter(problems)), problems
    return next(iter(problems.values()))


def rename(root, path, **changes):
    """Changes fields of an image's name; -> the new path."""
    fields = ["", *path.name.split("@")[1:-1], ".jpg"]
    places = {"image_id": 9, "timestamp": 10, "nadir_lat": 11, "nadir_lon": 12, "area": 13, "orientation": 14}
    for key, value in changes.items():
        fields[places[key]] = value
    path.rename(path.with_name("@".join(fields[:-1]) + "@" + fields[-1]))
    return path.with_name("@".join(fields[:-1]) + "@" + fields[-1])


def images(world, part="queries"):
    return sorted((world.path / part).rglob("*.jpg"))


def drop_table(world):
    """Renamed queries would all be missing from it, too: write it for the names that there are."""
    table = load_intersections(world.path / INTERSECTIONS_FILE)
    by_id = {name.split("@")[9]: entries for name, entries in table.items()}
    save_intersections(
        world.path / INTERSECTIONS_FILE, {path.name: by_id.get(path.name.split("@")[9], []) for path in images(world)}
    )


def test_the_tiny_world_is_fine(world):
    report = check.check(world.path, num_workers=1)
    assert check.problems(report) == 0 and "fine: no problem found" in check.to_text(report)
    assert report["zooms"] == {"zoom 9": {2018: 24, 2019: 24, 2020: 24, 2021: 24}}
    assert report["sizes"] == {"64 × 64": 96} and (report["database"], report["queries"]) == (96, 10)


def test_broken_images(own_world):
    victims = [own_world.image(own_world.regions[k], 2019) for k in range(5)]
    whole = victims[0].read_bytes()
    for path in victims:
        path.unlink()
    victims[0].write_bytes(whole[: len(whole) // 2])
    victims[1].write_bytes(b"")
    Image.new("RGB", (32, 64), (9, 99, 200)).save(victims[2])
    Image.new("RGB", (64, 64), (9, 99, 200)).save(victims[3])
    os.link(own_world.image(own_world.regions[9], 2018), victims[4])
    problems = found(own_world.path)
    names = [path.relative_to(own_world.path).as_posix() for path in victims]
    items = {
        text: [item for what, each in problems.items() if text in what for item in each]
        for text in ("cannot be read", "not square", "one colour", "very bytes")
    }
    assert [item.split(": ")[0] for item in items["cannot be read"]] == sorted(names[:2])
    assert list(items["not square"]) == [names[2] + ": 32 × 64"]
    assert items["one colour"] == sorted(names[2:4]) and len(items["very bytes"]) == 1 and len(problems) == 4
    assert names[4] in items["very bytes"][0]
    assert found(own_world.path, names_only=True) == {}


@pytest.mark.parametrize(
    "ground, other, share, expected",
    [
        (255, 60, 0.008, "extreme"),
        (252, 60, 0.008, "extreme"),
        (251, 60, 0.008, "nearly"),
        (255, 60, 0.012, None),
        (3, 90, 0.008, "extreme"),
        (4, 90, 0.008, "nearly"),
        (90, 200, 0.008, "nearly"),
        (90, 200, 0.012, None),
        (90, 93, 0.3, "one"),
        (90, 94, 0.3, None),
        (90, 94, 0.008, "nearly"),
    ],
)
def test_pictures_nearly_of_one_colour(ground, other, share, expected):
    pixels = np.full((128, 128), ground, dtype=np.uint8)
    pixels.ravel()[:: round(1 / share)] = other
    assert check.flatness(np.dstack([pixels] * 3)) == expected
    larger = np.kron(pixels, np.ones((4, 3), dtype=np.uint8))
    assert check.flatness(np.dstack([larger] * 3)) == expected
    colourful = np.dstack([pixels, pixels, np.arange(128 * 128).reshape(128, 128).astype(np.uint8)])
    assert check.flatness(colourful) is None  # two bands of one colour are not enough


def test_what_a_conversion_ruined_is_found(own_world):
    white, sea = (own_world.image(own_world.regions[k], 2019) for k in range(2))
    for path in (white, sea):
        path.unlink()
    pixels = np.full((64, 64, 3), 255, dtype=np.uint8)
    pixels[:4, :8] = 0
    Image.fromarray(pixels).save(white, quality=95)
    pixels[pixels == 255] = 70
    pixels[:4, :8] = 200
    Image.fromarray(pixels).save(sea, quality=95)
    assert [white.name in item for item in only(found(own_world.path), "black or white but for 1 %")] == [True]
    report = check.check(own_world.path, num_workers=1)
    (note,) = [finding for finding in report["findings"] if "islet" in finding.what]
    assert note.level == check.NOTE and [sea.name in item for item in note.items] == [True]
    Image.fromarray(np.full((64, 64), 700, dtype=np.uint16)).save(white, "PNG")  # what the loader would refuse
    assert "16-bit" in only(found(own_world.path), "cannot be read")[0]


def test_another_size_than_wanted(world):
    items = only(found(world.path, size=128), "another size than asked for")
    assert len(items) == 96 and all(item.endswith("64 × 64, not 128 × 128") for item in items)


def test_each_zoom_may_have_a_size_of_its_own(own_world):
    for zoom, size, colours in (10, 32, 60), (11, 16, 90):
        for k, year in enumerate(YEARS):
            path = own_world.path / grid.image_path(zoom, 400, 400, year)
            path.parent.mkdir(parents=True)
            pixels = np.random.default_rng([zoom, k]).integers(0, colours, (size, size, 3))
            Image.fromarray(pixels.astype(np.uint8)).save(path)
    assert found(own_world.path) == {}
    Image.new("RGB", (64, 64)).save(path)  # black, and of another zoom's size
    report = check.check(own_world.path, num_workers=1)
    (other,) = [each for each in report["findings"] if "of another size than most of their zoom" in each.what]
    assert other.level == check.NOTE and other.items == [f"{path.relative_to(own_world.path)}: 64 × 64, not 16 × 16"]


def test_a_missing_year(own_world):
    own_world.image(own_world.regions[3], 2019).unlink()
    assert only(found(own_world.path), "each year") == [
        "{:02d}_{:04d}_{:04d}: without 2019".format(*own_world.regions[3])
    ]


def test_a_year_twice(own_world):
    path = own_world.image(own_world.regions[3], 2019)
    (path.parent.parent / "0_0").mkdir()
    Image.new("L", (64, 64)).save(path.parent.parent / "0_0" / path.name)
    problems = found(own_world.path, names_only=True)
    assert len(problems) == 2
    assert path.name in problems["database images of a region and year that is there already"][0]
    assert "0_0" in problems["database images in a folder that does not fit their name"][0]


@pytest.mark.parametrize(
    "changes, text",
    [
        ({"area": "123"}, "area does not fit"),
        ({"nadir_lat": "12.00000"}, "centre does not fit"),
        ({"nadir_lon": "12.00000"}, "centre does not fit"),
        ({"orientation": "90"}, "orientation other than 0"),
        ({"image_id": "09_0208_9999"}, "corners are not those"),
        ({"area": "much"}, "do not parse"),
        ({"timestamp": "19"}, "do not parse"),
        ({"nadir_lat": "95.0"}, "do not parse"),
        ({"nadir_lat": "nan"}, "do not parse"),
    ],
)
def test_database_names(own_world, changes, text):
    new = rename(own_world.path, own_world.image(own_world.regions[3], 2019), **changes)
    problems = found(own_world.path, names_only=True)
    what = [key for key in problems if text in key]
    assert len(what) == 1 and len(problems[what[0]]) == 1 and new.name in problems[what[0]][0]
    # A name that cannot be read, or of another region, leaves its region without a year.
    others = [key for key in problems if text not in key]
    assert all(key.startswith("regions without an image of each year") for key in others)


def test_folders(own_world):
    path = own_world.image(own_world.regions[3], 2019)
    for folder in ("2019_10/30_-90", "2018_09/30_-90", "2019_09/40_-90", "2019_09/30_-100", "2019_09/else"):
        target = own_world.path / "database" / folder / path.name
        target.parent.mkdir(parents=True, exist_ok=True)
        path.rename(target)
        (item,) = only(found(own_world.path, names_only=True), "folder that does not fit")
        assert folder in item and "belongs into database/2019_09/30_-90" in item
        path = target


@pytest.mark.parametrize(
    "changes, text",
    [
        ({"timestamp": "20200231"}, "no date"),
        ({"timestamp": "2020"}, "no date"),
        ({"area": "5"}, "area does not fit"),
        ({"nadir_lat": "-60.0"}, "beyond the horizon"),
        ({"orientation": "400.0"}, "beyond -180"),
        ({"orientation": "100.0"}, "differ by more than"),
        ({"image_id": "TEST00-E-1"}, "image id of another"),
    ],
)
def test_query_names(own_world, changes, text):
    (first,) = [path for path in images(own_world) if "@TEST00-E-0@" in path.name]
    new = rename(own_world.path, first, **changes)
    drop_table(own_world)
    problems = found(own_world.path, names_only=True)
    items = only(problems, text)
    assert any(new.name in item for item in items) or "E-1@" in items[0]


def test_positives(own_world):
    path = own_world.path / INTERSECTIONS_FILE
    table = load_intersections(path)
    names = sorted(table)
    damaged = dict(table)
    gone = damaged[names[0]][0][0]
    (own_world.path / gone).unlink()
    damaged[names[1]] = [("database/x.jpg", 0.3), (damaged[names[1]][0][0], 1.5)]
    del damaged[names[2]]
    damaged["@old@.jpg"] = []
    damaged[names[3]] = []
    save_intersections(path, damaged)
    report = check.check(own_world.path, names_only=True)
    items = {finding.what.split(" (")[0]: finding.items for finding in report["findings"] if finding.items}
    assert f"{names[1]}: database/x.jpg" in items["positives that are not in the database"]
    assert all(gone in item or "x.jpg" in item for item in items["positives that are not in the database"])
    assert len(items["positives that have no IoU from 0 to 1"]) == 1
    assert "1.5" in items["positives that have no IoU from 0 to 1"][0]
    assert items["queries that the intersections file does not list"] == [names[2]]
    assert items["listed queries that are not there"] == ["@old@.jpg"]
    assert names[3] in items["queries without a positive"]
    path.write_bytes(b"nothing")
    assert (
        INTERSECTIONS_FILE
        in only(
            {key: value for key, value in found(own_world.path, names_only=True).items() if "each year" not in key},
            "cannot be used",
        )[0]
    )


def test_corners_that_cross_or_have_no_area():
    def name(corners, number):
        area_km2 = int(grid.quadrilateral_area(corners))
        return str(ImageName(corners, f"A-E-{number}", "20200101", corners[0], area_km2, 0.0))

    crossed = ((0, 0), (1, 1), (0, 1), (1, 0))
    names, _ = parse_names([name(crossed, 1), name(((1, 1),) * 4, 2), name(((0, 0), (1, 0), (1, 1), (0, 1)), 3)])
    items = {finding.what: finding.items for finding in check_queries(names)}
    assert list(items["queries whose corners cross over"]) == [names.paths[0]]
    assert items["queries with degenerate corners: they can have no positive"] == [names.paths[1]]


def test_crossing_knows_every_order_of_the_corners():
    from itertools import permutations

    corners = np.array([(0, 179), (1, 179.2), (1.1, -179), (0.1, -179.1)])
    for order in permutations(range(4)):
        cross = (order[0] - order[2]) % 4 != 2  # the first and the third are to be opposite
        assert self_crossing(corners[None, list(order)])[0] == cross


def test_orientation_of_the_corners_of_a_camera():
    from datasets.build.camera import Camera, footprint, orientation

    for azimuth, roll in ((0, 0), (50, 0), (130, 70), (300, -160)):
        camera = Camera((20.0, 179.9), 400, tilt=10, azimuth=azimuth, roll=roll, focal_mm=50)
        difference = corner_orientations(footprint(camera)[None])[0] - orientation(camera)
        assert abs((difference + 180) % 360 - 180) < 5
        top_first = footprint(camera)[[1, 0, 3, 2]]  # as the real names have it
        assert corner_orientations(top_first[None])[0] == pytest.approx(corner_orientations(footprint(camera)[None])[0])


def test_text_report_json_and_exit_code(own_world, tmp_path, capsys):
    rename(own_world.path, own_world.image(own_world.regions[3], 2021), orientation="90")
    arguments = [str(own_world.path), "--names_only", "--json", str(tmp_path / "r")]
    assert build.main(["check", *arguments]) == 1
    out = capsys.readouterr().out
    assert "orientation other than 0" in out and "zoom 9" in out
    report = json.loads((tmp_path / "r").read_text())
    assert report["problems"] == sum(each["count"] for each in report["findings"] if each["level"] == "problem") >= 1
    assert report["zooms"]["zoom 9"]["2019"] == 24
    assert build.main(["check", str(tmp_path / "none")]) == 2
    assert capsys.readouterr().err.strip() == f"error: {tmp_path / 'none'}: no such file or folder"


def test_folders_and_files_that_are_no_data_set(tmp_path):
    with pytest.raises(ValueError, match="is it the folder of a data set"):
        check.check(tmp_path)
    (tmp_path / "empty.txt").write_text("\n\n")
    with pytest.raises(ValueError, match="holds no name"):
        check.check(tmp_path / "empty.txt")
    (tmp_path / "notes.txt").write_text("hello\n")
    assert only(found(tmp_path / "notes.txt"), "do not parse")[0].startswith("hello: expected 14 fields")


def test_many_names_are_checked_by_columns(tmp_path):
    """1 % of the full catalogue of 720,000 names: a few calls a name, where parsing one by one takes 33."""
    regions, calls = grid.all_regions([9])[:1800], 0
    paths = [path for region in regions.tolist() for path in grid.image_paths(tuple(region), (2018, 2019, 2020, 2021))]
    (tmp_path / "names.txt").write_text("\n".join(paths))

    def profile(_, event, __):
        nonlocal calls
        calls += event == "call"

    before = sys.getprofile()
    sys.setprofile(profile)
    try:
        report = check.check(tmp_path / "names.txt")
    finally:
        sys.setprofile(before)
    assert report["database"] == 7200 and check.problems(report) == 0 and calls < 15 * 7200


@pytest.mark.skipif(not NAMES.is_dir(), reason="needs ../shared/names")
def test_the_real_names():
    assert found(NAMES / "database_2021_sample.txt") == {}
    problems = found(NAMES / "queries.txt")
    assert {len(items) for what, items in problems.items() if "beyond the horizon" in what} == {8}
    thousands = [
        item
        for what, items in problems.items()
        if "horizon" in what
        for item in items
        if float(item.rsplit(": ", 1)[1].split()[0].replace(",", "")) > 10_000
    ]
    assert len(thousands) == 4
