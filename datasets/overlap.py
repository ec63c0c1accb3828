"""Which footprints share ground: a dense test for a batch, a tree of polygons for a data set, and the public file.

Command: python -m datasets.overlap DATASET_PATH writes queries_intersections_with_db_2021.pt.

Areas are those of quadrilaterals in the cylindrical equal-area projection (x = longitude, y = sin latitude), whose
edges are straight there. For map-aligned regions that is exact; a slanted edge of 300 km strays at most about 2 km from
the great circle at 45 degrees of latitude.
"""

import argparse
import os
from pathlib import Path

import numpy as np
import shapely
import torch

from datasets.metadata import DATABASE_YEAR, Catalogue
from utils.geo import unwrap_footprints

INTERSECTIONS_FILE = f"queries_intersections_with_db_{DATABASE_YEAR}.pt"
TOUCHING_DEGREES = 2e-5  # names are rounded to five decimals: less than this is a shared edge, not shared ground


def ring(footprints):
    """(N, 4, 2) -> the same corners in circular order around their mean, longitudes unwrapped; any order may come in."""
    points = unwrap_footprints(footprints)
    offset = points - points.mean(axis=-2, keepdims=True)
    order = np.argsort(np.arctan2(offset[..., 0], offset[..., 1]), axis=-1, kind="stable")
    return np.take_along_axis(points, order[..., None], axis=-2)


def degenerate(footprints):
    """(N, 4, 2) -> (N,) bool: not finite, or (nearly) without area, so that they can share ground with nothing."""
    points = ring(np.nan_to_num(footprints))
    lat, lon = points[..., 0], points[..., 1]
    area = np.abs((np.roll(lon, -1, -1) * lat - np.roll(lat, -1, -1) * lon).sum(-1)) / 2
    return ~np.isfinite(footprints).all(axis=(-1, -2)) | (area < TOUCHING_DEGREES**2)


def share_ground(a, b):
    """a (N, 4, 2), b (M, 4, 2) degrees -> (N, M) bool, dense: for batches, not for a whole data set.

    The separating-axis test on convex quadrilaterals in (lat, lon). Touching edges share nothing; degenerate footprints
    share nothing. Safe at the antimeridian.
    """
    bad = degenerate(a)[:, None] | degenerate(b)[None, :]
    a, b = ring(np.nan_to_num(a)), ring(np.nan_to_num(b))
    turns = np.round((a[:, None, :, 1].mean(-1) - b[None, :, :, 1].mean(-1)) / 360)  # bring b to the turn of a
    separated = np.zeros((len(a), len(b)), dtype=bool)
    for axes, from_a in ((_normals(a), True), (_normals(b), False)):
        for k in range(4):
            axis = axes[:, k, :]  # (N or M, 2), over lat, lon
            if from_a:
                own, other = np.einsum("nki,ni->nk", a, axis)[:, None], np.einsum("mki,ni->nmk", b, axis)
                shift = turns * 360 * axis[:, None, 1]
            else:
                own, other = np.einsum("mki,mi->mk", b, axis)[None, :], np.einsum("nki,mi->nmk", a, axis)
                shift = -turns * 360 * axis[None, :, 1]
            other = other + shift[..., None]
            overlap = np.minimum(own.max(-1), other.max(-1)) - np.maximum(own.min(-1), other.min(-1))
            separated |= overlap <= TOUCHING_DEGREES
    return ~separated & ~bad


def _normals(points):
    edges = np.roll(points, -1, axis=-2) - points
    normals = np.stack([-edges[..., 1], edges[..., 0]], axis=-1)
    return normals / np.maximum(np.linalg.norm(normals, axis=-1, keepdims=True), 1e-12)


def polygons(footprints):
    """(N, 4, 2) -> (N,) shapely polygons in the equal-area projection, in degrees on both axes."""
    points = ring(footprints)
    flat = np.stack([points[..., 1], np.degrees(np.sin(np.radians(points[..., 0])))], axis=-1)
    # The hull makes footprints whose corners lie in no convex order usable.
    return shapely.convex_hull(shapely.polygons(flat))


def intersections(queries, database):
    """queries (Q, 4, 2), database (D, 4, 2) degrees -> pairs (P, 2) int rows of both, IoU (P,); sorted by query, then row.

    Only pairs that share ground; touching edges do not. Degenerate footprints have no pairs (see `degenerate`).
    """
    query_rows = np.flatnonzero(~degenerate(queries))
    database_rows = np.flatnonzero(~degenerate(database))
    query_polygons, database_polygons = polygons(queries[query_rows]), polygons(database[database_rows])
    tree = shapely.STRtree(database_polygons)
    pairs, areas = [], []
    for turn in (-360, 0, 360):  # unwrapped longitudes run from -360 to 360, so one ground has three addresses
        moved = shapely.transform(query_polygons, lambda xy, turn=turn: xy + [turn, 0])
        found = tree.query(moved, predicate="intersects").T
        area = shapely.area(shapely.intersection(moved[found[:, 0]], database_polygons[found[:, 1]]))
        pairs.append(found)
        areas.append(area)
    pairs, areas = np.concatenate(pairs), np.concatenate(areas)
    whole_q, whole_d = shapely.area(query_polygons)[pairs[:, 0]], shapely.area(database_polygons)[pairs[:, 1]]
    iou = areas / (whole_q + whole_d - areas)
    # What only touches has no more area than rounded names give it along the smaller one's edge.
    kept = areas > TOUCHING_DEGREES * np.sqrt(np.minimum(whole_q, whole_d))
    pairs = np.stack([query_rows[pairs[kept, 0]], database_rows[pairs[kept, 1]]], axis=1)
    order = np.lexsort((pairs[:, 1], pairs[:, 0]))
    return pairs[order], iou[kept][order]


def intersections_table(queries, database):
    """Two Catalogues -> the public table: query file name -> [(database path relative to the data set, IoU), …].

    Queries without a positive have an empty list.
    """
    names = queries.names
    table = {name: [] for name in names}
    pairs, iou = intersections(queries.footprints, database.footprints)
    for (query, image), value in zip(pairs.tolist(), iou.tolist()):
        table[names[query]].append((database.paths[image], value))
    return table


def save_intersections(path, table):
    """Written whole or not at all."""
    temporary = Path(f"{path}.tmp")
    torch.save(table, temporary)
    os.replace(temporary, path)


def load_intersections(path):
    """-> the table. Raises FileNotFoundError or ValueError naming the file and the command that makes it."""
    from models.weights import load_tensors

    path = Path(path)
    remedy = f"python -m datasets.overlap {path.parent} writes it"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; {remedy}")
    table = load_tensors(path)
    if not isinstance(table, dict) or not all(isinstance(name, str) and isinstance(found, (list, tuple))
                                              for name, found in table.items()):
        raise ValueError(f"{path}: expected a dict, query name -> list of (database path, IoU); {remedy}")
    return table


def main():
    """The command: positives of a data set's queries among its 2021 images."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset_path", type=Path)
    folder = parser.parse_args().dataset_path
    queries, database = Catalogue.read(folder, "queries"), Catalogue.read(folder, "database", DATABASE_YEAR)
    table = intersections_table(queries, database)
    save_intersections(folder / INTERSECTIONS_FILE, table)
    found = sum(bool(positives) for positives in table.values())
    print(f"{folder / INTERSECTIONS_FILE}: {found} of {len(table)} queries have a positive among {len(database)} images; "
          f"{int(degenerate(queries.footprints).sum())} queries have a degenerate footprint")


if __name__ == "__main__":
    main()
