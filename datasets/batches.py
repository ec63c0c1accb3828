"""Batches of one cluster each (paper, sec. 4.2): which regions, what stands in for unreadable ones, and the loader."""

import logging
import math
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from itertools import count

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from utils.signals import ignore_signals, iterate
from utils.workers import PREFETCH, fitting_workers, free_shared_memory, slots_for

SPARES = 8  # regions that may take the place of one that cannot be read
DRAWS = ("size", "uniform", "photos")


def schedule(
    clusters: Sequence[np.ndarray],
    batch_size: int,
    count: int,
    seed: int | Sequence[int],
    draw: str = "size",
    shares: np.ndarray | None = None,
) -> np.ndarray:
    """The region rows of `count` batches, each from one cluster -> (count, batch_size) int. Paper, sec. 4.2.

    clusters: list of arrays of rows, each at least batch_size long. seed: anything numpy.random.default_rng takes; the
    schedule depends on nothing else. draw "size": in a pass, each cluster is shuffled and cut into batches, so large
    ones come up more often and a region at most once; then the pass is shuffled so that no two batches in a row share a
    cluster. "uniform", as in the released code: each batch is of any cluster, all equally likely, whatever came before.
    "photos" (AstroLoc): the same, but likely by `shares` (C,), the share of photos in each; by size while that is None.
    """
    small = [len(each) for each in clusters if len(each) < batch_size]
    if small or not clusters:
        raise ValueError(
            f"--batch_size {batch_size}: a cluster has only {min(small, default=0)} regions; "
            f"use a smaller --batch_size or fewer --num_clusters"
        )
    rng = np.random.default_rng(seed)
    if draw == "uniform" or (draw == "photos" and shares is not None):
        chosen = rng.choice(len(clusters), size=count, p=shares if draw == "photos" else None)
        return np.array([rng.choice(clusters[each], batch_size, replace=False) for each in chosen], dtype=np.int64)
    batches, last = [], -1
    while len(batches) < count:
        cuts = [_cut(rng.permutation(members), batch_size) for members in clusters]
        if len(cuts) > 1:  # with more than half of a pass, the largest would have to follow itself
            largest = max(range(len(cuts)), key=lambda cluster: len(cuts[cluster]))
            cuts[largest] = cuts[largest][: sum(map(len, cuts)) - len(cuts[largest])]
        passing = [(cluster, rows) for cluster, batches_of in enumerate(cuts) for rows in batches_of]
        ordered = spread([cluster for cluster, _ in passing], rng, last)
        batches += [passing[position][1] for position in ordered]
        last = passing[ordered[-1]][0]
    return np.array(batches[:count], dtype=np.int64)


def _cut(rows: np.ndarray, size: int) -> list[np.ndarray]:
    return [rows[start : start + size] for start in range(0, len(rows) - size + 1, size)]


def spread(labels: Sequence[Hashable], rng: np.random.Generator, last: Hashable = -1) -> list[int]:
    """A random order of positions in which no two neighbours have one label, nor the first and `last`, if there is one.

    Labels are drawn in proportion to how many of them are left, except when one would otherwise be left over.
    """
    left = {}
    for position in rng.permutation(len(labels)):
        left.setdefault(labels[position], []).append(int(position))
    keys = sorted(left)
    counts = np.array([len(left[key]) for key in keys])
    order = []
    while counts.sum():
        allowed = counts * np.array([key != last for key in keys])
        if not allowed.any():  # only the last label is left: nothing to put between
            allowed = counts
        top = int(np.argmax(allowed))
        choice = top if 2 * allowed[top] > counts.sum() else rng.choice(len(keys), p=allowed / allowed.sum())
        last = keys[choice]
        order.append(left[last].pop())
        counts[choice] -= 1
    return order


