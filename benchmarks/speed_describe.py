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
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Annotated

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import functional as F
from tqdm import tqdm

from benchmarks.timing import seconds_on, show, timed_twice
from datasets.names import Catalogue
from datasets.sets import EvaluationData, load_evaluation_data
from models.earthloc import load_model
from retrieval.describe import ROTATIONS, Describer
from retrieval.evaluation import describe_sets
from utils.arguments import positive
from utils.flags import DEVICE, WORKERS, BatchSize, DatasetPath, Device, Workers, command
from utils.memory import GLIBC_KEEPS, keep_freed_blocks
from utils.precision import autocast, default_precision, require_device


class PlainImages(Dataset):
    """Paths -> float32 (3, size, size), rotated."""

    def __init__(self, paths: list, size: int, rotation: int) -> None:
        self.paths, self.size, self.rotation = paths, size, rotation

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, row: int) -> Tensor:
        with Image.open(self.paths[row]) as image:
            image = F.to_tensor(F.resize(image.convert("RGB"), [self.size, self.size]))
        return F.rotate(image, self.rotation) if self.rotation else image


@torch.inference_mode()
def plain(
    model: nn.Module, data: EvaluationData, batch_size: int, num_workers: int, device: torch.device
) -> dict[str, np.ndarray]:
    """Every set on its own -> {set's name: descriptors of its database (4, M, D)}."""
    model = copy.deepcopy(model).to(device, memory_format=torch.contiguous_format).eval()
    model.backbone._run_folded = model.backbone._run  # BatchNorm as it is
    results = {}
    with tqdm(total=views_of(data.sets), desc="plain", unit="img", leave=False) as bar:

        def described(catalogue: Catalogue, rows: np.ndarray, turn: int):
            paths, found = [catalogue.root / catalogue.paths[row] for row in rows], []
            images = PlainImages(paths, model.config.image_size, turn)
            for batch in DataLoader(images, batch_size, num_workers=num_workers):
                found.append(model(batch.to(device)).cpu().numpy())
                bar.update(len(batch))
            return np.concatenate(found)

        for one in data.sets:
            described(data.queries, one.query_rows, 0)
            results[one.name] = np.stack([described(data.database, one.database_rows, turn) for turn in ROTATIONS])
    return results


def views_of(sets: list) -> int:
    """Sets, or the data with their union -> how many images the network sees."""
    return sum(len(one.query_rows) + len(ROTATIONS) * len(one.database_rows) for one in sets)


def network_alone(
    model: nn.Module, views: int, batch_size: int, device: torch.device, precision: str
) -> tuple[float, float]:
    """Seconds for so many views, and of CPU, from a few batches of noise, the best of five."""
    size = model.config.image_size
    images = torch.rand(batch_size, 3, size, size, device=device).contiguous(memory_format=torch.channels_last)
    with torch.inference_mode(), autocast(device, precision):
        times = [timed_twice(lambda: model(images)[0, 0].item())[1:] for _ in range(5)]
    return tuple(np.min(times, axis=0) * views / batch_size)


@contextmanager
def inside(model: nn.Module, clock: Callable[[], float]) -> Iterator[list[float]]:
    """-> a list that gets the seconds of each of the model's calls inside: what is compared is of the same minutes."""
    began, seconds = [], []
    hooks = (
        model.register_forward_pre_hook(lambda *_: began.append(clock())),
        model.register_forward_hook(lambda *_: seconds.append(clock() - began.pop())),
    )
    try:
        yield seconds
    finally:
        for hook in hooks:
            hook.remove()


def thinned(data: EvaluationData, every: int) -> EvaluationData:
    """Only each `every`-th image of the database, and each such query."""
    sets = [
        replace(
            one,
            **{rows: getattr(one, rows)[getattr(one, rows) % every == 0] for rows in ("query_rows", "database_rows")},
        )
        for one in data.sets
    ]
    return replace(data, sets=[one for one in sets if not one.is_empty])


def main(
    *,
    resume: Annotated[str, "checkpoint"],
    dataset_path: DatasetPath = "data/demo_world",
    every: Annotated[int, "describe each so many-th image only", {"type": positive}] = 1,
    batch_size: BatchSize = 32,
    num_workers: Workers = WORKERS,
    device: Device = DEVICE,
) -> None:
    """Prints a row for each way."""
    device = require_device(device)
    precision, model = default_precision(device), load_model(resume)
    data = thinned(load_evaluation_data(dataset_path), every)
    keep_freed_blocks(GLIBC_KEEPS)  # its own way with memory
    per_set, *slow = timed_twice(lambda: plain(model, data, batch_size, num_workers, device))
    keep_freed_blocks()

    model, seen = model.to(device, memory_format=torch.channels_last), views_of([data])
    images = len(data.query_rows) + len(data.database_rows)
    how = model.config.image_size, batch_size, num_workers, device, precision, ROTATIONS
    with tempfile.TemporaryDirectory() as folder:
        ours = lambda: describe_sets(Describer(model, *how), data, keep=folder)[0]
        with inside(model, seconds_on(device)) as network:
            found, *once = timed_twice(ours)
        _, *again = timed_twice(ours)
    rows = [
        ("each set, plain", views_of(data.sets), views_of(data.sets), *slow),
        ("union once", images, seen, *once),
        ("again, kept", 0, 0, *again),
        (f"limit ({precision} alone)", 0, seen, *network_alone(model, seen, batch_size, device, precision)),
    ]
    print(f"{len(data.sets)} sets, {images} images in their union, on {device}")
    columns = {"": "20", "images read": "12", "views": "8", "seconds": "9.1f", "times": "7.1f", "CPU s": "8.1f"}
    show(columns | {"times ": "7.1f"}, [(*row[:4], slow[0] / row[3], row[4], slow[1] / row[4]) for row in rows])
    print("CPU s: of this process; with --num_workers 0 it does the reading as well")
    print(f"of the union once, the network itself takes {sum(network) / once[device.type == 'cpu']:.1%}")
    cosines = []
    for one in data.sets:
        union = found.database[:, np.searchsorted(found.database_rows, one.database_rows)].astype(np.float32)
        cosines.append((per_set[one.name] * union).sum(axis=-1).mean())
    print(f"mean cosine of the two ways' descriptors: {np.mean(cosines):.4f}")


if __name__ == "__main__":
    command(main)
