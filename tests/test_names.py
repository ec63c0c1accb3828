"""Names: round trip, what does not parse, and the columns of a catalogue."""

from pathlib import Path

import numpy as np
import pytest

from datasets import grid
from datasets.names import FIELDS, Catalogue, ImageName, parse_paths
from utils.tables import Strings

REAL_NAMES = Path(__file__).resolve().parents[2] / "shared" / "names"
QUERY = (
    "@10.000000@-20.500000@11.000000@-20.500000@11.000000@-19.000000@10.000000@-19.000000"
    "@ISS001-E-5@20150607@10.4@-19.9@18147@-.9@.jpg"
)
DATABASE = (
    "@0.00000@0.00000@2.81137@0.00000@2.81137@2.81250@0.00000@2.81250@09_0252_0256@2021@1.40568@1.40625@97735@0@.jpg"
)


def test_a_query_name_is_read_field_by_field():
    name = ImageName.parse("queries/" + QUERY)
    assert name.footprint == ((10, -20.5), (11, -20.5), (11, -19), (10, -19))
    assert (name.image_id, name.timestamp, name.year, name.is_database) == ("ISS001-E-5", "20150607", 2015, False)
    assert (name.nadir, name.area, name.orientation, name.suffix) == ((10.4, -19.9), 18147, -0.9, ".jpg")


@pytest.mark.parametrize(
    "text",
    [
        QUERY,
        DATABASE,
        QUERY.replace("-.9", ".0"),
        QUERY.replace("-.9", "-179.9"),
        QUERY.replace("-.9", "100.0"),
        QUERY.replace("-.9", "10.5"),
    ],
)
def test_round_trip(text):
    assert str(ImageName.parse(text)) == text


def test_another_year_changes_the_timestamp_alone():
    text = DATABASE.replace("97735", "2021")  # an area that looks like a year
    assert str(ImageName.parse(text).in_year(2018)) == text.replace("@2021@1.40568", "@2018@1.40568")
    with pytest.raises(ValueError, match="query has no other year"):
        ImageName.parse(QUERY).in_year(2018)


@pytest.mark.parametrize(
    "field, value",
    [
        ("lat1", "north"),
        ("lat2", "91"),
        ("lon3", "-180.5"),
        ("lon4", "nan"),
        ("lat4", ""),
        ("image_id", ""),
        ("timestamp", "201506"),
        ("timestamp", "June"),
        ("nadir_lat", "x"),
        ("nadir_lon", "inf"),
        ("sq_km_area", "big"),
        ("sq_km_area", "inf"),
        ("orientation", "up"),
    ],
)
def test_a_name_that_does_not_parse_says_which_field(field, value):
    parts = QUERY.split("@")
    parts[1 + FIELDS.index(field)] = value
    text = "queries/" + "@".join(parts)
    with pytest.raises(ValueError, match=f"field {field} ") as error:
        ImageName.parse(text)
    assert text in str(error.value)


@pytest.mark.parametrize("text", ["photo.jpg", QUERY[1:], QUERY.replace("@-.9", ""), "@" + QUERY, ""])
def test_a_name_of_the_wrong_number_of_fields(text):
    with pytest.raises(ValueError, match="16|14"):
        ImageName.parse(text)


@pytest.mark.parametrize(
    "field, value",
    [
        ("lat1", "north"),
        ("lat2", "91"),
        ("lon3", "-180.5"),
        ("lon4", "nan"),
        ("lat4", ""),
        ("image_id", ""),
        ("timestamp", "201506"),
        ("timestamp", "June"),
        ("nadir_lon", "inf"),
        ("sq_km_area", "inf"),
        ("orientation", "up"),
    ],
)
def test_columns_name_the_name_that_does_not_parse(field, value):
    parts = QUERY.split("@")
    parts[1 + FIELDS.index(field)] = value
    with pytest.raises(ValueError, match=f"field {field} ") as error:
        Catalogue.from_paths("/nowhere", [DATABASE, QUERY, "@".join(parts), DATABASE])
    assert "@".join(parts) in str(error.value)


