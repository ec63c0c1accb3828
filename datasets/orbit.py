"""Where a satellite was above: two-line elements (TLE) and a time -> the point below it, by SGP4."""

from __future__ import annotations

from bisect import bisect
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from sgp4.api import Satrec

MAX_AGE = timedelta(days=30)  # beyond, drag and reboosts have moved the station by more than a photo can reach
WGS84_RADIUS_KM, WGS84_FLATTENING = 6378.137, 1 / 298.257223563


class Orbit:
    """A satellite's elements at one or more epochs; `nadir` takes those of the nearest. Made by `Orbit.read`."""

    def __init__(self, satellites: Sequence, source: str | Path) -> None:
        """satellites: sgp4's Satrec, at least one."""
        dated = sorted(((_epoch(each), number) for number, each in enumerate(satellites)))
        self.epochs = [epoch for epoch, _ in dated]
        self.satellites = [satellites[number] for _, number in dated]
        self.source = source

    @classmethod
    def read(cls, path: str | Path) -> Orbit:
        """Text file of two-line elements, names between them allowed, any number of epochs of one satellite.

        Raises FileNotFoundError, or ValueError naming the line that does not fit.
        """
        from sgp4.api import Satrec
        from sgp4.io import verify_checksum

        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file of two-line elements (--tle)")
        try:
            lines = [line.rstrip() for line in path.read_text().splitlines()]
        except UnicodeDecodeError:
            raise ValueError(f"{path}: not a text file; --tle takes two-line elements") from None
        satellites = []
        for number, (first, second) in enumerate(zip(lines, lines[1:]), 1):
            if not (first.startswith("1 ") and second.startswith("2 ")):
                continue
            try:
                verify_checksum(first, second)
                satellite = Satrec.twoline2rv(first, second)
            except (ValueError, IndexError) as error:
                reason = " ".join(str(error).split())
                raise ValueError(
                    f"{path}, lines {number} and {number + 1}: no two-line elements ({reason}); fetch the file again"
                ) from None
            if satellite.error:
                raise ValueError(
                    f"{path}, lines {number} and {number + 1}: elements of no orbit (SGP4 error {satellite.error})"
                )
            satellites.append(satellite)
        if not satellites:
            raise ValueError(f"{path}: no two-line elements in it, which are lines that begin with '1 ' and '2 '")
        names = sorted({each.satnum_str.strip() for each in satellites})
        if len(names) > 1:
            raise ValueError(f"{path}: elements of {len(names)} satellites ({', '.join(names[:5])}); keep those of one")
        return cls(satellites, path)

    def nadir(self, when: datetime) -> tuple[float, float]:
        """Time, with its offset from UTC or in UTC -> (latitude, longitude) of the point below, degrees on WGS 84.

        Raises ValueError where no epoch lies within MAX_AGE of it, or SGP4 says that the satellite has come down.
        """
        from sgp4.api import jday
        from sgp4.propagation import gstime

        when = in_utc(when)
        place = bisect(self.epochs, when)
        nearest = min(
            range(max(0, place - 1), min(place + 1, len(self.epochs))), key=lambda k: abs(self.epochs[k] - when)
        )
        age = abs(self.epochs[nearest] - when)
        if age > MAX_AGE:
            raise ValueError(
                f"{self.source}: the epoch nearest to {when:%Y-%m-%d %H:%M} is {self.epochs[nearest]:%Y-%m-%d}, "
                f"{age.days} days off; add elements within {MAX_AGE.days} days (--tle)"
            )
        seconds = when.second + when.microsecond / 1e6
        day, fraction = jday(when.year, when.month, when.day, when.hour, when.minute, seconds)
        error, position, _ = self.satellites[nearest].sgp4(day, fraction)
        if error:
            raise ValueError(f"{self.source}: SGP4 error {error} at {when:%Y-%m-%d %H:%M}; add elements of that day")
        return subpoint(np.array(position), gstime(day + fraction))  # to 0.3 km: UT1 is taken for UTC


def subpoint(position: np.ndarray, angle: float) -> tuple[float, float]:
    """(3,) km in the frame of SGP4 (TEME), sidereal angle -> geodetic (latitude, longitude), degrees on WGS 84."""
    x, y, z = position
    longitude = (np.degrees(np.arctan2(y, x) - angle) + 180) % 360 - 180
    across = np.hypot(x, y)
    squared = WGS84_FLATTENING * (2 - WGS84_FLATTENING)  # of the eccentricity
    latitude = np.arctan2(z, across)
    for _ in range(5):  # the error shrinks by more than 100 each time
        sine = np.sin(latitude)
        lift = WGS84_RADIUS_KM * squared * sine / np.sqrt(1 - squared * sine**2)
        latitude = np.arctan2(z + lift, across)
    return float(np.degrees(latitude)), float(longitude)


def in_utc(when: datetime) -> datetime:
    """Any time -> the same in UTC; one that does not say its offset is taken for UTC, the station's time."""
    return when.replace(tzinfo=UTC) if when.tzinfo is None else when.astimezone(UTC)


def _epoch(satellite: Satrec) -> datetime:
    year = satellite.epochyr + (2000 if satellite.epochyr < 57 else 1900)  # as the format has it
    return datetime(year, 1, 1, tzinfo=UTC) + timedelta(days=satellite.epochdays - 1)
