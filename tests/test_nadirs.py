"""The point below the camera of each photo: which source counts, and what is wrong with a table in plain words."""

import os
from datetime import UTC, datetime
from pathlib import Path

import pytest
from PIL import Image

from datasets.nadirs import Nadirs, Table, nadir_of_name, read_nadirs, time_of_photo
from datasets.orbit import Orbit
from tests.test_orbit import FIRST, SECOND

NAME = "@1.0@2.0@3.0@2.0@3.0@4.0@1.0@4.0@ISS001-E-1@20080920@12.5@-30.5@100@0.0@.jpg"
IN_DATABASE = "@1.0@2.0@3.0@2.0@3.0@4.0@1.0@4.0@9_1_1@2021@12.5@-30.5@100@0@.jpg"


def write(path, text):
    path.write_text(text)
    return path


def photo(path, time=None, offset=None):
    """A picture with that time in its EXIF."""
    exif = Image.Exif()
    if time:
        exif.get_ifd(0x8769)[0x9003] = time
    if offset:
        exif.get_ifd(0x8769)[0x9010] = offset
    Image.new("RGB", (8, 8)).save(path, exif=exif)
    return path


@pytest.fixture
def tle(tmp_path):
    return write(tmp_path / "iss.tle", f"{FIRST}\n{SECOND}\n")


def test_a_row_is_found_by_path_from_the_table_or_an_input_folder_and_by_name(tmp_path):
    (tmp_path / "lists").mkdir()
    rows = f"sub/a.jpg,1,10,x\nb.jpg,2,20,y\n../c.jpg,3,30,z\n{tmp_path}/d.jpg,4,40,w\n"
    table = write(tmp_path / "lists" / "n.csv", "path,nadir_lat,nadir_lon,who\n" + rows)
    nadirs = read_nadirs(table, folders=[tmp_path / "photos"])
    for path, point, who in (
        (tmp_path / "photos" / "sub" / "a.jpg", (1, 10), "x"),  # from the input folder
        (tmp_path / "lists" / "sub" / "a.jpg", (1, 10), "x"),  # from the table's
        (tmp_path / "elsewhere" / "b.jpg", (2, 20), "y"),  # the name alone
        (tmp_path / "c.jpg", (3, 30), "z"),
        (tmp_path / "d.jpg", (4, 40), "w"),
    ):
        found = nadirs.of(path)
        assert (found.point, found.source, found.columns) == (point, "table", {"who": who})
    # The end of a path is not a name.
    found = nadirs.of(tmp_path / "elsewhere" / "a.jpg")
    assert (found.point, found.source, found.columns) == (None, "none", {"who": ""})


def test_a_relative_photo_is_the_same_as_its_absolute_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    nadirs = read_nadirs(write(tmp_path / "n.csv", "path,nadir_lat,nadir_lon\nx/a.jpg,1,10\n"))
    assert nadirs.of("x/a.jpg").point == nadirs.of("./x/../x/a.jpg").point == (1, 10)


def test_the_table_comes_before_near_near_before_the_name_and_the_name_before_the_orbit(tmp_path, tle):
    timed = photo(tmp_path / NAME, "2008:09:20 12:25:40")
    plain = photo(tmp_path / "a.jpg", "2008:09:20 12:25:40")
    table = write(tmp_path / "n.csv", f"path,nadir_lat,nadir_lon\n{NAME},1,2\n")
    assert read_nadirs(table, (3.0, 4.0), tle).of(timed).source == "table"
    assert read_nadirs(table, (3.0, 4.0), tle).of(plain).point == (3, 4)
    assert read_nadirs(None, (3.0, 4.0), tle).of(timed).source == "near"
    assert read_nadirs(None, None, tle).of(timed).point == (12.5, -30.5)
    found = read_nadirs(None, None, tle).of(plain)
    assert found.source == "orbit" and found.point == Orbit.read(tle).nadir(datetime(2008, 9, 20, 12, 25, 40))
    assert read_nadirs().of(plain) == read_nadirs().of(tmp_path / "b.jpg")
    assert read_nadirs().of(plain).source == "none"


