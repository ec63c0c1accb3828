"""Regions with their four years, the data set of quadruplets, and the schedule of batches (paper, sec. 4.1 and 4.2)."""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, default_collate

from datasets.images import read_pixels
from datasets.metadata import YEARS, Catalogue
from utils.preemption import ignore_signals, iterate
from utils.strings import Strings


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
    def read(cls, root, years=YEARS):
        """Data set folder -> Regions, and the ids of those left out because a year is missing.

        Raises ValueError where none is whole.
        """
        catalogue = Catalogue.read(root, "database")
        ids, region = np.unique(catalogue.ids.array, return_inverse=True)
        rows = np.full((len(ids), len(years)), -1)
        for column, year in enumerate(years):
            of_year = np.flatnonzero(catalogue.years == year)
            rows[region[of_year], column] = of_year
        whole = (rows >= 0).all(axis=1)
        missing = list(Strings(ids[~whole]))
        if not whole.any():
            raise ValueError(f"{Path(root) / 'database'}: {len(ids)} regions, none with an image of every year "
                             f"({', '.join(map(str, years))}); is the data set complete?")
        rows = rows[whole]
        paths, footprints = catalogue.paths, catalogue.footprints[rows[:, -1]]
        del catalogue, region  # 100 MB of a full data set that need not be there while the paths are copied
        return cls(Path(root), paths[rows], footprints, Strings(ids[whole]), tuple(years)), missing

    def __len__(self):
        return len(self.paths)

    def views_of(self, year):
        """The same regions with one year's image in every place: no regional quadruplets (Table 3, first row)."""
        column = self.years.index(year)
        return replace(self, paths=self.paths[:, [column] * len(self.years)])


class RegionDataset(Dataset):
    """Row -> (row, uint8 (years, 3, size, size)). Pixels stay uint8 until they are on the device.

    In memory they lie as they were decoded, (…, H, W, 3): channels last.
    """

    def __init__(self, regions, size):
        self.regions, self.size = regions, size

    def __len__(self):
        return len(self.regions)

    def __getitem__(self, row):
        return row, torch.stack(self.pixels(row)).permute(0, 3, 1, 2)

    def pixels(self, row):
        """-> a list of uint8 (size, size, 3), one a year."""
        paths = self.regions.paths[row]
        images = {path: read_pixels(self.regions.root / path, self.size) for path in set(paths)}
        return [images[path] for path in paths]


def schedule(clusters, batch_size, count, seed):
    """The region rows of `count` batches, each from one cluster -> (count, batch_size) int. Paper, sec. 4.2.

    clusters: list of arrays of rows, each at least batch_size long. seed: anything numpy.random.default_rng takes; the
    schedule depends on nothing else. In a pass, each cluster is shuffled and cut into batches, so large ones come up
    more often and a region at most once; then the pass is shuffled so that no two batches in a row share a cluster.
    """
    small = [len(each) for each in clusters if len(each) < batch_size]
    if small or not clusters:
        raise ValueError(f"--batch_size {batch_size}: a cluster has only {min(small, default=0)} regions; "
                         f"use a smaller --batch_size or fewer --num_clusters")
    rng = np.random.default_rng(seed)
    batches, last = [], -1
    while len(batches) < count:
        cuts = [_cut(rng.permutation(members), batch_size) for members in clusters]
        if len(cuts) > 1:  # with more than half of a pass, the largest would have to follow itself
            largest = max(range(len(cuts)), key=lambda cluster: len(cuts[cluster]))
            cuts[largest] = cuts[largest][:sum(map(len, cuts)) - len(cuts[largest])]
        passing = [(cluster, rows) for cluster, batches_of in enumerate(cuts) for rows in batches_of]
        ordered = spread([cluster for cluster, _ in passing], rng, last)
        batches += [passing[position][1] for position in ordered]
        last = passing[ordered[-1]][0]
    return np.array(batches[:count], dtype=np.int64)


def _cut(rows, size):
    return [rows[start:start + size] for start in range(0, len(rows) - size + 1, size)]


def spread(labels, rng, last=-1):
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


def random_clusters(regions, count, batch_size, seed):
    """The first clusters: `regions` rows in `count` random groups, fewer if a group would not fill a batch."""
    count = max(1, min(count, regions // batch_size))
    return [np.sort(rows) for rows in np.array_split(np.random.default_rng(seed).permutation(regions), count)]


SPARES = 8  # regions that may take the place of one that cannot be read


def spares(batch, clusters, seed):
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
        found = np.concatenate([found, rng.permutation(others)[:wanted - len(found)]])
    found = np.concatenate([found, np.full(wanted - len(found), -1)]).astype(np.int64)
    return found.reshape(SPARES, len(batch)).T  # every place gets a first choice before any gets a second


class Batches(Dataset):
    """(rows (B,), spares (B, K)) -> the rows that could be read, their images, and [(row, what went wrong), …].

    A place whose region and spares all cannot be read has row -1.
    """

    def __init__(self, dataset):
        self.dataset = dataset

    def __getitem__(self, batch):
        rows, images, errors = [], [], []
        for row, others in zip(*batch):
            for choice in (int(row), *others[others >= 0].tolist()):
                try:
                    images.append(self.dataset.pixels(choice))
                    break
                except (ValueError, OSError) as error:
                    errors.append((choice, str(error)))
            else:
                choice = -1
            rows.append(choice)
        return torch.tensor(rows), _stack(images) if images else torch.empty(0), errors


def _stack(regions):
    """Lists of (H, W, 3), one a region -> (B, years, 3, H, W), channels last in memory. Copied once: in a worker straight
    into the memory that it shares with the main process."""
    pixels = default_collate([image for region in regions for image in region])
    return pixels.unflatten(0, (len(regions), -1)).permute(0, 1, 4, 2, 3)


class BatchLoader:
    """Serves scheduled batches with workers that live as long as the loader, whatever the schedules."""

    def __init__(self, dataset, num_workers):
        self.batches, self.spares = np.empty((0, 0), dtype=np.int64), None
        self.loader = DataLoader(Batches(dataset), batch_size=None, sampler=self, num_workers=num_workers,
                                 persistent_workers=num_workers > 0, pin_memory=torch.cuda.is_available(),
                                 worker_init_fn=ignore_signals)

    def __iter__(self):
        none = np.empty((self.batches.shape[1], 0), dtype=np.int64)
        return ((rows, self.spares(number) if self.spares else none) for number, rows in enumerate(self.batches))

    def __len__(self):
        return len(self.batches)

    def serve(self, batches, spares=None):
        """batches (count, B) of rows -> iterator of (rows (B,), uint8 (B, years, 3, H, W), errors), see `Batches`.

        spares: batch number -> (B, K), asked for one batch at a time; without, an unreadable region has no substitute.
        """
        self.batches, self.spares = batches, spares
        return iterate(self.loader)

    def close(self):
        """Ends the workers."""
        self.loader._iterator = None  # the one place where a DataLoader holds workers that live on