def test_columns_are_what_parsing_one_by_one_gives():
    rng = np.random.default_rng(0)
    names = []
    for k in range(300):
        corners = tuple((float(lat), float(lon)) for lat, lon in rng.uniform((-90, -180), (90, 180), (4, 2)))
        names.append(
            ImageName(
                corners,
                f"ISS{k:03d}-E-{'é' * (k % 3)}{k}",
                ("2019", "20190531")[k % 2],
                tuple(rng.uniform((-90, -180), (90, 180)).tolist()),
                int(rng.integers(1e6)),
                float(rng.uniform(-180, 180)),
            )
        )
    paths = [f"folder/{name}" for name in names]
    for extra in ([], [QUERY.replace("@18147@", "@1_8147.9@").replace("10.4", " 10.4")]):  # what float() takes
        columns = Catalogue.from_table("", parse_paths(Strings(paths + extra).array, block=70))
        parsed = [ImageName.parse(path) for path in paths + extra]
        assert np.array_equal(columns.footprints, [name.footprint for name in parsed])
        assert np.array_equal(columns.nadirs, [name.nadir for name in parsed])
        for key in ("area", "orientation", "year"):
            assert getattr(columns, f"{key}s").tolist() == [getattr(name, key) for name in parsed]
        assert columns.ids == [name.image_id for name in parsed] and columns.paths == paths + extra
    assert len(Catalogue.from_paths("", []).footprints) == 0


def test_wrong_names_are_left_out_and_told_where_a_list_is_given():
    paths, wrong = [DATABASE, "photo.jpg", QUERY, QUERY.replace("@18147", "@big")], []
    table = parse_paths(Strings(paths).array, wrong, block=2)
    assert Strings(table["path"]) == [DATABASE, QUERY]
    assert len(wrong) == 2 and wrong[0].startswith("photo.jpg: ") and "field sq_km_area is 'big'" in wrong[1]


def test_catalogue_columns(tmp_path):
    for name in (DATABASE, str(ImageName.parse(DATABASE).in_year(2018))):
        folder = tmp_path / "database" / f"{ImageName.parse(name).year}_09" / "0_0"
        folder.mkdir(parents=True)
        (folder / name).touch()
        (folder / "notes.txt").touch()
    both = Catalogue.read(tmp_path, "database")
    assert both.years.tolist() == [2018, 2021] and both.paths[1] == f"database/2021_09/0_0/{DATABASE}"
    latest = Catalogue.read(tmp_path, "database", year=2021)
    assert len(latest) == 1 and latest.names == [DATABASE] and latest.ids == ["09_0252_0256"]
    assert latest.footprints.shape == (1, 4, 2) and latest.areas.tolist() == [97735]
    assert np.allclose(latest.centers, [[1.406, 1.406]], atol=2e-3)
    assert both.select([1]).paths == latest.paths and both.select(both.years == 2018).years.tolist() == [2018]


def test_catalogue_names_the_missing_folder_and_the_bad_name(tmp_path):
    with pytest.raises(FileNotFoundError, match="--dataset_path") as error:
        Catalogue.read(tmp_path / "nowhere", "queries")
    assert str(tmp_path / "nowhere") in str(error.value)
    (tmp_path / "queries").mkdir()
    assert len(Catalogue.read(tmp_path, "queries").centers) == 0
    (tmp_path / "queries" / "photo.jpg").touch()
    with pytest.raises(ValueError, match="queries/photo.jpg"):
        Catalogue.read(tmp_path, "queries")


@pytest.mark.parametrize(
    "make, says",
    [
        (lambda path: None, "no such folder or file.*folder of a data set"),
        (lambda path: path.write_text("\n"), "holds no name of queries"),
        (lambda path: path.write_text("a photo.jpg\n"), "names.txt: a photo.jpg.*one name of queries a line"),
        (lambda path: path.write_bytes(b"\xff\xfe\x00"), "not a text file"),
        (lambda path: path.mkdir(), "queries: no such folder"),
    ],
)
def test_wrong_inputs_say_what_is_needed(tmp_path, make, says):
    make(tmp_path / "names.txt")
    with pytest.raises((ValueError, FileNotFoundError), match=says):
        Catalogue.read_source(tmp_path / "names.txt", "queries")


def real_names(file):
    path = REAL_NAMES / file
    if not path.is_file():
        pytest.skip("the public data set's names are not here")
    return path.read_text().split("\n")[:-1]


def test_every_real_query_name_round_trips():
    names = real_names("queries.txt")
    assert len(names) > 10_000
    assert [name for name in names if str(ImageName.parse(name)) != name] == []


def test_every_real_database_name_comes_from_the_grid():
    paths = real_names("database_2021_sample.txt")
    assert len(paths) > 4000
    assert [path for path in paths if str(ImageName.parse(path)) != path.rsplit("/", 1)[-1]] == []
    regions = [(*map(int, ImageName.parse(path).image_id.split("_")), 2021) for path in paths]
    assert [path for path, region in zip(paths, regions) if grid.image_path(*region) != path] == []
