"""k-means of descriptors, for clustered batches (paper, sec. 4.2)."""

import numpy as np


def cluster(descriptors, count, min_size, seed):
    """descriptors (N, D) -> list of at most `count` arrays of rows, each at least min_size long; together all rows.

    faiss's k-means splits large clusters to reseed empty ones. Clusters that cannot fill a batch join the nearest.
    """
    import faiss

    descriptors = np.ascontiguousarray(descriptors, dtype=np.float32)
    if not np.isfinite(descriptors).all():
        raise ValueError("clustering: a descriptor is nan or infinite")
    count = max(1, min(count, len(descriptors) // min_size))
    kmeans = faiss.Kmeans(descriptors.shape[1], count, niter=20, seed=int(seed), min_points_per_centroid=1,
                          max_points_per_centroid=len(descriptors))
    kmeans.train(descriptors)
    labels = kmeans.index.search(descriptors, 1)[1][:, 0]
    return merge_small([np.flatnonzero(labels == k) for k in range(count)], descriptors, min_size)


def merge_small(clusters, descriptors, min_size):
    """Smallest first, a cluster with fewer than min_size rows joins the one whose centre is nearest to its own."""
    clusters = [rows for rows in clusters if len(rows)]
    while len(clusters) > 1 and min(map(len, clusters)) < min_size:
        smallest = min(range(len(clusters)), key=lambda k: len(clusters[k]))
        rows = clusters.pop(smallest)
        centers = np.stack([descriptors[each].mean(axis=0) for each in clusters])
        nearest = int(np.argmin(((centers - descriptors[rows].mean(axis=0)) ** 2).sum(axis=1)))
        clusters[nearest] = np.sort(np.concatenate([clusters[nearest], rows]))
    return clusters
