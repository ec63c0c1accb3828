"""Two-line elements and a time -> the point below the satellite, beside another library."""

from datetime import UTC, datetime, timedelta, timezone

import numpy as np
import pytest

from datasets.orbit import Orbit, in_utc, subpoint

# The station, 20 September 2008 (the example that textbooks and encyclopedias print).
FIRST = "1 25544U 98067A   08264.51782528 -.00002182  00000-0 -11606-4 0  2927"
SECOND = "2 25544  51.6416 247.4627 0006703 130.5360 325.0288 15.72125391563537"
EPOCH = datetime(2008, 9, 20, 12, 25, 40, tzinfo=UTC)


def later(line, day):
    """The first line with another day of the year as its epoch, and the checksum that follows."""
    line = line[:20] + f"{day:012.8f}" + line[32:68]
    return line + str(sum(int(each) if each.isdigit() else each == "-" for each in line) % 10)


@pytest.fixture
def elements(tmp_path):
    path = tmp_path / "iss.tle"
    path.write_text(f"ISS (ZARYA)\n{FIRST}\n{SECOND}\n")
    return path


def test_points_below_are_those_of_skyfield(elements):
    skyfield = pytest.importorskip("skyfield.api")
    scale = skyfield.load.timescale(builtin=True)
    satellite, orbit = skyfield.EarthSatellite(FIRST, SECOND, ts=scale), Orbit.read(elements)
    for hours in np.arange(-120, 120, 1.7):
        when = EPOCH + timedelta(hours=float(hours))
        place = skyfield.wgs84.geographic_position_of(satellite.at(scale.from_datetime(when)))
        lat, lon = orbit.nadir(when)
        assert lat == pytest.approx(place.latitude.degrees, abs=1e-4)
        # Skyfield turns the Earth by the apparent sidereal time and UT1: 0.003 degrees, 0.3 km.
        assert (lon - place.longitude.degrees + 180) % 360 - 180 == pytest.approx(0, abs=3e-3)


def test_a_point_on_the_ellipsoid_comes_back():
    """Forwards, from latitude, longitude and height, is a closed formula."""
    rng = np.random.default_rng(0)
    for lat, lon, height, angle in rng.uniform((-90, -180, 300, 0), (90, 180, 500, 6), (50, 4)):
        a, f = 6378.137, 1 / 298.257223563
        phi, theta = np.radians(lat), np.radians(lon) + angle
        normal = a / np.sqrt(1 - f * (2 - f) * np.sin(phi) ** 2)
        across = (normal + height) * np.cos(phi)
        z = (normal * (1 - f) ** 2 + height) * np.sin(phi)
        found = subpoint(np.array([across * np.cos(theta), across * np.sin(theta), z]), angle)
        assert found == pytest.approx((lat, lon), abs=1e-7)


def test_the_nearest_epoch_counts_and_30_days_are_the_limit(tmp_path):
    path = tmp_path / "two.tle"
    path.write_text("\n".join([later(FIRST, 284), SECOND, "0 ISS", FIRST, SECOND, ""]))
    orbit = Orbit.read(path)
    assert [each.timetuple().tm_yday for each in orbit.epochs] == [264, 284]
    alone = tmp_path / "one.tle"
    alone.write_text(f"{later(FIRST, 284)}\n{SECOND}\n")
    when = datetime(2008, 10, 8, tzinfo=UTC)  # day 282
    assert orbit.nadir(when) == Orbit.read(alone).nadir(when)
    before = datetime(2008, 9, 25, tzinfo=UTC)
    assert orbit.nadir(before) != Orbit.read(alone).nadir(before)
    orbit.nadir(datetime(2008, 11, 8, tzinfo=UTC))  # 29 days after the last
    with pytest.raises(ValueError, match="two.tle: the epoch nearest to 2008-11-10 .* is 2008-10-10, 31 days off; add"):
        orbit.nadir(datetime(2008, 11, 10, tzinfo=UTC))


def test_times_are_utc_where_they_do_not_say(elements):
    orbit = Orbit.read(elements)
    naive, aware = datetime(2008, 9, 20, 12), datetime(2008, 9, 20, 14, tzinfo=timezone(timedelta(hours=2)))
    assert orbit.nadir(naive) == orbit.nadir(aware) == orbit.nadir(in_utc(naive))


@pytest.mark.parametrize(
    "text, told",
    [
        ("", "no two-line elements in it"),
        ("a\nb\n", "no two-line elements in it"),
        (f"{FIRST[:-1]}0\n{SECOND}\n", "lines 1 and 2: no two-line elements"),
        (f"ISS\n{FIRST}\n{SECOND[:40]}\n", "lines 2 and 3: "),
        (
            f"{FIRST}\n{SECOND}\n{FIRST.replace('25544', '25545')[:-1]}8\n{SECOND.replace('25544', '25545')[:-1]}8\n",
            "2 sat",
        ),
    ],
)
def test_files_that_are_none_are_named(tmp_path, text, told):
    path = tmp_path / "bad.tle"
    path.write_text(text)
    with pytest.raises(ValueError, match=f"bad.tle.*{told}"):
        Orbit.read(path)


def test_a_missing_file_and_a_picture(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere.tle: no such file .*--tle"):
        Orbit.read(tmp_path / "nowhere.tle")
    (tmp_path / "x.jpg").write_bytes(b"\xff\xd8\xff")
    with pytest.raises(ValueError, match="x.jpg: not a text file"):
        Orbit.read(tmp_path / "x.jpg")
