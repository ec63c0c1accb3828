"""Describing the images of all evaluation sets: the plain way, the union once, and again from the file on disk.

python -m benchmarks.speed_describe --dataset_path data/demo_world --resume CHECKPOINT

The plain way describes each set on its own, as it is often written: for each rotation every image is read with PIL,
resized, turned to float32 in the workers, rotated there, and goes through the network in float32, in NCHW. Ours reads
each image of the union once, turns it on the device, and runs in channels-last bf16 where the hardware has it. Both
in one process on the same images, with the same workers; --every thins the images of the world to make it quick.
Limit: the network alone, on the views of the union, in ours' precision.
"""

import copy
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import functional as F
from tqdm import tqdm

from datasets.sets import load_evaluation_data
from models.earthloc import load_model
from retrieval.describe import ROTATIONS
from retrieval.evaluation import describe_sets
from utils.arguments import make_parser, run
from utils.memory import GLIBC_KEEPS, keep_freed_blocks
from utils.precision import autocast, default_precision, require_device


class PlainImages(Dataset):
    """Paths -> float32 (3, size, size), rotated."""

    def __init__(self, paths, size, rotation):
        self.paths, self.size, self.rotation = paths, size, rotation

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, row):
        with Image.open(self.paths[row]) as image:
            image = F.to_tensor(F.resize(image.convert("RGB"), [self.size, self.size]))
        return F.rotate(image, self.rotation) if self.rotation else image


@torch.inference_mode()
def describe_plainly(model, paths, size, rotation, batch_size, num_workers, device, bar):
    """-> (N, D) float32."""
    described = []
    for images in DataLoader(PlainImages(paths, size, rotation), batch_size, num_workers=num_workers):
        described.append(model(images.to(device)).cpu().numpy())
        bar.update(len(images))
    return np.concatenate(described)


def plain(model, data, args, device):
    """Every set on its own -> {set's name: (queries (Q, D), database (4, M, D))}, images read, seconds."""
    model = copy.deepcopy(model).to(device, memory_format=torch.contiguous_format).eval()
    model.backbone._run_folded = model.backbone._run  # BatchNorm as it is
    count = sum(len(one.query_rows) + len(ROTATIONS) * len(one.database_rows) for one in data.sets)
    began, results = clocks(), {}
    with tqdm(total=count, desc="plain", unit="img", leave=False) as bar:
        for one in data.sets:
            parts = []
            for catalogue, rows, rotations in (
                (data.queries, one.query_rows, (0,)),
                (data.database, one.database_rows, ROTATIONS),
            ):
                paths = [catalogue.root / catalogue.paths[row] for row in rows]
                parts.append(
                    np.stack(
                        [
                            describe_plainly(
                                model,
                                paths,
                                model.config.image_size,
                                turn,
                                args.batch_size,
                                args.num_workers,
                                device,
                                bar,
                            )
                            for turn in rotations
                        ]
                    )
                )
            results[one.name] = (parts[0][0], parts[1])
    return results, count, clocks() - began


def clocks():
    """Seconds -> (2,): on the clock, and of this process's threads, which other load on the machine disturbs less."""
    return np.array([time.perf_counter(), time.process_time()])


def network_alone(model, views, args, device, precision):
    """Seconds for so many views, from a few batches of noise, the best of five."""
    size = model.config.image_size
    images = torch.rand(args.batch_size, 3, size, size, device=device).contiguous(memory_format=torch.channels_last)
    times = []
    with torch.inference_mode(), autocast(device, precision):
        for _ in range(5):
            began = clocks()
            model(images)[0, 0].item()
            times.append(clocks() - began)
    return np.min(times, axis=0) * views / args.batch_size


def thinned(data, every):
    """Only each `every`-th image of the database, and each such query."""
    sets = [
        replace(
            one,
            query_rows=one.query_rows[one.query_rows % every == 0],
            database_rows=one.database_rows[one.database_rows % every == 0],
        )
        for one in data.sets
    ]
    return replace(data, sets=[one for one in sets if not one.is_empty])


def parse_arguments(argv=None):
    parser = make_parser(__doc__)
    parser.add_argument("--dataset_path", default="data/demo_world")
    parser.add_argument("--resume", required=True, help="checkpoint")
    parser.add_argument("--every", type=int, default=1, help="describe each so many-th image only")
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--num_workers", type=int, default=2)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--traceback", action="store_true")
    return parser.parse_args(argv)


def main(args):
    if args.every < 1:
        raise ValueError(f"--every {args.every}: must be at least 1")
    device = require_device(args.device)
    precision = default_precision(device)
    model = load_model(args.resume)
    data = thinned(load_evaluation_data(args.dataset_path), args.every)
    keep_freed_blocks(GLIBC_KEEPS)  # its own way with memory
    per_set, plain_views, plain_seconds = plain(model, data, args, device)

    keep_freed_blocks()
    model = model.to(device, memory_format=torch.channels_last)
    views = len(data.query_rows) + len(ROTATIONS) * len(data.database_rows)
    images = len(data.query_rows) + len(data.database_rows)
    rows = [("each set, plain", plain_views, plain_views, plain_seconds)]
    with tempfile.TemporaryDirectory() as folder:
        for title, read, seen in (("union once", images, views), ("again, kept", 0, 0)):
            began = clocks()
            found, _ = describe_sets(
                model,
                data,
                model.config.image_size,
                args.batch_size,
                args.num_workers,
                device,
                precision,
                keep=Path(folder),
            )
            rows.append((title, read, seen, clocks() - began))
    rows.append((f"limit ({precision} alone)", 0, views, network_alone(model, views, args, device, precision)))
    print(f"{len(data.sets)} sets, {images} images in their union, on {device}")
    print(f"{'':20} {'images read':>12} {'views':>8} {'seconds':>9} {'ratio':>7} {'CPU s':>8} {'ratio':>7}")
    for title, read, seen, (seconds, cpu) in rows:
        print(
            f"{title:20} {read:12} {seen:8} {seconds:9.1f} {plain_seconds[0] / seconds:6.1f}x {cpu:8.1f} "
            f"{plain_seconds[1] / cpu:6.1f}x"
        )
    print("CPU s: of this process; with --num_workers 0 it does the reading as well")
    agreement = [
        np.sum(
            per_set[one.name][1]
            * found.database[:, np.searchsorted(found.database_rows, one.database_rows)].astype(np.float32),
            axis=-1,
        ).mean()
        for one in data.sets
    ]
    print(f"mean cosine of the two ways' descriptors: {np.mean(agreement):.4f}")


if __name__ == "__main__":
    run(main, parse_arguments())
