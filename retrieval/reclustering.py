"""Clusters of look-alike regions for the batches of one period (paper, sec. 4.2)."""

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np

from datasets.batches import random_clusters
from datasets.images import read_image
from datasets.kinds import PhotoPairs
from datasets.names import DATABASE_YEAR
from datasets.regions import Regions
from retrieval.clustering import cluster
from retrieval.describe import ROTATIONS, Describer, Failures
from utils import distributed, figures


def make_clusters(
    describer: Describer,
    regions: Regions,
    period: int,
    batches: str,
    count: int,
    batch_size: int,
    seed: int,
    note: Callable[[Failures], None],
    photos: PhotoPairs | None = None,
) -> tuple[list[np.ndarray], np.ndarray | None]:
    """Rows of regions in up to `count` clusters: random ones in period 0, then k-means of one year's descriptors. With
    batches "random" instead of "clustered", all regions in one.

    Of k-means' clusters also the shares (C,) of the photos, if there are any: see `photo_shares`; else None. Regions
    whose image cannot be read are told to `note`, and are in no cluster.
    """
    if batches == "random":
        return [np.arange(len(regions))], None
    if period == 0:
        return random_clusters(len(regions), count, batch_size, [seed, 4]), None
    descriptors, failures = describer(regions.files(DATABASE_YEAR), "regions")
    note(failures)
    rows = np.setdiff1d(np.arange(len(regions)), [row for row, _ in failures])
    clustered = lambda: cluster(descriptors[0][rows], count, batch_size, seed + period, describer.device)
    clusters = distributed.from_first(lambda: [rows[each] for each in clustered()])
    if photos is None:
        return clusters, None
    return clusters, photo_shares(describer, photos, np.stack([descriptors[0][each].mean(axis=0) for each in clusters]))


def photo_shares(describer: Describer, photos: PhotoPairs, centers: np.ndarray) -> np.ndarray:
    """centers (C, D) of clusters -> the share of photos that each is the nearest to (C,), float64: how likely a batch
    is of it (MUM of AstroLoc, ICCV 2025). Photos are described with north up, to the quarter."""
    descriptors, failures = replace(describer, rotations=ROTATIONS)(photos.groups.photo_files, "photos")
    photos.note(failures)
    rows = np.setdiff1d(np.arange(photos.sources), [row for row, _ in failures])
    return distributed.from_first(lambda: shares_of(descriptors[photos.groups.turns[rows], rows], centers))


def shares_of(points: np.ndarray, centers: np.ndarray) -> np.ndarray:
    """points (N, D), centers (C, D) -> (C,) float64: the share of points that are nearest to each, by distance."""
    nearest = (points @ centers.T - (centers**2).sum(axis=1) / 2).argmax(axis=1)
    return np.bincount(nearest, minlength=len(centers)) / len(points)


def sizes_of(clusters: list[np.ndarray]) -> str:
    """For the log."""
    sizes = [len(each) for each in clusters]
    return f"{len(sizes)} clusters of {min(sizes)} to {max(sizes)} regions"


def save_clusters_figure(
    folder: Path, regions: Regions, clusters: list[np.ndarray], shown: int = 8, images: int = 12
) -> None:
    """Fig. 14: a row a cluster."""
    files = regions.files(DATABASE_YEAR)
    try:
        pictures = [[read_image(files[row], 128) for row in rows[:images]] for rows in clusters[:shown]]
    except (ValueError, OSError) as error:  # described a moment ago, gone now
        logging.warning(f"No picture of the clusters: {error}")
        return
    figures.save(figures.clusters_figure(pictures), folder / "clusters.jpg")
