"""Counting what was found: recall as it comes and over distinct images, chance, the nadir, orientation."""

from collections.abc import Collection, Sequence

import numpy as np
from numpy.typing import ArrayLike
from scipy.spatial import KDTree
from scipy.stats import hypergeom

from utils import geo

RANKS = (1, 5, 10, 20, 100)


def first_of_each(images: ArrayLike, k: int) -> np.ndarray:
    """Ranked lists with repeats (Q, K) int -> positions (Q, k) in the list of each image's first entry; -1 fills up.

    An entry of -1 is no image. This turns the count "as they come" into the count over distinct images.
    """
    images = np.asarray(images)
    order = np.argsort(images, axis=1, kind="stable")
    ordered = np.take_along_axis(images, order, axis=1)
    first = np.ones_like(ordered, dtype=bool)
    first[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    keep = np.zeros_like(first)
    np.put_along_axis(keep, order, first & (ordered >= 0), axis=1)
    kept_first = np.argsort(~keep, axis=1, kind="stable")[:, :k]
    positions = np.where(np.take_along_axis(keep, kept_first, axis=1), kept_first, -1)
    return np.pad(positions, ((0, 0), (0, k - positions.shape[1])), constant_values=-1)


def take(values: np.ndarray, positions: np.ndarray, missing: object) -> np.ndarray:
    """values (Q, K) at positions (Q, k), with `missing` where a position is -1."""
    return np.where(positions < 0, missing, np.take_along_axis(values, np.maximum(positions, 0), axis=1))


def is_correct(predictions: ArrayLike, positives: Sequence[Collection[int]]) -> np.ndarray:
    """predictions (Q, K) int, -1 for none; positives: Q sets or arrays -> (Q, K) bool."""
    predictions = np.asarray(predictions, dtype=np.int64)
    if len(predictions) != len(positives):
        raise ValueError(f"{len(predictions)} lists of predictions for {len(positives)} queries")
    right = [np.fromiter(each, dtype=np.int64, count=len(each)) for each in positives]
    flat = np.concatenate(right) if right else np.zeros(0, dtype=np.int64)
    query = np.repeat(np.arange(len(right)), [len(each) for each in right])
    size = 1 + max(predictions.max(initial=0), flat.max(initial=0))
    keys = np.arange(len(predictions))[:, None] * size + predictions
    return np.isin(keys, query * size + flat) & (predictions >= 0)


def recall_at(
    predictions: ArrayLike, positives: Sequence[Collection[int]], ks: Sequence[int] = RANKS
) -> dict[int, float]:
    """Share of queries with a right image among the first k, in percent: {k: recall} (paper, sec. 5.1.2).

    predictions (Q, K) int, best first, -1 for none. With fewer than k predictions, those that exist count.
    """
    return recall_of(is_correct(predictions, positives), ks)


def recall_of(correct: np.ndarray, ks: Sequence[int] = RANKS) -> dict[int, float]:
    """correct (Q, K) bool, best first -> {k: percent}."""
    if not len(correct):
        raise ValueError("recall over no queries: skip the empty set")
    return {k: 100 * float(correct[:, :k].any(axis=1).mean()) for k in ks}


def random_choice_recall(positives: ArrayLike, images: int, ks: Sequence[int] = RANKS) -> dict[int, float]:
    """Expected recall of drawing k of `images` without repeats, exact: 1 - C(M - p, k) / C(M, k), mean over queries.

    positives (Q,) int: how many of the M images are right for each query. {k: percent}, paper's row "Random Choice".
    """
    counts, queries = np.unique(positives, return_counts=True)
    missed = {k: hypergeom.pmf(0, images, counts, min(k, images)) for k in ks}
    return {k: 100 * float(np.average(1 - missed[k], weights=queries)) for k in ks}


def nearest_to_nadir(nadirs: ArrayLike, centers: ArrayLike, k: int) -> np.ndarray:
    """Database images ranked by distance of their centre (M, 2) from each nadir (Q, 2) -> (Q, k) int, -1 fills up.

    What is found without looking at the photo, by guessing that it shows what lies below the station. The paper's row
    "Nadir" has a fifth to a tenth of these recalls and does not say what it counts (docs/decisions.md).
    """
    tree = KDTree(geo.to_unit_vectors(centers))  # the chord grows with the distance
    _, ranked = tree.query(geo.to_unit_vectors(nadirs), np.arange(1, k + 1))
    return np.where(ranked < tree.n, ranked, -1)


def orientation_of(rotation: ArrayLike) -> np.ndarray:
    """Rotation of the matched database image, degrees counter-clockwise -> the query's orientation, in [0, 360).

    The names' orientation is the angle in the photo from its up direction to north, clockwise: the compass azimuth of
    up is minus the orientation. Found on the 17,752 public names: their corners run top-left, bottom-left,
    bottom-right, top-right, and minus the azimuth of up that follows is within 45 degrees of the label for 74 % of
    them (median 3.7 off). The others list their corners from the one that makes up the side nearest north (97 %), and
    agree with their label (median 3.7 off as well, landscape format) once counted from a later corner.
    A north-up image turned counter-clockwise by 90 has north at its left: orientation -90, so 270.
    """
    return (-np.asarray(rotation)) % 360


def orientation_error(estimate: ArrayLike, label: ArrayLike) -> np.ndarray:
    """Smallest angle between two orientations in degrees -> [0, 180]; broadcasts, any number of turns."""
    return np.abs((np.asarray(estimate, dtype=np.float64) - label + 180) % 360 - 180)
