"""Your own images, from a CSV or GeoJSON list: python -m datasets.build own OUTPUT --list FILE --as queries

Each row of the list is an image. Columns (GeoJSON: properties and geometry): path, date; lat1 lon1 … lat4 lon4 around
the image, or lat lon size_km (or width_km height_km, and azimuth of the image's up); and if known nadir_lat nadir_lon
orientation id zoom. A database image is north-up, its date can be a year; one id for the years of a region. What is no
JPEG becomes one: transparency over black, 65,535 of 16 bits white; other depths are refused.
"""

import json
import os
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import shapely
from PIL import Image

from datasets import grid
from datasets.build import flags
from datasets.build.camera import great_circle
from datasets.build.check_names import corner_orientations
from datasets.csv_rows import read_csv
from datasets.images import read_header, read_pixels, save_jpeg
from datasets.names import CORNER_FIELDS, DATABASE_YEAR, ImageName
from datasets.overlap import INTERSECTIONS_FILE, degenerate, ring, self_crossing, write_positives
from utils import geo
from utils.files import replacing

OPTIONAL = ("nadir_lat", "nadir_lon", "orientation", "id", "zoom")
CENTER = ("lat", "lon", "size_km", "width_km", "height_km", "azimuth")
COLUMNS = ("path", "date", *CORNER_FIELDS, *CENTER, *OPTIONAL)
NEEDED = f"path, date, and {CORNER_FIELDS[0]} … {CORNER_FIELDS[-1]} or lat, lon, size_km"
MAX_ERRORS = 10  # reported at a time


@dataclass(frozen=True)
class Row:
    """One row: where it stands, for messages, and its columns as text ('' where there is none)."""

    place: str
    columns: dict

    def error(self, column: str, problem: object) -> ValueError:
        return ValueError(f"{self.place}, column {column}: {problem}")

    def number(self, column: str, default: float | None = None, limit: float = np.inf) -> float:
        text = self.columns.get(column, "")
        if not text and default is not None:
            return default
        try:
            value = float(text)
        except ValueError:
            raise self.error(column, f"{text!r} is no number" if text else "is empty or missing") from None
        if not abs(value) <= limit or not np.isfinite(value):
            raise self.error(column, f"{text} is not within ±{limit:g}")
        return value


def read_list(path: Path) -> list[Row]:
    """CSV or GeoJSON file -> rows. Raises ValueError naming the file, the row and the column."""
    rows = list((rows_of_geojson if path.suffix.lower() in (".json", ".geojson") else rows_of_csv)(path))
    if not rows:
        raise ValueError(f"{path}: holds no image")
    return rows


def rows_of_csv(path: Path) -> Iterator[Row]:
    """As rows_of_geojson; the header names the columns."""
    lines = read_csv(path, NEEDED)
    _, header = next(lines)
    names = [name.lower() for name in header]
    if "path" not in names or "date" not in names:
        raise ValueError(f"{path}, line 1: expected a header with {NEEDED}, separated by commas; found {header}")
    wrong = [name for name in names if name not in COLUMNS or names.count(name) > 1]
    if wrong:
        raise ValueError(
            f"{path}, line 1: column {wrong[0]!r} is unknown or there twice; columns are {', '.join(COLUMNS)}"
        )
    for line, cells in lines:
        yield Row(f"{path}, line {line}", dict(zip(names, cells)))


def rows_of_geojson(path: Path) -> Iterator[Row]:
    """Features with a Polygon of four corners, or a Point and size_km; coordinates are lon, lat, as in GeoJSON."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; give a .csv or .geojson list of images")
    try:
        features = json.loads(path.read_text(encoding="utf-8-sig"))["features"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: is no GeoJSON FeatureCollection ({type(error).__name__}: {error})") from error
    for number, feature in enumerate(features, start=1):
        place = f"{path}, feature {number}"
        try:
            found, properties = shapely.geometry.shape(feature["geometry"]), dict(feature["properties"] or {})
        except (KeyError, TypeError, AttributeError, ValueError, shapely.GEOSException) as error:
            raise ValueError(f"{place}, geometry: cannot be read ({type(error).__name__}: {error})") from error
        names = {"Point": ("lat", "lon"), "Polygon": CORNER_FIELDS}.get(found.geom_type, ())
        points = shapely.get_coordinates(found)[: -1 if found.geom_type == "Polygon" else None].tolist()
        if not names or 2 * len(points) != len(names):
            raise ValueError(
                f"{place}, geometry: is a {found.geom_type} of {len(points)} corners, expected a Polygon of 4, or a "
                f"Point and size_km"
            )
        columns = {str(name).lower(): "" if value is None else str(value) for name, value in properties.items()}
        columns |= dict(zip(names, (str(value) for lon, lat in points for value in (lat, lon))))
        yield Row(place, {name: value for name, value in columns.items() if name in COLUMNS})


def square_corners(center: tuple[float, float], width_km: float, height_km: float, azimuth: float) -> np.ndarray:
    """Centre (lat, lon), km, and the compass direction of the picture's up -> (4, 2): BL, TL, TR, BR, on the sphere."""
    right, up = np.array([-1, -1, 1, 1]) * width_km / 2, np.array([-1, 1, 1, -1]) * height_km / 2
    bearing = np.arctan2(right, up) + np.radians(azimuth)
    lat, lon = great_circle(center, bearing, np.hypot(right, up) / geo.EARTH_RADIUS_KM)
    return np.stack([lat, geo.wrap_longitude(lon)], axis=1)


