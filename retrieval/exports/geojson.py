"""NAME.geojson: the footprints of a photo's places, with all that is known of each as properties."""

import json

from retrieval.predictions import area
from utils.files import replacing


def collection(places, footprints) -> dict:
    """places: dicts, footprints (P, 4, 2) degrees -> a FeatureCollection, cut at the antimeridian (RFC 7946)."""
    features = [
        {"type": "Feature", "geometry": area(footprint), "properties": place}
        for place, footprint in zip(places, footprints)
    ]
    return {"type": "FeatureCollection", "features": features}


def write(folder, photo, places, footprints, pictures=(), matches=()):
    file = folder / f"{photo.stem}.geojson"
    with replacing(file, sync=False) as out:
        out.write((json.dumps(collection(places, footprints)) + "\n").encode())
    return file
