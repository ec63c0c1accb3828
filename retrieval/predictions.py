"""What predict.py and predict_geoclip.py share: photos that cannot be read, and places as JSON, CSV and GeoJSON."""

import csv
import json
import logging
from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from pathlib import Path

import numpy as np
import shapely
from numpy.typing import ArrayLike
from shapely.geometry import mapping

from utils import geo
from utils.files import replacing_text
from utils.geo import ring
from utils.outlines import outlines


def readable_rows(paths: Sequence, failures: list[tuple[int, str]]) -> np.ndarray:
    """Rows of the paths that are not in failures [(row, what went wrong)], which are logged. Raises ValueError where
    none is left."""
    for _, error in failures:
        logging.info(f"left out: {error}")
    if len(failures) == len(paths):
        raise ValueError(f"none of the {len(paths)} images could be read, see above")
    if failures:
        logging.info(f"{len(failures)} of {len(paths)} images could not be read and are left out")
    return np.setdiff1d(np.arange(len(paths)), [row for row, _ in failures])


def write_predictions(folder: Path, places: Callable[[], Iterable[tuple[dict, np.ndarray | None]]]) -> None:
    """-> predictions.json, predictions.csv and predictions.geojson in the folder, each whole or not at all.

    places: a function that goes through (properties, footprint), as often as it is called; one is in memory at a time.
    Properties have the same keys, among them latitude and longitude, degrees. On the map each place is its footprint
    (4, 2) degrees, or a point where that is None; longitude first and counter-clockwise, as RFC 7946 wants it. A byte
    of a file name that is no text stands as \\udcXX in all three; json.loads makes it the name again.
    """
    with replacing_text(folder / "predictions.json", sync=False) as file:
        file.writelines(_listed("[\n", (json.dumps(properties) for properties, _ in places()), "\n]\n"))
    with replacing_text(folder / "predictions.geojson", sync=False) as file:
        file.writelines(_listed('{"type": "FeatureCollection", "features": [\n', _features(places()), "\n]}\n"))
    with replacing_text(folder / "predictions.csv", sync=False) as file:
        writer = None
        for properties, _ in places():
            if writer is None:
                writer = csv.DictWriter(file, properties.keys())
                writer.writeheader()
            writer.writerow(properties)


def _listed(begin: str, items: Iterable[str], end: str):
    """Texts -> pieces of a JSON list, an item a line."""
    yield begin
    for number, item in enumerate(items):
        yield (",\n" if number else "") + item
    yield end


def _features(places: Iterable[tuple], block: int = 1000):
    """Places -> each one's Feature as JSON. Outlines are made for a block at once: one by one they take ten times as
    long as all else."""
    places = iter(places)
    while part := list(islice(places, block)):
        areas = [footprint for _, footprint in part if footprint is not None]
        shapes = iter(shapely.to_geojson(outlines(np.array(areas))).tolist() if areas else [])
        for properties, footprint in part:
            geometry = json.dumps(point(properties)) if footprint is None else next(shapes)
            yield f'{{"type": "Feature", "geometry": {geometry}, "properties": {json.dumps(properties)}}}'


def point(prediction: dict) -> dict:
    """-> GeoJSON geometry."""
    return {"type": "Point", "coordinates": [prediction["longitude"], prediction["latitude"]]}


def area(footprint: np.ndarray) -> dict:
    """Corners (4, 2) degrees -> GeoJSON geometry, cut at the antimeridian."""
    return mapping(outlines(footprint)[0])


def distances_to_footprints(footprints: np.ndarray, point: ArrayLike, points_per_edge: int = 16) -> np.ndarray:
    """footprints (N, 4, 2), point (lat, lon), degrees -> (N,) km to the nearest ground of each, 0 where it lies inside.

    Edges are straight in latitude and longitude, as on the map that the database is cut from. Their points are laid
    out around `point` at their true distances and directions (azimuthal equidistant projection).
    """
    corners = ring(footprints)[:, :, None]
    share = np.arange(points_per_edge)[:, None] / points_per_edge
    outlines = corners + share * (np.roll(corners, -1, axis=1) - corners)
    lat, lon = np.radians(point)
    east = np.array([-np.sin(lon), np.cos(lon), 0])
    north = np.array([-np.sin(lat) * np.cos(lon), -np.sin(lat) * np.sin(lon), np.cos(lat)])
    flat = geo.to_unit_vectors(outlines) @ np.stack([east, north], axis=1)
    flat *= (geo.distance_km(outlines, point) / np.maximum(np.linalg.norm(flat, axis=-1), 1e-12))[..., None]
    return shapely.distance(shapely.polygons(flat.reshape(len(flat), 4 * points_per_edge, 2)), shapely.Point(0, 0))
