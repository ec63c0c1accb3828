"""Photos with GPS, and galleries of GPS: CSV files, EarthLoc data sets, grids; and noise in metres on the sphere."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from datasets.csv_rows import read_csv
from datasets.grid import is_land
from datasets.listing import SUFFIXES, list_files
from datasets.names import Catalogue
from utils import geo
from utils.files import GALLERY_PACKAGE, package_files

IMAGE_COLUMNS = ("IMG_ID", "IMG_FILE", "IMAGE", "FILENAME")
LATITUDE_COLUMNS, LONGITUDE_COLUMNS = ("LAT", "LATITUDE"), ("LON", "LNG", "LONGITUDE")


@dataclass(frozen=True)
class Photos:
    """Image files with coordinates. Row i: paths[i], points[i] (lat, lon) degrees.

    nadirs (N, 2) where known (EarthLoc's names), else None; notes: sentences for the log.
    """

    paths: list
    points: np.ndarray
    nadirs: np.ndarray | None = None
    notes: list = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.paths)

    def select(self, rows: np.ndarray) -> Photos:
        """Rows by integer or boolean index -> Photos."""
        rows = np.arange(len(self))[rows]
        return Photos(
            [self.paths[i] for i in rows],
            self.points[rows],
            None if self.nadirs is None else self.nadirs[rows],
            self.notes,
        )


def check_points(points: np.ndarray, source: str | Path, first_row: int = 1) -> np.ndarray:
    """(N, 2) latitude, longitude in degrees -> the same as float64, longitude 180 and -180 both allowed.

    Raises ValueError that shows the first bad row: not a number, out of range, or swapped. Rows count from first_row.
    """
    points = np.asarray(points, dtype=np.float64).reshape(-1, 2)
    bad = ~np.isfinite(points).all(axis=1) | (np.abs(points) > (90, 180)).any(axis=1)
    if not bad.any():
        return points
    row = int(np.argmax(bad))
    lat, lon = points[row]
    shown = f"{source}, row {first_row + row}: latitude {lat:g}, longitude {lon:g}"
    more = f"; {int(bad.sum())} such rows" if bad.sum() > 1 else ""
    if not np.isfinite(points[row]).all():
        raise ValueError(f"{shown}: not finite numbers{more}; fill in or remove them")
    if abs(lat) > 90 and abs(lon) <= 90 and abs(lat) <= 180:
        raise ValueError(f"{shown}: latitude must be within ±90{more}; are latitude and longitude swapped?")
    raise ValueError(f"{shown}: latitude must be within ±90 and longitude within ±180 degrees{more}")


def read_columns(path: str | Path, *wanted: tuple[str, ...]) -> tuple[list[int], list[list[str]]]:
    """CSV with a header -> the lines (N,) of its rows, and the cells (N,) of each group of accepted column names.

    Names are matched in upper case. FileNotFoundError or ValueError as read_csv, and where a column is missing.
    """
    rows = read_csv(path, ", ".join(names[0] for names in wanted))
    _, header = next(rows)
    upper, columns = [name.upper() for name in header], []
    for names in wanted:
        found = [upper.index(name) for name in names if name in upper]
        if not found:
            raise ValueError(f"{path}: no column {' or '.join(names)}; its columns are {', '.join(header)}")
        columns.append(found[0])
    lines, cells = zip(*rows)
    return list(lines), [[row[column] for row in cells] for column in columns]


def read_points(path: str | Path) -> np.ndarray:
    """CSV with LAT,LON (or latitude,longitude) -> (N, 2) degrees, float64. ValueError names the file and the line."""
    return _points(path, *read_columns(path, LATITUDE_COLUMNS, LONGITUDE_COLUMNS))


def _points(path: str | Path, lines: list[int], texts: list[list[str]]) -> np.ndarray:
    points = np.empty((len(lines), 2))
    for column, (name, cells) in enumerate(zip(("latitude", "longitude"), texts)):
        for row, cell in enumerate(cells):
            try:
                points[row, column] = float(cell)
            except ValueError:
                raise ValueError(
                    f"{path}, line {lines[row]}: {name} is {cell!r}, expected a number of degrees"
                ) from None
    return check_points(points, path, first_row=2)


def read_photos(path: str | Path, folder: str | Path | None = None) -> Photos:
    """CSV of IMG_ID,LAT,LON beside a folder of images -> Photos; MP-16, YFCC4k, Im2GPS3k and GWS15k have that form.

    folder: default, the CSV's own. An IMG_ID is a file's path in it, with or without .jpg. Rows without a file are
    left out, counted and listed in notes. Raises ValueError where nothing is left, and as `read_points`.
    """
    folder = Path(folder or Path(path).parent)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder of images")
    lines, (names, *degrees) = read_columns(path, IMAGE_COLUMNS, LATITUDE_COLUMNS, LONGITUDE_COLUMNS)
    points = _points(path, lines, degrees)
    paths = [_image_file(folder, name) for name in names]
    found = [row for row, file in enumerate(paths) if file is not None]
    missing = [name for name, file in zip(names, paths) if file is None]
    if not found:
        raise ValueError(
            f"{path}: none of its {len(paths)} images is in {folder} (the first is {names[0]}); give the "
            "folder of the images with --images"
        )
    shown = ", ".join(missing[:20]) + (" …" if len(missing) > 20 else "")
    notes = [f"{path}: {len(missing)} of {len(paths)} images are not in {folder}: {shown}"] if missing else []
    return Photos([paths[row] for row in found], points[found], notes=notes)


def _image_file(folder: Path, name: str) -> Path | None:
    for candidate in (folder / name, folder / f"{name}.jpg"):
        if name and candidate.is_file():
            return candidate
    return None


def photos_of_dataset(root: str | Path, part: str = "database") -> Photos:
    """EarthLoc's layout, "database" (all years) or "queries" -> Photos at their footprints' centres, with nadirs."""
    catalogue = Catalogue.read(root, part)
    if not len(catalogue):
        raise ValueError(f"{Path(root) / part}: no image in it; is --dataset_path right?")
    return Photos([catalogue.root / path for path in catalogue.paths], catalogue.centers, catalogue.nadirs)


def find_images(paths: Iterable[str | Path]) -> list[Path]:
    """Files and folders (searched through) -> image files, those of a folder sorted. ValueError where there is none."""
    return [Path(path) for path in each_image(paths)]


def each_image(paths: Iterable[str | Path]) -> Iterator[str]:
    """As find_images, one at a time, as str."""
    for path in map(Path, paths):
        if path.is_dir():
            inside, _ = list_files(path)
            if not inside:
                raise ValueError(f"{path}: no image in this folder ({', '.join(SUFFIXES)})")
            yield from (str(path / name) for name in inside)
        elif path.exists():
            yield str(path)
        else:
            raise FileNotFoundError(f"{path}: no such image or folder")


def grid_points(spacing_km: float, land_only: bool = False) -> np.ndarray:
    """Points about spacing_km apart over the whole Earth, on parallels with as many points as fit -> (N, 2) degrees.

    land_only keeps those on land. Raises ValueError where the spacing leaves no or too many points.
    """
    if not 2 <= spacing_km <= 5000:
        raise ValueError(f"a gallery grid of {spacing_km:g} km: choose 2 to 5000")
    rows = int(np.ceil(np.pi * geo.EARTH_RADIUS_KM / spacing_km))
    lats = (np.arange(rows) + 0.5) / rows * 180 - 90
    counts = np.ceil(2 * np.pi * geo.EARTH_RADIUS_KM * np.cos(np.radians(lats)) / spacing_km).astype(int)
    points = np.concatenate(
        [
            np.stack([np.full(count, lat), (np.arange(count) + 0.5) / count * 360 - 180], axis=1)
            for lat, count in zip(lats, counts)
        ]
    )
    return points[is_land(*points.T)] if land_only else points


def gallery_points(spec: str, training: np.ndarray | None = None) -> np.ndarray:
    """--gallery -> (N, 2) degrees: "package" (as published), "train" (`training`), "grid:KM", "land:KM", or CSV.

    Raises ValueError, FileNotFoundError or RuntimeError that says what to give instead.
    """
    if spec == "package":
        return read_points(package_files(GALLERY_PACKAGE, "model", "gps_gallery", "coordinates_100K.csv")[0])
    if spec == "train":
        if training is None or not len(training):
            raise ValueError(
                "--gallery train: these weights carry no training coordinates; give a CSV with LAT,LON, "
                "grid:KM or package"
            )
        return check_points(training, "training gallery")
    kind, _, spacing = spec.partition(":")
    if kind in ("grid", "land") and not Path(spec).exists():
        try:
            return grid_points(float(spacing), land_only=kind == "land")
        except ValueError as error:
            raise ValueError(f"--gallery {spec}: {error}; for example {kind}:100 for a point every 100 km") from None
    return read_points(spec)


def distinct_points(points: np.ndarray, limit: int, seed: int = 0) -> np.ndarray:
    """(N, 2) -> its distinct rows, sorted, as float32; a random `limit` of them where there are more."""
    distinct = np.unique(np.asarray(points, dtype=np.float32), axis=0)
    if len(distinct) > limit:
        distinct = distinct[np.sort(np.random.default_rng(seed).choice(len(distinct), limit, replace=False))]
    return distinct


def add_noise(points: np.ndarray, sigma_m: float, rng: np.random.Generator) -> np.ndarray:
    """Moves each point (N, 2) by a Gaussian step of sigma_m metres a direction on the sphere -> (N, 2) degrees.

    In the tangent plane, so that it is the same near a pole and across the antimeridian.
    """
    up = geo.to_unit_vectors(points)
    lon = np.radians(np.asarray(points, dtype=np.float64)[:, 1])
    east = np.stack([-np.sin(lon), np.cos(lon), np.zeros_like(lon)], axis=-1)
    north = np.cross(up, east)
    steps = rng.normal(0, sigma_m / 1000 / geo.EARTH_RADIUS_KM, (len(up), 2))
    return geo.from_unit_vectors(up + steps[:, :1] * east + steps[:, 1:] * north)
