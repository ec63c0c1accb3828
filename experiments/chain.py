"""The straightforward augmentation, for comparison: torchvision's transforms, one after the other.

resize → rotate → crop → perspective → crop → resize → colours, with a draw that can also be given to
augmentations.year_wise as one homography.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torchvision.transforms import functional as TF

from augmentations.year_wise import Draw

RESIZED = 2.5  # the released code loads images at 800 pixels for an output of 320
BILINEAR = TF.InterpolationMode.BILINEAR


@dataclass(frozen=True)
class ChainDraw:
    """angle: degrees counter-clockwise. inner, last: sides of the two centre crops, pixels. ends (4, 2): where the
    corners of the first crop go, (x, y) pixels. colours: brightness, contrast, saturation, hue. size: of the output."""

    resized: int
    angle: float
    inner: int
    ends: tuple
    last: int
    size: int
    colours: tuple

    @property
    def starts(self):
        side = self.inner - 1
        return (0, 0), (side, 0), (side, side), (0, side)


def draw_chain(size, generator, rotation=45.0, distortion=0.5, colours=(0.9, 0.9, 0.9, 0.0)):
    """-> a ChainDraw without black wedges: the crops keep what every angle and every perspective leaves."""
    def uniform(low, high):
        return low + (high - low) * torch.rand((), generator=generator).item()

    resized = round(RESIZED * size)
    angle = uniform(-rotation, rotation)
    radians = abs(math.radians(angle))
    inner = int(resized / (math.cos(radians) + math.sin(radians)))
    far, room = inner - 1, int(distortion * inner / 2)
    x, y = ([round(uniform(0, room)) for _ in range(4)] for _ in range(2))
    ends = (x[0], y[0]), (far - x[1], y[1]), (far - x[2], far - y[2]), (x[3], far - y[3])
    factors = [uniform(max(0.0, 1 - each), 1 + each) for each in colours[:3]] + [uniform(-colours[3], colours[3])]
    return ChainDraw(resized, angle, inner, ends, inner - 2 * max(*x, *y), size, tuple(factors))


def geometry(images, draw):
    """(N, 3, H, W) float -> (N, 3, size, size), each step resampling what the last one left."""
    images = TF.resize(images, [draw.resized, draw.resized], antialias=True)
    images = TF.rotate(images, draw.angle, BILINEAR)
    images = TF.center_crop(images, [draw.inner, draw.inner])
    images = TF.perspective(images, draw.starts, draw.ends, BILINEAR)
    images = TF.center_crop(images, [draw.last, draw.last])
    return TF.resize(images, [draw.size, draw.size], antialias=True)


def colours(images, draw):
    brightness, contrast, saturation, hue = draw.colours
    images = TF.adjust_brightness(images, brightness)
    images = TF.adjust_contrast(images, contrast)
    images = TF.adjust_saturation(images, saturation)
    return TF.adjust_hue(images, hue) if hue else images


def chain(images, draw):
    """(N, 3, H, W) float in [0, 1] -> (N, 3, size, size): a year's whole augmentation."""
    return colours(geometry(images, draw), draw)


def as_one(draw):
    """ChainDraw -> the same augmentation as a Draw of augmentations.year_wise."""
    offset = (draw.inner - draw.last) // 2
    corners = np.array([(0, 0), (1, 0), (1, 1), (0, 1)], dtype=np.float64) * draw.last + offset
    # torchvision's perspective takes pixel k for the place k, and samples at k + 0.5 by the same map.
    rows, right = [], []
    for (x, y), (u, v) in zip(draw.ends, draw.starts):
        rows += [(x, y, 1, 0, 0, 0, -u * x, -u * y), (0, 0, 0, x, y, 1, -v * x, -v * y)]
        right += [u, v]
    matrix = np.append(np.linalg.solve(np.array(rows, dtype=np.float64), np.array(right, dtype=np.float64)), 1)
    places = np.column_stack([corners, np.ones(4)]) @ matrix.reshape(3, 3).T
    places = places[:, :2] / places[:, 2:]
    places += round((draw.resized - draw.inner) / 2)
    centred = places - draw.resized / 2
    radians = math.radians(draw.angle)
    turned = centred @ np.array([[math.cos(radians), math.sin(radians)], [-math.sin(radians), math.cos(radians)]])
    return Draw(torch.from_numpy(turned * 2 / draw.resized).float(), *draw.colours, order=(0, 1, 2, 3))
