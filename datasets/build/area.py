"""Which regions a data set is built from: zooms, a bounding box that may span the antimeridian, land only or all."""

import argparse

import numpy as np

from datasets import grid
from datasets.names import YEARS

MAX_ZOOM = 19
MAX_LATITUDE = 60.0  # of a region's centre (paper, sec. 3.2)


def check_box(box):
    """(south, west, north, east) degrees; west > east spans the antimeridian. Raises ValueError saying what is not."""
    south, west, north, east = box
    if not -90 <= south < north <= 90:
        raise ValueError(
            f"--bbox {' '.join(map(str, box))}: expected SOUTH WEST NORTH EAST with -90 <= south < north "
            f"<= 90; south is {south}, north is {north}"
        )
    if not (-180 <= west <= 180 and -180 <= east <= 180) or west == east:
        raise ValueError(
            f"--bbox {' '.join(map(str, box))}: expected SOUTH WEST NORTH EAST, WEST and EAST different "
            f"and within ±180 (west > east spans the antimeridian); west is {west}, east is {east}"
        )


def in_box(regions, box):
    """regions (N, 3) -> (N,) bool: the region and the box (south, west, north, east) share ground, not just an edge."""
    south, west, north, east = box
    corners = grid.footprints(regions)
    bottom, left, top, right = corners[:, 0, 0], corners[:, 0, 1], corners[:, 2, 0], corners[:, 2, 1]
    if west < east:
        across = (left < east) & (right > west)
    else:
        across = (right > west) | (left < east)
    return (bottom < north) & (top > south) & across


def all_regions(zooms, max_latitude=MAX_LATITUDE):
    """Every region of the zooms with its centre within ±max_latitude, land or sea -> (N, 3) int, sorted."""
    found = [np.zeros((0, 3), dtype=np.int64)]
    for zoom in sorted(set(zooms)):
        start = np.arange(0, 2**zoom - grid.TILES + 1, grid.STEP)
        center = (grid.tile_latitude(zoom, start) + grid.tile_latitude(zoom, start + grid.TILES)) / 2
        rows, cols = np.meshgrid(start[np.abs(center) <= max_latitude], start, indexing="ij")
        found.append(np.stack([np.full(rows.size, zoom), rows.ravel(), cols.ravel()], axis=1))
    return np.concatenate(found)


def select_regions(zooms, box=None, land_only=True):
    """-> (N, 3) int rows of zoom, row, col, sorted. Raises ValueError naming the flag that leaves nothing."""
    if not zooms or min(zooms) < 2 or max(zooms) > MAX_ZOOM:
        raise ValueError(f"--zooms {list(zooms)}: expected numbers from 2 to {MAX_ZOOM}")
    if box is not None:
        check_box(box)
    regions = grid.land_regions(sorted(set(zooms))) if land_only else all_regions(zooms)
    if box is not None:
        regions = regions[in_box(regions, box)]
    if not len(regions):
        raise ValueError(
            f"no region{' with land' if land_only else ''} at --zooms {list(zooms)} in --bbox {box}; "
            f"choose a larger box{', or --no-land_only' if land_only else ''} (centres lie within "
            f"±{MAX_LATITUDE:g} degrees of latitude)"
        )
    return regions


def check_years(years):
    if not years or min(years) < 1000 or max(years) > 9999:
        raise ValueError(f"--years {list(years)}: expected years of four digits")


def image_paths(region, years):
    """(zoom, row, col) -> grid.image_path of each year; numbers are computed once, which counts at 175,000 regions."""
    fields = grid.image_path(*region, years[0]).split("@")  # database/{year}_{zoom}/{tens}/, 14 fields, .jpg
    folder, tens = fields[0].split("/")[0], fields[0].split("/")[2]
    return [
        "@".join([f"{folder}/{year:04d}_{region[0]:02d}/{tens}/", *fields[1:10], f"{year:04d}", *fields[11:]])
        for year in years
    ]


def add_area_arguments(parser, years=True):
    """The flags of select_regions, and --years."""
    parser.add_argument("--zooms", type=int, nargs="+", default=[9, 10, 11], help="Web Mercator zooms")
    if years:
        parser.add_argument("--years", type=int, nargs="+", default=list(YEARS), help="one image a region for each")
    parser.add_argument(
        "--bbox",
        type=float,
        nargs=4,
        metavar=("SOUTH", "WEST", "NORTH", "EAST"),
        help="degrees; WEST > EAST spans the antimeridian; default: the whole Earth",
    )
    parser.add_argument(
        "--land_only", action=argparse.BooleanOptionalAction, default=True, help="only regions that hold land"
    )
