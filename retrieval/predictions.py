"""What predict.py and predict_geoclip.py share: photos that cannot be read, and places as JSON, CSV and GeoJSON."""

import csv
import json
import logging

import numpy as np
import shapely
from shapely.geometry import mapping

from utils import geo
from utils.geo import ring
from utils.outlines import outlines


def readable_rows(paths, failures):
    """Rows of the paths that are not in failures [(row, what went wrong)], which are logged. Raises ValueError where
    none is left."""
    for _, error in failures:
        logging.info(f"left out: {error}")
    if len(failures) == len(paths):
        raise ValueError(f"none of the {len(paths)} images could be read, see above")
    if failures:
        logging.info(f"{len(failures)} of {len(paths)} images could not be read and are left out")
    return np.setdiff1d(np.arange(len(paths)), [row for row, _ in failures])


def write_predictions(folder, predictions, footprints=None):
    """-> predictions.json, predictions.csv and predictions.geojson in the folder.

    predictions: a list of dicts with the same keys, among them latitude and longitude, degrees. On the map each is a
    point, or where footprints (P, 4, 2) degrees are given its area; longitude first and counter-clockwise, as RFC 7946
    wants it. A byte of a file name that is no text stands as \\udcXX in all three; json.loads makes it the name again.
    """
    (folder / "predictions.json").write_text(json.dumps(predictions, indent=2) + "\n")
    with open(folder / "predictions.csv", "w", newline="", encoding="utf-8", errors="backslashreplace") as file:
        writer = csv.DictWriter(file, predictions[0].keys())
        writer.writeheader()
        writer.writerows(predictions)
    features = [
        {
            "type": "Feature",
            "geometry": point(each) if footprints is None else area(footprints[number]),
            "properties": {key: value for key, value in each.items() if key not in ("latitude", "longitude")},
        }
        for number, each in enumerate(predictions)
    ]
    collection = {"type": "FeatureCollection", "features": features}
    (folder / "predictions.geojson").write_text(json.dumps(collection) + "\n")


def point(prediction):
    return {"type": "Point", "coordinates": [prediction["longitude"], prediction["latitude"]]}


def area(footprint):
    """Corners (4, 2) degrees -> GeoJSON geometry, cut at the antimeridian."""
    return mapping(outlines(footprint)[0])


def distances_to_footprints(footprints, point, points_per_edge=16):
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
