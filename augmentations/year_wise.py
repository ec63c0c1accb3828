"""Year-wise augmentation (paper, sec. 4.3): one draw per year for the whole batch, on the device.

Rotation, crop, perspective and resize are one homography, so pixels are sampled once, in float32. The sampled
quadrilateral always lies inside the image, so no black wedge can appear. All draws of a batch are made at once on the
CPU and sent in one copy; what they do to pixels takes few operations, however many draws there are. Colours have
torchvision's maths.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Annotated, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

from augmentations.weather import add_weather, draw_weather, noise_of
from utils.transfer import to_device

T = TypeVar("T")
GROUPS = ("none", "image", "batch", "year")
# (x, y) corners of an image, in its half sizes.
SQUARE = torch.tensor([[-1.0, -1.0], [1.0, -1.0], [1.0, 1.0], [-1.0, 1.0]])
BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)
GREY = (0.299, 0.587, 0.114)


class Draws(NamedTuple):
    """D random augmentations, on the CPU.

    quads (D, 4, 2): where the output's corners lie in the source, (x, y) in [-1, 1]. colours (D, 4): factors of
    brightness, contrast and saturation, turn of the hue. order (D, P): which of these, in the order applied.
    """

    quads: Tensor
    colours: Tensor
    order: Tensor

    def rows(self, which: slice | Tensor) -> "Draws":
        return Draws(*(each[which] for each in self))


@dataclass(frozen=True)
class Augmentation:
    """Random rotation, crop, perspective and colour jitter, shared by `group`: nothing, each image, a batch, a year.

    size: side of the output, pixels. rotation: degrees, drawn in ±rotation. perspective: torchvision's distortion
    scale. min_crop: smallest side of the crop as a share of the largest that fits. aspect: the crop's sides are
    stretched against each other by up to this factor. brightness, contrast, saturation, hue: torchvision's ColorJitter.
    clouds, haze, exposure: of each image on its own, see augmentations.weather. turns, flip: as well, by a random
    multiple of 90 degrees before all else, and mirrored or not.
    """

    size: int
    group: str = "year"
    rotation: Annotated[float, "degrees"] = 45.0
    perspective: Annotated[float, "distortion scale"] = 0.5
    min_crop: Annotated[float, "smallest crop, as a share of the largest; below 1 it zooms in at random"] = 1.0
    aspect: Annotated[float, "largest stretch of one side against the other"] = 1.0
    brightness: Annotated[float, "of the colour jitter"] = 0.9
    contrast: Annotated[float, "of the colour jitter"] = 0.9
    saturation: Annotated[float, "of the colour jitter"] = 0.9
    hue: Annotated[float, "of the colour jitter"] = 0.0
    clouds: Annotated[float, "largest share of an image under clouds; see --exposure"] = 0.0
    haze: Annotated[float, "largest opacity of the air; see --exposure"] = 0.0
    exposure: Annotated[float, "of a camera, its largest strength; with clouds, haze or this half become photos"] = 0.0
    turns: bool = False
    flip: bool = False

    def __post_init__(self) -> None:
        if self.group not in GROUPS:
            raise ValueError(f"--augmentation {self.group}: choose one of {', '.join(GROUPS)}")
        if not 0 <= self.perspective < 2 / 3:
            raise ValueError(
                f"--perspective {self.perspective}: must be in [0, 2/3), beyond it the quadrilateral may fold"
            )
        if not 0 < self.min_crop <= 1:
            raise ValueError(f"--min_crop {self.min_crop}: must be in (0, 1]")
        for name in ("clouds", "haze", "exposure"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"--{name} {getattr(self, name)}: must be in [0, 1]")

    def __call__(
        self, images: Tensor, generator: torch.Generator, part: slice | None = None, batch: int | None = None
    ) -> Tensor:
        """images uint8 (B, Y, 3, H, W), one column a year -> float32 (B, Y, 3, size, size) in [0, 1].

        generator: a CPU torch.Generator; the same state gives the same augmentation. Where the images are only a slice
        `part` of a batch of more regions, they get what they would get in the whole batch.
        """
        years, flat = images.shape[1], images.flatten(0, 1)
        batch = batch or len(images)
        part = part or slice(0, batch)
        own = slice(part.start * years, part.stop * years)
        if self.group == "none":
            views = F.interpolate(flat.float() / 255, size=(self.size, self.size), mode="bilinear", antialias=True)
            return views.unflatten(0, (-1, years))
        # One column a draw.
        if self.group == "year":
            columns, draws = images, self.draw(years, generator)
        elif self.group == "batch":
            columns, draws = flat[:, None], self.draw(1, generator)
        else:
            columns, draws = flat[None], self.draw(batch * years, generator).rows(own)
        if self.turns or self.flip:
            draws = draws.rows(torch.arange(len(draws.quads)).repeat(len(columns)))
            turned = torch.rand(batch * years, 2, generator=generator)[own]
            draws, columns = draws._replace(quads=self.turned(draws.quads, turned)), flat[None]
        if not (self.clouds or self.haze or self.exposure):
            return apply(columns, draws, self.size)[0].view(-1, years, 3, self.size, self.size)
        *weather, seed = draw_weather(batch * years, own, generator)
        views, rows, uniform = apply(columns, draws, self.size, *weather)
        noise = noise_of(rows, batch * years, seed) if self.clouds else rows
        views = views.view(-1, 3, self.size, self.size)
        add_weather(views, rows - own.start, uniform, noise, self.clouds, self.haze, self.exposure)
        return views.unflatten(0, (-1, years))

    def turned(self, quads: Tensor, uniform: Tensor) -> Tensor:
        """quads (N, 4, 2) in images as they are turned and mirrored by uniform (N, 2) in [0, 1) -> in the images."""
        quarters, mirrored = (uniform * torch.tensor([4 if self.turns else 1, 2 if self.flip else 1])).long().unbind(1)
        turn = torch.tensor([[0.0, 1.0], [-1.0, 0.0]])
        turns = torch.stack([torch.eye(2), turn, turn @ turn, turn @ turn @ turn])
        return quads * F.pad((1.0 - 2 * mirrored)[:, None, None], (0, 1), value=1.0) @ turns[quarters]

    def draw(self, count: int, generator: torch.Generator) -> Draws:
        """-> so many Draws."""
        corners, three, place, colours, order = torch.rand(count, 21, generator=generator).split([8, 3, 2, 4, 4], dim=1)
        stretch, angle, zoom = three.unbind(1)
        # The perspective moves each corner inwards by up to half the distortion scale of a side.
        quads = SQUARE * (1 - self.perspective * corners.view(-1, 4, 2))
        stretch = self.aspect ** (stretch - 0.5)
        angle = (2 * angle - 1) * math.radians(self.rotation)
        cos, sin = torch.cos(angle), torch.sin(angle)
        turn = torch.stack([cos, sin, -sin, cos], dim=1).view(-1, 2, 2)
        quads = quads * torch.stack([stretch, 1 / stretch], dim=1)[:, None] @ turn
        low, high = quads.amin(dim=1, keepdim=True), quads.amax(dim=1, keepdim=True)
        scale = (2 / (high - low)).amin(dim=2, keepdim=True).clamp(max=1)
        scale = scale * (self.min_crop + (1 - self.min_crop) * zoom[:, None, None])
        quads = (quads - low) * scale - 1 + (2 - (high - low) * scale) * place[:, None]
        # torchvision's ranges: a factor in [max(0, 1 - x), 1 + x].
        spreads = self.brightness, self.contrast, self.saturation
        lowest = torch.tensor([*(max(0.0, 1 - each) for each in spreads), -self.hue])
        highest = torch.tensor([*(1 + each for each in spreads), self.hue])
        steps = torch.tensor([step for step, each in enumerate((*spreads, self.hue)) if each], dtype=torch.long)
        order = steps[order[:, : len(steps)].argsort(dim=1)]
        return Draws(quads, lowest + (highest - lowest) * colours, order)


def apply(columns: Tensor, draws: Draws, size: int, *more: Tensor) -> list[Tensor]:
    """columns (M, D, 3, H, W), uint8 or float32 in [0, 1]: those of a column share a draw -> float32 (M, D, 3, size,
    size). And `more` CPU tensors, which go to the columns' device in the same copy."""
    samples = samples_per_pixel(draws.quads, columns.shape[-2:], size)
    hues = draws.order == HUE
    turns_at = (hues * torch.arange(hues.shape[1])).sum(dim=1)
    many = (samples.diff().bool() | turns_at.diff().bool()).sum() > 4
    if many:  # those of one kind become neighbours, which are handled at once
        first = samples.argsort(stable=True)
        second = turns_at[first].argsort(stable=True)
        both = first[second]
        more, samples, hues = (first, second, both.argsort(), *more), samples[first], hues[both]
        draws = Draws(draws.quads[first], draws.colours[both], draws.order[both])
    tensors = homographies_of(draws.quads), *steps_of(draws.colours, draws.order), *more
    homographies, steps, turns, *more = to_device(tensors, columns.device)
    if many:
        first, second, back, *more = more
        columns = columns.movedim(2, -1).index_select(1, first).movedim(-1, 2)  # keeps channels last
    views = warp(columns, homographies, size, samples.tolist())
    views = jitter(views[:, second] if many else views, steps, turns, hues.T.tolist())
    return [views[:, back] if many else views, *more]


