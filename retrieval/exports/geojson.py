"""NAME.geojson: the footprints of a photo's places, with all that is known of each as properties."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from retrieval.predictions import area
from utils.files import replacing


def collection(places: Sequence[dict], footprints: np.ndarray) -> dict:
    """places: dicts, footprints (P, 4, 2) degrees -> a FeatureCollection, cut at the antimeridian (RFC 7946)."""
    features = [
        {"type": "Feature", "geometry": area(footprint), "properties": place}
        for place, footprint in zip(places, footprints)
    ]
    return {"type": "FeatureCollection", "features": features}


def write(folder: Path, photo: Path, places: Sequence[dict], footprints: np.ndarray, *_: object) -> Path:
    file = folder / f"{photo.name}.geojson"
    with replacing(file, sync=False) as out:
        out.write((json.dumps(collection(places, footprints)) + "\n").encode())
    return file
