"""Augmentation in one warp against torchvision's chain: pixels and speed. python -m benchmarks.speed_augmentation

The pictures come from the demo world's mosaic. PSNR is against the same homography, sampled 8 × 8 times a pixel. Both
sides take turns on the same thread, and its CPU time is counted, so that other jobs on the machine disturb little.
"""

from argparse import Namespace
from pathlib import Path

import torch
from kornia import enhance
from torch import Tensor
from torch.nn import functional as F

from augmentations.year_wise import HUE, Augmentation, Draws, apply, homographies_of, jitter, steps_of, turn_hue, warp
from benchmarks.timing import seconds_on, show, take_turns
from datasets.images import read_image
from datasets.regions import source_size
from experiments.chain import as_one, chain, draw_chain, geometry
from utils.arguments import add_shared, make_parser
from utils.arguments import run as run_script
from utils.precision import require_device
from utils.transfer import to_device

MOSAIC = Path(__file__).parent.parent / "datasets" / "build" / "blue_marble" / "bmng_5400.jpg"


def pictures(count: int, side: int, seed: int = 0) -> Tensor:
    """(count, 3, side, side) uint8: half-size views of the mosaic's land, so that they hold detail at every scale."""
    mosaic = read_image(MOSAIC)
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(400, mosaic.shape[1] - side - 800, (8 * count,), generator=generator).tolist()
    columns = torch.randint(mosaic.shape[2] - side, (8 * count,), generator=generator).tolist()
    cuts = [mosaic[:, row : row + side, column : column + side] for row, column in zip(rows, columns)]
    cuts.sort(key=lambda cut: -cut.float().std())  # the sea compresses and resamples too well
    return torch.stack(cuts[:count])


def psnr(a: Tensor, b: Tensor) -> float:
    """Decibels, of images in [0, 1]."""
    return (-10 * torch.log10((a - b).square().mean())).item()


def sampled(images: Tensor, draw: Draws, size: int, samples: int) -> Tensor:
    """One draw's warp of images (N, 3, H, W), with so many samples a pixel and axis."""
    homography = homographies_of(draw.quads)
    return torch.cat([warp(one[None, None], homography, size, [samples])[0] for one in images])


def geometry_of(images: Tensor, draw: Draws, size: int) -> Tensor:
    """One draw's warp of images (N, 3, H, W), with as many samples as it needs."""
    return apply(images[:, None], draw._replace(order=draw.order[:, :0]), size)[0][:, 0]


def quality(size: int, draws: int = 6) -> dict[str, tuple[float, float]]:
    """-> {way: mean PSNR against the ideal, against the chain}."""
    full = pictures(4, 1024)
    half = F.interpolate(full.float(), scale_factor=0.5, mode="area").round().to(torch.uint8)
    found = {}
    for seed in range(draws):
        drawn = draw_chain(size, torch.Generator().manual_seed(seed))
        draw = as_one(drawn)
        best, chained = sampled(full, draw, size, 8), geometry(full.float() / 255, drawn)
        ways = {
            "torchvision's chain": chained,
            "one warp from 1024, as it is": sampled(full, draw, size, 1),
            "one warp from 1024, filtered": geometry_of(full, draw, size),
            "one warp from 512, as it is": sampled(half, draw, size, 1),
            "one warp from 512, filtered": geometry_of(half, draw, size),
        }
        for name, views in ways.items():
            found.setdefault(name, []).append((psnr(views, best), psnr(views, chained)))
    return {name: tuple(sum(column) / len(column) for column in zip(*rows)) for name, rows in found.items()}


def main(args: Namespace) -> None:
    """Prints the PSNR of our views, and milliseconds of ours and of the chain."""
    torch.set_num_threads(1)
    device, size = require_device(args.device), args.image_size
    rows = [(name, *values) for name, values in quality(size).items()]
    show({"PSNR, dB": "34", "to the ideal": "12.1f", "to the chain": "12.1f"}, rows)

    loaded = pictures(args.batch_size, source_size(size)).to(device, memory_format=torch.channels_last)
    floats = F.interpolate(loaded.float() / 255, (round(2.5 * size),) * 2, mode="bilinear")
    generator = torch.Generator().manual_seed(0)
    views = torch.rand(args.batch_size, 1, 3, size, size, device=device)
    cases, hues = {}, (0.0, 0.05)
    for hue in hues:
        augment = Augmentation(size, hue=hue)
        drawn = lambda hue=hue: draw_chain(size, generator, colours=(0.9, 0.9, 0.9, hue))
        cases[f"chain, hue {hue}"] = lambda drawn=drawn: chain(floats, drawn())
        cases[f"one warp, hue {hue}"] = lambda augment=augment: augment(loaded[:, None], generator)
    draw = augment.draw(1, generator)
    steps, turns = to_device(steps_of(draw.colours, draw.order), device)
    turned, turn = (draw.order == HUE).T.tolist(), torch.full((1,), 0.05, device=device)
    cases |= {
        "warp alone": lambda: geometry_of(loaded, draw, size),
        "colours alone": lambda: jitter(views, steps, turns, turned),
        "hue: kornia": lambda: enhance.adjust_hue(views[:, 0], 0.3),
        "hue: ours": lambda: turn_hue(views, turn),
    }
    found = take_turns(cases, args.repeats, seconds_on(device))
    print()
    title = f"one year of {args.batch_size} images at {size} px, {device}"
    show({title: "40", "ms": "8.2f"}, [(name, 1000 * value) for name, value in found.items()])
    for hue in hues:
        ratio = found[f"chain, hue {hue}"] / found[f"one warp, hue {hue}"]
        print(f"times faster than the chain, hue {hue}: {ratio:.1f}")


def parse_arguments(argv: list[str] | None = None) -> Namespace:
    parser = make_parser(__doc__)
    parser.add_argument("--image_size", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=9)
    add_shared(parser, "device", batch_size=16)
    return parser.parse_args(argv)


if __name__ == "__main__":
    run_script(main, parse_arguments())
