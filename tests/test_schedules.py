"""The learning rate of each iteration, against plain arithmetic."""

import math

import pytest

from utils.schedules import learning_rate


def test_warm_up_rises_from_the_first_iteration_and_ends_at_the_rate():
    found = [learning_rate(iteration, 0.2, "constant", 10, warmup=4) for iteration in range(7)]
    assert found == pytest.approx([0.05, 0.1, 0.15, 0.2, 0.2, 0.2, 0.2])
    assert learning_rate(0, 0.2, "constant", 10) == 0.2


@pytest.mark.parametrize("iteration", [0, 3, 4, 9])
def test_cosine_with_warm_up(iteration):
    expected = 0.2 * min(1, (iteration + 1) / 4) * math.cos(math.pi * iteration / 20) ** 2  # (1 + cos 2x) / 2
    assert learning_rate(iteration, 0.2, "cosine", 10, warmup=4) == pytest.approx(expected)


def test_steps():
    found = [learning_rate(iteration, 8.0, "step", 10, gamma=0.5, step=3) for iteration in range(8)]
    assert found == [8, 8, 8, 4, 4, 4, 2, 2]


def test_an_unknown_schedule():
    with pytest.raises(KeyError):
        learning_rate(0, 1.0, "linear", 10)
