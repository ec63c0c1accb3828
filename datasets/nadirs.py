"""The point below the station, for each photo: from a table, one for all, the file name, or the time and the orbit.

In this order, the first that tells: a row of the table (nadir_lat, nadir_lon), `near`, an EarthLoc file name, a time
(the table's, else EXIF) with two-line elements. Where none does, the whole Earth is searched.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa
from PIL import ExifTags, Image

from datasets.csv_rows import read_csv
from datasets.images import FORMATS
from datasets.names import ImageName
from datasets.orbit import Orbit, in_utc
from utils.files import printable

COLUMNS = ("path", "nadir_lat", "nadir_lon", "time")
BLOCK = 20_000
# How far photos look, from the nadir to the centre of their corners: shares of the 17,752 public query names.
DISTANCE_SHARES = (0, 0.01, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 0.98, 0.99, 0.998, 1)
DISTANCES_KM = (2, 33, 81, 120, 180, 226, 272, 323, 385, 459, 507, 556, 613, 680, 764, 870, 943, 1138, 1400)


@dataclass(frozen=True)
class Nadir:
    """point (lat, lon) degrees, None: unknown, and `why`. source: "table", "near", "name", "orbit", "given" or "none".
    columns: the table's others."""

    point: tuple[float, float] | None
    source: str
    columns: dict[str, str] = field(default_factory=dict)
    why: str = ""


@dataclass
class Nadirs:
    """`of` a photo -> its Nadir; `check` looks at all photos before the work begins."""

    table: Table | None = None
    near: tuple[float, float] | None = None
    orbit: Orbit | None = None

    @property
    def columns(self) -> list[str]:
        """Names of the table's further columns, which every photo has in its results."""
        return [] if self.table is None else self.table.others

    def of(self, path: str | os.PathLike) -> Nadir:
        """What is known about one photo. Its file is opened only where the time in it is needed."""
        row = None if self.table is None else self.table.row_of(path)
        columns = {} if self.table is None else self.table.columns_of(row)
        known = None if row is None else self.table.point_of(row)
        if known is not None:
            return Nadir(known, "table", columns)
        if self.near is not None:
            return Nadir(self.near, "near", columns)
        known = nadir_of_name(path)
        if known is not None:
            return Nadir(known, "name", columns)
        if self.orbit is None:
            return Nadir(None, "none", columns)
        when = None if row is None else self.table.time_of(row)
        when = time_of_photo(path) if when is None else when
        if when is None:
            return Nadir(None, "none", columns, "no time in the table or in its EXIF")
        try:
            return Nadir(self.orbit.nadir(when), "orbit", columns)
        except ValueError as error:
            return Nadir(None, "none", columns, str(error))

    def check(self, paths: Sequence[str]) -> list[str]:
        """All photos -> sentences for the log: how many the table knows. Opens no photo.

        Raises ValueError where the table has none of them, where it names a file without its folder and two have that
        name, and where the orbit is not known at one of its times.
        """
        if self.table is None:
            return []
        if self.orbit is not None:
            self.table.check_times(self.orbit)
        return self.table.check(paths)


def read_nadirs(
    table: str | Path | None = None,
    near: tuple[float, float] | None = None,
    tle: str | Path | None = None,
    folders: Iterable[str | Path] = (),
) -> Nadirs:
    """Files of --nadirs and --tle, and --near -> Nadirs. folders: of the photos, to which the table's paths may be
    relative. Raises FileNotFoundError or ValueError naming file, line and field."""
    orbit = None if tle is None else Orbit.read(tle)
    return Nadirs(None if table is None else Table.read(table, folders), near, orbit)


def nadir_of_name(path: str | os.PathLike) -> tuple[float, float] | None:
    """The nadir that an EarthLoc name of a photo tells; None for other names, and for database images, which have
    none."""
    if "@" not in os.path.basename(path):
        return None
    try:
        name = ImageName.parse(os.fspath(path))
    except ValueError:
        return None
    return None if name.is_database else name.nadir


