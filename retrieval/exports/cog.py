"""NAME_map.tif: the photo warped onto the map as a Cloud-Optimized GeoTIFF, Web Mercator, transparent around it."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from datasets.images import read_pixels
from retrieval.exports.geotiff import tags
from retrieval.exports.warp import native_grid, warp
from utils.files import replacing


def write(folder: Path, photo: Path, places: Sequence[dict], footprints: np.ndarray, *_: object) -> Path:
    """ValueError where the first place's corners are no view of a camera. Over the antimeridian, x passes the map's
    edge, where GIS programs show it beside the rest."""
    import rasterio.shutil
    from rasterio.io import MemoryFile
    from rasterio.transform import from_bounds

    pixels = read_pixels(photo, upright=True).numpy()
    box, columns, rows = native_grid(footprints[0], pixels.shape[1], pixels.shape[0])
    laid = warp(pixels, footprints[0], box, columns, rows)
    file = folder / f"{photo.name}_map.tif"
    shape = dict(driver="GTiff", width=columns, height=rows, count=4, dtype="uint8", photometric="RGB", alpha="yes")
    with MemoryFile() as plain, MemoryFile() as optimized:
        with plain.open(**shape, crs="EPSG:3857", transform=from_bounds(*box, columns, rows)) as target:
            target.write(np.ascontiguousarray(laid.transpose(2, 0, 1)))
            target.update_tags(**tags(places[0]))
        with plain.open() as source:
            rasterio.shutil.copy(
                source, optimized.name, driver="COG", compress="deflate", predictor="yes", overview_resampling="average"
            )
        with replacing(file, sync=False) as out:
            out.write(optimized.getbuffer())
    return file
