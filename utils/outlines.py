"""Footprints as shapely geometries, longitude first: the one place where they are cut at the antimeridian."""

import json

import numpy as np
import pyarrow as pa
import shapely
from shapely.geometry import MultiPolygon, Polygon
from shapely.geometry.polygon import orient

from utils import geo

# Metadata of a Parquet file whose column "geometry" holds them as WKB: GeoParquet 1.1.
GEO = {
    b"geo": json.dumps(
        {
            "version": "1.1.0",
            "primary_column": "geometry",
            "columns": {"geometry": {"encoding": "WKB", "geometry_types": ["Polygon", "MultiPolygon"]}},
        }
    ).encode()
}
MAP = shapely.box(-180, -90, 180, 90)


def outlines(footprints: np.ndarray) -> np.ndarray:
    """(N, 4, 2) degrees, corners in any order -> (N,) Polygons, counter-clockwise as RFC 7946 wants them.

    Over the antimeridian it is a MultiPolygon of what lies on either side (RFC 7946, sec. 3.1.9). Around a pole, it
    reaches from edge to edge of the map.
    """
    footprints = np.asarray(footprints, dtype=np.float64).reshape(-1, 4, 2)
    points = geo.ring(footprints)[..., ::-1]
    shapes = shapely.polygons(points)
    longitudes = footprints[..., 1]
    steps = geo.wrap_longitude(np.roll(longitudes, -1, axis=1) - longitudes)  # each edge goes the short way round
    around = np.abs(steps.sum(axis=1)) > 180
    for row in np.flatnonzero(around):
        shapes[row] = _around_pole(footprints[row], steps[row])
    over = np.flatnonzero(around | (np.abs(points[..., 0]) > 180).any(axis=-1))
    turned = [shapely.transform(shapes[over], lambda xy: xy + [turn, 0]) for turn in (-360, 0, 360)]
    parts = shapely.intersection(np.stack(turned), MAP)
    parts[shapely.area(parts) == 0] = None  # an edge on the antimeridian
    shapes[over] = [_counter_clockwise(each) for each in shapely.union_all(parts, axis=0)]
    return shapes


def geometry(footprints: np.ndarray) -> pa.Array:
    """(N, 4, 2) degrees -> Arrow array (N,): the outlines as a GeoParquet file with the metadata GEO has them."""
    return pa.array(shapely.to_wkb(outlines(footprints)).tolist(), pa.binary())


def _around_pole(footprint: np.ndarray, steps: np.ndarray):
    """Corners (4, 2) in circular order, steps (4,) of longitude -> the Polygon to the pole's edge of the map."""
    (lat, lon), pole = footprint.T, np.copysign(90, footprint[:, 0].mean())
    lon = lon[0] + np.cumsum([0, *steps])
    return Polygon([*zip(lon, [*lat, lat[0]]), (lon[-1], pole), (lon[0], pole)])


def _counter_clockwise(shape: shapely.Geometry):
    if shape.geom_type == "Polygon":
        return orient(shape)
    return MultiPolygon([orient(part) for part in shape.geoms])
