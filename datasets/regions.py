"""Regions with their four years, and the data set of quadruplets (paper, sec. 4.1)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset

from datasets.images import read_pixels
from datasets.names import YEARS, Catalogue
from utils.tables import Strings


@dataclass(frozen=True)
class Regions:
    """paths[i]: region i's images, one a year, relative to root; footprints (R, 4, 2) degrees; ids zoom_row_col.

    paths and ids are Strings, which read like a list of tuples and a list of str: 175,000 regions are a few arrays.
    """

    root: Path
    paths: Strings
    footprints: np.ndarray
    ids: Strings
    years: tuple

    @classmethod
    def read(cls, root: str | Path, years: Sequence[int] = YEARS) -> tuple[Regions, list[str]]:
        """Data set folder -> Regions, and the ids of those left out because a year is missing.

        Raises ValueError where none is whole.
        """
        catalogue = Catalogue.read(root, "database")
        encoded = catalogue.ids.array.dictionary_encode()
        ids, place = np.unique(np.array(encoded.dictionary.to_pylist(), dtype=np.bytes_), return_inverse=True)
        region = place[encoded.indices]
        rows = np.full((len(ids), len(years)), -1)
        for column, year in enumerate(years):
            of_year = np.flatnonzero(catalogue.years == year)
            rows[region[of_year], column] = of_year
        whole = (rows >= 0).all(axis=1)
        missing = list(Strings(ids[~whole]))
        if not whole.any():
            raise ValueError(
                f"{Path(root) / 'database'}: {len(ids)} regions, none with an image of every year "
                f"({', '.join(map(str, years))}); is the data set complete?"
            )
        rows = rows[whole]
        return cls(
            Path(root), catalogue.paths[rows], catalogue.footprints[rows[:, -1]], Strings(ids[whole]), tuple(years)
        ), missing

    def __len__(self) -> int:
        return len(self.paths)

    def files(self, year: int) -> list[Path]:
        """Each region's image of one year."""
        column = self.years.index(year)
        return [self.root / paths[column] for paths in self.paths]

    @property
    def columns(self) -> tuple:
        """Titles of a group's images."""
        return self.years

    def paths_of(self, row: int) -> tuple[str, ...]:
        """A group's images."""
        return self.paths[row]

    def grounds(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, int]:
        """rows (B,) -> footprints (B, 4, 2), labels (B,), and how many images in a row show each of them."""
        return self.footprints[rows], rows, len(self.years)

    def views_of(self, year: int) -> Regions:
        """The same regions with one year's image in every place: no regional quadruplets (Table 3, first row)."""
        column = self.years.index(year)
        return replace(self, paths=self.paths[:, [column] * len(self.years)])


def source_size(image_size: int) -> int:
    """Pixels a side at which images are loaded for augmented views of image_size: at least 1.6 times as many, and a
    power of two, because JPEG decoders halve for nothing and what is left to resize costs. Not above the public 1,024.
    A view shows 0.71 of a side (experiments/chain.py), so few are upsampled: 3.5 % at 320 px from 512.
    """
    least = -(-8 * image_size // 5)
    return min(1 << (least - 1).bit_length(), max(1024, image_size))


class RegionDataset(Dataset):
    """Row -> (row, uint8 (years, 3, size, size)). Pixels stay uint8 until they are on the device.

    In memory they lie as they were decoded, shape = (years, H, W, 3): channels last.
    """

    def __init__(self, regions: Regions, size: int) -> None:
        self.regions, self.size = regions, size
        self.shape = (len(regions.years), size, size, 3)

    def __len__(self) -> int:
        return len(self.regions)

    def __getitem__(self, row: int) -> tuple[int, torch.Tensor]:
        return row, self.fill(torch.empty(self.shape, dtype=torch.uint8), row).permute(0, 3, 1, 2)

    def fill(self, places: torch.Tensor, row: int) -> torch.Tensor:
        """Reads a region's images into places, contiguous uint8 of self.shape, and returns it."""
        paths = list(self.regions.paths[row])
        for year, path in enumerate(paths):
            first = paths.index(path)
            if first < year:
                places[year] = places[first]
            else:
                read_pixels(self.regions.root / path, self.size, places[year])
        return places
