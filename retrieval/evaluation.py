"""A model and the evaluation sets -> recalls, lines for the log, results.json, predictions.csv and a picture."""

import csv
import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from datasets.images import read_image
from datasets.names import Catalogue
from datasets.sets import VALIDATION, EvaluationData, EvaluationSet
from retrieval.describe import Describer, rotate
from retrieval.recall import (
    RANKS,
    first_of_each,
    is_correct,
    nearest_to_nadir,
    orientation_error,
    orientation_of,
    random_choice_recall,
    recall_at,
    recall_of,
    take,
)
from retrieval.search import Search, make_search
from utils import figures, geo
from utils.files import replacing_text

CSV_FIELDS = ("set", "query", "rank", "database_image", "score", "rotation", "correct", "km")
# What results.json calls the ways of counting, and a SetResult.
COUNTINGS = {
    "recalls": "recalls",
    "recalls_distinct": "distinct",
    "nearest_to_nadir": "nearest_to_nadir",
    "random_choice": "random_choice",
}


@dataclass(frozen=True)
class Descriptors:
    """Every image of the sets, described once. Row i of queries (Q, D) is catalogue row query_rows[i];
    database (R, M, D) holds one layer a rotation, column j is catalogue row database_rows[j].

    Where the queries are turned instead, queries is (R, Q, D) and database (1, M, D)."""

    queries: np.ndarray
    query_rows: np.ndarray
    database: np.ndarray
    database_rows: np.ndarray
    rotations: tuple

    @property
    def queries_are_turned(self) -> bool:
        return self.queries.ndim == 3


@dataclass(frozen=True)
class SetResult:
    """One set's ranked lists and what they score. Lists are best first and hold rotated copies as they come.

    positions (Q, K): in the set's database_rows, -1 for none; rotations (Q, K) degrees; scores (Q, K);
    correct (Q, K) bool. Recalls are {k: percent}. orientation: None without rotations.
    """

    set: EvaluationSet
    scores: np.ndarray
    positions: np.ndarray
    rotations: np.ndarray
    correct: np.ndarray
    recalls: dict
    distinct: dict
    nearest_to_nadir: dict
    random_choice: dict
    orientation: dict | None

    @property
    def database_images(self) -> np.ndarray:
        """(Q, K) rows of the database catalogue, -1 for none."""
        return np.where(self.positions < 0, -1, self.set.database_rows[np.maximum(self.positions, 0)])


@dataclass(frozen=True)
class Evaluation:
    """All sets' results. The averages are over the paper's sets, the validation set is not in them."""

    data: EvaluationData  # without the images that could not be read
    results: list[SetResult]
    rotations: tuple
    ks: tuple
    notes: list = field(default_factory=list)

    def __getitem__(self, name: str) -> SetResult:
        for result in self.results:
            if result.set.name == name:
                return result
        raise KeyError(f"{name}: no result, the set was empty or not asked for")

    @property
    def test_results(self) -> list[SetResult]:
        return [result for result in self.results if result.set.name != VALIDATION]

    def average(self, counting: str = "recalls") -> dict[int, float]:
        """Mean over the sets of `recalls`, `distinct`, `nearest_to_nadir` or `random_choice` -> {k: percent}, or {}."""
        rows = [getattr(result, counting) for result in self.test_results]
        return {k: float(np.mean([row[k] for row in rows])) for k in self.ks} if rows else {}

    def lines(self) -> list[str]:
        """The log: one line a set in the form that users parse, the average, the other counting, the naive rows."""
        lines = [recall_line(result.set.name, result.set, result.recalls) for result in self.results]
        tests = self.test_results
        if tests:
            queries = sum(len(result.set.query_rows) for result in tests)
            images = len(self.data.only(*[result.set.name for result in tests]).database_rows)
            count = f"< {len(tests)} sets - #q: {queries}; #db: {images} >"
            lines.append(recall_line("average", count, self.average()))
            if len(self.rotations) > 1:
                lines.append(
                    "Counted as they come: each rotated copy takes a place in the list, the paper's protocol. "
                    "Over distinct images:"
                )
                lines += [recall_line(result.set.name, result.set, result.distinct, "Distinct") for result in tests]
                lines.append(recall_line("average", count, self.average("distinct"), "Distinct"))
            lines.append(recall_line("average", count, self.average("nearest_to_nadir"), "Nearest centre to the nadir"))
            lines.append(recall_line("average", count, self.average("random_choice"), "Random  "))
        for result in self.results:
            if result.orientation and result.orientation["queries"]:
                lines.append(
                    "Orientation of {:15} over {queries} queries whose first prediction is right: "
                    "{within_45:.1f} % within 45 degrees of the label, mean error {mean_error:.1f}".format(
                        result.set.name, **result.orientation
                    )
                )
        if len(tests) < len(self.results):
            lines.append(f"{VALIDATION} lies inside the Texas set and is not in the average")
        return lines

    def as_dict(self) -> dict:
        """What results.json holds."""
        sets = {
            result.set.name: {
                "queries": len(result.set.query_rows),
                "database": len(result.set.database_rows),
                "left_out": len(result.set.left_out),
                **{name: getattr(result, counting) for name, counting in COUNTINGS.items()},
                "orientation": result.orientation,
            }
            for result in self.results
        }
        average = {"over": [result.set.name for result in self.test_results]}
        average |= {name: self.average(counting) for name, counting in COUNTINGS.items()}
        return {"sets": sets, "average": average, "rotations": list(self.rotations), "notes": self.notes}