def footprint_of(row: Row) -> np.ndarray:
    """-> (4, 2) degrees. ValueError where it is no quadrilateral."""
    if any(row.columns.get(name) for name in CORNER_FIELDS):
        numbers = [row.number(name, limit=90 if "lat" in name else 360) for name in CORNER_FIELDS]
        corners = np.array(numbers).reshape(4, 2)
    else:
        lat, lon = row.number("lat", limit=90), row.number("lon", limit=360)
        size = None if row.columns.get("width_km") and row.columns.get("height_km") else row.number("size_km")
        width, height = row.number("width_km", size), row.number("height_km", size)
        if not (0 < width < 10_000 and 0 < height < 10_000):
            raise row.error("size_km", f"{width:g} × {height:g} km is not between 0 and 10,000")
        corners = square_corners((lat, lon), width, height, row.number("azimuth", 0.0))
    corners[:, 1] = np.where(np.abs(corners[:, 1]) <= 180, corners[:, 1], geo.wrap_longitude(corners[:, 1]))
    if degenerate(corners[None])[0]:
        raise row.error(CORNER_FIELDS[0], "the four corners have no area; are latitude and longitude right?")
    if self_crossing(corners[None])[0]:
        raise row.error(CORNER_FIELDS[0], "the edges cross over; list the corners in the order around the image")
    return corners


def date_of(row: Row, is_query: bool) -> str:
    """-> yyyymmdd of a query, yyyy of a database image."""
    text = row.columns.get("date", "")
    digits = re.sub(r"(\d{4})-(\d\d)-(\d\d)([T ].*)?", r"\1\2\3", text)
    try:
        if not re.fullmatch(r"\d{8}" if is_query else r"\d{4}(\d{4})?", digits):
            raise ValueError
        np.datetime64("-".join(filter(None, (digits[:4], digits[4:6], digits[6:]))))
    except ValueError:
        raise row.error("date", f"{text!r} is no date yyyy-mm-dd{'' if is_query else ' or year'}") from None
    return digits if is_query else digits[:4]


def source_of(row: Row, folder: Path, is_query: bool) -> tuple[Path, bool]:
    """-> the image's file, and whether it is a JPEG that can stay as it is."""
    text = row.columns.get("path", "")
    if not text:
        raise row.error("path", "is empty")
    path = (folder / text).absolute()
    try:
        size, kind = read_header(path)
    except FileNotFoundError:
        raise row.error("path", f"{path} does not exist (paths are relative to the list's folder)") from None
    except ValueError as error:
        raise row.error("path", error) from None
    if not is_query and size[0] != size[1]:
        raise row.error("path", f"{path} is {size[0]} × {size[1]} pixels; database images are square and north-up")
    return path, kind == "JPEG"


