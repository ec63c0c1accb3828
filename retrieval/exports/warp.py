"""A photo laid on the map: every pixel of the map asks the homography for its place in the photo. No files."""

import numpy as np
from PIL import Image

from utils.mercator import apply, bounds, photo_to_ground, require_view, to_mercator

MAX_SIDE = 8192  # pixels of a warped photo; beyond, it comes out coarser


def native_grid(footprint: np.ndarray, width: int, height: int, max_side: int = MAX_SIDE) -> tuple[tuple, int, int]:
    """Corners (4, 2) and the photo's size -> the box (west, south, east, north), metres, and the size in pixels of a
    map on which the photo covers about as many pixels as it has. Raises ValueError as `require_view`."""
    corners = to_mercator(require_view(footprint))
    west, south, east, north = bounds(corners)
    (x, y), (a, b) = corners.T, np.roll(corners, -1, axis=0).T
    pixel = np.sqrt(abs((x * b - a * y).sum()) / 2 / (width * height))
    pixel = max(pixel, (east - west) / max_side, (north - south) / max_side)
    columns, rows = (max(1, int(np.ceil(side / pixel - 1e-6))) for side in (east - west, north - south))
    return (west, north - rows * pixel, west + columns * pixel, north), columns, rows


def warp(photo: np.ndarray, footprint: np.ndarray, box: tuple, columns: int, rows: int) -> np.ndarray:
    """uint8 (H, W, 3), its own corners (4, 2) in degrees -> uint8 (rows, columns, 4), north up over the box (west,
    south, east, north), Web Mercator metres; alpha is 0 outside of the photo. Bicubic; a photo with more pixels than
    the map is averaged first. Raises ValueError as `require_view`."""
    image = Image.fromarray(photo)
    width, height = image.size
    to_ground = photo_to_ground(footprint, width, height)
    finer = _pixels_a_pixel(to_ground, width, height, (box[2] - box[0]) / columns)
    if finer > 1.5:
        image = image.resize([max(1, round(side / finer)) for side in image.size], Image.Resampling.BOX)
    west, _, east, north = box
    to_map = np.diag([columns / (east - west), -columns / (east - west), 1.0]) @ np.array(
        [[1, 0, -west], [0, 1, -north], [0, 0, 1]]
    )
    shrink = np.diag([image.width / width, image.height / height, 1.0])
    back = shrink @ np.linalg.inv(to_map @ to_ground)
    image.putalpha(255)
    return np.array(
        image.transform(
            (columns, rows), Image.Transform.PERSPECTIVE, (back / back[2, 2]).ravel()[:8], Image.Resampling.BICUBIC
        )
    )


def _pixels_a_pixel(to_ground, width, height, metres):
    """How many of the photo's pixels a pixel of the map is wide, on average."""
    x, y = apply(to_ground, np.array([(0, 0), (width, 0), (width, height), (0, height)])).T
    area = abs((x * np.roll(y, -1) - np.roll(x, -1) * y).sum()) / 2
    return metres / np.sqrt(area / (width * height))
