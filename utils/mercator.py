"""Web Mercator (EPSG:3857), and the homography that lays a photo on it.

A camera's view of a plane is a homography, and a map of a few hundred km is nearly one: registration finds its
footprints here, so that exports warp with the same one.
"""

import numpy as np

from utils import geo
from utils.geo import to_mercator

MAX_LATITUDE = 85.0511287798066  # where the square map ends


def homography(source: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Four points (4, 2) and where they go (4, 2) -> (3, 3), in float64. Raises ValueError where three are in line."""
    source, target = (np.asarray(points, dtype=np.float64) for points in (source, target))
    normalise = [_to_unit(points) for points in (source, target)]
    (x, y), (u, v) = (apply(move, points).T for move, points in zip(normalise, (source, target)))
    one, zero = np.ones(4), np.zeros(4)
    equations = np.concatenate(
        [
            np.stack([x, y, one, zero, zero, zero, -u * x, -u * y], axis=1),
            np.stack([zero, zero, zero, x, y, one, -v * x, -v * y], axis=1),
        ]
    )
    if np.linalg.cond(equations) > 1e12:
        raise ValueError(f"three of the corners lie in line: {target.tolist()}")
    found = np.append(np.linalg.solve(equations, np.concatenate([u, v])), 1).reshape(3, 3)
    return np.linalg.inv(normalise[1]) @ found @ normalise[0]


def apply(matrix: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Homography (3, 3), points (..., 2) -> (..., 2)."""
    moved = np.asarray(points) @ matrix[:, :2].T + matrix[:, 2]
    return moved[..., :2] / moved[..., 2:]


def photo_to_ground(footprint: np.ndarray, width: int, height: int) -> np.ndarray:
    """The photo's own corners (4, 2), degrees, bottom left, top left, top right, bottom right as a viewer shows it ->
    homography (3, 3) from its pixels (x right, y down, the first pixel's middle at 0.5, 0.5) to metres.

    Raises ValueError as `require_view`.
    """
    pixels = [(0, height), (0, 0), (width, 0), (width, height)]
    return homography(pixels, to_mercator(require_view(footprint)))


def require_view(footprint: np.ndarray) -> np.ndarray:
    """Corners (4, 2) as above -> the same, longitudes unwrapped. ValueError where no camera sees that: mirrored,
    folded, with a side of no length or a corner in line with its neighbours, or off the square map."""
    corners = geo.unwrap_footprints(footprint)
    if corners.shape != (4, 2) or not np.isfinite(corners).all():
        raise ValueError(f"the footprint {np.asarray(footprint).tolist()} is not four places (lat, lon)")
    if np.abs(corners[:, 0]).max() > MAX_LATITUDE:
        raise ValueError(f"the footprint reaches latitude {corners[:, 0].tolist()}: Web Mercator ends at ±85.05")
    points = to_mercator(corners)
    sides = np.roll(points, -1, axis=0) - points
    turns = sides[:, 0] * np.roll(sides, -1, axis=0)[:, 1] - sides[:, 1] * np.roll(sides, -1, axis=0)[:, 0]
    if not (turns < 0).all():  # bottom left, top left, top right: clockwise
        kind = "folded or not convex; no photo shows such ground"
        if (turns > 0).all():
            kind = "mirrored: its corners run counter-clockwise; give bottom left, top left, top right, bottom right"
        raise ValueError(f"the footprint {corners.round(4).tolist()} is {kind}")
    return corners


def bounds(corners: np.ndarray) -> tuple[float, float, float, float]:
    """(N, 2) metres -> west, south, east, north."""
    return (*corners.min(axis=0).tolist(), *corners.max(axis=0).tolist())


def _to_unit(points: np.ndarray):
    """(N, 2) -> (3, 3) that moves them around 0, about 1 away: equations of such numbers lose no digits."""
    middle, scale = points.mean(axis=0), max(np.abs(points - points.mean(axis=0)).max(), 1e-300)
    return np.array([[1 / scale, 0, -middle[0] / scale], [0, 1 / scale, -middle[1] / scale], [0, 0, 1]])
