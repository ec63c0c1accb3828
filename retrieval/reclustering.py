"""Clusters of look-alike regions for the batches of one period (paper, sec. 4.2)."""

import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np

from datasets.batches import random_clusters
from datasets.images import read_image
from datasets.names import DATABASE_YEAR
from datasets.regions import Regions
from retrieval.clustering import cluster
from retrieval.describe import Describer, Failures
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
) -> list[np.ndarray]:
    """Rows of regions in up to `count` clusters: random ones in period 0, then k-means of one year's descriptors. With
    batches "random" instead of "clustered", all regions in one.

    Regions whose image cannot be read are told to `note`, and are in no cluster.
    """
    if batches == "random":
        return [np.arange(len(regions))]
    if period == 0:
        return random_clusters(len(regions), count, batch_size, [seed, 4])
    descriptors, failures = describer(regions.files(DATABASE_YEAR), "regions")
    note(failures)
    rows = np.setdiff1d(np.arange(len(regions)), [row for row, _ in failures])
    clustered = lambda: cluster(descriptors[0][rows], count, batch_size, seed + period, describer.device)
    return distributed.from_first(lambda: [rows[each] for each in clustered()])


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
