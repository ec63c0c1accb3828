"""One training iteration end to end, ours against the straightforward one. python -m benchmarks.speed_step

The baseline is written plainly here: PIL and ToTensor to float32, torchvision's transforms one after the other for each
year, NCHW float32, plain frozen stages, Adam, glibc's own ways with memory. Same files, same model, same number of
images. On a CPU everything runs on one thread in this process and its CPU time counts: workers would take the same
cores. All parts take turns.
"""

import tempfile
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms import functional as TF

from augmentations.year_wise import Augmentation
from benchmarks.speed_input import make_files, make_regions, pil
from benchmarks.timing import seconds_on, show, take_turns
from datasets.batches import BatchLoader
from datasets.build.cache import store
from datasets.regions import RegionDataset, Regions, source_size
from experiments.chain import RESIZED, chain, draw_chain
from losses.multi_similarity import MultiSimilarityLoss
from models.config import ModelConfig
from models.earthloc import EarthLoc
from train import update
from utils.arguments import add_shared, make_parser
from utils.arguments import run as run_script
from utils.memory import GLIBC_KEEPS, keep_freed_blocks
from utils.precision import autocast, default_precision, require_device
from utils.runs import Run, make_optimizer

YEARS = 4


Parts = tuple[Callable, Callable, Callable]  # of an iteration: input, augmentation, step
PARTS = ("input", "augmentation", "step")


def make_model(args: Namespace, device: torch.device) -> EarthLoc:
    """Random weights, the paper's stages frozen: speed does not depend on the values."""
    torch.manual_seed(0)
    shape = {"descriptor_dim": args.descriptor_dim, "image_size": args.image_size}
    return EarthLoc(ModelConfig(args.backbone, freeze_until="layer2", **shape)).to(device).train()


def baseline(args: Namespace, root: str, regions: Regions, labels: Tensor, device: torch.device) -> Parts:
    """The same step as one writes it first: PIL, torchvision's chain a year, plain BatchNorm -> load, augment, step."""
    model = make_model(args, device)
    model.backbone._run_folded = model.backbone._run  # BatchNorm as it is
    optimizer = torch.optim.Adam([each for each in model.parameters() if each.requires_grad], lr=1e-4)
    loss_fn, generator = MultiSimilarityLoss(), torch.Generator().manual_seed(0)

    def load():
        read = lambda path: TF.to_tensor(pil(Path(root, path).read_bytes(), round(RESIZED * args.image_size)))
        return torch.stack([torch.stack([read(path) for path in paths]) for paths in regions.paths]).to(device)

    def augment(images: Tensor):
        views = [chain(images[:, year], draw_chain(args.image_size, generator)) for year in range(YEARS)]
        return torch.stack(views, dim=1).flatten(0, 1)

    def step(views: Tensor):
        loss = loss_fn(model(views), labels)
        if not np.isfinite(loss.item()):
            raise RuntimeError("the loss is nan")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return by_itself(load), by_itself(augment), by_itself(step)


def by_itself(function: Callable) -> Callable:
    """The function, with memory handled as glibc does if it is not told otherwise."""

    def measured(*arguments):
        keep_freed_blocks(GLIBC_KEEPS)
        try:
            return function(*arguments)
        finally:
            keep_freed_blocks()

    return measured


def ours(
    args: Namespace, regions: Regions, labels: Tensor, device: torch.device, precision: str, compiled: bool = False
) -> Parts:
    """As train.py runs them."""
    model = make_model(args, device).to(memory_format=torch.channels_last)
    if compiled:
        model.compile()
    run, loss_fn = Run(model, make_optimizer(model, 1e-4)), MultiSimilarityLoss()
    augmentation, generator = Augmentation(args.image_size), torch.Generator().manual_seed(0)
    loader = BatchLoader(RegionDataset(regions, source_size(args.image_size)), 0)

    def load():
        ((_, images, _),) = loader.serve(np.arange(len(regions))[None])
        return images.to(device)

    def augment(images: Tensor):
        return augmentation(images, generator).flatten(0, 1)

    def step(views: Tensor):
        update(run, views, labels, None, loss_fn, 1e-4, precision)

    return load, augment, step


