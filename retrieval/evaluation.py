"""A model and the evaluation sets -> recalls, lines for the log, results.json, predictions.csv and a picture."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from datasets.images import read_image
from datasets.sets import VALIDATION, EvaluationData, EvaluationSet
from retrieval import describe as retrieval
from retrieval.describe import RANKS, ROTATIONS, make_search
from utils import figures, geo

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CSV_FIELDS = ("set", "query", "rank", "database_image", "score", "rotation", "correct", "km")


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

    data: object  # EvaluationData, without the images that could not be read
    results: list
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
            count = (
                f"< {len(tests)} sets - #q: {sum(len(result.set.query_rows) for result in tests)}; "
                f"#db: {len(self.data.only(*[result.set.name for result in tests]).database_rows)} >"
            )
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
        if any(result.set.name == VALIDATION for result in self.results):
            lines.append(f"{VALIDATION} lies inside the Texas set and is not in the average")
        return lines

    def as_dict(self) -> dict:
        """What results.json holds."""
        sets = {
            result.set.name: {
                "queries": len(result.set.query_rows),
                "database": len(result.set.database_rows),
                "left_out": len(result.set.left_out),
                "recalls": result.recalls,
                "recalls_distinct": result.distinct,
                "nearest_to_nadir": result.nearest_to_nadir,
                "random_choice": result.random_choice,
                "orientation": result.orientation,
            }
            for result in self.results
        }
        average = {
            "over": [result.set.name for result in self.test_results],
            "recalls": self.average(),
            "recalls_distinct": self.average("distinct"),
            "nearest_to_nadir": self.average("nearest_to_nadir"),
            "random_choice": self.average("random_choice"),
        }
        return {"sets": sets, "average": average, "rotations": list(self.rotations), "notes": self.notes}


def recall_line(name: str, described: EvaluationSet | str, recalls: dict[int, float], title: str = "Recalls") -> str:
    """`Recalls on Alps            < Alps - #q: 2394; #db: 53012 >: R@1: 58.4, …`; recalls {k: percent}."""
    values = ", ".join(f"R@{k}: {value:.1f}" for k, value in recalls.items())
    return f"{title} on {name:15} {described}: {values}"


def evaluate(
    model: torch.nn.Module,
    data: EvaluationData,
    image_size: int,
    batch_size: int = 32,
    num_workers: int = 0,
    device: str | torch.device = "cpu",
    precision: str = "fp32",
    rotations: Sequence[int] = ROTATIONS,
    ks: Sequence[int] = RANKS,
    progress: bool = True,
    rotate: str = "database",
    keep: str | Path | None = None,
    search: str = "flat",
) -> Evaluation:
    """The whole evaluation: describe the union of the sets once, search and score each set -> Evaluation.

    data: datasets.sets.EvaluationData. rotations: of the database images, (0,) for no test-time augmentation;
    rotate="queries" turns these instead. keep: a folder for the descriptors, None for memory. search: one of SEARCHES.
    """
    descriptors, data = describe_sets(
        model, data, image_size, batch_size, num_workers, device, precision, rotations, progress, rotate, keep
    )
    return score_sets(data, descriptors, ks, search, device)


def describe_sets(
    model: torch.nn.Module,
    data: EvaluationData,
    image_size: int,
    batch_size: int = 32,
    num_workers: int = 0,
    device: str | torch.device = "cpu",
    precision: str = "fp32",
    rotations: Sequence[int] = ROTATIONS,
    progress: bool = True,
    rotate: str = "database",
    keep: str | Path | None = None,
) -> tuple[Descriptors, EvaluationData]:
    """-> Descriptors of the union of the sets, and the data without the images that could not be read."""
    parts, lost = [], []
    rotations, still = tuple(rotations), (0,)
    for label, catalogue, rows, turns in (
        ("queries", data.queries, data.query_rows, rotations if rotate == "queries" else still),
        ("database", data.database, data.database_rows, still if rotate == "queries" else rotations),
    ):
        paths = [catalogue.paths[row] for row in rows]
        common = (image_size, batch_size, num_workers, device, precision, turns)
        if keep is None:
            described, failures = retrieval.describe(
                model, [catalogue.root / path for path in paths], *common, f"describing {label}", progress
            )
        else:
            described, failures = retrieval.describe_kept(keep, model, catalogue.root, paths, *common, label, progress)
        parts += [described, rows]
        lost.append((rows[np.array([row for row, _ in failures], dtype=np.int64)], [text for _, text in failures]))
    (bad_queries, query_errors), (bad_database, database_errors) = lost
    if len(bad_queries) or len(bad_database):
        data = data.without(bad_queries, bad_database)
        data.notes.extend(f"left out: {error}" for error in query_errors + database_errors)
    queries = parts[0] if rotate == "queries" else parts[0][0]
    return Descriptors(queries, parts[1], parts[2], parts[3], rotations), data


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
    one: EvaluationSet, descriptors: Descriptors, depth: int, index: object
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The ranked list of each query of an EvaluationSet -> scores, positions in database_rows (-1 for none) and
    rotations of the database image, each (Q, rotations * depth). index: make_search's, over all layers.

    A photo turned by r against an image is the photo against the image turned by -r: the same list from a database
    of one layer, but for what the model makes of the turned photo.
    """
    turns = len(descriptors.rotations)
    query_rows = np.searchsorted(descriptors.query_rows, one.query_rows)
    columns = np.searchsorted(descriptors.database_rows, one.database_rows)
    if not descriptors.queries_are_turned:
        candidates = (np.arange(turns)[:, None] * descriptors.database.shape[1] + columns).ravel()
        scores, entries = index.search(descriptors.queries[query_rows], turns * depth, candidates)
        positions, turn = entries % len(columns), entries // len(columns)
        rotations = np.array(descriptors.rotations)
    else:
        found = [index.search(layer[query_rows], turns * depth, columns) for layer in descriptors.queries]
        scores, positions = (np.concatenate(each, axis=1) for each in zip(*found))
        turn = np.repeat(np.arange(turns), turns * depth)[None]
        order = np.argsort(-scores, axis=1, kind="stable")[:, : turns * depth]
        scores, positions, turn = (
            np.take_along_axis(each, order, axis=1) for each in (scores, positions, np.broadcast_to(turn, scores.shape))
        )
        rotations = -np.array(descriptors.rotations) % 360
    none = np.isneginf(scores)
    return scores, np.where(none, -1, positions), np.where(none, rotations[0], rotations[np.where(none, 0, turn)])


