"""Lists of own images: what comes out is a data set that passes the check, trains and evaluates."""

import csv
import json
import os
import re

import numpy as np
import pytest
from PIL import Image

from datasets import grid
from datasets.build import __main__ as build
from datasets.build.own import square_corners
from datasets.names import YEARS, Catalogue, ImageName
from datasets.regions import RegionDataset, Regions
from datasets.sets import load_evaluation_data
from utils import geo

CORNERS = ("lat1", "lon1", "lat2", "lon2", "lat3", "lon3", "lat4", "lon4")


def picture(path, seed, size=(48, 48)):
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return pixels


def write_csv(path, rows):
    with open(path, "w", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


@pytest.fixture
def lists(tmp_path):
    """Two regions near Texas by corners in four years, two photos by centre and size."""
    database = []
    for k, (south, west) in enumerate([(29, -98), (30, -97)]):
        for year in YEARS:
            picture(tmp_path / "in" / f"{k}_{year}.jpg", [k, year])
            corners = [south, west, south + 2, west, south + 2, west + 2, south, west + 2]
            database.append({"path": f"{k}_{year}.jpg", "date": year, **dict(zip(CORNERS, corners))})
    queries = []
    for k in range(2):
        picture(tmp_path / "in" / f"photo {k}.jpg", [9, k], (60, 40))
        queries.append(
            {
                "path": f"photo {k}.jpg",
                "date": "2020-02-29",
                "lat": 30 + k / 2,
                "lon": -97,
                "size_km": 80,
                "azimuth": 90 * k,
                "nadir_lat": 28 + k,
                "nadir_lon": -99,
            }
        )
    return write_csv(tmp_path / "in" / "database.csv", database), write_csv(tmp_path / "in" / "queries.csv", queries)


@pytest.mark.parametrize("link", [[], ["--link"]])
def test_a_data_set_that_is_checked_trained_on_and_evaluated(lists, tmp_path, link):
    output = tmp_path / "out"
    assert build.main(["own", str(output), "--list", str(lists[0]), "--as", "database", *link]) == 0
    assert build.main(["own", str(output), "--list", str(lists[1]), "--as", "queries", *link]) == 0
    assert build.main(["check", str(output), "--num_workers", "1"]) == 0
    regions, missing = Regions.read(output)
    assert len(regions) == 2 and not missing and RegionDataset(regions, 16)[0][1].shape == (4, 3, 16, 16)
    data = load_evaluation_data(output)
    texas = data.only("Texas").sets[0]
    assert len(texas.query_rows) == 2 and [len(found) for found in texas.positives] == [2, 2]
    source = (lists[0].parent / "0_2021.jpg").read_bytes()
    assert source in [path.read_bytes() for path in output.glob("database/2021_*/*/*.jpg")]
    assert all(path.is_symlink() == bool(link) for path in output.rglob("*.jpg"))
    assert build.main(["own", str(output), "--list", str(lists[1]), "--as", "queries", *link]) == 0  # again: no more
    assert len(Catalogue.read(output, "queries")) == 2


def test_names_hold_what_the_list_says(lists, tmp_path):
    output = tmp_path / "out"
    build.main(["own", str(output), "--list", str(lists[1]), "--as", "queries"])
    first, second = sorted((ImageName.parse(path.name) for path in output.glob("queries/*")), key=lambda n: n.image_id)
    assert (first.image_id, first.timestamp, first.nadir) == ("photo-0", "20200229", (28.0, -99.0))
    assert first.orientation == pytest.approx(0, abs=0.11) and second.orientation == pytest.approx(-90, abs=0.11)
    assert first.area == pytest.approx(80 * 80, rel=0.005)


@pytest.mark.parametrize("center", [(0.0, 0.0), (45.0, 179.9), (-60.0, -75.0)])
def test_corners_lie_where_centre_size_and_azimuth_say(center):
    corners = square_corners(center, 100, 60, 30)
    assert geo.distance_km(corners, center) == pytest.approx([np.hypot(50, 30)] * 4)
    assert geo.distance_km(corners[0], corners[1]) == pytest.approx(60, rel=1e-3)
    assert geo.distance_km(corners[1], corners[2]) == pytest.approx(100, rel=1e-3)
    bottom, top = geo.centers(corners[[0, 3]]), geo.centers(corners[[1, 2]])
    north, east = top[0] - bottom[0], (top[1] - bottom[1] + 180) % 360 - 180
    assert np.degrees(np.arctan2(east * np.cos(np.radians(center[0])), north)) == pytest.approx(30, abs=0.6)


def test_geojson_polygons_and_points(tmp_path):
    picture(tmp_path / "a.png", 1, (60, 40))
    picture(tmp_path / "b.jpg", 2)
    ring = [[179.5, -17], [179.5, -16], [180.5, -16], [180.5, -17], [179.5, -17]]
    features = [
        {
            "type": "Feature",
            "properties": {"path": "a.png", "date": "20210304", "author": "who"},
            "geometry": {"type": "Polygon", "coordinates": [ring]},
        },
        {
            "type": "Feature",
            "properties": {"path": "b.jpg", "date": "2021-03-05T10:00:00Z", "size_km": 50},
            "geometry": {"type": "Point", "coordinates": [10, 45]},
        },
    ]
    (tmp_path / "list.geojson").write_text(json.dumps({"type": "FeatureCollection", "features": features}))
    assert build.main(["own", str(tmp_path / "out"), "--list", str(tmp_path / "list.geojson"), "--as", "queries"]) == 0
    first, second = sorted(
        (ImageName.parse(path.name) for path in (tmp_path / "out" / "queries").iterdir()),
        key=lambda name: name.image_id,
    )
    assert first.footprint == ((-17, 179.5), (-16, 179.5), (-16, -179.5), (-17, -179.5))
    assert geo.centers(second.footprint) == pytest.approx([45, 10], abs=1e-3)
    with Image.open(next((tmp_path / "out" / "queries").glob("*@a@*"))) as image:
        assert (image.format, image.size) == ("JPEG", (60, 40))


def test_a_grid_region_gets_the_public_name(tmp_path):
    picture(tmp_path / "x.jpg", 1)
    corners = grid.footprints([(9, 208, 116)])[0].ravel().tolist()
    row = {"path": "x.jpg", "date": 2021, "id": "09_0208_0116", **dict(zip(CORNERS, corners))}
    write_csv(tmp_path / "list.csv", [row])
    assert build.main(["own", str(tmp_path / "out"), "--list", str(tmp_path / "list.csv"), "--as", "database"]) == 0
    (path,) = (tmp_path / "out").rglob("*.jpg")
    found, expected = ImageName.parse(path.name), ImageName.parse(grid.image_path(9, 208, 116, 2021))
    assert path.parent == (tmp_path / "out" / grid.image_path(9, 208, 116, 2021)).parent
    assert (found.footprint, found.image_id, found.area) == (expected.footprint, expected.image_id, expected.area)
    assert found.nadir == pytest.approx(expected.nadir, abs=1.1e-5)  # the mean of rounded corners


def place(tmp_path, name, kind, **columns):
    """One image of a list -> the exit code, and the folder of the data set."""
    row = {"path": name, "date": "2021", "lat": "10", "lon": "20", "size_km": "80", **columns}
    write_csv(tmp_path / "list.csv", [{**row, "date": "2021-01-01"} if kind == "queries" else row])
    output = tmp_path / "out"
    return build.main(["own", str(output), "--list", str(tmp_path / "list.csv"), "--as", kind]), output


@pytest.mark.parametrize("kind", ["queries", "database"])
@pytest.mark.parametrize("mode", ["I;16", "RGBA", "P", "CMYK"])
def test_a_picture_of_any_kind_is_placed_as_it_is_read(tmp_path, kind, mode):
    shade = np.kron(np.array([[40, 90], [140, 220]]), np.ones((32, 32)))
    if mode == "I;16":
        picture = Image.fromarray((shade * 257).astype(np.uint16))
    elif mode == "RGBA":  # white, and only as opaque as the shade
        picture = Image.fromarray(np.dstack([np.full((64, 64, 3), 255), shade]).astype(np.uint8))
    else:
        picture = Image.fromarray(shade.astype(np.uint8)).convert("RGB").convert(mode, palette=Image.Palette.ADAPTIVE)
    picture.save(tmp_path / "a.tif", "TIFF")
    code, output = place(tmp_path, "a.tif", kind)
    (path,) = output.rglob("*.jpg")
    with Image.open(path) as image:
        assert code == 0 and (image.format, image.mode) == ("JPEG", "RGB")
        assert np.abs(np.asarray(image) - shade[..., None]).max() <= 8


def test_depths_that_are_no_picture_are_refused_and_nothing_is_written(tmp_path, capsys):
    Image.fromarray(np.ones((8, 8), dtype=np.float32)).save(tmp_path / "a.tif")
    code, output = place(tmp_path, "a.tif", "queries")
    assert code == 2 and not output.exists()
    assert re.search("line 2, column path: .*a.tif: .*floating point", capsys.readouterr().err)
    Image.fromarray(np.full((8, 8), 4000, dtype=np.uint16)).save(tmp_path / "a.tif")  # its header does not tell
    code, output = place(tmp_path, "a.tif", "queries")
    assert code == 2 and not list(output.rglob("*.*")) and "a.tif: " in capsys.readouterr().err


@pytest.mark.parametrize("column", ["azimuth", "orientation"])
def test_database_images_that_are_not_north_up_are_refused(tmp_path, capsys, column):
    picture(tmp_path / "a.jpg", 1)
    code, output = place(tmp_path, "a.jpg", "database", **{column: "30"})
    assert code == 2 and not output.exists()
    assert f"line 2, column {column}: is 30; database images are north-up" in capsys.readouterr().err
    for kind, value in (("database", "360"), ("database", ""), ("queries", "30")):
        assert place(tmp_path, "a.jpg", kind, **{column: value})[0] == 0


GOOD = {"path": "x.jpg", "date": "2020-01-01", "lat": "1", "lon": "2", "size_km": "50"}
BOX = dict(zip(CORNERS, "0 0 2 0 2 2 0 2".split()))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"path": "none.jpg"}, "line 3, column path: .*none.jpg does not exist"),
        ({"path": "broken.jpg"}, "line 3, column path: .*cannot be read"),
        ({"path": ""}, "line 3, column path: is empty"),
        ({"date": "2020-02-30"}, "line 3, column date: '2020-02-30' is no date"),
        ({"date": "2020"}, "line 3, column date"),
        ({"lat": "95"}, "line 3, column lat: 95 is not within ±90"),
        ({"lat": "1,5"}, "line 3, column lat: '1,5' is no number"),
        ({"size_km": ""}, "line 3, column size_km: is empty"),
        ({"size_km": "-5"}, "line 3, column size_km: -5"),
        ({**BOX, "lat2": ""}, "line 3, column lat2: is empty"),
        ({**BOX, "lat3": "0", "lat4": "2"}, "line 3, column lat1: the edges cross"),
        ({**BOX, "lat2": "0", "lat3": "0"}, "line 3, column lat1: .*no area"),
        ({"nadir_lat": "5"}, "line 3, column nadir_lat: .*come together"),
        ({"path": "y.jpg", "id": "x"}, "line 3, column id: x is that of .*line 2"),
    ],
)
def test_errors_name_row_and_column_and_write_nothing(tmp_path, capsys, change, message):
    picture(tmp_path / "x.jpg", 1)
    picture(tmp_path / "y.jpg", 2)
    (tmp_path / "broken.jpg").write_bytes(b"no image")
    good = {**GOOD, **dict.fromkeys([*CORNERS, "nadir_lat", "nadir_lon", "id"], "")}
    write_csv(tmp_path / "list.csv", [good, {**good, "path": "y.jpg", **change}])
    assert build.main(["own", str(tmp_path / "out"), "--list", str(tmp_path / "list.csv"), "--as", "queries"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: 1 of 2 rows") and re.search(message, error)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("a.csv", "file,date\nx.jpg,2020\n", "line 1: expected a header with path"),
        ("a.csv", "path,date,latitude\nx.jpg,2020,1\n", "column 'latitude' is unknown"),
        ("a.csv", "path,date,lat\nx.jpg,2020\n", "line 2: 2 cells, the header has 3"),
        ("a.csv", "path,date,lat\n", "a header and no rows"),
        ("a.json", '{"features": []}', "holds no image"),
        ("a.csv", "", "is empty; expected a header"),
        ("a.json", "{}", "no GeoJSON FeatureCollection"),
        (
            "a.json",
            json.dumps(
                {
                    "features": [
                        {"properties": {}, "geometry": {"type": "Polygon", "coordinates": [[[0, 0], [1, 1], [0, 1]]]}}
                    ]
                }
            ),
            "feature 1, geometry: is a Polygon of 3 corners",
        ),
        (
            "a.json",
            '{"features": [{"properties": {}, "geometry": {"type": "LineString", "coordinates": []}}]}',
            "is a LineString",
        ),
    ],
)
def test_lists_of_another_form(tmp_path, capsys, name, text, message):
    (tmp_path / name).write_text(text)
    assert build.main(["own", str(tmp_path / "out"), "--list", str(tmp_path / name), "--as", "queries"]) == 2
    assert message in capsys.readouterr().err
    assert os.listdir(tmp_path) == [name]


def test_database_images_are_square(tmp_path, capsys):
    picture(tmp_path / "x.jpg", 1, (60, 40))
    write_csv(tmp_path / "list.csv", [{**GOOD, "date": "2021"}])
    assert build.main(["own", str(tmp_path / "out"), "--list", str(tmp_path / "list.csv"), "--as", "database"]) == 2
    assert "60 × 40 pixels; database images are square" in capsys.readouterr().err
