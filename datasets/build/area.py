"""Which regions a data set is built from: zooms, a bounding box that may span the antimeridian, land only or all."""

from collections.abc import Sequence

import numpy as np

from datasets import grid

MAX_ZOOM = 19
MAX_LATITUDE = 60.0  # of a region's centre (paper, sec. 3.2)


def check_box(box: Sequence[float]) -> None:
    """(south, west, north, east) degrees; west > east spans the antimeridian. Raises ValueError saying what is not."""
    south, west, north, east = box
    if not (-90 <= south < north <= 90 and -180 <= west <= 180 and -180 <= east <= 180 and west != east):
        raise ValueError(
            f"--bbox {' '.join(map(str, box))}: expected SOUTH WEST NORTH EAST with -90 <= south < north <= 90, and "
            f"west and east different and within ±180 (west > east spans the antimeridian); south is {south}, north "
            f"is {north}, west is {west}, east is {east}"
        )


def in_box(regions: np.ndarray, box: Sequence[float]) -> np.ndarray:
    """regions (N, 3) -> (N,) bool: the region and the box (south, west, north, east) share ground, not just an edge."""
    south, west, north, east = box
    corners = grid.footprints(regions)
    bottom, left, top, right = corners[:, 0, 0], corners[:, 0, 1], corners[:, 2, 0], corners[:, 2, 1]
    across = (left < east) & (right > west) if west < east else (right > west) | (left < east)
    return (bottom < north) & (top > south) & across


def select_regions(zooms: Sequence[int], box: Sequence[float] | None = None, land_only: bool = True) -> np.ndarray:
    """-> (N, 3) int rows of zoom, row, col, sorted. Raises ValueError naming the flag that leaves nothing."""
    if not zooms or min(zooms) < 2 or max(zooms) > MAX_ZOOM:
        raise ValueError(f"--zooms {list(zooms)}: expected numbers from 2 to {MAX_ZOOM}")
    if box is not None:
        check_box(box)
    regions = (grid.land_regions if land_only else grid.all_regions)(sorted(set(zooms)), MAX_LATITUDE)
    if box is not None:
        regions = regions[in_box(regions, box)]
    if not len(regions):
        raise ValueError(
            f"no region{' with land' if land_only else ''} at --zooms {list(zooms)} in --bbox {box}; "
            f"choose a larger box{', or --no-land_only' if land_only else ''} (centres lie within "
            f"±{MAX_LATITUDE:g} degrees of latitude)"
        )
    return regions


def check_years(years: Sequence[int]) -> None:
    """ValueError where one does not have four digits."""
    if not years or min(years) < 1000 or max(years) > 9999:
        raise ValueError(f"--years {list(years)}: expected years of four digits")
