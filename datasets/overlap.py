"""Which footprints share ground: a tree of polygons, and the public file.

Command: python -m datasets.overlap DATASET_PATH writes queries_intersections_with_db_2021.pt.

Areas are those of quadrilaterals in the cylindrical equal-area projection (x = longitude, y = sin latitude), whose
edges are straight there. For map-aligned regions that is exact. A photo's edges are great circles, and a slanted edge
of 300 km strays about 2 km from the straight one at 45 degrees of latitude. Measured against great circles on the
sphere for 20,000 pairs of the public names, the IoU is off by 0.0005 on average, 99 % of them by less than 0.0034, all
by less than 0.015; one pair in a thousand, with an IoU below 0.0001, shares nothing there (python -m
experiments.positives).
"""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import pyarrow as pa
import shapely
import torch

from datasets import listing
from datasets.names import DATABASE_YEAR, Catalogue
from utils.checkpoint import load_tensors
from utils.files import replacing
from utils.flags import command
from utils.geo import ring, unwrap_footprints
from utils.tables import Strings, as_text, in_one, opened, or_anew, read_rows, store

INTERSECTIONS_FILE = f"queries_intersections_with_db_{DATABASE_YEAR}.pt"
TOUCHING_DEGREES = 2e-5  # names are rounded to five decimals: less than this is a shared edge, not shared ground


def degenerate(footprints: np.ndarray) -> np.ndarray:
    """(N, 4, 2) -> (N,) bool: these share ground with nothing. Not finite, latitudes beyond a pole, (nearly) without
    area, or half the globe wide, as when a pole lies inside: then four corners do not say what they enclose."""
    points = ring(np.nan_to_num(footprints))
    lat, lon = points[..., 0], points[..., 1]
    return (
        ~np.isfinite(footprints).all(axis=(-1, -2))
        | (np.abs(_area(points)) < TOUCHING_DEGREES**2)
        | (np.ptp(lon, axis=-1) >= 180)
        | (np.abs(lat) > 90).any(axis=-1)
    )


def self_crossing(footprints: np.ndarray) -> np.ndarray:
    """(N, 4, 2) -> (N,) bool: the corners, as they are listed, make a bow tie. `ring` puts such corners in order."""
    listed, ordered = unwrap_footprints(np.nan_to_num(footprints)), ring(np.nan_to_num(footprints))
    # In order, forwards or backwards, the area is that of the ring; a bow tie's halves cancel.
    return ~degenerate(footprints) & (np.abs(_area(listed)) < np.abs(_area(ordered)) * (1 - 1e-9))


def _area(points: np.ndarray) -> np.ndarray:
    lat, lon = points[..., 0], points[..., 1]
    lon = lon - lon[..., :1]
    return (np.roll(lon, -1, -1) * lat - np.roll(lat, -1, -1) * lon).sum(-1) / 2


def polygons(footprints: np.ndarray) -> np.ndarray:
    """(N, 4, 2) -> (N,) shapely polygons in the equal-area projection, in degrees on both axes."""
    points = ring(footprints)
    flat = np.stack([points[..., 1], np.degrees(np.sin(np.radians(points[..., 0])))], axis=-1)
    # The hull makes footprints whose corners lie in no convex order usable.
    return shapely.convex_hull(shapely.polygons(flat))


def intersections(
    queries: np.ndarray, database: np.ndarray, block: int = 512, num_threads: int = 2
) -> tuple[np.ndarray, np.ndarray]:
    """queries (Q, 4, 2), database (D, 4, 2) degrees -> pairs (P, 2) int rows of both, IoU (P,); sorted by query, row.

    Only pairs that share ground; touching edges do not. Degenerate footprints have no pairs (see `degenerate`).
    Works on `block` queries at a time, so that memory holds the polygons of a few blocks only.
    """
    query_rows, database_rows = (np.flatnonzero(~degenerate(each)) for each in (queries, database))
    if not (len(query_rows) and len(database_rows)):
        return np.zeros((0, 2), dtype=np.int64), np.zeros(0)
    query_polygons = polygons(queries[query_rows])
    database_polygons = query_polygons if database is queries else polygons(database[database_rows])
    database_areas = shapely.area(database_polygons)
    farthest = shapely.total_bounds(database_polygons)
    tree = shapely.STRtree(database_polygons)
    tree.query(shapely.Point(0, 0))  # the tree is built at its first query, which has to be alone

    def of_block(start: int) -> list[tuple]:
        parts = []
        west, _, east, _ = shapely.total_bounds(query_polygons[start : start + block])
        for turn in (-360, 0, 360):  # unwrapped longitudes run from -360 to 360, so one ground has three addresses
            if not (west + turn <= farthest[2] and farthest[0] <= east + turn):
                continue
            moved = shapely.transform(query_polygons[start : start + block], lambda xy: xy + [turn, 0])
            of_query, of_database = tree.query(moved, predicate="intersects")
            whole_q, whole_d = shapely.area(moved)[of_query], database_areas[of_database]
            area = shapely.area(shapely.intersection(moved[of_query], database_polygons[of_database]))
            # What only touches has no more area than rounded names give it along the smaller one's edge.
            kept = area > TOUCHING_DEGREES * np.sqrt(np.minimum(whole_q, whole_d))
            rows = np.stack([query_rows[start + of_query[kept]], database_rows[of_database[kept]]], axis=1)
            parts.append((rows, area[kept] / (whole_q + whole_d - area)[kept]))
        return parts

    starts = range(0, len(query_rows), block)
    # shapely lets go of the interpreter while it computes; for a batch, a thread would cost more than the work.
    with ThreadPoolExecutor(num_threads) as pool:
        mapped = pool.map(of_block, starts) if len(starts) > 1 else map(of_block, starts)
        parts = [part for each in mapped for part in each]
    pairs = np.concatenate([rows for rows, _ in parts]) if parts else np.zeros((0, 2), dtype=np.int64)
    iou = np.concatenate([values for _, values in parts]) if parts else np.zeros(0)
    order = np.lexsort((pairs[:, 1], pairs[:, 0]))
    return pairs[order], iou[order]


