"""The two countings, chance, the nadir and orientation, each against something worked out another way."""

import math

import numpy as np
import pytest
import torch

from retrieval import recall
from retrieval.describe import ROTATIONS, rotate
from retrieval.recall import recall_at
from utils import geo


def test_recall_ignores_missing_neighbours():
    assert recall_at([[-1, 2]], [{2}], ks=(1, 2)) == {1: 0.0, 2: 100.0}


def test_recall_against_plain_loops():
    rng = np.random.default_rng(0)
    predictions = rng.integers(-1, 40, (50, 30))
    positives = [set(rng.choice(40, rng.integers(0, 4), replace=False).tolist()) for _ in range(50)]
    recalls = recall_at(predictions, positives, ks=(1, 7, 30, 100))
    for k, value in recalls.items():
        hits = [any(entry in right for entry in row[:k]) for row, right in zip(predictions.tolist(), positives)]
        assert value == pytest.approx(100 * sum(hits) / 50)


def test_recall_over_no_queries_is_an_error():
    with pytest.raises(ValueError, match="no queries"):
        recall_at(np.zeros((0, 5), dtype=int), [])


def test_the_two_countings():
    images = np.array([[7, 7, 3, 7, 3, 5, -1], [1, 2, 3, 4, 5, 6, 7]])
    positions = recall.first_of_each(images, 4)
    assert positions.tolist() == [[0, 2, 5, -1], [0, 1, 2, 3]]
    assert recall.take(images, positions, -1).tolist() == [[7, 3, 5, -1], [1, 2, 3, 4]]
    # Image 5 is sixth as they come, third over distinct images.
    assert recall_at(images[:1], [{5}], ks=(3, 6)) == {3: 0.0, 6: 100.0}
    assert recall_at(recall.take(images, positions, -1)[:1], [{5}], ks=(3,)) == {3: 100.0}


def test_random_choice_is_hypergeometric():
    positives, images = np.array([1, 3, 50, 120, 0]), 120
    for k, value in recall.random_choice_recall(positives, images, ks=(1, 5, 100, 500)).items():
        expected = [
            1 - math.comb(images - p, min(k, images)) / math.comb(images, min(k, images)) for p in positives.tolist()
        ]
        assert value == pytest.approx(100 * np.mean(expected))
    assert recall.random_choice_recall([2], 4, ks=(1, 2)) == pytest.approx({1: 50, 2: 100 * (1 - 1 / 6)})


def test_random_choice_keeps_its_precision_at_full_size():
    assert recall.random_choice_recall([60], 53012, ks=(1,))[1] == pytest.approx(100 * 60 / 53012, rel=1e-5)


def test_nearest_to_nadir_crosses_the_antimeridian():
    centers = np.array([(0, 0), (0, -179), (0, 170), (80, 180)])
    assert recall.nearest_to_nadir([(0, 179.5)], centers, 3).tolist() == [[1, 2, 3]]
    assert recall.nearest_to_nadir([(0, 179.5)], centers, 6).tolist() == [[1, 2, 3, 0, -1, -1]]


def test_nearest_to_nadir_against_distances():
    rng = np.random.default_rng(5)
    nadirs = np.stack([rng.uniform(-52, 52, 1100), rng.uniform(-180, 180, 1100)], axis=1)
    centers = np.stack([rng.uniform(-60, 60, 40), rng.uniform(-180, 180, 40)], axis=1)
    expected = np.argsort(geo.distance_km(nadirs[:, None], centers), axis=1)[:, :7]
    assert np.array_equal(recall.nearest_to_nadir(nadirs, centers, 7), expected)


def test_orientation_follows_north_around_the_image():
    """North is the bright edge of a north-up image; its angle from up, clockwise, is the orientation."""
    image = torch.zeros(1, 3, 3)
    image[0, 0] = 1
    clockwise_from_up = {"top": 0, "right": 90, "bottom": 180, "left": 270}
    for degrees in ROTATIONS:
        turned = rotate(image, degrees)[0]
        edges = {"top": turned[0], "right": turned[:, 2], "bottom": turned[2], "left": turned[:, 0]}
        north = max(edges, key=lambda edge: edges[edge].sum())
        assert recall.orientation_of(degrees) == clockwise_from_up[north]


def test_orientation_error_is_modulo_a_turn():
    error = recall.orientation_error([0, 270, 350, 180], [-33.4, -90, 10, 0])
    assert error.tolist() == pytest.approx([33.4, 0, 20, 180])
