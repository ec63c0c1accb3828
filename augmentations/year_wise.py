"""Year-wise augmentation (paper, sec. 4.3): one draw per year for the whole batch, on the device.

Rotation, crop, perspective and resize are one homography, so pixels are sampled once, in float32. The sampled
quadrilateral always lies inside the image, so no black wedge can appear. kornia does the geometry and the colours, but
for the hue, which is ours because kornia's takes longer than all the rest (benchmarks/speed_augmentation.py).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from kornia import enhance
from kornia.geometry import get_perspective_transform, transform_points
from torch import Tensor
from torch.nn import functional as F

from augmentations.weather import add_weather

GROUPS = ("none", "image", "batch", "year")
# (x, y) corners of an image, in its half sizes.
SQUARE = torch.tensor([[-1.0, -1.0], [1.0, -1.0], [1.0, 1.0], [-1.0, 1.0]])


@dataclass(frozen=True)
class Draw:
    """One random augmentation. quad (4, 2): where the output's corners lie in the source, (x, y) in [-1, 1]."""

    quad: torch.Tensor
    brightness: float
    contrast: float
    saturation: float
    hue: float
    order: tuple


@dataclass(frozen=True)
class Augmentation:
    """Random rotation, crop, perspective and colour jitter, shared by `group`: nothing, each image, a batch, a year.

    size: side of the output, pixels. rotation: degrees, drawn in ±rotation. perspective: torchvision's distortion
    scale. min_crop: smallest side of the crop as a share of the largest that fits. aspect: the crop's sides are
    stretched against each other by up to this factor. brightness, contrast, saturation, hue: torchvision's ColorJitter.
    clouds, haze, exposure: of each image on its own, see augmentations.weather.
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
        years = images.shape[1]
        batch = batch or len(images)
        part = part or slice(0, batch)
        if self.group == "none":
            views = F.interpolate(
                images.flatten(0, 1).float() / 255, size=(self.size, self.size), mode="bilinear", antialias=True
            )
            return views.unflatten(0, (-1, years))
        here = torch.zeros(batch, dtype=torch.bool)
        here[part] = True
        if self.group == "year":
            return torch.stack([self.view(each, generator, here) for each in images.unbind(1)], dim=1)
        here, flat = here.repeat_interleave(years), images.flatten(0, 1)
        if self.group == "batch":
            views = self.view(flat, generator, here)
        else:
            own = iter(flat.split(1))
            views = torch.cat([self.view(next(own) if mine else flat[:0], generator, mine[None]) for mine in here])
        return views.unflatten(0, (-1, years))

    def view(self, images: Tensor, generator: torch.Generator, here: Tensor) -> Tensor:
        """images uint8 (N, 3, H, W) -> float32 (N, 3, size, size), one draw for all but the weather. here (M,): which
        of the images that share it these are; where there are none, the draws are made all the same."""
        draw = self.draw(generator)
        views = (
            jitter(warp(images, draw, self.size), draw)
            if len(images)
            else torch.empty(0, 3, self.size, self.size, device=images.device)
        )
        return add_weather(views, self.clouds, self.haze, self.exposure, generator, here)

    def draw(self, generator: torch.Generator) -> Draw:
        """-> a Draw."""

        def uniform(low: float, high: float, count: tuple = ()):
            return torch.rand(count, generator=generator) * (high - low) + low

        # The perspective moves each corner inwards by up to half the distortion scale of a side.
        quad = SQUARE * (1 - uniform(0, self.perspective, (4, 2)))
        stretch = self.aspect ** uniform(-0.5, 0.5)
        angle = uniform(-self.rotation, self.rotation) * math.pi / 180
        cos, sin = torch.cos(angle), torch.sin(angle)
        quad = (
            quad
            * torch.stack([stretch, 1 / stretch])
            @ torch.stack([torch.stack([cos, sin]), torch.stack([-sin, cos])])
        )
        low, high = quad.amin(dim=0), quad.amax(dim=0)
        scale = (2 / (high - low)).amin().clamp(max=1) * uniform(self.min_crop, 1)
        room = 2 - (high - low) * scale
        quad = (quad - low) * scale - 1 + room * uniform(0, 1, (2,))
        # torchvision's ranges: a factor in [max(0, 1 - x), 1 + x].
        factors = [uniform(max(0.0, 1 - x), 1 + x).item() for x in (self.brightness, self.contrast, self.saturation)]
        return Draw(
            quad,
            *factors,
            hue=uniform(-self.hue, self.hue).item(),
            order=tuple(torch.randperm(4, generator=generator).tolist()),
        )


def warp(images: Tensor, draw: Draw, size: int, samples: int | None = None) -> Tensor:
    """A Draw's quadrilateral of all images (N, 3, H, W) uint8, or float32 in [0, 1] -> float32 (N, 3, size, size).

    One bilinear sampling, which alone would alias where the output is coarser than the source: there, several samples
    a pixel and axis are averaged (`samples`; None: as many as needed). Only what the quad covers becomes float.
    """
    images, quad = crop_to(images, draw.quad)
    images = images.float().mul_(1 / 255) if images.dtype == torch.uint8 else images
    fine = size * (samples or samples_per_pixel(quad, images.shape[-2:], size))
    homography = get_perspective_transform(SQUARE[None], quad[None]).to(images.device, non_blocking=True)
    steps = (torch.arange(fine, device=images.device) + 0.5) * (2 / fine) - 1  # of sample centers, in half sizes
    centers = torch.stack(torch.meshgrid(steps, steps, indexing="xy"), dim=-1)
    grid = transform_points(homography, centers.view(1, -1, 2)).view(1, fine, fine, 2)
    views = F.grid_sample(
        images, grid.expand(len(images), -1, -1, -1), mode="bilinear", padding_mode="border", align_corners=False
    )
    return views if fine == size else F.avg_pool2d(views, fine // size)


def crop_to(images: Tensor, quad: Tensor) -> tuple[Tensor, Tensor]:
    """Images (N, C, H, W) and a quad in their half sizes -> the part that bilinear samples of the quad read, the quad
    in half sizes of that part."""
    whole = torch.tensor(images.shape[:-3:-1])  # width, height
    corners = (quad + 1) / 2 * whole  # pixels from the upper left corner
    low = (corners.amin(dim=0) - 1).floor().clamp(min=0).long()
    high = torch.minimum((corners.amax(dim=0) + 1).ceil().long(), whole)
    (left, top), (right, bottom) = low.tolist(), high.tolist()
    return images[..., top:bottom, left:right], (corners - low) * 2 / (high - low) - 1


def samples_per_pixel(quad: Tensor, source: Sequence[int], size: int) -> int:
    """How many bilinear samples an axis an output of size × size needs: about one for each pixel of the source."""
    x, y = ((quad + 1) / 2 * torch.tensor(source[::-1])).T
    area = (x * (y.roll(-1) - y.roll(1))).sum().item() / 2
    return max(1, round(abs(area) ** 0.5 / size))


def jitter(images: Tensor, draw: Draw) -> Tensor:
    """Colour jitter with torchvision's maths, in the draw's order. (N, 3, H, W) in [0, 1] -> the same.

    kornia gets tensors: a float it would send to a GPU as a tensor, and wait for that.
    """
    for step in draw.order:
        if step == 0 and draw.brightness != 1:
            images = (images * draw.brightness).clamp(0, 1)
        elif step == 1 and draw.contrast != 1:
            images = enhance.adjust_contrast_with_mean_subtraction(images, torch.tensor(draw.contrast))
        elif step == 2 and draw.saturation != 1:
            images = enhance.adjust_saturation_with_gray_subtraction(images, torch.tensor(draw.saturation))
        elif step == 3 and draw.hue != 0:
            images = adjust_hue(images, draw.hue)
    return images


def adjust_hue(images: Tensor, turn: float) -> Tensor:
    """(N, 3, H, W) RGB in [0, 1], hue turned by a share of the circle -> the same; HSV, as torchvision.

    Value and saturation stay, so of HSV only the hue is needed: a channel is value - chroma · clamp(2 - |k - 2|, 0, 1)
    with k = 6 hue + n (mod 6), n = 5, 3, 1 for red, green, blue.
    """
    red, green, blue = images.unbind(1)
    value = images.amax(dim=1)
    chroma = value - images.amin(dim=1)
    sixth = 1 / (6 * chroma.clamp(min=1e-12))
    hue = torch.where(
        value == red,
        (green - blue) * sixth,
        torch.where(value == green, (blue - red) * sixth + 1 / 3, (red - green) * sixth + 2 / 3),
    )
    turned = torch.empty_like(images)
    for channel, n in enumerate((5, 3, 1)):
        k = (hue + (n / 6 + 1 + turn)).frac_().mul_(6)  # + 1: frac of a negative number would be negative
        torch.sub(value, k.sub_(2).abs_().neg_().add_(2).clamp_(0, 1).mul_(chroma), out=turned[:, channel])
    return turned
