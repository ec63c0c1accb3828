"""What a photo is compared with: the images of a data set, described here, or an index that was described before.

Both are `Places`: rows with footprints, of which `near` picks those in reach of a camera and `search` finds the ones
that look most like a photo.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from datasets import grid
from datasets.images import read_image
from datasets.names import DATABASE_YEAR, Catalogue
from datasets.sets import read_database
from retrieval.describe import ROTATIONS, Describer
from retrieval.predictions import distances_to_footprints
from retrieval.prior import log_prior, weigh
from retrieval.recall import first_of_each, take
from retrieval.search import search
from retrieval.store import Rows
from utils import geo

if TYPE_CHECKING:
    from retrieval.earth_index import EarthIndex
    from retrieval.ground import DatabaseGround

FOUND = tuple[np.ndarray, np.ndarray, np.ndarray]  # scores, rows, rotations, each (Q, k)


class Places:
    """N places: footprints (N, 4, 2) degrees, bottom-left, top-left, top-right, bottom-right; names (N,); areas (N,)
    km². turns: degrees, counter-clockwise, in which `search` wants a photo described."""

    turns: tuple[int, ...] = (0,)
    most = sys.maxsize  # places that a search can find
    ground = None  # for registration: what there is around a place, see retrieval/ground.py

    def __init__(self, source: str | Path, footprints: np.ndarray, names: Sequence[str], areas: np.ndarray) -> None:
        self.source, self.footprints, self.names, self.areas = source, footprints, names, areas
        self.centers = geo.centers(footprints)
        self.vectors = geo.to_unit_vectors(self.centers)
        self.reach = geo.distance_km(footprints, self.centers[:, None]).max(axis=1)
        self.near = lru_cache(64)(self._near)  # photos of one pass share their nadir

    def __len__(self) -> int:
        return len(self.footprints)

    def _near(self, point: tuple[float, float] | None, km: float) -> np.ndarray:
        """Sorted rows whose footprint reaches into the circle of so many km around a point (lat, lon); None: all."""
        if point is None:
            return np.arange(len(self))
        cosines = self.vectors @ geo.to_unit_vectors(point)
        widest = (km + self.reach.max(initial=0)) / geo.EARTH_RADIUS_KM + 1e-6
        rows = np.flatnonzero(cosines >= np.cos(min(widest, np.pi)))  # few: the arc cosine of these only
        away = geo.EARTH_RADIUS_KM * np.arccos(cosines[rows].clip(-1, 1))
        near = away <= km - 0.01  # the arc cosine is off by some 0.1 m
        rim = np.flatnonzero(~near & (away <= km + self.reach[rows] + 0.01))
        near[rim] = distances_to_footprints(self.footprints[rows[rim]], point) <= km  # fewer: the outlines of these
        return rows[near]

    def prepare(self, rows: np.ndarray) -> np.ndarray:
        """Rows that are to be searched, sorted -> those that can be."""
        return rows

    def search(self, photos: np.ndarray, rows: np.ndarray, k: int) -> FOUND:
        """photos (len(turns), Q, D), rows as `prepare` gives them -> scores, rows and rotations (degrees that the image
        is turned counter-clockwise to look like the photo) of the k best different places, best first, each (Q, k).

        A place counts in its best rotation. Where there are fewer than k the score is -inf and the row -1.
        """
        raise NotImplementedError

    def picture(self, row: int, size: int) -> torch.Tensor | None:
        """uint8 (3, size, size), north up; None where there is none."""
        return None


class Dataset(Places):
    """The images of 2021 of a data set's folder, each in four rotations; described when they are first to be searched,
    and kept: `describe(rows)` -> Rows (4, N, D) that have values there, and failures [(row, what went wrong)]."""

    def __init__(self, catalogue: Catalogue, describe: Callable[[np.ndarray], tuple[Rows, list]]) -> None:
        super().__init__(catalogue.root, catalogue.footprints, catalogue.paths, catalogue.areas)
        self.describe, self.descriptors = describe, None
        self.known = np.zeros(len(catalogue), dtype=bool)
        self.unreadable = np.zeros(len(catalogue), dtype=bool)

    @classmethod
    def read(cls, path: str | Path, model: torch.nn.Module, folder: str | Path, **settings) -> Dataset:
        """Data set's folder, model, folder for descriptors -> Dataset. settings: as a Describer takes them."""
        catalogue = read_database(path)
        describer = Describer(model, rotations=ROTATIONS, **settings)
        return cls(catalogue, lambda rows: describer.kept(folder, catalogue.root, catalogue.paths, "world", rows))

    @cached_property
    def ground(self) -> DatabaseGround:
        from retrieval.ground import DatabaseGround

        return DatabaseGround(self.source, self.names, self.footprints)

    def prepare(self, rows: np.ndarray) -> np.ndarray:
        new = rows[~self.known[rows]]
        if len(new):
            found, failures = self.describe(new)
            if self.descriptors is not None:  # what was found before lies where it lay in the same, longer file
                found.index[:, self.known] = self.descriptors.index[:, self.known]
            self.descriptors, self.known[new] = found, True
            for row, error in failures:
                self.unreadable[row] = True
                logging.info(f"left out: {error}")
        return rows[~self.unreadable[rows]]

    def search(self, photos: np.ndarray, rows: np.ndarray, k: int) -> FOUND:
        return best_rotations(photos[0], self.descriptors, rows, k)

    def picture(self, row: int, size: int) -> torch.Tensor:
        return read_image(self.source / self.names[row], size)