def test_names_of_photos_tell_their_nadir_and_those_of_satellite_images_none():
    assert nadir_of_name(f"somewhere/{NAME}") == (12.5, -30.5)
    for name in (IN_DATABASE, "photo@home.jpg", "a.jpg", NAME.replace("12.5", "120.5")):
        assert nadir_of_name(name) is None


def test_times_come_from_the_table_before_the_exif(tmp_path, tle):
    orbit = Orbit.read(tle)
    file = photo(tmp_path / "a.jpg", "2008:09:20 12:00:00")
    table = write(tmp_path / "n.csv", "path,time\na.jpg,2008-09-21T00:10:00+02:00\nb.jpg,\n")
    assert read_nadirs(table, tle=tle).of(file).point == orbit.nadir(datetime(2008, 9, 20, 22, 10))
    other = photo(tmp_path / "b.jpg", "2008:09:20 12:00:00")
    assert read_nadirs(table, tle=tle).of(other).point == orbit.nadir(datetime(2008, 9, 20, 12))
    assert read_nadirs(table).of(file).source == "none"  # a time alone says nothing
    # An empty nadir leaves it to the others.
    both = write(tmp_path / "m.csv", "path,nadir_lat,nadir_lon,time\na.jpg,,,2008-09-20T22:10Z\nb.jpg,1,2,\n")
    assert read_nadirs(both, tle=tle).of(file).point == orbit.nadir(datetime(2008, 9, 20, 22, 10))
    assert read_nadirs(both, tle=tle).of(other).point == (1, 2)


def test_exif_times(tmp_path):
    noon = datetime(2008, 9, 20, 12, tzinfo=UTC)
    assert time_of_photo(photo(tmp_path / "a.jpg", "2008:09:20 12:00:00")) == noon
    assert time_of_photo(photo(tmp_path / "b.jpg", "2008:09:20 15:30:00", "+03:30")) == noon
    for name, time in (("c.jpg", None), ("d.jpg", "0000:00:00 00:00:00"), ("e.jpg", "yesterday")):
        assert time_of_photo(photo(tmp_path / name, time)) is None
    (tmp_path / "f.jpg").write_bytes(b"no picture")
    assert time_of_photo(tmp_path / "f.jpg") is None and time_of_photo(tmp_path / "none.jpg") is None


def test_a_photo_of_a_time_without_elements_says_why_and_is_searched_everywhere(tmp_path, tle):
    found = read_nadirs(tle=tle).of(photo(tmp_path / "a.jpg", "2020:01:01 00:00:00"))
    assert found.point is None and "the epoch nearest to 2020-01-01" in found.why
    assert "no time" in read_nadirs(tle=tle).of(photo(tmp_path / "b.jpg")).why
    table = write(tmp_path / "n.csv", "path,time\na.jpg,2008-09-20\nb.jpg,2020-01-01\n")
    with pytest.raises(ValueError, match="n.csv, line 3: .*the epoch nearest to 2020-01-01.*--tle"):
        read_nadirs(table, tle=tle).check([str(tmp_path / "b.jpg")])


HEAD = "path,nadir_lat,nadir_lon\n"


