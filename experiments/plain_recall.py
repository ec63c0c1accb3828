"""Does speed cost recall? One recipe trained and evaluated twice, plainly and as train.py does it; same seed, same
iterations, same random draws.

python -m experiments.plain_recall @presets/demo.args --seeds 0 1: all other flags are train.py's. Plain: PIL, then
torchvision's transforms one after the other (experiments/chain.py, whose draws both ways take: no stretch, no weather),
float32, no folded BatchNorm, plain Adam, and an evaluation in float32 with a flat search. A run whose results are there
is not done again.
"""

import argparse
from collections.abc import Callable, Sequence
from typing import Annotated
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor, nn

import train
from augmentations.year_wise import apply
from benchmarks.speed_input import pil
from benchmarks.timing import show
from datasets.batches import BatchLoader
from datasets.regions import RegionDataset
from experiments.chain import RESIZED, ChainDraw, as_one, chain, draw_chain
from experiments.runs import trained_and_evaluated
from models.backbone import Backbone
from utils.flags import OTHERS, command

RANKS = ("1", "5", "10", "20", "100")


class PlainDataset(RegionDataset):
    def fill(self, places: Tensor, row: int) -> Tensor:
        for place, path in zip(places, self.regions.paths[row]):
            place.copy_(torch.from_numpy(pil((self.regions.root / path).read_bytes(), self.size)))
        return places


def year_wise(size: int, colours: Sequence[float], one_draw: Callable[[Tensor, ChainDraw], Tensor]) -> Callable:
    """-> augmentation of (B, Y, 3, H, W) uint8 by one chain draw a year, which one_draw(images, draw) applies."""

    def augment(images: Tensor, generator: torch.Generator, part: slice | None = None, batch: int | None = None):
        draws = [draw_chain(size, generator, colours=colours) for _ in range(images.shape[1])]
        return torch.stack([one_draw(images[:, year], draw) for year, draw in enumerate(draws)], dim=1)

    return augment


def one_by_one(images: Tensor, draw: ChainDraw) -> Tensor:
    """The draw as torchvision's chain."""
    return chain(images.float() / 255, draw)


def at_once(images: Tensor, draw: ChainDraw) -> Tensor:
    """The same draw as train.py applies its own."""
    return apply(images[:, None], as_one(draw), draw.size)[0][:, 0]


def prepare(args: argparse.Namespace, plain: bool) -> tuple:
    """As train.prepare, with chain draws."""
    regions, loader, _, validation = train_prepare(args)
    colours = args.brightness, args.contrast, args.saturation, args.hue
    augment = year_wise(args.image_size, colours, one_by_one if plain else at_once)
    if plain:
        loader.close()
        loader = BatchLoader(PlainDataset(regions, round(RESIZED * args.image_size)), args.num_workers, args.device)
    return regions, loader, augment, validation


train_prepare = train.prepare


class PlainAdam(torch.optim.Adam):
    def __init__(self, model: nn.Module, lr: float, _: nn.Module) -> None:
        super().__init__([each for each in model.parameters() if each.requires_grad], lr=lr, foreach=False)

    def step(self, closure: Callable | None = None) -> None:
        del self.found_inf  # for fused ones only
        return super().step(closure)


def recalls(flags: list[str], name: str, plain: bool) -> list[float]:
    """Trains and evaluates, or reads what that left -> average recalls, in the order of RANKS."""
    with patch.object(train, "prepare", lambda args: prepare(args, plain)):
        if not plain:
            average = trained_and_evaluated(name, flags)
        else:  # plain parts in place of train.py's own
            with patch.object(train, "make_optimizer", PlainAdam), patch.object(Backbone, "_run_folded", Backbone._run):
                more = "--search", "flat", "--descriptors", "none"
                average = trained_and_evaluated(name, [*flags, "--precision", "fp32"], *more)
    return [average[rank] for rank in RANKS]


def main(others: Annotated[list[str], OTHERS], seeds: Annotated[list[int], "two trainings each"] = (0,)) -> None:
    """Prints recalls of both ways, a row for each seed."""
    train.parse_arguments(others)  # a wrong flag is better met now than after minutes
    found = {
        way: [recalls([*others, "--seed", str(seed)], f"plain_recall/{way}_{seed}", way == "plain") for seed in seeds]
        for way in ("plain", "fast")
    }
    rows = [(way, str(seed), *each) for way, table in found.items() for seed, each in zip(seeds, table)]
    rows += [(way, "mean", *np.mean(table, axis=0)) for way, table in found.items()]
    print(f"\nAverages over the six sets; seeds {' '.join(map(str, seeds))}")
    show({"": "6", "seed": ">5"} | {f"R@{rank}": "6.1f" for rank in RANKS}, rows)


if __name__ == "__main__":
    command(main)
