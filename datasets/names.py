"""What a file name says: one name <-> ImageName, many names <-> Catalogue (columns)."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from pathlib import Path, PurePosixPath

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from datasets import index
from utils import geo
from utils.tables import Strings, base_names, in_one

YEARS = (2018, 2019, 2020, 2021)
DATABASE_YEAR = 2021  # the year that evaluation searches and clustering describes (paper, sec. 4.2 and 5.1.2)

# The 14 fields between the "@" of a name, 16 with what is before and after: 8 corner coordinates, then these.
CORNER_FIELDS = tuple(f"{axis}{corner}" for corner in range(1, 5) for axis in ("lat", "lon"))
FIELDS = CORNER_FIELDS + ("image_id", "timestamp", "nadir_lat", "nadir_lon", "sq_km_area", "orientation")
NUMBERS = tuple(field for field in FIELDS if field not in ("image_id", "timestamp"))
SCHEMA = pa.schema(
    {"path": pa.binary(), **{field: pa.float64() if field in NUMBERS else pa.binary() for field in FIELDS}}
)


@dataclass(frozen=True, slots=True)
class ImageName:
    """One image's name, parsed. Degrees, km²; `footprint` is four (lat, lon) corners.

    A database image is north-up and its corners are bottom-left, top-left, top-right, bottom-right; its `image_id` is
    zoom_row_col and its timestamp a year. A query's id is mission-roll-frame and its timestamp yyyymmdd.
    """

    footprint: tuple
    image_id: str
    timestamp: str
    nadir: tuple
    area: int
    orientation: float
    suffix: str = ".jpg"

    @classmethod
    def parse(cls, name: str) -> ImageName:
        """File name or path -> ImageName. Raises ValueError that names the file and the field that does not fit."""
        base = PurePosixPath(name).name
        parts = base.split("@")
        if len(parts) != len(FIELDS) + 2 or parts[0]:
            raise ValueError(
                f"{name}: expected {len(FIELDS)} fields between '@' "
                f"(@{'@'.join(FIELDS)}@.jpg), found {max(len(parts) - 2, 0)}"
            )
        text = dict(zip(FIELDS, parts[1:-1]))
        number = {field: _number(name, field, text[field]) for field in NUMBERS}
        if not text["image_id"]:
            raise ValueError(f"{name}: field image_id is empty")
        if not (text["timestamp"].isdigit() and len(text["timestamp"]) in (4, 8)):
            raise ValueError(f"{name}: field timestamp is {text['timestamp']!r}, expected yyyy or yyyymmdd")
        corners = [number[field] for field in CORNER_FIELDS]
        return cls(
            footprint=tuple(zip(corners[0::2], corners[1::2])),
            image_id=text["image_id"],
            timestamp=text["timestamp"],
            nadir=(number["nadir_lat"], number["nadir_lon"]),
            area=int(number["sq_km_area"]),
            orientation=number["orientation"],
            suffix=parts[-1],
        )

    def __str__(self) -> str:
        """The file name. Queries and database images are written with the decimals of the public data set."""
        corner, nadir, orientation = (".5f", ".5f", ".0f") if self.is_database else (".6f", ".1f", ".1f")
        fields = [format(value, corner) for point in self.footprint for value in point]
        fields += [self.image_id, self.timestamp, *(format(value, nadir) for value in self.nadir), str(self.area)]
        turn = format(self.orientation, orientation)
        # The public names write an orientation of 0.0 as ".0" and of -0.9 as "-.9".
        fields.append(turn.replace("0.", ".") if abs(self.orientation) < 1 else turn)
        return "@".join(["", *fields, self.suffix])

    @property
    def is_database(self) -> bool:
        return len(self.timestamp) == 4

    @property
    def year(self) -> int:
        return int(self.timestamp[:4])

    def in_year(self, year: int) -> ImageName:
        """The same region's image of another year. Only the timestamp changes, never a folder or an area of '2021'."""
        if not self.is_database:
            raise ValueError(f"{self}: a query has no other year")
        return replace(self, timestamp=f"{year:04d}")


