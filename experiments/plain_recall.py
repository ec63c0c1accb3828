"""Does speed cost recall? One recipe trained and evaluated twice, plainly and as train.py does it; same seed, same
iterations, same random draws.

python -m experiments.plain_recall @presets/demo.args --seeds 0 1: all other flags are train.py's. Plain: PIL, then
torchvision's transforms one after the other (experiments/chain.py, whose draws both ways take: no stretch, no weather),
float32, no folded BatchNorm, plain Adam, and an evaluation in float32 with a flat search. A run whose results are there
is not done again.
"""

from unittest.mock import patch

import numpy as np
import torch

import train
from augmentations.year_wise import jitter, warp
from benchmarks.speed_input import pil
from datasets.batches import BatchLoader
from datasets.regions import RegionDataset
from experiments.chain import RESIZED, as_one, chain, draw_chain
from experiments.runs import trained_and_evaluated
from models.backbone import Backbone
from utils.arguments import make_parser, run

RANKS = ("1", "5", "10", "20", "100")


class PlainDataset(RegionDataset):
    def fill(self, places, row):
        for place, path in zip(places, self.regions.paths[row]):
            place.copy_(torch.from_numpy(pil((self.regions.root / path).read_bytes(), self.size)))
        return places


def year_wise(size, colours, one_draw):
    """-> augmentation of (B, Y, 3, H, W) uint8 by one chain draw a year, which one_draw(images, draw) applies."""

    def augment(images, generator, part=None, batch=None):
        draws = [draw_chain(size, generator, colours=colours) for _ in range(images.shape[1])]
        return torch.stack([one_draw(images[:, year], draw) for year, draw in enumerate(draws)], dim=1)

    return augment


def one_by_one(images, draw):
    return chain(images.float() / 255, draw)


def at_once(images, draw):
    one = as_one(draw)
    return jitter(warp(images, one, draw.size), one)


def prepare(args, plain):
    """As train.prepare, with chain draws."""
    regions, loader, _, validation = train_prepare(args)
    augment = year_wise(
        args.image_size, (args.brightness, args.contrast, args.saturation, args.hue), one_by_one if plain else at_once
    )
    if plain:
        loader.close()
        loader = BatchLoader(PlainDataset(regions, round(RESIZED * args.image_size)), args.num_workers)
    return regions, loader, augment, validation


train_prepare = train.prepare


class PlainAdam(torch.optim.Adam):
    def __init__(self, model, lr, _):
        super().__init__([each for each in model.parameters() if each.requires_grad], lr=lr, foreach=False)

    def step(self, closure=None):
        del self.found_inf  # for fused ones only
        return super().step(closure)


def recalls(flags, name, plain):
    """Trains and evaluates, or reads what that left -> average recalls, in the order of RANKS."""
    with patch.object(train, "prepare", lambda args: prepare(args, plain)):
        if not plain:
            average = trained_and_evaluated(name, flags)
        else:  # plain parts in place of train.py's own
            with patch.object(train, "make_optimizer", PlainAdam), patch.object(Backbone, "_run_folded", Backbone._run):
                average = trained_and_evaluated(
                    name, [*flags, "--precision", "fp32"], "--search", "flat", "--descriptors", "none"
                )
    return [average[rank] for rank in RANKS]


def main(args):
    table = {}
    for way in ("plain", "fast"):
        table[way] = np.array(
            [
                recalls([*args.flags, "--seed", str(seed)], f"plain_recall/{way}_{seed}", way == "plain")
                for seed in args.seeds
            ]
        )
    print(
        f"\nAverages over the six sets; seeds {' '.join(map(str, args.seeds))}\n"
        f"{'':6} {'seed':>5} " + " ".join(f"{'R@' + rank:>6}" for rank in RANKS)
    )
    for way, rows in table.items():
        for seed, row in zip(args.seeds, rows):
            print(f"{way:6} {seed:5} " + " ".join(f"{value:6.1f}" for value in row))
    for way, rows in table.items():
        print(f"{way:6} {'mean':>5} " + " ".join(f"{value:6.1f}" for value in rows.mean(axis=0)))


def parse_arguments(argv=None):
    parser = make_parser(__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--traceback", action="store_true", help="show the traceback of an error")
    args, args.flags = parser.parse_known_args(argv)
    train.parse_arguments(args.flags)  # a wrong flag is better met now than after minutes
    return args


if __name__ == "__main__":
    run(main, parse_arguments())
