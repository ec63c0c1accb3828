"""What a file name says: one name <-> ImageName, many names <-> Catalogue (columns)."""

from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

import numpy as np

from datasets import index
from utils import geo
from utils.strings import Strings, base_names

YEARS = (2018, 2019, 2020, 2021)
DATABASE_YEAR = 2021  # the year that evaluation searches and clustering describes (paper, sec. 4.2 and 5.1.2)

# The 14 fields between the "@" of a name, 16 with what is before and after: 8 corner coordinates, then these.
CORNER_FIELDS = tuple(f"{axis}{corner}" for corner in range(1, 5) for axis in ("lat", "lon"))
FIELDS = CORNER_FIELDS + ("image_id", "timestamp", "nadir_lat", "nadir_lon", "sq_km_area", "orientation")


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
    def parse(cls, name):
        """File name or path -> ImageName. Raises ValueError that names the file and the field that does not fit."""
        base = PurePosixPath(name).name
        parts = base.split("@")
        if len(parts) != len(FIELDS) + 2 or parts[0]:
            raise ValueError(f"{name}: expected {len(FIELDS)} fields between '@' "
                             f"(@{'@'.join(FIELDS)}@.jpg), found {max(len(parts) - 2, 0)}")
        text = dict(zip(FIELDS, parts[1:-1]))
        number = {}
        for field in CORNER_FIELDS + ("nadir_lat", "nadir_lon", "sq_km_area", "orientation"):
            number[field] = _number(name, field, text[field])
        if not text["image_id"]:
            raise ValueError(f"{name}: field image_id is empty")
        if not (text["timestamp"].isdigit() and len(text["timestamp"]) in (4, 8)):
            raise ValueError(f"{name}: field timestamp is {text['timestamp']!r}, expected yyyy or yyyymmdd")
        corners = [number[field] for field in CORNER_FIELDS]
        return cls(footprint=tuple(zip(corners[0::2], corners[1::2])), image_id=text["image_id"],
                   timestamp=text["timestamp"], nadir=(number["nadir_lat"], number["nadir_lon"]),
                   area=int(number["sq_km_area"]), orientation=number["orientation"], suffix=parts[-1])

    def __str__(self):
        """The file name. Queries and database images are written with the decimals of the public data set."""
        corner, nadir, orientation = (".5f", ".5f", ".0f") if self.is_database else (".6f", ".1f", ".1f")
        fields = [format(value, corner) for point in self.footprint for value in point]
        fields += [self.image_id, self.timestamp, *(format(value, nadir) for value in self.nadir)]
        # The public names write an orientation of 0.0 as ".0" and of -0.9 as "-.9".
        fields += [str(self.area), format(self.orientation, orientation).replace("0.", ".") if abs(self.orientation) < 1
                   else format(self.orientation, orientation)]
        return "@" + "@".join(fields) + "@" + self.suffix

    @property
    def is_database(self):
        return len(self.timestamp) == 4

    @property
    def year(self):
        return int(self.timestamp[:4])

    def in_year(self, year):
        """The same region's image of another year. Only the timestamp changes, never a folder or an area of '2021'."""
        if not self.is_database:
            raise ValueError(f"{self}: a query has no other year")
        return replace(self, timestamp=f"{year:04d}")


def _limit(field):
    return 90 if "lat" in field else 180 if "lon" in field else np.inf


def _number(name, field, text):
    limit = _limit(field)
    try:
        value = float(text)
    except ValueError:
        raise ValueError(f"{name}: field {field} is {text!r}, expected a number") from None
    if not abs(value) <= limit or value in (np.inf, -np.inf):
        raise ValueError(f"{name}: field {field} is {text}, expected within ±{limit:g}")
    return value


def parse_columns(paths, block=20_000):
    """Strings (N,) of names or paths -> dict of columns as in Catalogue: all but its paths, ids as bytes.

    The same values and errors as ImageName.parse gives, one by one, at a fifth of the time.
    """
    parts = [_parse_block(paths[start:start + block]) for start in range(0, len(paths), block)]
    parts = parts or [_columns_of([])]
    return {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}