def bare(args: Namespace, views: Tensor, device: torch.device, precision: str) -> Callable[[], None]:
    """Forward and backward of our model alone."""
    model = make_model(args, device).to(memory_format=torch.channels_last)
    views = views.contiguous(memory_format=torch.channels_last)

    def run():
        with autocast(device, precision):
            descriptors = model(views)
        model.zero_grad()
        descriptors.sum().backward()

    return run


def main(args: Namespace) -> None:
    """Prints milliseconds of loading, augmentation and step: the baseline, ours, and the bare network."""
    torch.set_num_threads(1)
    device = require_device(args.device)
    precision = default_precision(device)
    labels = torch.arange(args.batch_size, device=device).repeat_interleave(YEARS)
    with tempfile.TemporaryDirectory() as folder:
        paths, cache = make_files(folder, 16), Path(folder, "cache")
        for path in paths:
            store(path, folder, cache, 512, 90)
        whole, cached = (make_regions(root, paths, args.batch_size) for root in (folder, cache))
        ways = {
            "baseline": baseline(args, folder, whole, labels, device),
            "ours": ours(args, whole, labels, device, precision),
        }
        if args.compile:
            ways["ours, compiled"] = ours(args, whole, labels, device, precision, compiled=True)
        cases = {}
        for name, (load, augment, step) in ways.items():
            views = augment(loaded := load())
            cases |= {
                (name, "input"): load,
                (name, "augmentation"): lambda augment=augment, loaded=loaded: augment(loaded),
                (name, "step"): lambda step=step, views=views: step(views),
            }
        cases["ours, cached files", "input"] = ours(args, cached, labels, device, precision)[0]
        cases["bare forward and backward", "step"] = bare(args, views, device, precision)
        found = {case: 1000 * each for case, each in take_turns(cases, args.repeats, seconds_on(device)).items()}
    print(f"{len(labels)} images, {device}, {precision}; ms an iteration")
    report([*ways, "ours, cached files"], found, len(labels))


def report(names: list[str], found: dict[tuple[str, str], float], images: int) -> None:
    """Milliseconds of (name, part) -> the table; parts that a way shares with ours are not there."""
    parts = {name: [found.get((name, part), found["ours", part]) for part in PARTS] for name in names}
    total = {name: sum(each) for name, each in parts.items()}
    limit = found["bare forward and backward", "step"]
    rows = [
        (name, *each, total[name], images / total[name] * 1000, total["baseline"] / total[name])
        for name, each in parts.items()
    ]
    columns = {"": "26", "input": "7.0f", "augment": "7.0f", "step": "7.0f", "sum": "7.0f", "images/s": "9.0f"}
    show(columns | {"times": "6.1f"}, [*rows, ("bare forward and backward", None, None, limit, None, None, None)])
    _, augment, step = parts["ours"]
    print(
        f"share of the bare rate: step {limit / step:.1%}, with augmentation {limit / (step + augment):.1%}, "
        f"all of it from a cache {limit / total['ours, cached files']:.1%}"
    )


def parse_arguments(argv: list[str] | None = None) -> Namespace:
    """Flags of the step that is timed, and of how often."""
    parser = make_parser(__doc__)
    parser.add_argument("--backbone", default="resnet18", help="a ResNet")
    parser.add_argument("--descriptor_dim", type=int, default=512)
    parser.add_argument("--image_size", type=int, default=128)
    parser.add_argument("--compile", action="store_true", help="torch.compile as well: minutes")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--batch_size", type=int, default=16, help="quadruplets")
    add_shared(parser, "device")
    return parser.parse_args(argv)


if __name__ == "__main__":
    run_script(main, parse_arguments())
