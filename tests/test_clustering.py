"""k-means clusters: a partition, none smaller than a batch."""

import numpy as np
import pytest
import torch

from retrieval.clustering import cluster, faiss_kmeans, kmeans, merge_small


def blobs(sizes, seed=0):
    rng = np.random.default_rng(seed)
    return np.concatenate([rng.normal(10 * k, 0.1, (size, 6)) for k, size in enumerate(sizes)])


def rows_of(clusters):
    return sorted(np.concatenate(clusters).tolist())


def test_every_row_is_in_the_cluster_of_the_nearest_mean():
    descriptors = blobs([20, 30, 25])
    for seed in range(5):
        clusters = cluster(descriptors, 3, 1, seed)
        means = np.stack([descriptors[rows].mean(axis=0) for rows in clusters])
        for k, rows in enumerate(clusters):
            for row in rows:
                squares = ((means - descriptors[row]) ** 2).sum(axis=1)
                assert squares[k] <= squares.min() + 1e-3  # faiss subtracts squares of 2,400 in float32


def test_well_separated_blobs_are_found_from_some_starts():
    """One run of k-means may stop at a local optimum, not every one."""
    blobs_of = [list(range(20)), list(range(20, 50)), list(range(50, 75))]
    found = [sorted(rows.tolist() for rows in cluster(blobs([20, 30, 25]), 3, 5, seed)) for seed in range(12)]
    assert found.count(blobs_of) >= 4


def test_clusters_are_a_partition_and_fill_a_batch():
    descriptors = np.random.default_rng(1).normal(size=(200, 8))
    for seed in range(5):
        clusters = cluster(descriptors, 15, 8, seed)
        assert rows_of(clusters) == list(range(200)) and min(map(len, clusters)) >= 8 and len(clusters) > 1


def test_equal_descriptors_and_more_clusters_than_fit():
    clusters = cluster(np.ones((30, 4)), 5, 6, seed=0)
    assert rows_of(clusters) == list(range(30)) and min(map(len, clusters)) >= 6
    assert rows_of(cluster(np.random.default_rng(0).normal(size=(10, 4)), 200, 4, seed=0)) == list(range(10))


def test_the_same_seed_gives_the_same_clusters():
    descriptors = np.random.default_rng(2).normal(size=(100, 8))
    first, second = cluster(descriptors, 6, 4, 3), cluster(descriptors, 6, 4, 3)
    assert [rows.tolist() for rows in first] == [rows.tolist() for rows in second]


def test_a_small_cluster_joins_the_nearest():
    descriptors = np.array([[0.0], [0.1], [0.2], [5.0], [9.0], [9.1], [9.2]])
    merged = merge_small(
        [np.array([0, 1, 2]), np.array([3]), np.array([4, 5, 6]), np.array([], dtype=int)], descriptors, 3
    )
    assert [rows.tolist() for rows in merged] == [[0, 1, 2], [3, 4, 5, 6]]


def test_nan_descriptors_are_refused():
    with pytest.raises(ValueError, match="nan or infinite"):
        cluster(np.full((10, 3), np.nan), 2, 2, 0)


def plain_lloyd(points, centers, iterations):
    """Float64 loops -> labels and centers."""
    for step in range(iterations + 1):
        labels = np.array([np.argmin(((centers - point) ** 2).sum(axis=1)) for point in points])
        if step < iterations:
            centers = np.stack([points[labels == k].mean(axis=0) for k in range(len(centers))])
    return labels, centers


def objective(points, labels):
    return sum(((points[labels == k] - points[labels == k].mean(axis=0)) ** 2).sum() for k in np.unique(labels))


@pytest.mark.parametrize("block", [7, 1000])
def test_kmeans_is_lloyds_algorithm(block):
    points = np.random.default_rng(4).normal(size=(150, 6))
    labels, centers = kmeans(points.astype(np.float32), 5, 0, 8, dtype=torch.float32, centers=points[:5], block=block)
    right_labels, right_centers = plain_lloyd(points, points[:5], 8)
    assert np.array_equal(labels, right_labels) and centers == pytest.approx(right_centers, abs=1e-5)


def test_low_precision_comes_within_two_percent_of_float32_and_of_faiss():
    rng = np.random.default_rng(5)
    points = rng.normal(size=(40, 32))[rng.integers(40, size=1500)] + 0.7 * rng.normal(size=(1500, 32))
    points = (points / np.linalg.norm(points, axis=1, keepdims=True)).astype(np.float32)
    start = points[:30]
    low = objective(points, kmeans(points, 30, 0, 15, dtype=torch.bfloat16, centers=start)[0])
    full = objective(points, kmeans(points, 30, 0, 15, dtype=torch.float32, centers=start)[0])
    by_faiss = np.mean([objective(points, faiss_kmeans(points, 30, seed)[0]) for seed in range(3)])
    ours = np.mean([objective(points, kmeans(points, 30, seed)[0]) for seed in range(3)])
    assert low == pytest.approx(full, rel=0.02) and ours == pytest.approx(by_faiss, rel=0.05)


def test_kmeans_fills_empty_clusters_and_repeats():
    points = blobs([30, 30, 30]).astype(np.float32)
    labels, centers = kmeans(points, 4, 0, centers=np.repeat(points[:1], 4, axis=0), dtype=torch.float32)
    assert sorted(np.unique(labels)) == [0, 1, 2, 3] and np.isfinite(centers).all()
    again = kmeans(points, 4, 0, centers=np.repeat(points[:1], 4, axis=0), dtype=torch.float32)
    assert np.array_equal(labels, again[0]) and np.array_equal(centers, again[1])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_clusters_on_a_gpu_are_a_partition_and_repeat():
    descriptors = np.random.default_rng(6).normal(size=(400, 16))
    first, second = (cluster(descriptors, 12, 8, 3, "cuda") for _ in range(2))
    assert rows_of(first) == list(range(400)) and min(map(len, first)) >= 8
    assert [rows.tolist() for rows in first] == [rows.tolist() for rows in second]