def homographies_of(quads: Tensor) -> Tensor:
    """(D, 4, 2) -> (D, 3, 3), from places in the output to places in the source, both in half sizes.

    A homography keeps that corner 0 + corner 2 = corner 1 + corner 3, in homogeneous coordinates: their weights are the
    areas of the triangles that the other three corners make.
    """
    first, second, third = (quads.roll(-count, dims=1) for count in (1, 2, 3))
    (x, y), (u, v) = (second - first).unbind(2), (third - first).unbind(2)
    corners = F.pad(quads, (0, 1), value=1.0) * (x * v - y * u)[..., None]
    return corners.mT @ F.pad(SQUARE, (0, 1), value=1.0)


def samples_per_pixel(quads: Tensor, source: Sequence[int], size: int) -> Tensor:
    """-> (D,) int: bilinear samples an axis that outputs of size × size need, about one a pixel of the source."""
    x, y = ((quads + 1) / 2 * torch.tensor(source[::-1])).unbind(2)
    area = (x * (y.roll(-1, 1) - y.roll(1, 1))).sum(dim=1).abs() / 2
    return (area.sqrt() / size).round().clamp(min=1).int()


def runs(values: Sequence[T]) -> Iterator[tuple[slice, T]]:
    """-> each run of equal neighbours, and what they are."""
    start = 0
    for value, same in groupby(values):
        stop = start + len(list(same))
        yield slice(start, stop), value
        start = stop