def recall_line(name: str, described: object, recalls: dict[int, float], title: str = "Recalls") -> str:
    """`Recalls on Alps            < Alps - #q: 2394; #db: 53012 >: R@1: 58.4, …`; recalls {k: percent}."""
    values = ", ".join(f"R@{k}: {value:.1f}" for k, value in recalls.items())
    return f"{title} on {name:15} {described}: {values}"


def evaluate(
    describer: Describer,
    data: EvaluationData,
    ks: Sequence[int] = RANKS,
    search: str = "flat",
    rotate: str = "database",
    keep: str | Path | None = None,
) -> Evaluation:
    """The whole evaluation: describe the union of the sets once, search and score each set. search: one of SEARCHES,
    the rest as for `describe_sets`."""
    descriptors, data = describe_sets(describer, data, rotate, keep)
    return score_sets(data, descriptors, ks, search, describer.device)


def describe_sets(
    describer: Describer, data: EvaluationData, rotate: str = "database", keep: str | Path | None = None
) -> tuple[Descriptors, EvaluationData]:
    """-> Descriptors of the union of the sets, and the data without the images that could not be read.

    The database images are turned by the describer's rotations, (0,) for no test-time augmentation; rotate="queries"
    turns these instead. keep: a folder for the descriptors, None for memory.
    """
    still = replace(describer, rotations=(0,))

    def described(label: str, catalogue: Catalogue, rows: np.ndarray):
        describe, paths = describer if rotate == label else still, [catalogue.paths[row] for row in rows]
        if keep is None:
            found, failures = describe([catalogue.root / path for path in paths], label)
        else:
            found, failures = describe.kept(keep, catalogue.root, paths, label)
        return found, rows[[row for row, _ in failures]], [error for _, error in failures]

    queries, bad_queries, errors = described("queries", data.queries, data.query_rows)
    database, bad_database, more_errors = described("database", data.database, data.database_rows)
    queries = queries if rotate == "queries" else queries[0]
    found = Descriptors(queries, data.query_rows, database, data.database_rows, tuple(describer.rotations))
    if len(bad_queries) or len(bad_database):
        data = data.without(bad_queries, bad_database)
        data.notes.extend(f"left out: {error}" for error in errors + more_errors)
    return found, data


def score_sets(
    data: EvaluationData,
    descriptors: Descriptors,
    ks: Sequence[int] = RANKS,
    search: str = "flat",
    device: str | torch.device = "cpu",
) -> Evaluation:
    """Descriptors of the union -> Evaluation. Each set is a slice of them; search: one of SEARCHES, on the device."""
    layers, described, dim = descriptors.database.shape
    index = make_search(search, descriptors.database.reshape(layers * described, dim), device)
    results = [score_set(one, data, descriptors, ks, index) for one in data.sets]
    notes = list(data.notes)
    for one in data.sets:
        if len(one.database_rows) < max(ks):
            notes.append(
                f"{one.name}: the database has {len(one.database_rows)} images, recalls beyond "
                f"R@{len(one.database_rows)} are over all of them"
            )
    return Evaluation(data, results, descriptors.rotations, tuple(ks), notes)


