"""What predict.py and predict_geoclip.py share: photos that cannot be read, and places as JSON, CSV and GeoJSON."""

import csv
import json
import logging

import numpy as np
from shapely.geometry import Polygon, mapping
from shapely.geometry.polygon import orient


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
    wants it.
    """
    (folder / "predictions.json").write_text(json.dumps(predictions, indent=2) + "\n")
    with open(folder / "predictions.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, predictions[0].keys())
        writer.writeheader()
        writer.writerows(predictions)
    features = [{"type": "Feature",
                 "geometry": point(each) if footprints is None else area(footprints[number]),
                 "properties": {key: value for key, value in each.items() if key not in ("latitude", "longitude")}}
                for number, each in enumerate(predictions)]
    collection = {"type": "FeatureCollection", "features": features}
    (folder / "predictions.geojson").write_text(json.dumps(collection) + "\n")


def point(prediction):
    return {"type": "Point", "coordinates": [prediction["longitude"], prediction["latitude"]]}


def area(footprint):
    """Corners (4, 2) degrees, in order around it -> its polygon, counter-clockwise."""
    return mapping(orient(Polygon(footprint[:, ::-1].tolist())))
