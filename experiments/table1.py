"""The paper's Table 1 and Table 2's naive rows, from file names alone: python -m experiments.table1 NAMES

NAMES is a data set's folder, or a text file with one query name a line. The database is made of all regions that hold
land (datasets/grid.py), or is that of --database, again a folder or a file of names. No picture is read.

Random choice is exact: the expected recall of drawing N different images, from how many of each query's images are
right. The paper's row is one draw; the column ± is the most by which one draw scatters (one standard deviation).

Nadir: R@1 of the database image whose centre is nearest to the photo's nadir, as in eval.py's log, and the share of
photos that show their nadir. Both are above the paper's row, whose definition is unknown.

Amazon's recalls come out at twice the paper's, whatever the land rule (min_land 0 to 0.5: R@100 22.0 to 22.7). The
column "implied" says why the paper's cell is to blame: it is the number of positives a query that its R@100 and its own
Table 1 imply. That is near ours for five sets, but for Amazon less than half of ours, although its photos are as large
as everywhere (median 10,287 km², Toshka 10,316). Its row would fit a database of 45,000 images, not of 19,000.
"""

import time
from collections.abc import Sequence
from typing import Annotated

import numpy as np
import shapely

from datasets import grid
from datasets.names import DATABASE_YEAR, Catalogue
from datasets.overlap import intersections, ring
from datasets.sets import DATABASE_RADIUS_KM, POINTS_OF_INTEREST, QUERY_RADIUS_KM, EvaluationSet, select_set
from retrieval.recall import nearest_to_nadir, random_choice_recall, recall_at
from utils import geo
from utils.flags import command

ZOOMS = (9, 10, 11)
RANKS = (1, 10, 100)
TABLE_1 = {
    "Texas": (6142, 34_000),
    "Alps": (2394, 53_000),
    "California": (3568, 30_000),
    "Gobi Desert": (726, 54_000),
    "Amazon": (682, 19_000),
    "Toshka Lakes": (2164, 63_000),
}
RANDOM_CHOICE = {
    "Texas": (0.2, 1.7, 15.5),
    "Alps": (0.1, 1.1, 11.6),
    "California": (0.2, 2.3, 20.1),
    "Gobi Desert": (0.1, 1.0, 13.2),
    "Amazon": (0.1, 1.1, 11.5),
    "Toshka Lakes": (0.2, 1.2, 9.1),
}
Sets = dict[str, tuple[int, EvaluationSet]]  # name -> (queries in reach, those with a positive)
NADIR = {"Texas": 2.4, "Alps": 1.2, "California": 2.4, "Gobi Desert": 1.8, "Amazon": 3.1, "Toshka Lakes": 1.4}


def compute_sets(queries: Catalogue, footprints: np.ndarray) -> Sets:
    """footprints (D, 4, 2) of the database."""
    pairs, _ = intersections(queries.footprints, footprints)
    centers = geo.centers(footprints)
    sets = {}
    for name, center in POINTS_OF_INTEREST.items():
        one = select_set(name, center, queries.nadirs, centers, pairs)
        sets[name] = (len(one.query_rows) + len(one.left_out), one)
    return sets


def table_1(sets: Sets) -> list[str]:
    """-> lines: queries and database images of each set beside the paper's."""
    lines = [
        f"Table 1 (queries within {QUERY_RADIUS_KM:,} km, database within {DATABASE_RADIUS_KM:,} km)",
        f"{'':14}{'in reach':>10}{'queries':>9}{'paper':>7}{'diff':>6}{'database':>11}{'paper':>8}{'diff':>8}",
    ]
    for name, (reach, one) in sets.items():
        found, images = len(one.query_rows), len(one.database_rows)
        queries, database = TABLE_1[name]
        lines.append(
            f"{name:14}{reach:10}{found:9}{queries:7}{found - queries:+6}{images:11,}"
            f"{database // 1000:7}k{100 * (images / database - 1):+7.1f}%"
        )
    return lines


def random_choice(sets: Sets, ks: Sequence[int] = RANKS) -> dict[str, tuple[float, dict[int, float]]]:
    """-> {set: (positives a query, {k: percent})}; a set without queries or images is left out."""
    rows = {}
    for name, (_, one) in sets.items():
        counts = np.array([len(positives) for positives in one.positives])
        if len(counts):
            rows[name] = counts.mean(), random_choice_recall(counts, len(one.database_rows), ks)
    return rows