def random_clusters(regions: int, count: int, batch_size: int, seed: int | Sequence[int]) -> list[np.ndarray]:
    """The first clusters: `regions` rows in `count` random groups, fewer if a group would not fill a batch."""
    count = max(1, min(count, regions // batch_size))
    return [np.sort(rows) for rows in np.array_split(np.random.default_rng(seed).permutation(regions), count)]


def spares(batch: np.ndarray, clusters: Sequence[np.ndarray], seed: int | Sequence[int]) -> np.ndarray:
    """batch (B,) of rows from one of the clusters -> (B, SPARES) rows to take in place of each, in order; -1: none.

    First from the batch's own cluster, then from anywhere. No row comes up twice or is in the batch, so places are
    filled without looking at each other. seed: as for `schedule`; nothing else matters.
    """
    rng = np.random.default_rng(seed)
    own = next(rows for rows in clusters if batch[0] in rows)
    wanted = len(batch) * SPARES
    found = rng.permutation(np.setdiff1d(own, batch))[:wanted]
    if len(found) < wanted:
        others = np.setdiff1d(np.concatenate(clusters), np.concatenate([own, batch]))
        found = np.concatenate([found, rng.permutation(others)[: wanted - len(found)]])
    found = np.concatenate([found, np.full(wanted - len(found), -1)]).astype(np.int64)
    return found.reshape(SPARES, len(batch)).T  # every place gets a first choice before any gets a second


def fill(dataset: Dataset, places: torch.Tensor, choices: Iterable[int]) -> tuple[int, list[tuple[int, str]]]:
    """Reads the first of the choices that can be read into places -> that one, or -1, and [(row, what went wrong), …]
    of those before it."""
    errors = []
    for choice in choices:
        try:
            dataset.fill(places, choice)
            return choice, errors
        except (ValueError, OSError) as error:
            errors.append((choice, str(error)))
    return -1, errors


class Batches(Dataset):
    """(slot, rows (B,)) -> the rows, -1 where one could not be read, the slot of the pool that now has their images,
    and [(row, what went wrong), …]. pool: uint8 (slots, B, *dataset.shape)."""

    def __init__(self, dataset: Dataset, pool: torch.Tensor) -> None:
        self.dataset, self.pool = dataset, pool

    def __getitem__(self, batch: tuple) -> tuple[torch.Tensor, int, list[tuple[int, str]]]:
        slot, rows = batch
        found = [fill(self.dataset, places, [int(row)]) for places, row in zip(self.pool[slot], rows)]
        return torch.tensor([row for row, _ in found]), slot, [error for _, errors in found for error in errors]


def pool_note(batch_size: int, shape: tuple[int, ...], workers: int, free: int | None) -> str:
    """A line about the memory for batches of images, shape (years, H, W, 3) each. free: as in `fitting_workers`.

    Raises ValueError where they do not fit, while that is an error.
    """
    slot = batch_size * math.prod(shape)
    fitting, why = fitting_workers(workers, slot, free)
    if fitting < workers:
        raise ValueError(f"{why}, or a smaller --source_size (now {shape[1]})")
    kind, slots = "shared memory" if workers else "memory", slots_for(workers)
    return f"Batches: {slots} of {slot / 1e6:.1f} MB each, {slots * slot / 1e6:.0f} MB of {kind}"


class BatchLoader:
    """Serves scheduled batches with workers that live as long as the loader, whatever the schedules of one batch size.

    Workers decode into a pool of slots in shared memory that are used in turn: no copy, and no fresh pages, which cost
    a quarter of the time (benchmarks/speed_input.py). device: where they go; for a GPU the pool is page-locked.
    """

    def __init__(self, dataset: Dataset, num_workers: int, device: str | torch.device = "cpu") -> None:
        self.dataset, self.num_workers, self.page_locked = dataset, num_workers, torch.device(device).type == "cuda"
        self.batches, self.spares = np.empty((0, 0), dtype=np.int64), None
        self.pool, self.loader = None, None

    def __iter__(self) -> Iterator[tuple]:
        return ((number % len(self.pool), rows) for number, rows in enumerate(self.batches))

    def __len__(self) -> int:
        return len(self.batches)

    def serve(self, batches: np.ndarray, spares: Callable[[int], np.ndarray] | None = None) -> Iterator[tuple]:
        """batches (count, B) of rows -> iterator of (rows (B,), uint8 (B, years, 3, H, W), errors), see `Batches`.

        Images are valid until the next batch but one is asked for: then their memory is written to again.
        spares: batch number -> (B, K) rows that may take the place of each, -1: none; asked for where a region cannot
        be read, and read by this process. Without them, and where all cannot be read, its row is -1.
        """
        self.batches, self.spares = batches, spares
        if self.pool is None or self.pool.shape[1] != batches.shape[1]:
            self._open(batches.shape[1])
        served = iterate(self.loader)
        if self.page_locked and not self.pool.is_pinned():
            page_lock(self.pool)
        return map(self._place, count(), served)

    def close(self) -> None:
        """Ends the workers and frees the pool."""
        if self.loader is not None:
            # The one place where a DataLoader holds workers that live on. They ignore signals, so whoever still holds
            # what `serve` returned must not keep them.
            workers, self.loader._iterator = self.loader._iterator, None
            if workers is not None:
                workers._shutdown_workers()
            if self.page_locked and self.pool.is_pinned():
                torch.cuda.synchronize()
                torch.cuda.cudart().cudaHostUnregister(self.pool.data_ptr())
        self.pool, self.loader = None, None

    def _open(self, batch_size: int) -> None:
        self.close()
        logging.info(pool_note(batch_size, self.dataset.shape, self.num_workers, free_shared_memory()))
        self.pool = torch.empty((slots_for(self.num_workers), batch_size, *self.dataset.shape), dtype=torch.uint8)
        if self.num_workers:
            self.pool.share_memory_()
        self.loader = DataLoader(
            Batches(self.dataset, self.pool),
            batch_size=None,
            sampler=self,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            prefetch_factor=PREFETCH if self.num_workers else None,
            worker_init_fn=ignore_signals,
        )

    def _place(self, number: int, item: tuple) -> tuple[torch.Tensor, torch.Tensor, list]:
        rows, slot, errors = item
        empty = torch.nonzero(rows < 0).flatten().tolist() if self.spares else []
        others = self.spares(number) if empty else None
        for place in empty:
            choices = others[place][others[place] >= 0].tolist()
            rows[place], failed = fill(self.dataset, self.pool[slot, place], choices)
            errors = errors + failed
        return rows, self.pool[slot].permute(0, 1, 4, 2, 3), errors


def page_lock(tensor: torch.Tensor) -> None:
    """Pins memory that is there already, so that copies to a GPU are fast and run beside the host. RuntimeError where
    the driver refuses."""
    code = int(torch.cuda.cudart().cudaHostRegister(tensor.data_ptr(), tensor.nbytes, 1))  # 1: for every device
    if code:
        raise RuntimeError(
            f"{tensor.nbytes / 1e6:.0f} MB for batches could not be page-locked (CUDA error {code}); "
            f"fewer --num_workers or a smaller --batch_size need less"
        )
