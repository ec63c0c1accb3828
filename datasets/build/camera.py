"""A pinhole camera above a spherical Earth: image coordinates <-> ground, footprint, orientation.

Image coordinates: u runs from 0 (left edge) to 1 (right edge), v from 0 (top edge) to 1 (bottom edge).
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from utils import geo


@dataclass(frozen=True)
class Camera:
    """Where a camera is and where it looks. Degrees, km, mm.

    nadir: (lat, lon) below the camera. tilt: angle between straight down and the boresight. azimuth: compass direction
    in which the boresight leans. roll: clockwise turn of the camera about its boresight, as the photographer sees it;
    with roll 0 the photo's up points away from the nadir along `azimuth`. sensor_mm: (width, height).
    """

    nadir: tuple
    altitude_km: float
    tilt: float
    azimuth: float
    roll: float
    focal_mm: float
    sensor_mm: tuple = (36.0, 23.9)

    def __post_init__(self) -> None:
        if not (self.altitude_km > 0 and self.focal_mm > 0 and min(self.sensor_mm) > 0):
            raise ValueError(f"{self}: altitude_km, focal_mm and sensor_mm must be positive")


def _north_east(up: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Unit vectors up (..., 3) -> unit vectors to the north and to the east, each (..., 3)."""
    east = np.stack([-up[..., 1], up[..., 0], np.zeros_like(up[..., 0])], axis=-1)
    length = np.linalg.norm(east, axis=-1, keepdims=True)
    east = np.where(length > 1e-12, east / np.maximum(length, 1e-12), (0.0, 1.0, 0.0))  # any direction at a pole
    return np.cross(up, east), east


def _pose(camera: Camera) -> tuple[np.ndarray, ...]:
    """Position (3,) in Earth radii, and the unit vectors forward, right, up of the camera, each (3,)."""
    zenith = geo.to_unit_vectors(camera.nadir)
    north, east = _north_east(zenith)
    tilt, azimuth, roll = np.radians([camera.tilt, camera.azimuth, camera.roll])
    lean = np.cos(azimuth) * north + np.sin(azimuth) * east
    forward = np.sin(tilt) * lean - np.cos(tilt) * zenith
    level_up = np.cos(tilt) * lean + np.sin(tilt) * zenith
    level_right = np.cross(forward, level_up)
    right = np.cos(roll) * level_right - np.sin(roll) * level_up
    up = np.cos(roll) * level_up + np.sin(roll) * level_right
    return zenith * (1 + camera.altitude_km / geo.EARTH_RADIUS_KM), forward, right, up


def _hits(camera: Camera, u: ArrayLike, v: ArrayLike) -> np.ndarray:
    """(...), (...), broadcast -> unit vectors (..., 3) of the points where the rays meet Earth; NaN where they miss."""
    position, forward, right, up = _pose(camera)
    x = (np.asarray(u, dtype=np.float64) - 0.5) * (camera.sensor_mm[0] / camera.focal_mm)
    y = (0.5 - np.asarray(v, dtype=np.float64)) * (camera.sensor_mm[1] / camera.focal_mm)
    # ray = forward + x right + y up. |position + t ray|² = 1: the smaller root is the near side of Earth.
    a = 1 + x**2 + y**2
    b = forward @ position + x * (right @ position) + y * (up @ position)
    c = position @ position - 1
    square = b**2 - a * c
    hit = (square >= 0) & (b < 0)
    # c / (-b + root) is the smaller root without the cancellation of (-b - root) / a.
    t = c / np.where(hit, -b + np.sqrt(np.where(hit, square, 0)), np.nan)
    return position + t[..., None] * ((forward + x[..., None] * right) + y[..., None] * up)


def ground_points(camera: Camera, u: ArrayLike, v: ArrayLike) -> np.ndarray:
    """u (...), v (...) across the image -> (..., 2) lat, lon of the ground seen; NaN where the ray misses Earth."""
    return geo.from_unit_vectors(_hits(camera, u, v))


def project(camera: Camera, latlon: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """(..., 2) degrees -> u (...), v (...); outside [0, 1] beyond the image, NaN behind the horizon or the camera."""
    position, forward, right, up = _pose(camera)
    points = geo.to_unit_vectors(latlon)
    offset = points - position
    depth = offset @ forward
    visible = (depth > 0) & (points @ position >= 1)
    depth = np.where(visible, depth, np.nan)
    u = 0.5 + offset @ right / depth * (camera.focal_mm / camera.sensor_mm[0])
    v = 0.5 - offset @ up / depth * (camera.focal_mm / camera.sensor_mm[1])
    return u, v


def footprint(camera: Camera) -> np.ndarray:
    """(4, 2) lat, lon of the image's bottom-left, top-left, top-right and bottom-right corners; NaN off Earth."""
    return ground_points(camera, np.array([0.0, 0.0, 1.0, 1.0]), np.array([1.0, 0.0, 0.0, 1.0]))


def orientation(camera: Camera) -> float:
    """Degrees in [-180, 180) from the photo's up to north, clockwise in the photo, at the image's centre.

    That is minus the compass azimuth of the photo's up, the convention of the public data set's names. NaN where the
    boresight misses Earth.
    """
    _, forward, _, up = _pose(camera)
    ground = _hits(camera, 0.5, 0.5)
    # A small step up in the photo moves the ray by `up`; slide along the ray back into the ground's tangent plane.
    step = up - forward * (up @ ground) / (forward @ ground)
    north, east = _north_east(ground)
    return float(geo.wrap_longitude(-np.degrees(np.arctan2(step @ east, step @ north))))


def incidence(camera: Camera, u: ArrayLike, v: ArrayLike) -> np.ndarray:
    """u (...), v (...) -> cosine (...) of the angle between the ray and the ground's vertical; NaN off Earth."""
    position = _pose(camera)[0]
    ground = _hits(camera, u, v)
    ray = position - ground
    return (ray * ground).sum(axis=-1) / np.linalg.norm(ray, axis=-1)


def great_circle(start: ArrayLike, bearing: ArrayLike, angle: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """(lat, lon) degrees, compass bearing and length in radians -> lat, lon at its end, degrees, lon as it comes."""
    lat, lon = np.radians(start)
    sin_lat = np.sin(lat) * np.cos(angle) + np.cos(lat) * np.sin(angle) * np.cos(bearing)
    east = np.arctan2(np.sin(bearing) * np.sin(angle) * np.cos(lat), np.cos(angle) - np.sin(lat) * sin_lat)
    return np.degrees(np.arcsin(np.clip(sin_lat, -1, 1))), np.degrees(lon + east)
