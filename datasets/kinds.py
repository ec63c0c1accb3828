"""What a batch holds: groups of images of one place. Quadruplets of regions, pairs with photos, or both kinds."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from datasets.batches import BatchLoader
from datasets.pairs import Pairs
from datasets.regions import Regions
from datasets.training import note_unreadable, serve_pairs, serve_period
from utils import distributed, figures


class Quadruplets:
    """Regions with a year in each column, in clustered batches.

    share: of unreadable ones that raises ValueError. served: an iterator of (own rows, own images, errors), see
    `serve`; None before that.
    """

    what, picture = "region", "batch.jpg"

    def __init__(self, groups: Regions | Pairs, loader: BatchLoader, share: float) -> None:
        self.groups, self.loader, self.share = groups, loader, share
        self.unreadable, self.served = {}, None

    @property
    def sources(self) -> int:
        """How many there are that can be unreadable."""
        return len(self.groups)

    def note(self, errors: Sequence[tuple[int, str]]) -> None:
        """See `note_unreadable`."""
        note_unreadable(errors, self.unreadable, self.sources, self.share, self.what)

    def serve(self, memory: dict, draw: str, *when: object) -> None:
        """Batches to the next clusters. memory: the run's clusters, and the shares to draw them by; see `serve_period`
        for the rest."""
        self.served = serve_period(self.loader, memory["clusters"], *when, draw, memory["shares"])

    def save_picture(self, views: Tensor, folder: Path, shown: int = 20) -> None:
        """views (B, columns, 3, H, W) of own groups, as the model sees them."""
        figures.save(figures.batch_figure(views[:shown], self.groups.columns), folder / self.picture)

    def receive(self, rows: Tensor, errors: list[tuple[int, str]]) -> np.ndarray:
        """Own rows of a batch, and what could not be read -> the rows of all processes. Raises ValueError where a place
        is empty."""
        rows, errors = distributed.gather(rows), sum(distributed.gather_objects_if(errors), [])
        self.note(errors)
        if (rows < 0).any():
            raise ValueError(f"{errors[0][1]}. No other {self.what} of {self.sources} can take its place in the batch")
        return rows.numpy()


class PhotoPairs(Quadruplets):
    """Pairs in random batches; errors are told of photos."""

    what, picture = "photo", "pairs.jpg"

    @property
    def sources(self) -> int:
        return len(self.groups.photos)

    def serve(self, memory: dict, draw: str, *when: object) -> None:
        self.served = serve_pairs(self.loader, self.groups, *when)


def join(groups: Sequence[Regions | Pairs], rows: Sequence[np.ndarray]) -> tuple[np.ndarray, Tensor, Tensor]:
    """Rows (B,) of each kind -> footprints (F, 4, 2), each image's place in them (N,), and labels (N,)."""
    grounds = [each.grounds(own) for each, own in zip(groups, rows)]
    footprints = np.concatenate([found for found, _, _ in grounds])
    images = np.concatenate([np.full(len(found), count) for found, _, count in grounds])
    places = np.repeat(np.arange(len(footprints)), images)
    labels = np.concatenate([labels for _, labels, _ in grounds])[places]
    return footprints, torch.from_numpy(places), torch.from_numpy(labels)


def paths_of(groups: Sequence[Regions | Pairs], rows: Sequence[np.ndarray]) -> list[str]:
    """Rows (B,) of each kind -> paths (N,)."""
    return [path for each, own in zip(groups, rows) for row in own.tolist() for path in each.paths_of(row)]
