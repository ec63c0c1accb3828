"""The straightforward augmentation, for comparison: torchvision's transforms, one after the other.

resize → rotate → crop → perspective → crop → resize → colours, with a draw that can also be given to
augmentations.year_wise as one homography. How much of an image a view shows in these chains and in ours:
python -m experiments.chain
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import numpy as np
import shapely
import torch
from torch import Tensor
from torchvision.transforms import functional as TF

from augmentations.year_wise import Augmentation, Draws
from benchmarks.timing import show
from datasets import regions
from utils import mercator
from utils.flags import Seed, command

RESIZED = 2.5  # the released code loads images at 800 pixels for an output of 320
CROPPED = 0.875  # and crops them to 700 after the rotation
ROTATION, DISTORTION = 45.0, 0.5  # degrees either way; of the perspective, share of half a side
BILINEAR = TF.InterpolationMode.BILINEAR


@dataclass(frozen=True)
class ChainDraw:
    """angle: degrees counter-clockwise. inner, last: sides of both crops, pixels; inner_at, last_at: their upper left
    corners, (x, y). ends (4, 2): where the corners of the first crop go, (x, y) pixels. colours: brightness, contrast,
    saturation, hue. size: of the output."""

    resized: int
    angle: float
    inner: int
    inner_at: tuple
    ends: tuple
    last: int
    last_at: tuple
    size: int
    colours: tuple

    @property
    def starts(self) -> tuple:
        """Corners of the first crop, clockwise from the upper left."""
        side = self.inner - 1
        return (0, 0), (side, 0), (side, side), (0, side)


def draw_chain(
    size: int, generator: torch.Generator, colours: Sequence[float] = (0.9, 0.9, 0.9, 0.0), released: bool = False
) -> ChainDraw:
    """-> a ChainDraw without black wedges: the crops keep what every angle and every perspective leaves.

    released: as in the released code instead, where the first crop lies anywhere and has one size, wedges or not, and
    the last one is the middle of the upright rectangle that the perspective leaves.
    """

    def uniform(low: float, high: float):
        return low + (high - low) * torch.rand((), generator=generator).item()

    resized = round(RESIZED * size)
    angle = uniform(-ROTATION, ROTATION)
    radians = abs(math.radians(angle))
    inner = round(CROPPED * resized) if released else int(resized / (math.cos(radians) + math.sin(radians)))
    far, room = inner - 1, int(DISTORTION * inner / 2)
    x, y = ([round(uniform(0, room)) for _ in range(4)] for _ in range(2))
    ends = (x[0], y[0]), (far - x[1], y[1]), (far - x[2], far - y[2]), (x[3], far - y[3])
    factors = [uniform(max(0.0, 1 - each), 1 + each) for each in colours[:3]] + [uniform(-colours[3], colours[3])]
    if released:
        low = np.array([max(x[0], x[3]), max(y[0], y[1])])
        sides = far - np.array([max(x[1], x[2]), max(y[2], y[3])]) - low
        inner_at = tuple(round(uniform(0, resized - inner)) for _ in range(2))
        last = int(sides.min())
        last_at = tuple((low + (sides - last) // 2).tolist())
    else:
        margin = max(*x, *y)
        inner_at, last_at, last = (round((resized - inner) / 2),) * 2, (margin, margin), inner - 2 * margin
    return ChainDraw(resized, angle, inner, inner_at, ends, last, last_at, size, tuple(factors))


def geometry(images: Tensor, draw: ChainDraw) -> Tensor:
    """(N, 3, H, W) float -> (N, 3, size, size), each step resampling what the last one left."""
    images = TF.resize(images, [draw.resized, draw.resized], antialias=True)
    images = TF.rotate(images, draw.angle, BILINEAR)
    images = TF.crop(images, *draw.inner_at[::-1], draw.inner, draw.inner)
    images = TF.perspective(images, draw.starts, draw.ends, BILINEAR)
    images = TF.crop(images, *draw.last_at[::-1], draw.last, draw.last)
    return TF.resize(images, [draw.size, draw.size], antialias=True)


def colours(images: Tensor, draw: ChainDraw) -> Tensor:
    """(N, 3, H, W) float in [0, 1] -> the same."""
    brightness, contrast, saturation, hue = draw.colours
    images = TF.adjust_brightness(images, brightness)
    images = TF.adjust_contrast(images, contrast)
    images = TF.adjust_saturation(images, saturation)
    return TF.adjust_hue(images, hue) if hue else images


def chain(images: Tensor, draw: ChainDraw) -> Tensor:
    """(N, 3, H, W) float in [0, 1] -> (N, 3, size, size): a year's whole augmentation."""
    return colours(geometry(images, draw), draw)


def as_one(draw: ChainDraw) -> Draws:
    """ChainDraw -> the same augmentation as one of augmentations.year_wise."""
    corners = np.array([(0, 0), (1, 0), (1, 1), (0, 1)], dtype=np.float64) * draw.last + draw.last_at
    # torchvision's perspective takes pixel k for the place k, and samples at k + 0.5 by the same map.
    places = mercator.apply(mercator.homography(draw.ends, draw.starts), corners) + draw.inner_at
    centred = places - draw.resized / 2
    radians = math.radians(draw.angle)
    turned = centred @ np.array([[math.cos(radians), math.sin(radians)], [-math.sin(radians), math.cos(radians)]])
    quad = torch.from_numpy(turned * 2 / draw.resized).float()
    return Draws(quad[None], torch.tensor([draw.colours]), torch.arange(4)[None])


def shown(quads: Tensor, image_size: int, loaded: int) -> tuple[float, float, float, float]:
    """quads (N, 4, 2) -> (mean side that a view shows, as a share of the image's; share of views upsampled from
    `loaded` pixels; mean IoU of two years' views, on the ground; share of views that reach beyond the image)."""
    beyond = (quads.abs().amax(dim=(1, 2)) > 1.01).double().mean().item()
    quads = shapely.polygons(quads.double().numpy())
    sides = np.sqrt(shapely.area(quads)) / 2
    first, second = quads[::2], quads[1::2]
    overlaps = shapely.area(shapely.intersection(first, second)) / shapely.area(shapely.union(first, second))
    return sides.mean(), (sides * loaded < image_size).mean(), overlaps.mean(), beyond


def main(
    image_size: Annotated[int, "pixels a side of a view"] = 320,
    source_size: Annotated[int | None, "default: as in training"] = None,
    min_crop: Annotated[list[float], "as train.py's, one warp for each"] = (1.0, 0.7),
    draws: Annotated[int, "of each way"] = 4000,
    seed: Seed = 0,
) -> None:
    """Prints a row for each way."""
    generator, size = torch.Generator().manual_seed(seed), image_size
    loaded = source_size or regions.source_size(size)
    ways = {
        "the released chain": lambda: as_one(draw_chain(size, generator, released=True)).quads[0],
        "the chain without wedges": lambda: as_one(draw_chain(size, generator)).quads[0],
    }
    for least in min_crop:
        ways[f"one warp, --min_crop {least:g}"] = lambda least=least: (
            Augmentation(size, min_crop=least).draw(1, generator).quads[0]
        )
    columns = {f"to {size} px from {loaded}": "28", "side shown": "10.3f", "upsampled": "10.1%"}
    columns |= {"IoU of two years": "17.3f", "beyond the image": "17.1%"}
    drawn = ((name, torch.stack([draw() for _ in range(draws)])) for name, draw in ways.items())
    show(columns, ((name, *shown(quads, size, loaded)) for name, quads in drawn))


if __name__ == "__main__":
    command(main)