def _limit(field: str) -> float:
    return 90 if "lat" in field else 180 if "lon" in field else np.inf


def _number(name: str, field: str, text: str) -> float:
    limit = _limit(field)
    try:
        value = float(text)
    except ValueError:
        raise ValueError(f"{name}: field {field} is {text!r}, expected a number") from None
    if not abs(value) <= limit or value in (np.inf, -np.inf):
        raise ValueError(f"{name}: field {field} is {text}, expected within ±{limit:g}")
    return value


def parse_paths(paths: pa.Array, wrong: list[str] | None = None, block: int = 20_000) -> pa.Table:
    """Arrow array of names or paths, bytes -> table of "path" and FIELDS, texts as bytes.

    The same values and errors as ImageName.parse gives, one by one, at a tenth of the time. wrong: a list that takes
    the errors; what does not parse is left out then.
    """
    starts = range(0, max(len(paths), 1), block)
    return pa.concat_tables([_parse_block(paths.slice(start, block), wrong) for start in starts])


def _parse_block(paths: pa.Array, wrong: list | None) -> pa.Table:
    parts = pc.split_pattern(base_names(paths), "@")
    width = len(FIELDS) + 2
    texts = parts.flatten()
    if len(paths) and (parts.value_lengths().to_numpy() == width).all():
        columns = {field: texts.take(pa.array(np.arange(k, len(texts), width))) for k, field in enumerate(FIELDS, 1)}
        try:
            columns.update({field: columns[field].cast(pa.string()).cast(pa.float64()) for field in NUMBERS})
        except pa.ArrowInvalid:  # no number, or one that only Python's float reads
            return _parse_each(paths, wrong)
        good = [
            pc.match_substring_regex(columns["timestamp"], r"^(\d{4}|\d{8})$"),
            pc.not_equal(columns["image_id"], b""),
            pc.equal(texts.take(pa.array(np.arange(0, len(texts), width))), b""),
        ]
        within = ((np.abs(columns[field]) <= _limit(field)) & np.isfinite(columns[field]) for field in NUMBERS)
        if all(pc.all(each).as_py() for each in good) and all(each.all() for each in within):
            return pa.table({"path": paths, **columns})
    return _parse_each(paths, wrong)


def _parse_each(paths: pa.Array, wrong: list | None) -> pa.Table:
    rows = []
    for path in paths.to_pylist():
        try:
            name = ImageName.parse(os.fsdecode(path))
        except ValueError as error:
            if wrong is None:
                raise
            wrong.append(str(error))
            continue
        corners = [value for point in name.footprint for value in point]
        texts = (os.fsencode(text) for text in (name.image_id, name.timestamp))
        values = [path, *corners, *texts, *name.nadir, float(name.area), name.orientation]
        rows.append(dict(zip(SCHEMA.names, values)))
    return pa.Table.from_pylist(rows, SCHEMA)