def _parse_block(paths):
    rows = [path.rsplit(b"/", 1)[-1].split(b"@") for path in paths.array.tolist()]
    if all(len(row) == len(FIELDS) + 2 and not row[0] and row[9] for row in rows):
        text = {field: np.array(column) for field, column in zip(FIELDS, list(zip(*rows))[1:])}
        try:
            number = {field: column.astype(np.float64) for field, column in text.items()
                      if field not in ("image_id", "timestamp")}
        except ValueError:
            number = None
        stamps = text["timestamp"]
        if (number and all((np.abs(column) <= _limit(field)).all() and np.isfinite(column).all()
                           for field, column in number.items())
                and (np.char.isdigit(stamps) & np.isin(np.char.str_len(stamps), (4, 8))).all()):
            corners = np.stack([number[field] for field in CORNER_FIELDS], axis=1).reshape(-1, 4, 2)
            return {"footprints": corners, "nadirs": np.stack([number["nadir_lat"], number["nadir_lon"]], axis=1),
                    "areas": np.trunc(number["sq_km_area"]), "orientations": number["orientation"],
                    "years": stamps.astype("S4").astype(np.int64), "ids": text["image_id"]}
    return _columns_of([ImageName.parse(path) for path in paths])  # raises for the name that does not fit


def _columns_of(names):
    count = len(names)
    return {
        "footprints": np.array([name.footprint for name in names], dtype=np.float64).reshape(count, 4, 2),
        "nadirs": np.array([name.nadir for name in names], dtype=np.float64).reshape(count, 2),
        "areas": np.array([name.area for name in names], dtype=np.float64),
        "orientations": np.array([name.orientation for name in names], dtype=np.float64),
        "years": np.array([name.year for name in names], dtype=np.int64),
        "ids": Strings([name.image_id for name in names]).array,
    }


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
    def from_paths(cls, root, paths):
        """Paths relative to root -> Catalogue. Raises ValueError naming the first name that does not parse."""
        paths = paths if isinstance(paths, Strings) else Strings(paths)
        return cls.from_columns(root, {"paths": paths.array, **parse_columns(paths)})

    @classmethod
    def from_columns(cls, root, columns):
        """dict of arrays, as parse_columns gives them, with "paths" -> Catalogue."""
        texts = {key: Strings(columns[key]) for key in ("paths", "ids")}
        return cls(root=Path(root), **{**columns, **texts})

    @classmethod
    def read(cls, root, folder, year=None):
        """All .jpg images under root/folder ("queries" or "database"), sorted by path; year picks database folders.

        Large folders are listed once and kept in an index file beside them, see datasets/index.py. Raises
        FileNotFoundError where there is no such folder, ValueError where a name does not parse.
        """
        top = Path(root) / folder
        if not top.is_dir():
            raise FileNotFoundError(f"{top}: no such folder; is --dataset_path right? A data set has the folders "
                                    f"database/ and queries/ (README, 'The real data set')")
        prefix = "" if year is None else f"{folder}/{year}_"
        return cls.from_columns(root, index.read_columns(root, folder, parse_columns, prefix))

    @classmethod
    def read_source(cls, source, folder):
        """A data set's folder, or a text file with one name or path a line -> Catalogue of "queries" or "database".

        Of a database, the images of 2021. Raises FileNotFoundError or ValueError saying what is needed.
        """
        source = Path(source)
        year = DATABASE_YEAR if folder == "database" else None
        needed = (f"give the folder of a data set (with {folder}/ in it), or a text file with one name of {folder} a "
                  f"line")
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
                raise ValueError(f"{source}: {catalogue.paths[0]} is no name of {folder} (a database image's timestamp "
                                 f"is a year, a query's a day); {needed}")
            if year is not None:
                catalogue = catalogue.select(catalogue.years == year)
        if not len(catalogue):
            raise ValueError(f"{source}: holds no name of {folder}{f' of {year}' if year else ''}; {needed}")
        return catalogue

    def __len__(self):
        return len(self.paths)

    def select(self, indices):
        """Rows by integer or boolean index -> Catalogue."""
        rows = np.arange(len(self))[indices]
        return Catalogue(self.root, self.paths[rows], self.footprints[rows], self.nadirs[rows], self.areas[rows],
                         self.orientations[rows], self.years[rows], self.ids[rows])

    @property
    def names(self):
        """File names without their folders: the keys of the intersections file."""
        return base_names(self.paths)

    @property
    def centers(self):
        """(N, 2) centre of each footprint, degrees."""
        return geo.centers(self.footprints) if len(self) else np.zeros((0, 2))