def plan_image(row: Row, folder: Path, is_query: bool) -> tuple[Path, bool, str]:
    """Row -> (its file, whether that is a JPEG, path in the data set)."""
    source, is_jpeg = source_of(row, folder, is_query)
    for column in ("azimuth", "orientation"):
        if not is_query and row.number(column, 0.0) % 360:
            raise row.error(
                column,
                f"is {row.columns[column]}; database images are north-up: leave it out or 0, turn "
                f"the picture first, or build it from a GeoTIFF (datasets.build raster)",
            )
    corners, date = footprint_of(row), date_of(row, is_query)
    corners = np.round(corners, 6 if is_query else 5) + 0.0  # no -0.0
    center = geo.centers(corners)
    if not is_query:
        center = geo.unwrap_footprints(corners).mean(axis=0)
        center[1] = geo.wrap_longitude(center[1])
    nadir = (row.number("nadir_lat", float(center[0]), 90), row.number("nadir_lon", float(center[1]), 180))
    if bool(row.columns.get("nadir_lat")) != bool(row.columns.get("nadir_lon")):
        raise row.error("nadir_lat", "nadir_lat and nadir_lon come together or not at all")
    if not is_query and row.columns.get("nadir_lat"):
        raise row.error("nadir_lat", "a database image has no nadir: its name holds its centre")
    own = f"OWN-{zlib.crc32(corners.tobytes()):08x}" if not is_query else source.stem
    image_id = re.sub(r"[@/\\\s]+", "-", row.columns.get("id", "") or own)
    turn = row.number("orientation", float(corner_orientations(corners[None])[0])) if is_query else 0.0
    name = ImageName(
        tuple(map(tuple, corners.tolist())),
        image_id,
        date,
        nadir,
        int(grid.quadrilateral_area(ring(corners[None]))[0]),
        turn,
    )
    if is_query:
        return source, is_jpeg, f"queries/{name}"
    # A region of the public data set is 4 tiles wide; the zoom says only which folder, and goes by the width.
    width = np.ptp(geo.unwrap_footprints(corners)[:, 1])
    zoom = int(row.number("zoom", float(np.clip(np.round(np.log2(360 * grid.TILES / width)), 0, 25)), 25))
    lat10, lon10 = (round(value / 10) * 10 for value in center.tolist())
    return source, is_jpeg, f"database/{date}_{zoom:02d}/{lat10}_{lon10}/{name}"


def plan_images(rows: list[Row], folder: Path, is_query: bool) -> list[tuple[Path, bool, str]]:
    """-> [(file, is JPEG, path in the data set)], nothing written. Raises ValueError with the rows' first errors."""
    images, errors, seen = [], [], {}
    for row in rows:
        try:
            image = plan_image(row, folder, is_query)
            name = ImageName.parse(image[2])
            key = (name.image_id, name.timestamp if not is_query else "")
            if seen.setdefault(key, row.place) != row.place:
                raise row.error(
                    "id",
                    f"{name.image_id} is that of {seen[key]} already; give each image its own"
                    + ("" if is_query else " (one id for the years of one region)"),
                )
            images.append(image)
        except ValueError as error:
            errors.append(str(error))
    if errors:
        more = [f"… and {len(errors) - MAX_ERRORS} more"] if len(errors) > MAX_ERRORS else []
        raise ValueError(
            "\n  ".join(
                [f"{len(errors)} of {len(rows)} rows cannot be used, nothing was written:", *errors[:MAX_ERRORS], *more]
            )
        )
    return images


def place(source: Path, is_jpeg: bool, target: Path, link: bool) -> None:
    """Puts the image there, whole or not at all. What is no JPEG becomes one, as read_image reads it."""
    if not is_jpeg:
        return save_jpeg(target, Image.fromarray(read_pixels(source).numpy()), 95)
    target.parent.mkdir(parents=True, exist_ok=True)
    with replacing(target, sync=False) as file:
        if link:
            os.unlink(file.name)
            os.symlink(source, file.name)
        else:
            file.write(source.read_bytes())


def main(
    output: flags.Output,
    *,
    list_file: Annotated[Path, ".csv, .geojson or .json", {"option": "--list", "metavar": "FILE"}],
    kind: Annotated[Literal["queries", "database"], "what they are", {"option": "--as"}],
    link: Annotated[bool, "symbolic links instead of copies"] = False,
) -> str:
    """-> How many images were placed; the intersections file is written anew where there are both kinds."""
    images = plan_images(read_list(list_file), list_file.parent, kind == "queries")
    for source, is_jpeg, path in images:
        place(source, is_jpeg, output / path, link)
    placed = f"{output}: {len(images):,} images as {kind}"
    if not ((output / "queries").is_dir() and any(output.glob(f"database/{DATABASE_YEAR}_*"))):
        return (
            f"{placed}; evaluation needs queries and a database of {DATABASE_YEAR}: the other part comes from "
            f"another list, or from datasets.build tiles or raster"
        )
    table = write_positives(output / INTERSECTIONS_FILE)
    return f"{placed}; {sum(map(bool, table.values())):,} of {len(table):,} queries have a positive"