def search_set(
    one: EvaluationSet, descriptors: Descriptors, depth: int, index: Search
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The ranked list of each query of an EvaluationSet -> scores, positions in database_rows (-1 for none) and
    rotations of the database image, each (Q, rotations * depth). index: make_search's, over all layers.

    A photo turned by r against an image is the photo against the image turned by -r: the same list from a database
    of one layer, but for what the model makes of the turned photo.
    """
    turns = len(descriptors.rotations)
    rows = np.searchsorted(descriptors.query_rows, one.query_rows)
    columns = np.searchsorted(descriptors.database_rows, one.database_rows)
    if not descriptors.queries_are_turned:
        candidates = (np.arange(turns)[:, None] * descriptors.database.shape[1] + columns).ravel()
        scores, entries = index.search(descriptors.queries[rows], turns * depth, candidates)
        positions, turn = entries % len(columns), entries // len(columns)
        rotations = np.array(descriptors.rotations)
    else:
        found = [index.search(layer[rows], turns * depth, columns) for layer in descriptors.queries]
        scores, positions = (np.concatenate(each, axis=1) for each in zip(*found))
        best = np.argsort(-scores, axis=1, kind="stable")[:, : turns * depth]
        scores, positions = np.take_along_axis(scores, best, axis=1), np.take_along_axis(positions, best, axis=1)
        turn = best // (turns * depth)
        rotations = -np.array(descriptors.rotations) % 360
    none = np.isneginf(scores)
    return scores, np.where(none, -1, positions), np.where(none, rotations[0], rotations[np.where(none, 0, turn)])


def score_set(
    one: EvaluationSet, data: EvaluationData, descriptors: Descriptors, ks: Sequence[int], index: Search
) -> SetResult:
    """EvaluationSet -> SetResult. The list is deep enough to hold max(ks) distinct images, whatever repeats."""
    depth = max(ks)
    scores, positions, rotations = search_set(one, descriptors, depth, index)
    correct = is_correct(positions, one.positives)
    distinct = take(correct, first_of_each(positions, depth), False)
    queries, centers = one.query_rows, data.database.centers[one.database_rows]
    orientation = score_orientation(rotations[:, 0], data.queries.orientations[queries], correct[:, 0])
    return SetResult(
        one,
        scores,
        positions,
        rotations,
        correct,
        recalls=recall_of(correct, ks),
        distinct=recall_of(distinct, ks),
        nearest_to_nadir=recall_at(nearest_to_nadir(data.queries.nadirs[queries], centers, depth), one.positives, ks),
        random_choice=random_choice_recall([len(each) for each in one.positives], len(centers), ks),
        orientation=orientation if len(descriptors.rotations) > 1 else None,
    )


def score_orientation(rotations: np.ndarray, labels: np.ndarray, right: np.ndarray) -> dict:
    """Rotation of the first prediction against the label, where that prediction is right (paper, sec. 5.1.2).

    (Q,), (Q,) degrees, (Q,) bool -> queries counted, within_45 percent, mean_error degrees (None without queries).
    """
    error = orientation_error(orientation_of(rotations), labels)[right]
    return {
        "queries": len(error),
        "within_45": 100 * float((error <= 45).mean()) if len(error) else None,
        "mean_error": float(error.mean()) if len(error) else None,
    }


def write_results(path: str | Path, evaluation: Evaluation, **more: object) -> None:
    """Evaluation -> results.json; `more` are further entries, such as the checkpoint. Written whole or not at all."""
    with replacing_text(path) as file:
        file.write(json.dumps({**more, **evaluation.as_dict()}, indent=2, default=str) + "\n")


def write_predictions(path: str | Path, evaluation: Evaluation, depth: int = 10) -> None:
    """The first `depth` entries of every query, as they come, with km between the centres of the two footprints."""
    data = evaluation.data
    query_centers, database_centers = data.queries.centers, data.database.centers
    with replacing_text(path) as file:
        writer = csv.writer(file)
        writer.writerow(CSV_FIELDS)
        for result in evaluation.results:
            images = result.database_images[:, :depth]
            km = geo.distance_km(query_centers[result.set.query_rows][:, None], database_centers[images])
            for q, rank in np.argwhere(images >= 0).tolist():
                writer.writerow(
                    (
                        result.set.name,
                        data.queries.paths[result.set.query_rows[q]],
                        rank + 1,
                        data.database.paths[images[q, rank]],
                        f"{result.scores[q, rank]:.4f}",
                        result.rotations[q, rank],
                        int(result.correct[q, rank]),
                        f"{km[q, rank]:.1f}",
                    )
                )


def evaluation_figure(
    evaluation: Evaluation, queries_per_set: int = 4, depth: int = 3, size: int = 160, seed: int = 0
) -> Image.Image | None:
    """An Evaluation -> predictions_figure of a few queries of each test set, drawn by seed, not chosen.

    None where there is no set to draw from.
    """
    data, generator, rows = evaluation.data, np.random.default_rng(seed), []

    def picture(catalogue: Catalogue, row: int):
        return read_image(catalogue.root / catalogue.paths[row], size)

    for result in evaluation.test_results:
        images, count = result.database_images[:, :depth], len(result.set.query_rows)
        for q in sorted(generator.choice(count, min(queries_per_set, count), replace=False)):
            found = [
                (rotate(picture(data.database, image), int(turn)), bool(correct))
                for image, turn, correct in zip(images[q], result.rotations[q], result.correct[q])
                if image >= 0
            ]
            rows.append((picture(data.queries, result.set.query_rows[q]), found, result.set.name))
    return figures.predictions_figure(rows, size) if rows else None
