"""What training asks of its regions and pairs: enough of them, what to do about unreadable ones, what is neutral."""

import logging
from collections.abc import Iterator, Sequence

import numpy as np
import torch

from datasets.batches import SPARES, BatchLoader, schedule, spares
from datasets.overlap import share_ground
from datasets.pairs import Pairs, schedule_pairs
from datasets.regions import Regions


def read_regions(dataset_path: str, batch_size: int) -> Regions:
    """-> Regions with all years; those without are logged. Raises ValueError where a batch cannot be filled."""
    if batch_size < 1:
        raise ValueError(f"--batch_size {batch_size}: a batch has at least one region")
    regions, incomplete = Regions.read(dataset_path)
    logging.info(f"{len(regions)} regions with all years")
    if incomplete:
        logging.info(f"{len(incomplete)} regions lack a year and are left out: {', '.join(incomplete[:10])} …")
        logging.debug(f"Regions that lack a year: {incomplete}")
    if len(regions) < batch_size:
        raise ValueError(
            f"{dataset_path}: {len(regions)} regions do not fill a batch; --batch_size {len(regions)} or smaller would"
        )
    return regions


def note_unreadable(
    errors: Sequence[tuple[int, str]], unreadable: dict[int, str], count: int, share: float, what: str = "region"
) -> None:
    """errors [(row, what went wrong)] are logged and added to the dict `unreadable`, each region (or photo) once.

    Raises ValueError where more than this share of all `count` is unreadable.
    """
    for row, text in errors:
        if row not in unreadable:
            unreadable[row] = text
            logging.warning(f"Left out, another {what} takes its place: {text}")
    if len(unreadable) > share * count:
        raise ValueError(
            f"{len(unreadable)} of {count} {what}s have an image that cannot be read, more than "
            f"--max_unreadable {share:g} allows; the last one: {list(unreadable.values())[-1]}"
        )


def serve_period(
    loader: BatchLoader,
    clusters: Sequence[np.ndarray],
    batch_size: int,
    iteration: int,
    every: int,
    iterations: int,
    seed: int,
    part: slice,
    draw: str = "size",
    shares: np.ndarray | None = None,
) -> Iterator[tuple]:
    """-> The loader's batches from this iteration to the next clusters, which come `every` so many; of each the `part`.
    draw, shares: see `schedule`.

    Schedule and substitutes depend on the seed, the clusters and the iteration's number alone.
    """
    period, since = divmod(iteration, every)
    count = min(every, iterations - period * every)
    batches = schedule(clusters, batch_size, count, [seed, 2, period], draw, shares)[since:]
    return loader.serve(
        batches[:, part], lambda number: spares(batches[number], clusters, [seed, 5, iteration + number])[part]
    )


def serve_pairs(
    loader: BatchLoader,
    pairs: Pairs,
    batch_size: int,
    iteration: int,
    every: int,
    iterations: int,
    seed: int,
    part: slice,
) -> Iterator[tuple]:
    """As `serve_period`, of pairs; errors are told of rows of photos.

    Any pair may take the place of one that cannot be read: should it be in the batch already, the two are no negatives.
    """
    period, since = divmod(iteration, every)
    count = min(every, iterations - period * every)
    batches = schedule_pairs(pairs, batch_size, count, [seed, 9, period])[since:]

    def substitutes(number: int):
        return np.random.default_rng([seed, 10, iteration + number]).integers(len(pairs), size=(batch_size, SPARES))

    served = loader.serve(batches[:, part], lambda number: substitutes(number)[part])
    for rows, images, errors in served:
        yield rows, images, [(pairs.photo_of(row), text) for row, text in errors]


def serve_sample(loader: BatchLoader, regions: int, batch_size: int, seed: int, count: int = 512) -> Iterator[tuple]:
    """-> The loader's batches of `count` of so many regions, drawn by seed, in whole batches."""
    rows = np.random.default_rng([seed, 1]).permutation(regions)[:count]
    batches = rows[: len(rows) // batch_size * batch_size].reshape(-1, batch_size)
    substitutes = [spares(each, [np.arange(regions)], [seed, 6, k]) for k, each in enumerate(batches)]
    return loader.serve(batches, substitutes.__getitem__)


def iteration_seed(seed: int, iteration: int) -> int:
    """The seed of all that is random in one iteration, whatever came before it."""
    return int(np.random.SeedSequence([seed, 3, iteration]).generate_state(1)[0])


def neutral_pairs(footprints: np.ndarray, places: torch.Tensor) -> torch.Tensor:
    """footprints (B, 4, 2) of the batch's regions, places (N,) in them -> (N, N) bool: other regions, same ground."""
    shared = torch.from_numpy(share_ground(footprints, footprints))
    return shared[places][:, places] & (places[:, None] != places)
