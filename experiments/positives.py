"""Positives at full size: time, memory, and the error of their IoU. python -m experiments.positives NAMES

NAMES is a data set's folder or a text file of query names; the database is made of all regions that hold land, or is
that of --database. For --pairs random pairs the IoU is computed again on the sphere: a photo's edges as great circles,
a region's as meridians and parallels, cut in the gnomonic projection (where great circles are straight), areas by
spherical excess.
"""

import resource
from collections.abc import Callable
from typing import Annotated

import numpy as np
import shapely
from numpy.typing import ArrayLike

from benchmarks.timing import timed_twice
from datasets import grid
from datasets.names import Catalogue
from datasets.overlap import degenerate, intersections, ring, self_crossing
from experiments.table1 import ZOOMS
from utils import geo
from utils.flags import command

STEPS = 32  # pieces of an edge along a parallel


def spherical_area(points: ArrayLike) -> float:
    """Polygon (N, 2) degrees, great-circle edges, no pole inside -> steradians: what lies between edges and equator."""
    lat, lon = np.radians(np.asarray(points, dtype=np.float64)).T
    half, turn = np.tan(lat / 2), np.radians(geo.wrap_longitude(np.degrees(np.roll(lon, -1) - lon)))
    next_half = np.roll(half, -1)
    return abs(2 * np.arctan2(np.tan(turn / 2) * (half + next_half), 1 + half * next_half).sum())


def gnomonic(points: np.ndarray, center: np.ndarray) -> tuple[np.ndarray, Callable[[np.ndarray], np.ndarray]]:
    """(N, 2) degrees -> (N, 2) on the plane that touches the sphere at center, and a function back."""
    up = geo.to_unit_vectors(center)
    east = np.array([-np.sin(np.radians(center[1])), np.cos(np.radians(center[1])), 0])
    north = np.cross(up, east)
    vectors = geo.to_unit_vectors(points)
    flat = np.stack([vectors @ east, vectors @ north], axis=-1) / (vectors @ up)[:, None]
    return flat, lambda xy: geo.from_unit_vectors(up + xy[:, :1] * east + xy[:, 1:] * north)


def along_parallels(footprint: np.ndarray, steps: int = STEPS) -> np.ndarray:
    """A map-aligned footprint (4, 2) -> (4 steps, 2) points on its edges, which are meridians and parallels."""
    corners = ring(footprint[None])[0]
    shares = np.arange(steps)[:, None] / steps
    return np.concatenate([a + shares * (b - a) for a, b in zip(corners, np.roll(corners, -1, axis=0))])


def spherical_iou(query: np.ndarray, region: np.ndarray) -> float:
    """(4, 2) great-circle edges, (4, 2) map-aligned, degrees -> IoU on the sphere."""
    center = geo.centers(query)
    outline, edges = ring(query[None])[0], along_parallels(region)
    (a, back), (b, _) = gnomonic(outline, center), gnomonic(edges, center)
    common = shapely.intersection(shapely.Polygon(a), shapely.Polygon(b))
    shared = sum(
        spherical_area(back(shapely.get_coordinates(part)[:-1]))
        for part in shapely.get_parts(common)
        if part.geom_type == "Polygon" and not part.is_empty
    )
    return shared / (spherical_area(outline) + spherical_area(edges) - shared)


def main(
    names: Annotated[str, "data set's folder, or a text file of query names"],
    database: Annotated[
        str | None, "data set's folder, or a text file of database names; default: land regions"
    ] = None,
    pairs: Annotated[int, "compared with the sphere"] = 20_000,
) -> np.ndarray:
    """-> the errors of the IoU."""
    queries = Catalogue.read_source(names, "queries")
    if database:
        footprints = Catalogue.read_source(database, "database").footprints
    else:
        footprints = grid.footprints(grid.land_regions(ZOOMS))
    (found, iou), seconds, cpu = timed_twice(lambda: intersections(queries.footprints, footprints))
    print(
        f"{len(queries):,} queries, {len(footprints):,} regions: {len(found):,} pairs in {seconds:.1f} s "
        f"({cpu:.1f} s of CPU)"
    )
    print(
        f"{int(degenerate(queries.footprints).sum())} queries are degenerate, "
        f"{int(self_crossing(queries.footprints).sum())} list their corners crosswise"
    )
    print(
        f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GB"
        f"{'' if database else ' (1 GB of it is the land mask)'}"
    )
    chosen = np.random.default_rng(0).permutation(len(found))[:pairs]
    exact = np.array([spherical_iou(queries.footprints[q], footprints[d]) for q, d in found[chosen]])
    error = np.abs(iou[chosen] - exact)
    print(
        f"IoU against the sphere, {len(chosen):,} pairs: mean error {error.mean():.5f}, 99 % below "
        f"{np.quantile(error, 0.99):.5f}, largest {error.max():.5f}; {int((exact == 0).sum())} pairs share nothing "
        f"there, their largest IoU here is {iou[chosen][exact == 0].max(initial=0):.5f}"
    )
    return error


if __name__ == "__main__":
    command(main)