def time_of_photo(path: str | os.PathLike) -> datetime | None:
    """EXIF DateTimeOriginal with its offset -> time in UTC; without an offset it is UTC, as the station's cameras have
    it. None where there is none, or no readable photo."""
    try:
        with Image.open(path, formats=FORMATS) as image:
            exif = image.getexif().get_ifd(ExifTags.IFD.Exif)
    except Exception:  # PIL raises all sorts at broken files; the one who reads the pixels tells
        return None
    text = str(exif.get(ExifTags.Base.DateTimeOriginal, "")).strip("\0 ")
    offset = str(exif.get(ExifTags.Base.OffsetTimeOriginal) or exif.get(ExifTags.Base.OffsetTime) or "").strip("\0 ")
    try:
        when = datetime.strptime(text, "%Y:%m:%d %H:%M:%S")
        return in_utc(datetime.fromisoformat(when.isoformat() + offset))
    except ValueError:
        return None


class Table:
    """A CSV of nadirs in memory: a million rows are a few arrays. Made by `Table.read`."""

    def __init__(
        self, path: Path, folders: list[str], keys: dict[int, int], values: pa.Table, lines: np.ndarray
    ) -> None:
        self.path, self.folders, self.rows, self.lines = path, folders, keys, lines
        self.points = np.stack([values["nadir_lat"], values["nadir_lon"]], axis=1)
        self.times = values["time"]
        self.others = [name for name in values.column_names if name not in COLUMNS]
        self.values = values.select(self.others)

    @classmethod
    def read(cls, path: str | Path, folders: Iterable[str | Path] = ()) -> Table:
        """CSV with the columns path, and nadir_lat with nadir_lon, or time (ISO 8601, UTC), or all four -> Table.

        A path is relative to the CSV's folder, or to one of `folders`, or absolute, or a name alone. A row may leave
        the nadir or the time empty. Raises FileNotFoundError or ValueError that names line, field and remedy.
        """
        path = Path(path)
        # A byte of a path that is no text comes as os.fsdecode has it.
        lines = read_csv(path, "path, nadir_lat, nadir_lon", errors="surrogateescape")
        header = _header(path, next(lines)[1])
        texts = ["time", *(name for name in header if name not in COLUMNS)]
        numbers = dict.fromkeys(("nadir_lat", "nadir_lon"), pa.float64())
        schema = pa.schema({**numbers, **dict.fromkeys(texts, pa.large_string())})
        keys, places, blocks = {}, [], []
        while block := list(islice(lines, BLOCK)):  # not all of a million rows as texts at once
            rows = [_row(f"{path}, line {line}", header, cells) for line, cells in block]
            for (line, _), row in zip(block, rows):
                key = hash(os.path.normpath(row["path"]))  # 8 bytes in place of a path
                if key in keys:
                    raise ValueError(
                        f"{path}, line {line}: path {row['path']} is in line {places[keys[key]]} as well; "
                        f"keep one of them"
                    )
                keys[key] = len(places)
                places.append(line)
            blocks.append(pa.Table.from_pylist(rows, schema))
        folders = dict.fromkeys(os.path.abspath(each) for each in (path.parent, *folders))
        return cls(path, list(folders), keys, pa.concat_tables(blocks), np.array(places))

    def row_of(self, path: str | os.PathLike) -> int | None:
        """A photo's row: by its path from the CSV's folder or one of the others, its absolute path, or its name."""
        path = os.path.abspath(path)
        for name in (*(os.path.relpath(path, folder) for folder in self.folders), path, os.path.basename(path)):
            row = self.rows.get(hash(name))
            if row is not None:
                return row
        return None

    def point_of(self, row: int) -> tuple[float, float] | None:
        lat, lon = self.points[row].tolist()
        return None if np.isnan(lat) else (lat, lon)

    def time_of(self, row: int) -> datetime | None:
        text = self.times[row].as_py()
        return in_utc(datetime.fromisoformat(text)) if text else None

    def columns_of(self, row: int | None) -> dict[str, str]:
        """The further columns of a row; of a photo without a row they are empty."""
        return {name: "" if row is None else self.values[name][row].as_py() for name in self.others}

    def check(self, paths: Sequence[str]) -> list[str]:
        """As `Nadirs.check`."""
        uses, without, example = np.zeros(len(self.lines), np.int64), 0, ""
        for path in paths:
            row = self.row_of(path)
            if row is None:
                without, example = without + 1, example or path
            else:
                uses[row] += 1
        if not uses.any():
            raise ValueError(
                f"{self.path}: no row fits a photo (the first is {example}); its paths have to be relative to its own "
                "folder or to that of the photos, or names alone"
            )
        doubled = int(np.argmax(uses))
        if uses[doubled] > 1:
            fitting = sorted({os.path.abspath(each) for each in paths if self.row_of(each) == doubled})
            if len(fitting) > 1:  # not one photo that was given twice
                raise ValueError(
                    f"{self.path}, line {self.lines[doubled]}: the name fits {len(fitting)} photos, {fitting[0]} and "
                    f"{fitting[1]}; give it with its folder"
                )
        notes = [f"{self.path}: {np.count_nonzero(uses)} of its {len(self.lines)} rows fit a photo"]
        if without:
            notes.append(f"{self.path}: {without} of {len(paths)} photos have no row, such as {example}")
        return notes

    def check_times(self, orbit: Orbit) -> None:
        """Raises ValueError naming the line where the orbit is not known at its time."""
        for row in range(len(self.lines)):
            if self.point_of(row) is None and (when := self.time_of(row)) is not None:
                try:
                    orbit.nadir(when)
                except ValueError as error:
                    raise ValueError(f"{self.path}, line {self.lines[row]}: {error}") from None


