"""NAME.parquet: places as GeoParquet 1.1, which geopandas, DuckDB and QGIS open."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from datasets.names import CORNER_FIELDS
from utils.files import printable, replacing
from utils.outlines import GEO, geometry


def table(places: Sequence[dict], footprints: np.ndarray) -> pa.Table:
    """places: dicts, of as many photos as there are, footprints (P, 4, 2) degrees -> a column a property, the corners
    lat1, lon1 … lat4, lon4 in the photo's own order, and "geometry", cut at the antimeridian."""
    names = list(dict.fromkeys(name for place in places for name in place))
    text = lambda value: printable(value) if isinstance(value, str) else value
    columns = {name: pa.array([text(place.get(name)) for place in places]) for name in names}
    corners = np.array(footprints, dtype=np.float64).reshape(-1, 8)
    columns |= dict(zip(CORNER_FIELDS, map(pa.array, corners.T.copy())))
    return pa.table({**columns, "geometry": geometry(footprints)}).replace_schema_metadata(GEO)


def write_table(file: Path, places: Sequence[dict], footprints: np.ndarray) -> Path:
    """-> the file, whole or not at all; for one photo's places or those of a whole run."""
    with replacing(file) as out:
        pq.write_table(table(places, footprints), out, compression="zstd")
    return file


def write(folder: Path, photo: Path, places: Sequence[dict], footprints: np.ndarray, *_: object) -> Path:
    return write_table(folder / f"{photo.name}.parquet", places, footprints)
