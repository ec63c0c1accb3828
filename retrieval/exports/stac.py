"""NAME.stac.json: a STAC item of the photo at its first place, with the other files beside it as assets."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path, PurePath
from typing import TYPE_CHECKING
from urllib.parse import quote

import numpy as np
import shapely

from datasets.images import read_header
from datasets.nadirs import time_of_photo
from datasets.names import ImageName
from utils import geo
from utils.files import printable, replacing
from utils.outlines import outlines

if TYPE_CHECKING:
    import pystac

FIRST_PHOTO = datetime(1961, 1, 1, tzinfo=UTC)  # nobody was up there before: the start where the time is not known
COG_TYPE = "image/tiff; application=geotiff; profile=cloud-optimized"
# Suffix of a file beside the item -> its asset's name, media type and role.
ASSETS = {
    ".tif": ("gcps", "image/tiff; application=geotiff", "data"),
    "_map.tif": ("cog", COG_TYPE, "visual"),
    ".kmz": ("kmz", "application/vnd.google-earth.kmz", "overview"),
    ".geojson": ("geojson", "application/geo+json", "metadata"),
    ".parquet": ("geoparquet", "application/vnd.apache.parquet", "metadata"),
    ".report.html": ("report", "text/html", "overview"),
}


def write(folder: Path, photo: Path, places: Sequence[dict], footprints: np.ndarray, *_: object) -> Path:
    one = item(photo, places[0], footprints[0])
    one.add_asset("photo", _asset(folder, photo, f"image/{read_header(photo)[1].lower()}", "data"))
    for suffix, (name, kind, role) in ASSETS.items():
        if (file := folder / f"{photo.name}{suffix}").exists():
            one.add_asset(name, _asset(folder, file, kind, role))
    file = folder / f"{photo.name}.stac.json"
    with replacing(file, sync=False) as out:
        out.write((json.dumps(one.to_dict(include_self_link=False), indent=2) + "\n").encode())
    return file


def item(photo: Path, place: dict, footprint: np.ndarray) -> pystac.Item:
    """-> pystac.Item without assets. Its time is that of `time_taken`, or from the first photo ever to the file's."""
    import pystac

    taken = time_taken(photo)
    span = (
        {}
        if taken
        else {"start_datetime": FIRST_PHOTO, "end_datetime": datetime.fromtimestamp(os.stat(photo).st_mtime, UTC)}
    )
    properties = {
        f"earthloc:{key}": printable(value) if isinstance(value, str) else value
        for key, value in place.items()
        if value is not None and key != "image"
    }
    properties["title"] = printable(PurePath(str(place.get("image", photo))).name)
    shape = outlines(footprint)[0]
    return pystac.Item(
        id=printable(photo.name),
        geometry=json.loads(json.dumps(shapely.geometry.mapping(shape))),  # tuples become lists
        bbox=box_of(footprint),
        datetime=taken,
        properties=properties,
        **span,
    )


def box_of(footprint: np.ndarray) -> list[float]:
    """Corners (4, 2) -> west, south, east, north in degrees; west > east over the antimeridian (RFC 7946)."""
    lat, lon = geo.unwrap_footprints(footprint).T
    if len(getattr(shape := outlines(footprint)[0], "geoms", ())) > 1:
        west, east = geo.wrap_longitude([lon.min(), lon.max()]).tolist()
        return [west, float(lat.min()), east, float(lat.max())]
    return list(shape.bounds)


def time_taken(photo: Path) -> datetime | None:
    """The time in the photo's EXIF (see `time_of_photo`), or the day in its EarthLoc name; None where neither."""
    if (taken := time_of_photo(photo)) is not None:
        return taken
    try:
        return datetime.strptime(ImageName.parse(photo.name).timestamp, "%Y%m%d").replace(tzinfo=UTC)
    except ValueError:
        return None


def _asset(folder: Path, file: Path, kind: str, role: str):
    import pystac

    href = quote(os.fsencode(os.path.relpath(file, folder)))
    return pystac.Asset(href=href if "/" in href else f"./{href}", media_type=kind, roles=[role])