def _header(path: Path, names: list[str]) -> list[str]:
    if any("\0" in name for name in names):
        raise ValueError(f"{path}: no CSV text file; expected a header with path, nadir_lat, nadir_lon, and rows")
    names = [name.lower() if name.lower() in COLUMNS else name for name in names]
    needed = "--nadirs takes a table with path, nadir_lat and nadir_lon (or time, with --tle)"
    shown = f"its columns are {', '.join(names)}"
    missing = [] if "path" in names else ["path"]
    if "time" not in names or {"nadir_lat", "nadir_lon"} & set(names):
        missing += [name for name in ("nadir_lat", "nadir_lon") if name not in names]
    if missing:
        raise ValueError(f"{path}, line 1: no column {' and '.join(missing)}, {shown}; {needed}")
    if len(set(names)) < len(names) or "" in names:
        raise ValueError(f"{path}, line 1: two columns of one name, or one without, {shown}; {needed}")
    return names


def _row(where: str, header: list[str], cells: list[str]) -> dict:
    """Cells -> {column: text}, nadir_lat and nadir_lon as numbers, None where empty. ValueError names the field."""
    path = dict(zip(header, cells))["path"]
    row = {"time": "", **{name: printable(cell) for name, cell in zip(header, cells)}, "path": path}
    if not path:
        raise ValueError(f"{where}: path is empty; name the photo, or remove the line")
    lat, lon = (_degrees(where, name, row.get(name, "")) for name in ("nadir_lat", "nadir_lon"))
    for name, value, limit in (("nadir_lat", lat, 90), ("nadir_lon", lon, 180)):
        if value is not None and not abs(value) <= limit:
            swapped = limit == 90 and abs(value) <= 180 and lon is not None and abs(lon) <= 90
            remedy = "are nadir_lat and nadir_lon swapped?" if swapped else "correct it, or leave both cells empty"
            raise ValueError(f"{where}: {name} is {row[name]}, expected within ±{limit} degrees; {remedy}")
    if (lat is None) != (lon is None):
        empty = "nadir_lat" if lat is None else "nadir_lon"
        raise ValueError(f"{where}: {empty} is empty and the other is not; fill in or empty both")
    try:
        datetime.fromisoformat(row["time"] or "2000-01-01")
    except ValueError:
        raise ValueError(f"{where}: time is {row['time']!r}, expected ISO 8601, such as 2021-03-04T05:06:07Z") from None
    return {**row, "nadir_lat": lat, "nadir_lon": lon}


def _degrees(where: str, name: str, text: str) -> float | None:
    try:
        return float(text) if text else None
    except ValueError:
        raise ValueError(f"{where}: {name} is {text!r}, expected degrees, such as -12.5") from None
