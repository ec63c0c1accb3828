"""The camera that took a photo, from points whose place is known and the nadir: a footprint that holds away from them.

A homography has eight free numbers, and where clouds leave only a corner of the photo to be matched, its other corners
swing. A camera above a known nadir has five: three of direction, two of the lens (the second because data sets squash
photos to squares). It sees the Earth as the sphere that it is. It must be a whole photo, though: a crop's axis is not
in its middle. So what fits worse than the homography is not taken.
"""

import numpy as np
from scipy.optimize import least_squares
from scipy.spatial.transform import Rotation

from utils import geo

ALTITUDE_KM, ALTITUDE_SPREAD_KM = 415.0, 10.0  # the station's since 2014
NADIR_SPREAD_DEGREES = 0.05  # names round it to tenths
ENOUGH = 12  # points


def footprint_by_pose(
    photo_points: np.ndarray,
    ground_points: np.ndarray,
    size: tuple[int, int],
    nadir: tuple[float, float],
    guess: np.ndarray,
) -> tuple[np.ndarray, np.ndarray] | None:
    """photo_points (N, 2) x, y of a photo of size (width, height) pixels; ground_points (N, 2) and nadir (2,) lat, lon;
    guess (4, 2): the footprint by other means, bottom-left, top-left, top-right, bottom-right.

    -> the footprint (4, 2) of the camera that fits best, and (N,) how far from its place it sees each point, pixels.
    None where there are too few points, or a corner misses the Earth.
    """
    if len(photo_points) < ENOUGH:
        return None
    ground = geo.to_unit_vectors(ground_points)
    start = first_guess(geo.to_unit_vectors(guess), position(nadir, ALTITUDE_KM), size)
    if start is None:
        return None
    axes, focal = start

    def camera(values: np.ndarray):
        """values (8,): small turns, logarithms of the lens, nadir and altitude in their spreads -> its parts."""
        place = np.asarray(nadir) + values[5:7] * NADIR_SPREAD_DEGREES
        height = ALTITUDE_KM + values[7] * ALTITUDE_SPREAD_KM
        return position(place, height), Rotation.from_rotvec(values[:3]).as_matrix() @ axes, focal * np.exp(values[3:5])

    def residuals(values: np.ndarray):
        away = see(ground, size, *camera(values)) - photo_points
        return np.concatenate([away.ravel(), values[5:]])

    found = least_squares(residuals, np.zeros(8), loss="soft_l1", max_nfev=50)
    corners = np.array([[0, size[1]], [0, 0], [size[0], 0], [size[0], size[1]]], dtype=np.float64)
    footprint = hit(corners, size, *camera(found.x))
    if not np.isfinite(footprint).all():
        return None
    return footprint, np.linalg.norm(see(ground, size, *camera(found.x)) - photo_points, axis=1)


def position(nadir: tuple[float, float], altitude_km: float) -> np.ndarray:
    """-> (3,) in Earth radii."""
    return geo.to_unit_vectors(nadir) * (1 + altitude_km / geo.EARTH_RADIUS_KM)


def first_guess(corners: np.ndarray, place: np.ndarray, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray] | None:
    """Corners (4, 3) on the unit sphere -> axes (3, 3), rows right, down, forward, and focal lengths (2,), pixels."""
    rays = corners - place
    rays = rays / np.linalg.norm(rays, axis=1, keepdims=True)
    forward = rays.mean(axis=0)
    forward = forward / np.linalg.norm(forward)
    flat = rays / (rays @ forward)[:, None]  # the picture's plane, at distance 1
    right, down = flat[2:].mean(axis=0) - flat[:2].mean(axis=0), flat[[0, 3]].mean(axis=0) - flat[1:3].mean(axis=0)
    focal = np.array(size) / np.maximum([np.linalg.norm(right), np.linalg.norm(down)], 1e-9)
    right = right - forward * (right @ forward)
    if not np.isfinite(rays).all() or np.linalg.norm(right) < 1e-9:
        return None
    right = right / np.linalg.norm(right)
    return np.stack([right, np.cross(forward, right), forward]), focal


def see(
    ground: np.ndarray, size: tuple[int, int], place: np.ndarray, axes: np.ndarray, focal: np.ndarray
) -> np.ndarray:
    """Points (N, 3) on the unit sphere -> (N, 2) x, y in the photo's pixels."""
    x, y, depth = axes @ (ground - place).T
    return np.stack([x, y], axis=1) / np.maximum(depth, 1e-6)[:, None] * focal + np.array(size) / 2


def hit(
    points: np.ndarray, size: tuple[int, int], place: np.ndarray, axes: np.ndarray, focal: np.ndarray
) -> np.ndarray:
    """(N, 2) pixels -> (N, 2) lat, lon of the ground seen there; NaN where the ray misses the Earth."""
    rays = np.concatenate([(points - np.array(size) / 2) / focal, np.ones((len(points), 1))], axis=1) @ axes
    a, b, c = (rays**2).sum(axis=1), rays @ place, place @ place - 1
    square = b**2 - a * c
    distance = np.where((square >= 0) & (b < 0), c / (-b + np.sqrt(np.maximum(square, 0))), np.nan)
    return geo.from_unit_vectors(place + distance[:, None] * rays)
