"""Augmentation in one warp against torchvision's chain: pixels and speed. python -m benchmarks.speed_augmentation

The pictures come from the demo world's mosaic. PSNR is against the same homography, sampled 8 × 8 times a pixel. Both
sides take turns on the same thread, and its CPU time is counted, so that other jobs on the machine disturb little.
"""

from pathlib import Path

import torch
from kornia import enhance
from torch.nn import functional as F

from augmentations.year_wise import Augmentation, adjust_hue, jitter, warp
from benchmarks.timing import seconds_on, take_turns
from datasets.images import read_image
from datasets.regions import source_size
from experiments.chain import as_one, chain, draw_chain, geometry
from utils.arguments import make_parser
from utils.arguments import run as run_script
from utils.precision import require_device

MOSAIC = Path(__file__).parent.parent / "datasets" / "build" / "blue_marble" / "bmng_5400.jpg"


def pictures(count, side, seed=0):
    """(count, 3, side, side) uint8: half-size views of the mosaic's land, so that they hold detail at every scale."""
    mosaic = read_image(MOSAIC)
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(400, mosaic.shape[1] - side - 800, (8 * count,), generator=generator).tolist()
    columns = torch.randint(mosaic.shape[2] - side, (8 * count,), generator=generator).tolist()
    cuts = [mosaic[:, row : row + side, column : column + side] for row, column in zip(rows, columns)]
    cuts.sort(key=lambda cut: -cut.float().std())  # the sea compresses and resamples too well
    return torch.stack(cuts[:count])


def psnr(a, b):
    """Decibels, of images in [0, 1]."""
    return (-10 * torch.log10((a - b).square().mean())).item()


def ideal(images, draw, size, fine=8):
    """The mean of fine × fine samples a pixel."""
    return torch.cat([warp(one[None], draw, size, samples=fine) for one in images])


def quality(size, draws=6):
    """-> {way: mean PSNR against the ideal, against the chain}."""
    full = pictures(4, 1024)
    half = F.interpolate(full.float(), scale_factor=0.5, mode="area").round().to(torch.uint8)
    found = {}
    for seed in range(draws):
        drawn = draw_chain(size, torch.Generator().manual_seed(seed))
        draw = as_one(drawn)
        best, chained = ideal(full, draw, size), geometry(full.float() / 255, drawn)
        ways = {
            "torchvision's chain": chained,
            "one warp from 1024, as it is": warp(full, draw, size, samples=1),
            "one warp from 1024, filtered": warp(full, draw, size),
            "one warp from 512, as it is": warp(half, draw, size, samples=1),
            "one warp from 512, filtered": warp(half, draw, size),
        }
        for name, views in ways.items():
            found.setdefault(name, []).append((psnr(views, best), psnr(views, chained)))
    return {name: tuple(sum(column) / len(column) for column in zip(*rows)) for name, rows in found.items()}


def main(args):
    torch.set_num_threads(1)
    device = require_device(args.device)
    print(f"{'PSNR, dB':34} {'to the ideal':>12} {'to the chain':>12}")
    for name, (best, chained) in quality(args.image_size).items():
        print(f"{name:34} {best:12.1f} {chained:12.1f}")

    loaded = pictures(args.batch_size, source_size(args.image_size)).to(device, memory_format=torch.channels_last)
    floats = F.interpolate(loaded.float() / 255, (round(2.5 * args.image_size),) * 2, mode="bilinear")
    generator = torch.Generator().manual_seed(0)
    everything = torch.ones(len(loaded), dtype=torch.bool)
    views = torch.rand(args.batch_size, 3, args.image_size, args.image_size, device=device)
    cases = {}
    for hue in (0.0, 0.05):
        augment = Augmentation(args.image_size, hue=hue)
        cases[f"chain, hue {hue}"] = lambda hue=hue: chain(
            floats, draw_chain(args.image_size, generator, colours=(0.9, 0.9, 0.9, hue))
        )
        cases[f"one warp, hue {hue}"] = lambda augment=augment: augment.view(loaded, generator, everything)
    draw = augment.draw(generator)
    cases |= {
        "warp alone": lambda: warp(loaded, draw, args.image_size),
        "colours alone": lambda: jitter(views, draw),
        "hue: kornia": lambda: enhance.adjust_hue(views, 0.3),
        "hue: ours": lambda: adjust_hue(views, 0.05),
    }
    found = take_turns(cases, args.repeats, seconds_on(device))
    title = f"one year of {args.batch_size} images at {args.image_size} px, {device}"
    print(f"\n{title:44} ms")
    for name, value in found.items():
        print(f"{name:40} {1000 * value:8.2f}")
    for hue in (0.0, 0.05):
        ratio = found[f"chain, hue {hue}"] / found[f"one warp, hue {hue}"]
        print(f"times faster than the chain, hue {hue}: {ratio:.1f}")


if __name__ == "__main__":
    parser = make_parser(__doc__)
    parser.add_argument("--image_size", type=int, default=128)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--traceback", action="store_true", help="show the traceback of an error")
    run_script(main, parser.parse_args())
