"""k-means of descriptors, for clustered batches (paper, sec. 4.2)."""

import numpy as np
import torch

from retrieval.search import low_precision


def cluster(
    descriptors: np.ndarray, count: int, min_size: int, seed: int, device: str | torch.device = "cpu"
) -> list[np.ndarray]:
    """descriptors (N, D) -> list of at most `count` arrays of rows, each at least min_size long; together all rows.

    faiss's k-means on the CPU, `kmeans` below on a GPU. Clusters that cannot fill a batch join the nearest.
    """
    descriptors = np.ascontiguousarray(descriptors, dtype=np.float32)
    if not np.isfinite(descriptors).all():
        raise ValueError("clustering: a descriptor is nan or infinite")
    count = max(1, min(count, len(descriptors) // min_size))
    on_cpu = torch.device(device).type == "cpu"
    labels, _ = faiss_kmeans(descriptors, count, seed) if on_cpu else kmeans(descriptors, count, seed, device=device)
    return merge_small([np.flatnonzero(labels == k) for k in range(count)], descriptors, min_size)


def faiss_kmeans(descriptors: np.ndarray, count: int, seed: int, iterations: int = 20) -> tuple[np.ndarray, np.ndarray]:
    """descriptors (N, D) float32 -> labels (N,), centers (count, D). Splits large clusters to reseed empty ones."""
    import faiss

    points = {"min_points_per_centroid": 1, "max_points_per_centroid": len(descriptors)}
    means = faiss.Kmeans(descriptors.shape[1], count, niter=iterations, seed=int(seed), **points)
    means.train(descriptors)
    return means.index.search(descriptors, 1)[1][:, 0], means.centroids


def kmeans(
    descriptors: np.ndarray,
    count: int,
    seed: int,
    iterations: int = 20,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    centers: np.ndarray | None = None,
    block: int = 16384,
) -> tuple[np.ndarray, np.ndarray]:
    """Lloyd's algorithm on a device: descriptors (N, D) -> labels (N,), centers (count, D) float32.

    Rows are compared with centers in low precision where the device multiplies in it (dtype overrides), means are
    taken in float32. Starts from `centers`, or from `count` random rows. An empty cluster gets the row that lies
    farthest from its center. Keeps one copy of the descriptors in low precision on the device.
    """
    device = torch.device(device)
    dtype = dtype or low_precision(device) or torch.float32
    points = torch.empty(descriptors.shape, dtype=dtype, device=device)
    squares = torch.empty(len(points), device=device)
    for start in range(0, len(points), block):
        part = torch.as_tensor(descriptors[start : start + block]).to(device, torch.float32)
        points[start : start + block], squares[start : start + block] = part.to(dtype), part.square().sum(1)
    if centers is None:
        first = np.sort(np.random.default_rng(seed).choice(len(points), count, replace=False))
        centers = torch.as_tensor(descriptors[first])
    centers = torch.as_tensor(centers).to(device, torch.float32)
    for _ in range(iterations):
        labels, distances = _assign(points, squares, centers, block)
        sums, counts = torch.zeros_like(centers), torch.zeros(count, device=device)
        for start in range(0, len(points), block):
            # A product with one-hot rows, not index_add_: that adds in any order on a GPU, and a run could not be
            # repeated.
            own = labels[start : start + block]
            if device.type == "cpu":
                sums.index_add_(0, own, points[start : start + block].float())
            else:
                hot = torch.zeros(count, len(own), device=device).scatter_(0, own[None], 1.0)
                sums += hot @ points[start : start + block].float()
        counts += torch.bincount(labels, minlength=count)
        centers = sums / counts.clamp(min=1)[:, None]
        empty = torch.nonzero(counts == 0)[:, 0]
        if len(empty):
            centers[empty] = points[distances.topk(len(empty)).indices].float()
    labels, _ = _assign(points, squares, centers, block)
    return labels.cpu().numpy(), centers.cpu().numpy()


def _assign(points: torch.Tensor, squares: torch.Tensor, centers: torch.Tensor, block: int):
    """-> the nearest center of each point (N,), and the squared distance to it (N,)."""
    labels = torch.empty(len(points), dtype=torch.long, device=points.device)
    distances = torch.empty(len(points), device=points.device)
    low, half = centers.to(points.dtype).T, centers.square().sum(1) / 2
    for start in range(0, len(points), block):
        best, labels[start : start + block] = ((points[start : start + block] @ low).float() - half).max(1)
        distances[start : start + block] = squares[start : start + block] - 2 * best
    return labels, distances


def merge_small(clusters: list[np.ndarray], descriptors: np.ndarray, min_size: int) -> list[np.ndarray]:
    """Smallest first, a cluster with fewer than min_size rows joins the one whose centre is nearest to its own."""
    clusters = [rows for rows in clusters if len(rows)]
    while len(clusters) > 1 and min(map(len, clusters)) < min_size:
        smallest = min(range(len(clusters)), key=lambda k: len(clusters[k]))
        rows = clusters.pop(smallest)
        centers = np.stack([descriptors[each].mean(axis=0) for each in clusters])
        nearest = int(np.argmin(((centers - descriptors[rows].mean(axis=0)) ** 2).sum(axis=1)))
        clusters[nearest] = np.sort(np.concatenate([clusters[nearest], rows]))
    return clusters