def table_2(sets: Sets, ks: Sequence[int] = RANKS) -> list[str]:
    """-> lines: expected recalls of random choice beside the paper's."""
    head = "".join(f"{f'R@{k}':>9}{'paper':>7}{'±':>6}" for k in ks)
    lines = ["Table 2, row Random choice (percent)", f"{'':14}{'positives':>10}{'implied':>9}{head}"]
    for name, (mean, recalls) in random_choice(sets, ks).items():
        queries = len(sets[name][1].query_rows)
        cells = ""
        for k, paper in zip(ks, RANDOM_CHOICE[name]):
            scatter = np.sqrt(recalls[k] * (100 - recalls[k]) / queries)
            cells += f"{recalls[k]:9.2f}{paper:7.1f}{scatter:6.2f}"
        implied = TABLE_1[name][1] * (1 - (1 - RANDOM_CHOICE[name][-1] / 100) ** (1 / RANKS[-1]))
        lines.append(f"{name:14}{mean:10.1f}{implied:9.1f}{cells}")
    return lines


def nadir_recalls(queries: Catalogue, footprints: np.ndarray, sets: Sets) -> dict[str, tuple[float, float]]:
    """-> {set: (R@1 of the image with its centre nearest to the nadir, share of photos showing their nadir)}, percent;
    a set without queries is left out."""
    centers, shown = geo.centers(footprints), nadir_inside(queries.footprints, queries.nadirs)
    recalls = {}
    for name, (_, one) in sets.items():
        if len(one.query_rows):
            nearest = nearest_to_nadir(queries.nadirs[one.query_rows], centers[one.database_rows], 1)
            recalls[name] = recall_at(nearest, one.positives, (1,))[1], 100 * shown[one.query_rows].mean()
    return recalls


def nadir_inside(footprints: np.ndarray, nadirs: np.ndarray) -> np.ndarray:
    """(N, 4, 2), (N, 2) degrees -> (N,) bool: the nadir lies in the footprint, whose corners may come in any order."""
    corners = ring(footprints)
    lon = corners[:, 0, 1] + geo.wrap_longitude(nadirs[:, 1] - corners[:, 0, 1])
    return shapely.contains_xy(shapely.convex_hull(shapely.polygons(corners[..., ::-1])), lon, nadirs[:, 0])


def nadir_lines(recalls: dict[str, tuple[float, float]]) -> list[str]:
    """nadir_recalls' -> lines: beside the paper's row."""
    lines = ["Table 2, row Nadir (R@1, percent)", f"{'':14}{'nearest centre':>16}{'nadir in photo':>16}{'paper':>7}"]
    return lines + [
        f"{name:14}{nearest:16.1f}{shown:16.1f}{NADIR[name]:7.1f}" for name, (nearest, shown) in recalls.items()
    ]


def main(
    names: Annotated[str, "data set's folder, or a text file of query names"],
    database: Annotated[
        str | None, "data set's folder, or a text file of database names; default: land regions"
    ] = None,
    min_land: Annotated[float, "a region counts with more than this share of land"] = 0.0,
    max_latitude: Annotated[float, "of a region's centre, degrees"] = 60.0,
) -> Sets:
    """Prints the three tables -> the sets."""
    began = time.perf_counter()
    queries = Catalogue.read_source(names, "queries")
    if database:
        footprints = Catalogue.read_source(database, "database").footprints
        said = f"names of {database}, {DATABASE_YEAR}"
    else:
        footprints = grid.footprints(grid.land_regions(ZOOMS, max_latitude, min_land))
        said = f"all regions of zooms {', '.join(map(str, ZOOMS))} with land, centre within ±{max_latitude:g}"
    print(f"{len(queries):,} queries of {names}; database: {len(footprints):,} images ({said})")
    sets = compute_sets(queries, footprints)
    for lines in (table_1(sets), table_2(sets), nadir_lines(nadir_recalls(queries, footprints, sets))):
        print("\n" + "\n".join(lines))
    print(f"\nDone in {time.perf_counter() - began:.0f} s")
    return sets


if __name__ == "__main__":
    command(main)