class Index(Places):
    """A file of descriptors, retrieval/earth_index.py: no images needed. Its pictures are NASA's Blue Marble, which
    ships with the demo world (7.4 km a pixel)."""

    turns = ROTATIONS

    def __init__(self, index: EarthIndex, source: str | Path) -> None:
        names = [f"{zoom}_{row}_{col}" for zoom, row, col in index.regions.tolist()]
        super().__init__(source, index.footprints, names, grid.name_area(index.footprints))
        self.index = index

    @cached_property
    def blue_marble(self) -> torch.Tensor:
        from datasets.build.demo import MOSAICS

        return read_image(MOSAICS[DATABASE_YEAR])

    def search(self, photos: np.ndarray, rows: np.ndarray, k: int) -> FOUND:
        return self.index.search(photos, rows, k)

    def picture(self, row: int, size: int) -> torch.Tensor:
        from datasets.build.demo_world import render_region

        return render_region(self.blue_marble, *self.index.regions[row].tolist(), size)


class MilvusIndex(Index):
    """An index whose vectors are searched in Milvus (retrieval/milvus.py): uri is a file that ends in .db, or a
    cluster's. It is told of the circle around the rows, that of a nadir: so many numbers would take it seconds."""

    most = 1000  # quick; Milvus itself can 16,384

    def __init__(self, index: EarthIndex, source: str | Path, uri: str, key: str = "sq8", token: str = "") -> None:
        from retrieval.milvus import MilvusSearch

        super().__init__(index, source)
        self.engine = MilvusSearch.of_index(uri, index, key, token)

    def search(self, photos: np.ndarray, rows: np.ndarray, k: int) -> FOUND:
        near, km = None, 0.0
        if 0 < len(rows) < len(self):
            near = geo.from_unit_vectors(self.vectors[rows].sum(axis=0))
            km = geo.distance_km(self.centers[rows], near).max() + 0.01
        every = None if near is None else rows
        return self.index.search(photos, rows, k, lambda queries, k, _: self.engine.search(queries, k, every, near, km))


def require_enough(places: Places, near: tuple[float, float] | None, near_km: float, top_k: int) -> None:
    """Raises ValueError where fewer than top_k places can be found, before anything is described."""
    count, where = len(places.near(near, near_km)), ""
    if near is not None:
        where = f" within {near_km:g} km of {near[0]:g}, {near[1]:g} (--near, --near_km)"
    if count < top_k:
        raise ValueError(f"--top_k {top_k}: the database has {count} images{where}")


def best_rotations(photos: np.ndarray, images: np.ndarray | Rows, rows: np.ndarray, k: int) -> FOUND:
    """photos (Q, D), images (R, N, D) in the rotations of ROTATIONS, rows to look at -> as `Places.search`."""
    turns, count, dim = images.shape
    entries = (np.arange(turns)[:, None] * count + rows).ravel()
    # An image may take a place for each rotation.
    scores, entry = search(images.reshape(-1, dim), photos, min(turns * k, len(entries)), entries)
    turn, row = np.divmod(entries[entry], count)
    first = first_of_each(row, k)
    return take(scores, first, -np.inf), take(row, first, -1), np.array(ROTATIONS)[take(turn, first, 0)]


def search_near(
    places: Places, photos: np.ndarray, points: Sequence, km: float, k: int, prior: str = "uniform"
) -> FOUND:
    """As `Places.search`, of each photo among the places within km of its own point (lat, lon), None: anywhere.

    prior: "archive" orders them by how likely they are so far from the point, too (retrieval/prior.py; with Milvus its
    best 1,000). Photos of one point are searched together.
    """
    scores = np.full((photos.shape[1], k), -np.inf, dtype=np.float32)
    found, rotations = np.full(scores.shape, -1), np.zeros(scores.shape, dtype=np.int64)
    groups = {}
    for photo, point in enumerate(points):
        groups.setdefault(None if point is None else tuple(map(float, point)), []).append(photo)
    near = {point: places.near(point, km) for point in groups}
    places.prepare(np.unique(np.concatenate([*near.values(), np.zeros(0, dtype=np.int64)])))
    for point, own in groups.items():
        rows = places.prepare(near[point])
        if not len(rows):
            continue
        if prior == "uniform" or point is None:
            best = places.search(photos[:, own], rows, k)
        else:
            in_reach = places.search(photos[:, own], rows, min(len(rows), places.most))
            best = weigh(*in_reach, log_prior(geo.distance_km(places.centers, point)), k)
        for whole, part in zip((scores, found, rotations), best):
            whole[own, : part.shape[1]] = part
    return scores, found, rotations