def score_set(
    one: EvaluationSet, data: EvaluationData, descriptors: Descriptors, ks: Sequence[int], index: object
) -> SetResult:
    """EvaluationSet -> SetResult. The list is deep enough to hold max(ks) distinct images, whatever repeats."""
    turns, depth = len(descriptors.rotations), max(ks)
    scores, positions, rotations = search_set(one, descriptors, depth, index)
    correct = retrieval.is_correct(positions, one.positives)
    distinct = retrieval.take(correct, retrieval.first_of_each(positions, depth), False)

    nadirs, centers = data.queries.nadirs[one.query_rows], data.database.centers[one.database_rows]
    nearest = retrieval.nearest_to_nadir(nadirs, centers, depth)
    counts = np.array([len(each) for each in one.positives])
    return SetResult(
        one,
        scores,
        positions,
        rotations,
        correct,
        recalls=retrieval.recall_of(correct, ks),
        distinct=retrieval.recall_of(distinct, ks),
        nearest_to_nadir=retrieval.recall_at(nearest, one.positives, ks),
        random_choice=retrieval.random_choice_recall(counts, len(one.database_rows), ks),
        orientation=score_orientation(rotations[:, 0], data.queries.orientations[one.query_rows], correct[:, 0])
        if turns > 1
        else None,
    )


def score_orientation(rotations: np.ndarray, labels: np.ndarray, right: np.ndarray) -> dict:
    """Rotation of the first prediction against the label, where that prediction is right (paper, sec. 5.1.2).

    (Q,), (Q,) degrees, (Q,) bool -> queries counted, within_45 percent, mean_error degrees (None without queries).
    """
    error = retrieval.orientation_error(retrieval.orientation_of(rotations), labels)[right]
    return {
        "queries": len(error),
        "within_45": 100 * float((error <= 45).mean()) if len(error) else None,
        "mean_error": float(error.mean()) if len(error) else None,
    }


def write_results(path: str | Path, evaluation: Evaluation, **more) -> None:
    """Evaluation -> results.json; `more` are further entries, such as the checkpoint. Written whole or not at all."""
    temporary = Path(f"{path}.tmp")
    temporary.write_text(json.dumps({**more, **evaluation.as_dict()}, indent=2, default=str) + "\n")
    os.replace(temporary, path)


def write_predictions(path: str | Path, evaluation: Evaluation, depth: int = 10) -> None:
    """The first `depth` entries of every query, as they come, with km between the centres of the two footprints."""
    data = evaluation.data
    query_centers, database_centers = data.queries.centers, data.database.centers
    temporary = Path(f"{path}.tmp")
    with open(temporary, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(CSV_FIELDS)
        for result in evaluation.results:
            images = result.database_images[:, :depth]
            km = geo.distance_km(query_centers[result.set.query_rows][:, None], database_centers[images])
            for q, row in enumerate(result.set.query_rows):
                writer.writerows(
                    (
                        result.set.name,
                        data.queries.paths[row],
                        rank + 1,
                        data.database.paths[image],
                        f"{result.scores[q, rank]:.4f}",
                        result.rotations[q, rank],
                        int(result.correct[q, rank]),
                        f"{km[q, rank]:.1f}",
                    )
                    for rank, image in enumerate(images[q])
                    if image >= 0
                )
    os.replace(temporary, path)


def evaluation_figure(
    evaluation: Evaluation, queries_per_set: int = 4, depth: int = 3, size: int = 160, seed: int = 0
) -> Figure | None:
    """An Evaluation -> predictions_figure of a few queries of each test set, drawn by seed, not chosen.

    None where there is no set to draw from.
    """
    data, generator, rows = evaluation.data, np.random.default_rng(seed), []
    for result in evaluation.test_results:
        images, count = result.database_images, len(result.set.query_rows)
        for q in sorted(generator.choice(count, min(queries_per_set, count), replace=False)):
            found = [
                (
                    retrieval.rotate(
                        read_image(data.database.root / data.database.paths[image], size),
                        int(result.rotations[q, rank]),
                    ),
                    bool(result.correct[q, rank]),
                )
                for rank, image in enumerate(images[q, :depth])
                if image >= 0
            ]
            query = read_image(data.queries.root / data.queries.paths[result.set.query_rows[q]], size)
            rows.append((query, found, result.set.name))
    return figures.predictions_figure(rows, size) if rows else None
