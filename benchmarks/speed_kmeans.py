"""k-means for clustered batches (paper, sec. 4.2): time and objective of torch, faiss and scikit-learn; warm starts.

python -m benchmarks.speed_kmeans --dataset_path data/demo_world --resume CHECKPOINT --rows 50000

The points are made from real descriptors as in speed_search. Objective: mean squared distance to the own center, in
float32, the same for all. A warm start begins at the means of the clusters of slightly other descriptors of the same
images, as reclustering would. Limit: the bare products of points and centers, as often, in CPU seconds (on a GPU: in
seconds).
"""

import tempfile
from pathlib import Path
from typing import Annotated

import numpy as np
import torch

from benchmarks.speed_search import bare_product, real_descriptors, spread, unit
from benchmarks.timing import show, timed_twice
from retrieval.clustering import faiss_kmeans, kmeans
from retrieval.search import low_precision
from utils.flags import DEVICE, Device, Seed, command
from utils.precision import require_device

ITERATIONS, WARM_ITERATIONS = 20, 5


def objective(points: np.ndarray, labels: np.ndarray, block: int = 16384) -> float:
    """Mean squared distance of unit vectors to the mean of their cluster: 1 - sum of n |mean|² / N, in float64."""
    sums, squares = np.zeros((labels.max() + 1, points.shape[1])), 0.0
    for start in range(0, len(points), block):
        part = points[start : start + block].astype(np.float64)
        np.add.at(sums, labels[start : start + block], part)
        squares += (part**2).sum()
    return float(squares - ((sums**2).sum(axis=1) / np.bincount(labels).clip(min=1)).sum()) / len(points)


def mini_batch(points: np.ndarray, count: int, seed: int) -> np.ndarray:
    """-> labels (N,)."""
    from sklearn.cluster import MiniBatchKMeans

    return MiniBatchKMeans(count, random_state=seed, batch_size=4096, n_init=1).fit(points).labels_


def main(
    rows: Annotated[int, "points; the paper's 175,000 need 8 GB"] = 50_000,
    num_clusters: Annotated[int, "of k-means"] = 200,
    drift: Annotated[float, "of the descriptors before a warm start, in lengths"] = 0.3,
    seed: Seed = 0,
    device: Device = DEVICE,
    **source: Annotated[object, real_descriptors],
) -> None:
    """Prints a row for each way."""
    device, count = require_device(device), num_clusters
    _, real, _, _ = real_descriptors(device, **source)
    with tempfile.TemporaryDirectory() as folder:
        points = spread(real, rows, Path(folder) / "points.npy", seed)[0].astype(np.float32)
    rng, low = np.random.default_rng(seed), low_precision(device) or torch.float32

    # The descriptors of a period ago: another direction for each image, `drift` long.
    before = np.empty_like(points)
    for start in range(0, len(points), 16384):
        part = points[start : start + 16384]
        noise = rng.standard_normal(part.shape, dtype=np.float32)
        before[start : start + 16384] = unit(part + drift * unit(noise))
    old = kmeans(before, count, seed + 1, ITERATIONS, device)[0]
    del before
    warm = np.stack([points[old == k].mean(axis=0) for k in range(count)])

    own = lambda iterations, **more: kmeans(points, count, seed, iterations, device, **more)[0]
    product = bare_product(points, points[:count], low, device)
    limit, short = product * ITERATIONS, product * WARM_ITERATIONS
    ways = [
        (f"torch, {str(low)[6:]}, {device}", lambda: own(ITERATIONS), limit),
        (f"torch, warm, {WARM_ITERATIONS} it.", lambda: own(WARM_ITERATIONS, centers=warm), short),
        (f"torch, cold, {WARM_ITERATIONS} it.", lambda: own(WARM_ITERATIONS), short),
        ("faiss, float32, cpu", lambda: faiss_kmeans(points, count, seed, ITERATIONS)[0], None),
        ("sklearn MiniBatch", lambda: mini_batch(points, count, seed), None),
    ]
    print(f"{len(points)} points, dimension {points.shape[1]}, {count} clusters, {ITERATIONS} iterations")
    results = []
    for name, way, bound in ways:
        labels, *seconds = timed_twice(way)
        results.append((name, *seconds, bound, objective(points, labels)))
    best = min(value for *_, value in results)
    columns = {"": "26", "seconds": "8.1f", "CPU s": "8.1f", "limit": "7.1f", "objective": "10.4f", "worse, %": "+9.2f"}
    show(columns, [(*row, 100 * (row[-1] / best - 1)) for row in results])


if __name__ == "__main__":
    command(main)
