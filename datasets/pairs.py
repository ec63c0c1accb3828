"""Pairs of an astronaut photo and a database image that show the same ground, to train with (AstroLoc, ICCV 2025).

Photos of the evaluation sets are in no pair.
"""

import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset

from datasets.images import read_pixels
from datasets.names import Catalogue
from datasets.overlap import intersections
from datasets.regions import Regions
from datasets.sets import in_a_set


@dataclass(frozen=True)
class Pairs:
    """photos: those in a pair; shown (P, 2): rows of a photo and of a region that it shows, sorted.

    Each brings as many pairs as a region has years: row r of a batch is the image of year r % Y of shown[r // Y].
    """

    photos: Catalogue
    regions: Regions
    shown: np.ndarray
    columns = ("photo", "image")

    def __len__(self) -> int:
        return len(self.shown) * len(self.regions.years)

    @property
    def turns(self) -> np.ndarray:
        """Quarter turns, counter-clockwise, that bring each photo's north nearest to up -> (photos,) int."""
        return np.rint(self.photos.orientations / 90).astype(np.int64) % 4

    @property
    def photo_files(self) -> list[Path]:
        return [self.regions.root / path for path in self.photos.paths]

    def photo_of(self, row: int) -> int:
        return int(self.shown[row // len(self.regions.years), 0])

    def paths_of(self, row: int) -> tuple[str, str]:
        """A group's images."""
        pair, year = divmod(row, len(self.regions.years))
        photo, region = self.shown[pair]
        return self.photos.paths[photo], self.regions.paths[region][year]

    def grounds(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, int]:
        """As of Regions: footprints (2 B, 4, 2), labels (2 B,), 1. A pair's label is its region."""
        photos, regions = self.shown[rows // len(self.regions.years)].T
        footprints = np.stack([self.photos.footprints[photos], self.regions.footprints[regions]], axis=1)
        return footprints.reshape(-1, 4, 2), np.repeat(regions, 2), 1


def read_pairs(dataset_path: str | Path, regions: Regions, min_iou: float, batch_size: int) -> Pairs:
    """Data set folder and its regions -> the Pairs with at least that IoU.

    Raises FileNotFoundError without photos, ValueError where those outside the evaluation sets do not fill a batch.
    """
    every = Catalogue.read(dataset_path, "queries")
    photos = every.select(~in_a_set(every.nadirs))
    shown, iou = intersections(photos.footprints, regions.footprints)
    shown = shown[iou >= min_iou]
    used, places = np.unique(shown[:, 0], return_inverse=True)
    logging.info(
        f"{len(every)} photos, {len(photos)} of them in no evaluation set, {len(used)} of these show a region with an "
        f"IoU of {min_iou:g}: {len(shown)} pairs, of {len(regions.years)} years each"
    )
    if len(used) < batch_size:
        raise ValueError(
            f"{Path(dataset_path) / 'queries'}: {len(used)} photos outside the evaluation sets show a region with an "
            f"IoU of {min_iou:g}, and a batch takes {batch_size}; use a smaller --batch_size or --pair_iou"
        )
    return Pairs(photos.select(used), regions, np.stack([places, shown[:, 1]], axis=1))


class PairDataset(Dataset):
    """Row -> (row, uint8 (2, 3, size, size)): the photo, turned by quarters to bring north up, and the image."""

    def __init__(self, pairs: Pairs, size: int) -> None:
        self.pairs, self.size, self.turns = pairs, size, pairs.turns
        self.shape = (2, size, size, 3)

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, row: int) -> tuple[int, torch.Tensor]:
        return row, self.fill(torch.empty(self.shape, dtype=torch.uint8), row).permute(0, 3, 1, 2)

    def fill(self, places: torch.Tensor, row: int) -> torch.Tensor:
        """As RegionDataset's."""
        photo, image = (self.pairs.regions.root / path for path in self.pairs.paths_of(row))
        places[0] = torch.rot90(read_pixels(photo, self.size), int(self.turns[self.pairs.photo_of(row)]))
        read_pixels(image, self.size, places[1])
        return places


def schedule_pairs(pairs: Pairs, batch_size: int, count: int, seed: int | list[int]) -> np.ndarray:
    """Rows of `count` batches -> (count, batch_size) int. In a pass each photo comes up at most once, with any of its
    regions in any year; the schedule depends on nothing but the seed."""
    rng, years = np.random.default_rng(seed), len(pairs.regions.years)
    starts = np.searchsorted(pairs.shown[:, 0], np.arange(len(pairs.photos)))
    counts = np.diff(starts, append=len(pairs.shown))
    batches = []
    while len(batches) < count:
        rows = (starts + rng.integers(counts)) * years + rng.integers(years, size=len(starts))
        whole = len(rows) // batch_size
        batches += list(rng.permutation(rows)[: whole * batch_size].reshape(whole, batch_size))
    return np.array(batches[:count], dtype=np.int64)
