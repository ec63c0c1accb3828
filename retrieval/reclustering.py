"""Clusters of look-alike regions for the batches of one period (paper, sec. 4.2)."""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from datasets.batches import random_clusters
from datasets.images import read_image
from datasets.names import DATABASE_YEAR
from retrieval.clustering import cluster
from retrieval.describe import describe
from utils import distributed, figures


def make_clusters(
    model: torch.nn.Module,
    regions: Sequence,
    period: int,
    count: int,
    batch_size: int,
    seed: int,
    image_size: int,
    num_workers: int,
    device: str | torch.device,
    precision: str,
    note: Callable[[list], None],
) -> list[np.ndarray]:
    """Rows of regions in up to `count` clusters: random ones in period 0, then k-means of one year's descriptors.

    Regions whose image cannot be read are told to note([(row, what went wrong)]), and are in no cluster.
    """
    if period == 0:
        return random_clusters(len(regions), count, batch_size, [seed, 4])
    descriptors, failures = describe(
        model,
        regions.files(DATABASE_YEAR),
        image_size,
        4 * batch_size,
        num_workers,
        device,
        precision,
        label="describing regions",
    )
    note(failures)
    rows = np.setdiff1d(np.arange(len(regions)), [row for row, _ in failures])
    return distributed.from_first(
        lambda: [rows[each] for each in cluster(descriptors[0][rows], count, batch_size, seed + period, device)]
    )


def save_clusters_figure(
    folder: str | Path, regions: Sequence, clusters: list[np.ndarray], shown: int = 8, images: int = 12
) -> None:
    """Fig. 14: a row a cluster."""
    files = regions.files(DATABASE_YEAR)
    try:
        pictures = [[read_image(files[row], 128) for row in rows[:images]] for rows in clusters[:shown]]
    except (ValueError, OSError) as error:  # described a moment ago, gone now
        logging.warning(f"No picture of the clusters: {error}")
        return
    figures.save(figures.clusters_figure(pictures), folder / "clusters.jpg")
