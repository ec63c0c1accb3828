"""The six evaluation sets and the validation set: who is in them, and which images are right (paper, sec. 3.3)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from datasets.names import DATABASE_YEAR, Catalogue
from datasets.overlap import INTERSECTIONS_FILE, Positives, load_positives
from utils import geo
from utils.tables import Strings, base_names, find

POINTS_OF_INTEREST = {  # Table 1
    "Texas": (30, -95),
    "Alps": (45, 10),
    "California": (38, -122),
    "Gobi Desert": (40, 105),
    "Amazon": (-3, -60),
    "Toshka Lakes": (23, 30),
}
QUERY_RADIUS_KM = 2500  # what the station's crew can see, eq. 1 rounded up
DATABASE_RADIUS_KM = 5000  # all ground that a photo with its nadir inside the query radius can show

# Validation lies inside the Texas set: the paper marks Texas as "validation" for that reason.
VALIDATION = "Texas-validation"
VALIDATION_QUERY_RADIUS_KM = 500
VALIDATION_DATABASE_RADIUS_KM = 1200


@dataclass(frozen=True)
class EvaluationSet:
    """One set. Rows point into the two catalogues, positives into database_rows.

    query_rows (Q,), database_rows (D,) sorted; positives: Q arrays of positions 0 … D-1, none of them empty;
    left_out: rows of the queries in reach that have no positive in this database, which nothing could find.
    """

    name: str
    query_rows: np.ndarray
    database_rows: np.ndarray
    positives: list
    left_out: np.ndarray

    def __str__(self) -> str:
        return f"< {self.name} - #q: {len(self.query_rows)}; #db: {len(self.database_rows)} >"

    @property
    def is_empty(self) -> bool:
        return not (len(self.query_rows) and len(self.database_rows))

    @property
    def note(self) -> str:
        """For the log: what is empty or left out."""
        found, lost = len(self.query_rows), len(self.left_out)
        if self.is_empty:
            return (
                f"{self.name}: skipped, it has {found} queries with a positive ({lost} without) "
                f"and {len(self.database_rows)} database images"
            )
        without = f"{self.name}: {lost} of {found + lost} queries left out, they have no positive in the set's database"
        return without if lost else ""


@dataclass(frozen=True)
class EvaluationData:
    """All sets over one pair of catalogues. pairs (P, 2): (query row, database row) that share ground, sorted."""

    queries: Catalogue
    database: Catalogue
    pairs: np.ndarray
    sets: list
    notes: list  # sentences for the log: what is missing, empty or left out

    @property
    def query_rows(self) -> np.ndarray:
        """Union over the sets, sorted: each query is described once."""
        return _union([one.query_rows for one in self.sets])

    @property
    def database_rows(self) -> np.ndarray:
        """Union over the sets, sorted: each database image is described once."""
        return _union([one.database_rows for one in self.sets])

    def only(self, *names: str) -> EvaluationData:
        """The same data with just these sets; unknown or skipped names leave nothing behind."""
        return replace(self, sets=[one for one in self.sets if one.name in names])

    def without(self, query_rows: np.ndarray, database_rows: np.ndarray) -> EvaluationData:
        """Leaves images out (unreadable ones) of every set; queries that lose their last positive go too."""
        sets = [
            build_set(
                one.name,
                np.setdiff1d(np.union1d(one.query_rows, one.left_out), query_rows),
                np.setdiff1d(one.database_rows, database_rows),
                self.pairs,
            )
            for one in self.sets
        ]
        notes = [one.note for one in sets if one.is_empty]
        return replace(self, sets=[one for one in sets if not one.is_empty], notes=self.notes + notes)


def in_a_set(nadirs: np.ndarray) -> np.ndarray:
    """nadirs (N, 2) -> (N,) bool: photos that belong to an evaluation set, found a positive or not.

    Validation lies inside Texas.
    """
    near = [geo.distance_km(nadirs, center) <= QUERY_RADIUS_KM for center in POINTS_OF_INTEREST.values()]
    return np.any(near, axis=0)


def in_validation(nadirs: np.ndarray) -> np.ndarray:
    """nadirs (N, 2) -> (N,) bool: photos that belong to the validation set, found a positive or not."""
    return geo.distance_km(nadirs, POINTS_OF_INTEREST["Texas"]) <= VALIDATION_QUERY_RADIUS_KM


def read_database(root: str | Path) -> Catalogue:
    """The images that are searched, those of 2021 -> Catalogue. Raises FileNotFoundError where there is none."""
    database = Catalogue.read(root, "database", year=DATABASE_YEAR)
    if not len(database):
        raise FileNotFoundError(
            f"{Path(root) / 'database'}: no image in a folder {DATABASE_YEAR}_*; searched are the "
            f"images of {DATABASE_YEAR}"
        )
    return database


def load_evaluation_data(dataset_path: str | Path, validation: bool = True) -> EvaluationData:
    """Queries, the database of 2021 and their positives, read once -> EvaluationData with every set that is not empty.

    validation=True appends the validation set. Raises FileNotFoundError where the data set or a part of it is missing.
    """
    root = Path(dataset_path)
    queries = Catalogue.read(root, "queries")
    if not len(queries):
        raise FileNotFoundError(f"{root / 'queries'}: no image in it; is --dataset_path right?")
    database = read_database(root)
    return make_evaluation_data(queries, database, load_positives(root / INTERSECTIONS_FILE), validation)


def load_validation_data(dataset_path: str | Path) -> EvaluationData | None:
    """As `load_evaluation_data`, of the validation set alone; None where the data set has no folder of queries, so that
    one can train on satellite images only."""
    if not (Path(dataset_path) / "queries").exists():
        return None
    return load_evaluation_data(dataset_path).only(VALIDATION)


def make_evaluation_data(
    queries: Catalogue, database: Catalogue, intersections: Positives | dict, validation: bool = True
) -> EvaluationData:
    """Catalogues and Positives, or {query name: [(database path, IoU)]} -> EvaluationData."""
    pairs, notes = positive_pairs(queries, database, intersections)
    wanted = [(name, center, QUERY_RADIUS_KM, DATABASE_RADIUS_KM) for name, center in POINTS_OF_INTEREST.items()]
    if validation:
        radii = VALIDATION_QUERY_RADIUS_KM, VALIDATION_DATABASE_RADIUS_KM
        wanted.append((VALIDATION, POINTS_OF_INTEREST["Texas"], *radii))
    centers = database.centers
    sets = [select_set(name, center, queries.nadirs, centers, pairs, *radii) for name, center, *radii in wanted]
    notes += [note for one in sets if (note := one.note)]
    return EvaluationData(queries, database, pairs, [one for one in sets if not one.is_empty], notes)


def select_set(
    name: str,
    center: tuple[float, float],
    nadirs: np.ndarray,
    database_centers: np.ndarray,
    pairs: np.ndarray,
    query_radius_km: float = QUERY_RADIUS_KM,
    database_radius_km: float = DATABASE_RADIUS_KM,
) -> EvaluationSet:
    """Queries by nadir (N, 2), database images by centre (M, 2), great-circle distance to center (lat, lon)."""
    query_rows = np.flatnonzero(geo.distance_km(nadirs, center) <= query_radius_km)
    database_rows = np.flatnonzero(geo.distance_km(database_centers, center) <= database_radius_km)
    return build_set(name, query_rows, database_rows, pairs)


def build_set(name: str, query_rows: np.ndarray, database_rows: np.ndarray, pairs: np.ndarray) -> EvaluationSet:
    """Sorted rows and the positive pairs (P, 2) -> EvaluationSet. Queries without a positive go to left_out."""
    inside = np.isin(pairs[:, 0], query_rows) & np.isin(pairs[:, 1], database_rows)
    of_query, of_database = pairs[inside].T
    found, starts = np.unique(of_query, return_index=True)
    positions = np.searchsorted(database_rows, of_database)
    positives = np.split(positions, starts[1:]) if len(found) else []
    return EvaluationSet(name, found, database_rows, positives, np.setdiff1d(query_rows, found))


def positive_pairs(
    queries: Catalogue, database: Catalogue, intersections: Positives | dict
) -> tuple[np.ndarray, list[str]]:
    """Positives, or {query name: [(database path, IoU)]} -> pairs (P, 2) of catalogue rows, sorted, and notes on what
    is missing.

    Images are matched by file name, which is unique and does not change when a data set's folders are moved.
    """
    table = intersections if isinstance(intersections, Positives) else Positives.from_table(intersections)
    of_table = find(table.queries, queries.names)
    image_rows = find(database.names, Strings(base_names(table.images.column)))
    starts = np.searchsorted(table.pairs[:, 0], np.arange(len(table.queries) + 1))
    counts = np.where(of_table < 0, 0, np.diff(starts, append=starts[-1:])[of_table])
    # Entry k of query q is the table's pair starts[q] + k.
    entry = np.arange(counts.sum()) + np.repeat(starts[of_table] - np.cumsum(counts) + counts, counts)
    found = image_rows[table.pairs[entry, 1]]
    missing, unlisted = int((found < 0).sum()), int((of_table < 0).sum())
    key = np.sort((np.repeat(np.arange(len(queries)), counts) * len(database) + found)[found >= 0])
    key = key[np.diff(key, prepend=-1) > 0]  # np.unique hashes first: 30 times as long
    pairs = np.stack(np.divmod(key, max(len(database), 1)), axis=1)
    notes = []
    if missing:
        notes.append(
            f"{missing} of {missing + len(pairs)} positives of {INTERSECTIONS_FILE} are not in the database "
            "on disk: recalls count the others only"
        )
    if unlisted:
        notes.append(
            f"{unlisted} of {len(queries)} queries are not listed in {INTERSECTIONS_FILE}: counted as without "
            "a positive"
        )
    return pairs, notes


def _union(rows: Sequence[np.ndarray]) -> np.ndarray:
    return np.unique(np.concatenate(rows)) if rows else np.zeros(0, dtype=np.int64)
