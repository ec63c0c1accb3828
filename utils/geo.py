"""Spherical geometry on arrays of (latitude, longitude) in degrees."""

import numpy as np
from numpy.typing import ArrayLike

EARTH_RADIUS_KM = 6371.0
MERCATOR_HALF = np.pi * 6378137  # metres: the edge of Web Mercator's square


def distance_km(a: ArrayLike, b: ArrayLike) -> np.ndarray:
    """Great-circle distance. a (..., 2), b (..., 2) degrees, broadcast -> (...) km.

    The haversine form: exact for close points, and clipped so that antipodes give half the circumference, not NaN.
    """
    lat_a, lon_a = np.radians(np.moveaxis(np.asarray(a, dtype=np.float64), -1, 0))
    lat_b, lon_b = np.radians(np.moveaxis(np.asarray(b, dtype=np.float64), -1, 0))
    haversine = np.sin((lat_b - lat_a) / 2) ** 2 + np.cos(lat_a) * np.cos(lat_b) * np.sin((lon_b - lon_a) / 2) ** 2
    return 2 * EARTH_RADIUS_KM * np.arcsin(np.sqrt(np.clip(haversine, 0, 1)))


def wrap_longitude(longitude: ArrayLike) -> np.ndarray:
    """Any longitude in degrees -> the same one in [-180, 180)."""
    return (np.asarray(longitude, dtype=np.float64) + 180) % 360 - 180


def unwrap_footprints(footprints: ArrayLike) -> np.ndarray:
    """(..., 4, 2) -> the same footprints with longitudes that do not jump at the antimeridian.

    Every corner is moved by whole turns to within half a turn of the first one, so longitudes can pass ±180.
    """
    unwrapped = np.array(footprints, dtype=np.float64)
    turns = np.floor((unwrapped[..., 1] - unwrapped[..., :1, 1] + 180) / 360)
    unwrapped[..., 1] -= 360 * turns  # nothing is rounded where there is no jump
    return unwrapped


def ring(footprints: ArrayLike) -> np.ndarray:
    """(N, 4, 2) -> the same corners in circular order around their mean, longitudes unwrapped; any order comes in."""
    points = unwrap_footprints(footprints)
    offset = points - points.mean(axis=-2, keepdims=True)
    order = np.argsort(np.arctan2(offset[..., 0], offset[..., 1]), axis=-1, kind="stable")
    return np.take_along_axis(points, order[..., None], axis=-2)


def to_unit_vectors(points: ArrayLike) -> np.ndarray:
    """(..., 2) degrees -> (..., 3) unit vectors: x to (0, 0), y to (0, 90 E), z to the North Pole."""
    lat, lon = np.radians(np.moveaxis(np.asarray(points, dtype=np.float64), -1, 0))
    return np.stack([np.cos(lat) * np.cos(lon), np.cos(lat) * np.sin(lon), np.sin(lat)], axis=-1)


def from_unit_vectors(vectors: ArrayLike) -> np.ndarray:
    """(..., 3) vectors of any length -> (..., 2) degrees."""
    x, y, z = np.moveaxis(np.asarray(vectors, dtype=np.float64), -1, 0)
    return np.degrees(np.stack([np.arctan2(z, np.hypot(x, y)), np.arctan2(y, x)], axis=-1))


def centers(footprints: ArrayLike) -> np.ndarray:
    """(..., 4, 2) -> (..., 2), the mean of the four corners on the sphere, which is safe at the antimeridian."""
    return from_unit_vectors(to_unit_vectors(footprints).mean(axis=-2))


def to_mercator(points: ArrayLike) -> np.ndarray:
    """(..., 2) lat, lon in degrees -> (..., 2) x, y in metres of Web Mercator (EPSG:3857), y to the north.

    Longitudes beyond ±180 go on beyond the map's edge, so unwrapped footprints stay in one piece.
    """
    lat, lon = np.moveaxis(np.asarray(points, dtype=np.float64), -1, 0)
    return np.stack([lon / 180 * MERCATOR_HALF, np.arcsinh(np.tan(np.radians(lat))) / np.pi * MERCATOR_HALF], axis=-1)


def from_mercator(points: ArrayLike) -> np.ndarray:
    """(..., 2) metres of Web Mercator -> (..., 2) lat, lon in degrees; x beyond the map's edge: lon beyond ±180."""
    x, y = np.moveaxis(np.asarray(points, dtype=np.float64) / MERCATOR_HALF, -1, 0)
    return np.stack([np.degrees(np.arctan(np.sinh(np.pi * y))), x * 180], axis=-1)
