"""Batches of GeoCLIP's training: which photos, against which coordinates, and with which random draws."""

import logging
from collections.abc import Iterator, Sequence

import numpy as np
import torch

from datasets.gps import add_noise


class Schedule:
    """Rows of every global batch: a permutation an epoch, cut into batches, whatever is left over waits for the next.

    batch(i) depends on seed and i only, so every process knows all coordinates of every batch without a message.
    Iterating it gives one process's share from iteration `start` on: a batch_sampler.
    """

    def __init__(
        self, count: int, batch_size: int, iterations: int, seed: int, rank: int = 0, processes: int = 1, start: int = 0
    ) -> None:
        self.count, self.batch_size, self.iterations, self.seed = count, batch_size, iterations, seed
        self.rank, self.share, self.start = rank, batch_size // processes, start
        self.per_epoch = count // batch_size
        self.order = (None, None)

    def batch(self, iteration: int) -> np.ndarray:
        epoch, step = divmod(iteration, self.per_epoch)
        if self.order[0] != epoch:
            self.order = (epoch, np.random.default_rng([self.seed, 5, epoch]).permutation(self.count))
        return self.order[1][step * self.batch_size : (step + 1) * self.batch_size]

    def own(self) -> slice:
        return slice(self.rank * self.share, (self.rank + 1) * self.share)

    def __iter__(self) -> Iterator[list[int]]:
        for iteration in range(self.start, self.iterations):
            yield self.batch(iteration)[self.own()].tolist()

    def __len__(self) -> int:
        return self.iterations - self.start


def candidates_of(
    points: np.ndarray, queue: np.ndarray, noise_batch: float, noise_queue: float, seed: int, iteration: int
) -> np.ndarray:
    """The batch's points (B, 2) and the queue (Q, 2) -> (B + Q, 2) degrees, each moved by its noise, metres (sec. 3.3).

    Drawn from the seed and the iteration: the same in every process and after a resume.
    """
    rng = np.random.default_rng([seed, 6, iteration])
    return np.concatenate([add_noise(points, noise_batch, rng), add_noise(queue, noise_queue, rng)])


def draws_of(seed: int, iteration: int, rank: int) -> torch.Generator:
    """The generator of one iteration's augmentation in one process, whatever came before it."""
    return torch.Generator().manual_seed(int(np.random.SeedSequence([seed, 8, iteration, rank]).generate_state(1)[0]))


def note_unreadable(rows: torch.Tensor, errors: Sequence[str], unreadable: set[int], count: int) -> None:
    """Logs each image that could not be read once, and adds its row to the set `unreadable`. ValueError beyond half."""
    for row, error in zip(rows.tolist(), errors):
        if error and row not in unreadable:
            unreadable.add(row)
            logging.warning(f"left out: {error} ({len(unreadable)} so far)")
    if len(unreadable) > count / 2:
        raise ValueError(f"{len(unreadable)} of {count} training images cannot be read, see above")
