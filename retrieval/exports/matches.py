"""Match lines for the report: the points of a photo that a registration found again, and the ground around them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from utils import geo
from utils.mercator import bounds

if TYPE_CHECKING:
    from retrieval.registration import Registration

SIDE = 640  # pixels of the ground
MARGIN = 0.1  # of the ground's side, around photo and points


@dataclass(frozen=True)
class Matches:
    """photo (M, 2) and ground (M, 2): shares x, y of the photo's and of the picture's width and height, from the upper
    left corner. picture: uint8 (3, h, h), north up."""

    photo: np.ndarray
    ground: np.ndarray
    picture: np.ndarray


def matches_of(registration: Registration | None, ground: Callable | None, side: int = SIDE) -> Matches | None:
    """What retrieval/registration.py found (or None), and the ground that it was matched with (retrieval/ground.py) ->
    its inliers; None where there is nothing to show."""
    if registration is None or ground is None or not len(registration.photo_points):
        return None
    corners = geo.to_mercator(geo.unwrap_footprints(registration.footprint))
    points = geo.to_mercator(registration.ground_points)
    around = 2 * geo.MERCATOR_HALF
    points[:, 0] += around * np.round((corners[:, 0].mean() - points[:, 0]) / around)
    west, south, east, north = bounds(np.concatenate([corners, points]))
    half = max(east - west, north - south) * (0.5 + MARGIN)
    west, north = (west + east) / 2 - half, (south + north) / 2 + half
    picture = ground((west, north - 2 * half, west + 2 * half, north), side)
    if picture is None:
        return None
    shares = (points - (west, north)) * (1, -1) / (2 * half)
    return Matches(registration.photo_points / registration.photo_size, shares, np.asarray(picture))
