"""A photo laid on the map: every pixel of the map asks the homography for its place in the photo. No files."""

import numpy as np

from utils.geo import to_mercator
from utils.mercator import apply, bounds, photo_to_ground, require_view

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
    import cv2

    height, width = photo.shape[:2]
    to_ground = photo_to_ground(footprint, width, height)
    finer = _pixels_a_pixel(to_ground, width, height, (box[2] - box[0]) / columns)
    if finer > 1.5:
        smaller = [max(1, round(side / finer)) for side in (width, height)]
        photo = cv2.resize(photo, smaller, interpolation=cv2.INTER_AREA)
    west, _, east, north = box
    scale = columns / (east - west)
    to_map = np.array([[scale, 0, -west * scale], [0, -scale, north * scale], [0, 0, 1]])
    grow = np.diag([width / photo.shape[1], height / photo.shape[0], 1.0])
    half = np.array([[1, 0, 0.5], [0, 1, 0.5], [0, 0, 1]])  # OpenCV's pixels have their middle at whole numbers
    matrix = np.linalg.inv(half) @ to_map @ to_ground @ grow @ half
    laid = np.empty((rows, columns, 4), np.uint8)
    laid[..., :3] = cv2.warpPerspective(
        photo, matrix, (columns, rows), flags=cv2.INTER_CUBIC, borderMode=cv2.BORDER_REPLICATE
    )
    there = np.full(photo.shape[:2], 255, np.uint8)
    laid[..., 3] = cv2.warpPerspective(there, matrix, (columns, rows), flags=cv2.INTER_NEAREST)
    laid[laid[..., 3] == 0] = 0
    return laid


def _pixels_a_pixel(to_ground: np.ndarray, width: int, height: int, metres: float):
    """How many of the photo's pixels a pixel of the map is wide, on average."""
    x, y = apply(to_ground, np.array([(0, 0), (width, 0), (width, height), (0, height)])).T
    area = abs((x * np.roll(y, -1) - np.roll(x, -1) * y).sum()) / 2
    return metres / np.sqrt(area / (width * height))