@dataclass(frozen=True)
class Catalogue:
    """Many images as columns, so that 700,000 of them are a few arrays. Row i of each belongs to paths[i].

    paths: relative to root, posix. footprints (N, 4, 2), nadirs (N, 2) degrees; areas (N,) km²; orientations (N,)
    degrees; years (N,) int; ids: zoom_row_col or mission-roll-frame. Strings read like lists of str.
    """

    root: Path
    paths: Strings
    footprints: np.ndarray
    nadirs: np.ndarray
    areas: np.ndarray
    orientations: np.ndarray
    years: np.ndarray
    ids: Strings

    @classmethod
    def from_paths(cls, root: str | Path, paths: Iterable[str]) -> Catalogue:
        """Paths relative to root -> Catalogue. Raises ValueError naming the first name that does not parse."""
        return cls.from_table(root, parse_paths(Strings(paths).array))

    @classmethod
    def from_table(cls, root: str | Path, table: pa.Table) -> Catalogue:
        """Arrow table as parse_paths gives it -> Catalogue."""
        columns = dict(zip(table.column_names, table.columns))
        del table  # where nobody else holds it, a column is let go once it is taken

        def points(fields: tuple) -> np.ndarray:
            out = np.empty((len(columns["path"]), len(fields)))
            for k, field in enumerate(fields):
                out[:, k] = columns.pop(field)
            return out

        footprints, nadirs = points(CORNER_FIELDS).reshape(-1, 4, 2), points(("nadir_lat", "nadir_lon"))
        stamps = in_one(columns.pop("timestamp")).dictionary_encode()
        years = np.array([int(stamp[:4]) for stamp in stamps.dictionary.to_pylist()], dtype=np.int64)
        return cls(
            Path(root),
            Strings(columns["path"]),
            footprints,
            nadirs,
            np.trunc(columns["sq_km_area"]),
            np.array(columns["orientation"]),
            years[stamps.indices],
            Strings(columns["image_id"]),
        )

    @classmethod
    def read(cls, root: str | Path, folder: str, year: int | None = None) -> Catalogue:
        """All images under root/folder ("queries" or "database"), sorted by folder, then name; year picks folders.

        Large folders are listed once and kept in an index file beside them, see datasets/index.py. Raises
        FileNotFoundError where there is no such folder, ValueError where a name does not parse.
        """
        top = Path(root) / folder
        if not top.is_dir():
            raise FileNotFoundError(
                f"{top}: no such folder; is --dataset_path right? A data set has the folders "
                f"database/ and queries/ (docs/data.md)"
            )
        prefix = "" if year is None else f"{folder}/{year}_"
        return cls.from_table(root, index.read_table(root, folder, parse_paths, prefix))

    @classmethod
    def read_source(cls, source: str | Path, folder: str) -> Catalogue:
        """A data set's folder, or a text file with one name or path a line -> Catalogue of "queries" or "database".

        Of a database, the images of 2021. Raises FileNotFoundError or ValueError saying what is needed.
        """
        source, year = Path(source), DATABASE_YEAR if folder == "database" else None
        needed = (
            f"give the folder of a data set (with {folder}/ in it), or a text file with one name of {folder} a line"
        )
        if source.is_dir():
            catalogue = cls.read(source, folder, year)
        elif not source.is_file():
            raise FileNotFoundError(f"{source}: no such folder or file; {needed}")
        else:
            try:
                names = [line.strip() for line in source.read_text().split("\n")]
                catalogue = cls.from_paths(source.parent, [name for name in names if name])
            except UnicodeDecodeError:
                raise ValueError(f"{source}: not a text file; {needed}") from None
            except ValueError as error:
                raise ValueError(f"{source}: {error}; {needed}") from None
            if len(catalogue) and ImageName.parse(catalogue.paths[0]).is_database != (folder == "database"):
                raise ValueError(
                    f"{source}: {catalogue.paths[0]} is no name of {folder} (a database image's timestamp "
                    f"is a year, a query's a day); {needed}"
                )
            if year is not None:
                catalogue = catalogue.select(catalogue.years == year)
        if not len(catalogue):
            raise ValueError(f"{source}: holds no name of {folder}{f' of {year}' if year else ''}; {needed}")
        return catalogue

    def __len__(self) -> int:
        return len(self.paths)

    def select(self, indices: np.ndarray) -> Catalogue:
        """Rows by integer or boolean index -> Catalogue."""
        rows = np.arange(len(self))[indices]
        columns = {field.name: getattr(self, field.name)[rows] for field in fields(self) if field.name != "root"}
        return replace(self, **columns)

    @property
    def names(self) -> Strings:
        """File names without their folders: the keys of the intersections file."""
        return Strings(base_names(self.paths.column))

    @property
    def centers(self) -> np.ndarray:
        """(N, 2) centre of each footprint, degrees."""
        return geo.centers(self.footprints) if len(self) else np.zeros((0, 2))
