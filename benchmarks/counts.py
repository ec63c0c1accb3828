"""What an iteration asks of the host, by counting: operations, waits for the GPU, copies to it, and the host's time.

python -m benchmarks.counts needs no GPU. Augmentation and loss are those of the flags, on a pretended GPU
(benchmarks/pretend_gpu.py); updates are counted on the CPU, backward too. The host's time is CPU time of the same calls
on one thread with pictures of a few pixels, so that hardly anything but asking is left; an update's is that of its
operations at the price of an addition.
"""

from collections.abc import Callable
from time import process_time
from types import ModuleType
from typing import Annotated

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import train
import train_geoclip
from augmentations.year_wise import Augmentation
from benchmarks.pretend_gpu import GPU, PretendGPU, pretended_gpu
from benchmarks.timing import show, take_turns
from datasets.training import neutral_pairs
from models.config import model_config
from models.earthloc import EarthLoc
from models.geoclip import GeoCLIP, GeoClipConfig
from utils.flags import command
from utils.runs import Run, make_optimizer
from utils.settings import chosen_settings
from utils.transfer import to_device

WEATHER = "--clouds", "0.6", "--haze", "0.7", "--exposure", "1"
BATCHES = {  # what is augmented: the trainer and its flags
    "paper.args": (train, ["@presets/paper.args"]),
    "paper.args with weather": (train, ["@presets/paper.args", *WEATHER]),
    "demo.args": (train, ["@presets/demo.args"]),
    "paper.args, --augmentation image": (train, ["@presets/paper.args", "--augmentation", "image"]),
    "geoclip.args, 512 images": (train_geoclip, ["@presets/geoclip.args"]),
    "geoclip_demo.args": (train_geoclip, ["@presets/geoclip_demo.args"]),
}


class Operations(TorchDispatchMode):
    """Counts what is asked of the CPU."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(
        self, function: Callable, types: object, args: tuple = (), kwargs: dict | None = None
    ) -> object:
        self.count += 1
        return function(*args, **(kwargs or {}))


def augmentation(trainer: ModuleType, flags: list[str], size: int) -> tuple[Augmentation, Tensor]:
    """-> the augmentation of these flags to so many pixels, and a batch on the host."""
    args = trainer.parse_arguments(flags)
    if trainer is train:
        augment, years = Augmentation(size, args.augmentation, **chosen_settings(args, Augmentation)), 4
    else:
        augment, years = trainer.make_augmentation(args, size), 1
    images = torch.zeros(args.batch_size, years, 2 * size, 2 * size, 3, dtype=torch.uint8)
    return augment, images.permute(0, 1, 4, 2, 3)


def footprints(count: int) -> np.ndarray:
    """(count, 4, 2) squares of a degree among which some share ground, as in a batch of one cluster."""
    corners = np.array([[0, 0], [1, 0], [1, 1], [0, 1]])
    return np.random.default_rng(0).uniform(0, 20, (count, 1, 2)) + corners


def told(regions: np.ndarray, device: str | torch.device) -> list[Tensor]:
    """What train.py tells the loss: labels and neutral pairs."""
    labels = torch.arange(len(regions)).repeat_interleave(4)
    return to_device([labels, neutral_pairs(regions, labels)], device)


def asked(batches: dict[str, tuple] = BATCHES) -> dict[str, tuple]:
    """-> {part of an iteration: (operations, waits, copies, those of them that the host waits for or that are not out
    of page-locked memory)}; without updates, and without the pictures' own copy."""
    found = {}
    for name, batch in batches.items():
        with pretended_gpu() as gpu:
            augment, images = augmentation(*batch, 48)
            images, before = torch.empty_like(images, device=GPU), gpu.operations
            augment(images, torch.Generator().manual_seed(0))
            found[f"augmentation, {name}"] = seen(gpu, before)
    with pretended_gpu() as gpu:
        told(footprints(32), GPU)
        found["labels and neutral pairs"] = seen(gpu)
    return found


def seen(gpu: PretendGPU, before: int = 0) -> tuple[int, int, int, int]:
    return gpu.operations - before, len(gpu.looks), len(gpu.sent), len(gpu.uploads + gpu.unpinned)


def updates() -> dict[str, int]:
    """-> {trainer: operations of an update}, backward too. CLIP's weights are not at hand: GeoCLIP's is the demo's."""
    args = train.parse_arguments(["@presets/paper.args", "--image_size", "32", "--batch_size", "2"])
    model, loss_fn = EarthLoc(model_config(args)), train.make_loss(args, 2)
    labels, neutral = told(footprints(2), "cpu")
    batch = torch.rand(8, 3, 32, 32), labels, neutral, loss_fn, 1e-4, "bf16"
    found = {"paper.args": operations(lambda run: train.update(run, *batch), model)}
    args = train_geoclip.parse_arguments(["@presets/geoclip_demo.args"])
    model = GeoCLIP(GeoClipConfig(args.image_encoder, freeze_until=args.freeze_until, image_size=32))
    points = np.random.default_rng(0).uniform(-60, 60, (12, 2))
    batch = torch.rand(4, 3, 32, 32), points[:4], points, np.arange(4), torch.ones(4, dtype=torch.bool), 300.0, "bf16"
    found["geoclip_demo.args"] = operations(lambda run: train_geoclip.update(run, 1e-4, *batch), model)
    return found


def operations(update: Callable[[Run], object], model: nn.Module) -> int:
    """Of the second update: the first one makes the optimizer's averages and folds BatchNorm."""
    run = Run(model, make_optimizer(model, 1e-4))
    update(run)
    with Operations() as asked_for:
        update(run)
    return asked_for.count


def host_seconds(repeats: int) -> dict[str, float]:
    """-> {part of an iteration: CPU seconds with next to nothing to compute}, and of one operation."""
    generator, regions = torch.Generator().manual_seed(0), footprints(32)
    cases, one = {"labels and neutral pairs": lambda: told(regions, "cpu")}, torch.ones(8)
    for name, batch in BATCHES.items():
        augment, images = augmentation(*batch, 2)
        cases[f"augmentation, {name}"] = lambda augment=augment, images=images: augment(images, generator)
    cases["1000 operations"] = lambda: [one.add_(1) for _ in range(1000)]
    return take_turns(cases, repeats, process_time)


def main(repeats: Annotated[int, "turns of the clock"] = 9) -> None:
    """Prints a row for each part of an iteration."""
    torch.set_num_threads(1)
    seconds, rows = host_seconds(repeats), []
    for name, counts in asked().items():
        rows.append((name, *counts, 1000 * seconds[name]))
    price = seconds["1000 operations"]
    for name, count in updates().items():
        rows.append((f"update, {name}", count, None, None, None, price * count))
    columns = {"an iteration's": "48", "operations": "10d", "waits": "6d", "copies": "7d", "blocking": "9d"}
    show(columns | {"host, ms": "9.1f"}, rows)
    whole = [row for row in rows if row[0].endswith((", paper.args", "pairs"))]
    print(f"paper.args: {sum(row[1] for row in whole)} operations, {sum(row[-1] for row in whole):.1f} ms of the host")


if __name__ == "__main__":
    command(main)