@pytest.mark.parametrize(
    "text, told",
    [
        ("", "n.csv: the file is empty; expected a header with path"),
        (HEAD, "n.csv: a header and no rows"),
        (
            "file,lat,lon\na.jpg,1,2\n",
            "line 1: no column path and nadir_lat and nadir_lon, its columns are file, lat, lon",
        ),
        ("path,nadir_lat\na.jpg,1\n", "line 1: no column nadir_lon"),
        ("path,nadir_lat,time\na.jpg,1,\n", "line 1: no column nadir_lon"),
        ("path,who\na.jpg,1\n", "line 1: no column nadir_lat and nadir_lon.*or time, with --tle"),
        (HEAD.strip() + ",who,who\na.jpg,1,2,,\n", "line 1: two columns of one name"),
        (HEAD + "a.jpg,1,2\nb.jpg,95,200\n", "line 3: nadir_lat is 95, expected within ±90 degrees; correct it"),
        (HEAD + "a.jpg,1,2\nb.jpg,-95.5,30\n", "line 3: nadir_lat is -95.5, .*; are nadir_lat and nadir_lon swapped"),
        (HEAD + "a.jpg,1,181\n", "line 2: nadir_lon is 181, expected within ±180"),
        (HEAD + "a.jpg,nan,1\n", "line 2: nadir_lat is nan, expected within"),
        (HEAD + "a.jpg,12N,1\n", "line 2: nadir_lat is '12N', expected degrees"),
        (HEAD + "a.jpg,,1\n", "line 2: nadir_lat is empty and the other is not"),
        (HEAD + "a.jpg,1,\n", "line 2: nadir_lon is empty and the other is not"),
        (HEAD + ",1,2\n", "line 2: path is empty"),
        (HEAD + "a.jpg,1\n", "line 2: 2 cells, the header has 3"),
        (HEAD + "a.jpg,1,2\n\nb.jpg,1,2\n./a.jpg,3,4\n", "line 5: path ./a.jpg is in line 2 as well"),
        ("path,time\na.jpg,noon\n", "line 2: time is 'noon', expected ISO 8601"),
        ("path\ta\n\0", "n.csv"),
        ("\0\1JFIF\n", "n.csv: no CSV text file; expected a header with path"),
    ],
)
def test_bad_tables_name_line_field_and_remedy(tmp_path, text, told):
    with pytest.raises(ValueError, match=told):
        Table.read(write(tmp_path / "n.csv", text))


def test_a_missing_table(tmp_path):
    with pytest.raises(FileNotFoundError, match="n.csv: no such CSV file"):
        read_nadirs(tmp_path / "n.csv")


def test_all_photos_are_looked_at_first(tmp_path):
    nadirs = read_nadirs(write(tmp_path / "n.csv", HEAD + "a.jpg,1,2\nb.jpg,3,4\nc.jpg,5,6\n"))
    a, b, x = (str(tmp_path / each) for each in ("a.jpg", "sub/b.jpg", "x.jpg"))
    assert nadirs.check([a, a, b, x]) == [
        f"{tmp_path}/n.csv: 2 of its 3 rows fit a photo",
        f"{tmp_path}/n.csv: 1 of 4 photos have no row, such as {x}",
    ]
    with pytest.raises(ValueError, match=r"n.csv: no row fits a photo \(the first is .*x.jpg\)"):
        nadirs.check([x])
    with pytest.raises(
        ValueError, match="line 3: the name fits 2 photos, .*b.jpg and .*b.jpg; give it with its folder"
    ):
        nadirs.check([a, b, str(tmp_path / "other" / "b.jpg")])
    assert Nadirs().check([x]) == []


def test_a_table_as_spreadsheets_write_it_and_stray_bytes(tmp_path):
    path = tmp_path / "n.csv"
    path.write_bytes(b'\xef\xbb\xbfPath,Nadir_Lat,NADIR_LON,Note\r\n caf\xe9.jpg , 1.5 ,-2,"a, b\xe9"\r\n,,,\r\n')
    found = read_nadirs(path).of(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.jpg"))
    assert found.point == (1.5, -2) and found.columns == {"Note": "a, b\\udce9"}


def test_many_rows_come_in_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.nadirs.BLOCK", 7)
    lines = [f"{number}.jpg,{number / 2},{-number},n{number}" for number in range(30)]
    nadirs = read_nadirs(write(tmp_path / "n.csv", "path,nadir_lat,nadir_lon,who\n" + "\n".join(lines)))
    for number in range(30):
        found = nadirs.of(tmp_path / f"{number}.jpg")
        assert (found.point, found.columns) == ((number / 2, -number), {"who": f"n{number}"})


REAL = Path(__file__).resolve().parents[2] / "shared" / "real_photos"


@pytest.mark.skipif(not REAL.is_dir(), reason="needs ../shared/real_photos")
def test_the_table_of_the_real_photos_says_what_their_names_say():
    photos = sorted(map(str, (REAL / "queries").iterdir()))
    nadirs = read_nadirs(REAL / "nadirs.csv")
    assert len(nadirs.check(photos)) == 1  # none is without a row
    for path in photos:
        assert nadirs.of(path).source == "table" and nadirs.of(path).point == pytest.approx(nadir_of_name(path))
