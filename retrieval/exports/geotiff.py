"""NAME.tif: the photo's own pixels with its four corners as ground control points (EPSG:4326).

A GIS turns four points into an affine map or a spline of its own; NAME_map.tif (cog.py) is warped by the homography.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from datasets.images import read_pixels
from utils import geo
from utils.files import replacing
from utils.mercator import require_view


def write(folder: Path, photo: Path, places: Sequence[dict], footprints: np.ndarray, *_: object) -> Path:
    """Lossless, as a viewer shows the photo. ValueError where the first place's corners are no view of a camera."""
    from rasterio.io import MemoryFile

    pixels = read_pixels(photo, upright=True).numpy()
    height, width = pixels.shape[:2]
    file = folder / f"{photo.name}.tif"
    with MemoryFile() as memory:
        with memory.open(
            driver="GTiff",
            width=width,
            height=height,
            count=3,
            dtype="uint8",
            photometric="RGB",
            compress="deflate",
            predictor=2,
            tiled=True,
            gcps=control_points(footprints[0], width, height),
            crs="EPSG:4326",
        ) as target:
            target.write(np.ascontiguousarray(pixels.transpose(2, 0, 1)))
            target.update_tags(**tags(places[0]))
        with replacing(file, sync=False) as out:
            out.write(memory.getbuffer())
    return file


def control_points(footprint: np.ndarray, width: int, height: int) -> list:
    """Corners (4, 2) -> rasterio's points: x longitude, y latitude, col and row from the photo's outer edge."""
    from rasterio.control import GroundControlPoint

    corners = require_view(footprint)
    corners[:, 1] += geo.wrap_longitude(corners[:, 1].mean()) - corners[:, 1].mean()
    pixels = [(height, 0), (0, 0), (0, width), (height, width)]
    return [GroundControlPoint(row, col, float(lon), float(lat)) for (row, col), (lat, lon) in zip(pixels, corners)]


def tags(place: dict) -> dict:
    """A place -> texts to be kept in a TIFF; None is left out."""
    return {
        key: str(value).encode("ascii", "backslashreplace").decode()
        for key, value in place.items()
        if value is not None
    }