def warp(columns: Tensor, homographies: Tensor, size: int, samples: Sequence[int]) -> Tensor:
    """columns (M, D, 3, H, W), uint8 or float32 in [0, 1], homographies (D, 3, 3) -> float32 (M, D, 3, size, size).

    One bilinear sampling, which alone would alias where the output is coarser than the source: there, several samples
    a pixel and axis are averaged.
    """
    found = []
    for own, count in runs(samples):
        images, fine = columns[:, own], size * count
        steps = (torch.arange(fine, device=images.device) + 0.5) * (2 / fine) - 1  # of sample centers, in half sizes
        x, y = torch.meshgrid(steps, steps, indexing="xy")
        places = torch.stack([x, y, torch.ones_like(x)], dim=-1).flatten(0, 1) @ homographies[own].mT
        grid = (places[..., :2] / places[..., 2:]).view(-1, fine, fine, 2).expand(len(images), -1, -1, -1, -1)
        views = F.grid_sample(
            images.flatten(0, 1).float(),
            grid.flatten(0, 1),
            mode="bilinear",
            padding_mode="border",
            align_corners=False,
        )
        views = views if count == 1 else F.avg_pool2d(views, count)
        found.append((views.mul_(1 / 255) if images.dtype == torch.uint8 else views).unflatten(0, images.shape[:2]))
    return found[0] if len(found) == 1 else torch.cat(found, dim=1)


def steps_of(colours: Tensor, order: Tensor) -> tuple[Tensor, Tensor]:
    """Draws' colours (D, 4) and order (D, P) -> each step as pixel · a + its grey · b + the image's mean grey · c,
    (P, 3, D), or as a turn of the hue, (P, D)."""
    own = colours.gather(1, order)
    scale = torch.where(order == HUE, 1.0, own)
    grey, mean = (torch.where(order == step, 1 - own, 0.0) for step in (SATURATION, CONTRAST))
    return torch.stack([scale, grey, mean]).permute(2, 0, 1), own.T


def jitter(columns: Tensor, steps: Tensor, turns: Tensor, hues: Sequence[Sequence[bool]]) -> Tensor:
    """Colour jitter with torchvision's maths: columns float32 (M, D, 3, H, W) in [0, 1] -> the same, written to.
    steps (P, 3, D), turns (P, D): see `steps_of`. hues (P, D): which are turns of the hue."""
    for (scale, grey, mean), turn, turned in zip(steps[..., None, None, None], turns, hues):
        for own, is_hue in runs(turned):
            images = columns[:, own]
            if is_hue:
                turn_hue(images, turn[own])
                continue
            red, green, blue = images.unbind(2)
            shift = (red * GREY[0]).add_(green, alpha=GREY[1]).add_(blue, alpha=GREY[2])[:, :, None]
            average = shift.mean(dim=(-2, -1), keepdim=True) * mean[own]
            shift = shift.mul_(grey[own]).add_(average)
            torch.addcmul(shift, images, scale[own], out=images).clamp_(0, 1)
    return columns


def turn_hue(images: Tensor, turn: Tensor) -> Tensor:
    """images (M, D, 3, H, W) RGB in [0, 1], hue turned by turn (D,), shares of the circle -> the same, written to; HSV,
    as torchvision.

    Value and saturation stay, so of HSV only the hue is needed: a channel is value - chroma · clamp(2 - |k - 2|, 0, 1)
    with k = 6 hue + n (mod 6), n = 5, 3, 1 for red, green, blue; below, k / 6. kornia's takes longer than all the rest
    (benchmarks/speed_augmentation.py).
    """
    red, green, blue = images.unbind(2)
    value = images.amax(dim=2)
    chroma = value - images.amin(dim=2)
    sixth = 1 / (6 * chroma.clamp(min=1e-12))
    hue = torch.where(
        value == red,
        (green - blue) * sixth,
        torch.where(value == green, (blue - red) * sixth + 1 / 3, (red - green) * sixth + 2 / 3),
    )
    # n / 6, and 1: frac of a negative number would be negative.
    sixths = torch.arange(11, 6, -2, device=images.device)[:, None, None] / 6
    k = (hue[:, :, None] + (turn[:, None, None, None] + sixths)).frac_().sub_(1 / 3).abs_().clamp_(1 / 6, 1 / 3)
    return torch.addcmul((value - 2 * chroma)[:, :, None], (6 * chroma)[:, :, None], k, out=images)
