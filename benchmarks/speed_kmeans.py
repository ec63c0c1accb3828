"""k-means for clustered batches (paper, sec. 4.2): time and objective of torch, faiss and scikit-learn; warm starts.

python -m benchmarks.speed_kmeans --dataset_path data/demo_world --resume CHECKPOINT --rows 50000

The points are made from real descriptors as in speed_search. Objective: mean squared distance to the own center, in
float32, the same for all. A warm start begins at the means of the clusters of slightly other descriptors of the same
images, as reclustering would. Limit: the bare products of points and centers, as often, in CPU seconds (on a GPU: in
seconds).
"""

import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from benchmarks.speed_search import real_descriptors, spread, unit
from benchmarks.timing import seconds_on, timed
from retrieval.clustering import faiss_kmeans, kmeans
from retrieval.search import low_precision
from utils.arguments import make_parser, run
from utils.precision import require_device

ITERATIONS, WARM_ITERATIONS = 20, 5


def parse_arguments(argv=None):
    parser = make_parser(__doc__)
    parser.add_argument("--dataset_path", default="data/demo_world")
    parser.add_argument("--resume", required=True, help="checkpoint")
    parser.add_argument("--rows", type=int, default=50_000, help="points; the paper's 175,000 need 8 GB")
    parser.add_argument("--dim", type=int, default=4096)
    parser.add_argument("--num_clusters", type=int, default=200)
    parser.add_argument("--drift", type=float, default=0.3, help="of the descriptors before a warm start, in lengths")
    parser.add_argument("--descriptors", default="logs/descriptors", help="folder for the data set's descriptors")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--traceback", action="store_true")
    return parser.parse_args(argv)


def objective(points, labels, block=16384):
    """Mean squared distance of unit vectors to the mean of their cluster: 1 - sum of n |mean|² / N, in float64."""
    sums = np.zeros((labels.max() + 1, points.shape[1]))
    for start in range(0, len(points), block):
        own, part = labels[start : start + block], points[start : start + block]
        for k in np.unique(own):
            sums[k] += part[own == k].sum(axis=0, dtype=np.float64)
    counts = np.bincount(labels).clip(min=1)
    squares = sum(
        float((points[start : start + block].astype(np.float64) ** 2).sum()) for start in range(0, len(points), block)
    )
    return (squares - ((sums**2).sum(axis=1) / counts).sum()) / len(points)


def mini_batch(points, args):
    from sklearn.cluster import MiniBatchKMeans

    return MiniBatchKMeans(args.num_clusters, random_state=args.seed, batch_size=4096, n_init=1).fit(points).labels_


def bare_products(points, args, device, dtype):
    """Seconds of ITERATIONS products of all points with the centers, from one block's, best of three."""
    block = torch.from_numpy(points[:16384]).to(device, dtype)
    centers = block[: args.num_clusters].T.contiguous()
    one = min(timed(lambda: block @ centers, seconds_on(device))[1] for _ in range(3))
    return one * len(points) / len(block) * ITERATIONS


def main(args):
    device = require_device(args.device)
    _, real, _, _ = real_descriptors(args, device)
    with tempfile.TemporaryDirectory() as folder:
        made, _ = spread(real, args.rows, Path(folder) / "points.npy", args.seed)
        points = made.astype(np.float32)
    rng = np.random.default_rng(args.seed)
    low = low_precision(device) or torch.float32
    count, seed = args.num_clusters, args.seed

    # The descriptors of a period ago: another direction for each image, `drift` long.
    before = np.empty_like(points)
    for start in range(0, len(points), 16384):
        part = points[start : start + 16384]
        noise = rng.standard_normal(part.shape, dtype=np.float32)
        before[start : start + 16384] = unit(part + args.drift * unit(noise))
    old = kmeans(before, count, seed + 1, ITERATIONS, device)[0]
    del before
    warm = np.stack([points[old == k].mean(axis=0) for k in range(count)])

    limit = bare_products(points, args, device, low)
    short = limit * WARM_ITERATIONS / ITERATIONS
    ways = [
        (f"torch, {str(low)[6:]}, {device}", lambda: kmeans(points, count, seed, ITERATIONS, device)[0], limit),
        (
            f"torch, warm, {WARM_ITERATIONS} it.",
            lambda: kmeans(points, count, seed, WARM_ITERATIONS, device, centers=warm)[0],
            short,
        ),
        (f"torch, cold, {WARM_ITERATIONS} it.", lambda: kmeans(points, count, seed, WARM_ITERATIONS, device)[0], short),
        ("faiss, float32, cpu", lambda: faiss_kmeans(points, count, seed, ITERATIONS)[0], None),
        ("sklearn MiniBatch", lambda: mini_batch(points, args), None),
    ]
    print(f"{len(points)} points, dimension {points.shape[1]}, {count} clusters, {ITERATIONS} iterations")
    print(f"{'':26} {'seconds':>8} {'CPU s':>8} {'limit':>7} {'objective':>10} {'against the best':>17}")
    results = []
    for name, way, bound in ways:
        (labels, seconds), cpu = timed(lambda: timed(way), time.process_time)
        results.append((name, seconds, cpu, bound, objective(points, labels)))
    best = min(value for *_, value in results)
    for name, seconds, cpu, bound, value in results:
        print(
            f"{name:26} {seconds:8.1f} {cpu:8.1f} {'' if bound is None else f'{bound:.1f}':>7} {value:10.4f} "
            f"{100 * (value / best - 1):+16.2f} %"
        )


if __name__ == "__main__":
    run(main, parse_arguments())
