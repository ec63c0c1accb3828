"""NAME.parquet: places as GeoParquet 1.1, which geopandas, DuckDB and QGIS open."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import shapely

from utils.files import printable, replacing
from utils.outlines import GEO, outlines


def table(places: Sequence[dict], footprints: np.ndarray) -> pa.Table:
    """places: dicts, of as many photos as there are, footprints (P, 4, 2) degrees -> a column a property, the corners
    lat1, lon1 … lat4, lon4 in the photo's own order, and "geometry", cut at the antimeridian."""
    names = list(dict.fromkeys(name for place in places for name in place))
    columns = {name: pa.array([_value(place.get(name)) for place in places]) for name in names}
    for corner in range(4):
        for axis, name in enumerate(("lat", "lon")):
            columns[f"{name}{corner + 1}"] = pa.array([float(each[corner][axis]) for each in footprints], pa.float64())
    columns["geometry"] = pa.array(shapely.to_wkb(outlines(footprints)).tolist(), pa.binary())
    return pa.table(columns).replace_schema_metadata(GEO)


def write_table(file: Path, places: Sequence[dict], footprints: np.ndarray) -> Path:
    """-> the file, whole or not at all; for one photo's places or those of a whole run."""
    with replacing(file) as out:
        pq.write_table(table(places, footprints), out, compression="zstd")
    return file


def write(folder: Path, photo: Path, places: Sequence[dict], footprints: np.ndarray, *_: object) -> Path:
    return write_table(folder / f"{photo.name}.parquet", places, footprints)


def _value(value: object):
    return printable(value) if isinstance(value, str) else value