def share_ground(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """a (N, 4, 2), b (M, 4, 2) degrees -> (N, M) bool, the pairs of `intersections`: for batches, not a data set."""
    shared = np.zeros((len(a), len(b)), dtype=bool)
    shared[tuple(intersections(a, b, num_threads=1)[0].T)] = True
    return shared


@dataclass(frozen=True)
class Positives:
    """The public table as columns: queries' file names, database paths, pairs (P, 2) rows of both, iou (P,).

    Pairs are sorted by query; a query may have none. 1.2 million pairs take 60 MB here, and 450 MB as a dict.
    """

    queries: Strings
    images: Strings
    pairs: np.ndarray
    iou: np.ndarray

    @classmethod
    def from_table(cls, table: dict) -> Positives:
        """{query name: [(database path, IoU), …]} -> Positives."""
        row_of = {}
        images = [row_of.setdefault(path, len(row_of)) for found in table.values() for path, _ in found]
        counts = np.array([len(found) for found in table.values()], dtype=np.int64)
        pairs = np.stack([np.repeat(np.arange(len(counts)), counts), np.array(images, dtype=np.int64)], axis=1)
        iou = np.array([float(value) for found in table.values() for _, value in found], dtype=np.float64)
        return cls(Strings(list(table)), Strings(list(row_of)), pairs, iou)

    @classmethod
    def from_rows(cls, table: pa.Table) -> Positives:
        """Arrow table as `rows` gives it -> Positives."""
        query, image = (in_one(table[name]) for name in ("query", "image"))
        found = image.is_valid().to_numpy(zero_copy_only=False)
        pairs = np.stack([query.indices, image.indices.fill_null(0)], axis=1)[found]
        queries, images = (Strings(column.dictionary.cast(pa.binary())) for column in (query, image))
        return cls(queries, images, pairs, table["iou"].to_numpy()[found])

    def rows(self) -> pa.Table:
        """-> Arrow table: query, image, iou; a query without a positive has one row, where these are null."""
        counts = np.bincount(self.pairs[:, 0], minlength=len(self.queries))
        query = np.repeat(np.arange(len(counts), dtype=np.int32), np.maximum(counts, 1))
        found = counts[query] > 0
        image, iou = np.zeros(len(query), dtype=np.int32), np.zeros(len(query))
        image[found], iou[found] = self.pairs[:, 1], self.iou
        texts = {
            "query": pa.DictionaryArray.from_arrays(query, as_text(self.queries.column)),
            "image": pa.DictionaryArray.from_arrays(pa.array(image, mask=~found), as_text(self.images.column)),
        }
        return pa.table({**texts, "iou": pa.array(iou, mask=~found)})


def intersections_table(queries: Catalogue, database: Catalogue) -> dict[str, list[tuple[str, float]]]:
    """Two Catalogues -> the public table: query file name -> [(database path relative to the data set, IoU), …].

    Queries without a positive have an empty list.
    """
    names, paths = list(queries.names), list(database.paths)
    table = {name: [] for name in names}
    pairs, iou = intersections(queries.footprints, database.footprints)
    for (query, image), value in zip(pairs.tolist(), iou.tolist()):
        table[names[query]].append((paths[image], value))
    return table


def save_intersections(path: str | Path, table: dict) -> None:
    """Written whole or not at all, also by several processes at once."""
    with replacing(path) as file:
        torch.save(table, file)


def write_positives(path: str | Path, queries: Catalogue | None = None, database: Catalogue | None = None) -> dict:
    """Makes the public table and writes it -> the table. The catalogues are those of its folder where not given."""
    root = Path(path).parent
    queries = Catalogue.read(root, "queries") if queries is None else queries
    database = Catalogue.read(root, "database", DATABASE_YEAR) if database is None else database
    table = intersections_table(queries, database)
    save_intersections(path, table)
    return table


def load_intersections(path: str | Path) -> dict:
    """-> the table. Raises FileNotFoundError or ValueError naming the file and the command that makes it."""
    path = Path(path)
    if path.is_dir():
        raise ValueError(
            f"{path}: is a folder; the positives of a data set are its file {path / INTERSECTIONS_FILE}, "
            f"which python -m datasets.overlap {path} writes"
        )
    remedy = f"python -m datasets.overlap {path.parent} writes it"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; {remedy}")
    table = load_tensors(path)
    if not isinstance(table, dict) or not all(
        isinstance(name, str) and isinstance(found, (list, tuple)) for name, found in table.items()
    ):
        raise ValueError(f"{path}: expected a dict, query name -> list of (database path, IoU); {remedy}")
    for name, found in table.items():
        for entry in found:
            if not _is_positive(entry):
                raise ValueError(
                    f"{path}: query {name} has the entry {str(entry)[:80]}, expected (database path, IoU); {remedy}"
                )
    return table


def _is_positive(entry: object) -> bool:
    if not (isinstance(entry, (list, tuple)) and len(entry) == 2 and isinstance(entry[0], str)):
        return False
    return isinstance(entry[1], (int, float)) or isinstance(entry[1], torch.Tensor) and entry[1].ndim == 0


def load_positives(path: str | Path, min_pairs: int = 100_000) -> Positives:
    """The same file -> Positives. Errors as load_intersections.

    A large table takes 12 s to read, so its rows are kept in index_positives.parquet beside it, for as long as the
    table's size, times and inode are those that the index holds.
    """
    path = Path(path)
    file = path.with_name("index_positives.parquet")
    return or_anew(lambda trusted: _load_positives(path, min_pairs, file, trusted), file)


def _load_positives(path: Path, min_pairs: int, file: Path, trusted: bool) -> Positives:
    began = time.time()
    state = path.stat() if path.is_file() else None
    mark = [state.st_size, state.st_mtime_ns, state.st_ctime_ns, state.st_ino] if state else []
    stored = opened(file) if state and trusted else None
    if stored and stored[1] == mark:
        return Positives.from_rows(read_rows(stored[0], ["query", "image", "iou"]))
    positives = Positives.from_table(load_intersections(path))
    settled = max(mark[1:3]) < (began - listing.RACY_SECONDS) * 1e9  # else it could change without a new time
    if settled and len(positives.pairs) >= min_pairs:
        store(file, [positives.rows()], mark)
    return positives


def report(catalogue: Catalogue, kind: str, shown: int = 10) -> list[str]:
    """-> lines on footprints that cannot be used as they are: degenerate ones by name, the number of bow ties."""
    bad, lines = np.flatnonzero(degenerate(catalogue.footprints)), []
    if len(bad):
        lines = [f"{len(bad)} {kind} have a degenerate footprint (no area, or half the globe wide), without positives:"]
        lines += [f"    {path}" for path in catalogue.paths[bad[:shown]]]
        lines += [f"    and {len(bad) - shown} more"] if len(bad) > shown else []
    if crossing := int(self_crossing(catalogue.footprints).sum()):
        lines.append(f"{crossing} {kind} list their corners crosswise; they were put in order")
    return lines


def main(
    dataset_path: Annotated[Path, "folder with queries/ and database/; the file goes into it"],
    queries: Annotated[Path | None, "take the queries from another data set, or a text file of names"] = None,
    database: Annotated[Path | None, "take the database from another data set, or a text file of names"] = None,
    output: Annotated[Path | None, "file to write instead"] = None,
) -> None:
    """The command: positives of a data set's queries among its 2021 images."""
    began = time.perf_counter()
    output = output or dataset_path / INTERSECTIONS_FILE
    if output.is_dir():
        raise ValueError(f"{output}: is a folder; name the file to write, such as {output / INTERSECTIONS_FILE}")
    if not output.parent.is_dir():
        raise FileNotFoundError(f"{output.parent}: no such folder to write {output.name} to; make it, or give --output")
    queries = Catalogue.read_source(queries or dataset_path, "queries")
    database = Catalogue.read_source(database or dataset_path, "database")
    for line in report(queries, "queries") + report(database, "database images"):
        print(line)
    table = write_positives(output, queries, database)
    found = sum(bool(positives) for positives in table.values())
    print(
        f"{output}: {found} of {len(table)} queries have a positive among {len(database)} images, "
        f"{sum(map(len, table.values())):,} pairs in {time.perf_counter() - began:.1f} s"
    )


if __name__ == "__main__":
    command(main)
