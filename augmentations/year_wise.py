"""Year-wise augmentation (paper, sec. 4.3): one draw per year for the whole batch, on the device.

Rotation, crop and perspective are one homography, so pixels are sampled once. The sampled quadrilateral always lies
inside the image, so no black wedge can appear. kornia does the geometry and the colours.
"""

import math
from dataclasses import dataclass

import torch
from kornia import enhance
from kornia.geometry import create_meshgrid, get_perspective_transform, transform_points
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
    clouds, haze: of each image on its own, see augmentations.weather.
    """

    size: int
    group: str = "year"
    rotation: float = 45.0
    perspective: float = 0.5
    min_crop: float = 0.7
    aspect: float = 1.0
    brightness: float = 0.9
    contrast: float = 0.9
    saturation: float = 0.9
    hue: float = 0.0
    clouds: float = 0.0
    haze: float = 0.0

    def __post_init__(self):
        if self.group not in GROUPS:
            raise ValueError(f"--augmentation {self.group}: choose one of {', '.join(GROUPS)}")
        if not 0 <= self.perspective < 2 / 3:
            raise ValueError(f"--perspective {self.perspective}: must be in [0, 2/3), beyond it the "
                             f"quadrilateral may fold")
        if not 0 < self.min_crop <= 1:
            raise ValueError(f"--min_crop {self.min_crop}: must be in (0, 1]")
        for name in ("clouds", "haze"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"--{name} {getattr(self, name)}: must be in [0, 1]")

    def __call__(self, images, generator, part=None, batch=None):
        """images uint8 (B, Y, 3, H, W), one column a year -> float32 (B, Y, 3, size, size) in [0, 1].

        generator: a CPU torch.Generator; the same state gives the same augmentation. Where the images are only a slice
        `part` of a batch of more regions, they get what they would get in the whole batch.
        """
        batch, years = batch or len(images), images.shape[1]
        first = part.start * years if part else 0
        flat = images.flatten(0, 1).float() / 255
        if self.group == "none":
            views = F.interpolate(flat, size=(self.size, self.size), mode="bilinear", antialias=True)
            return views.unflatten(0, (-1, years))
        index = torch.arange(batch * years).view(batch, years)
        groups = {"image": index.view(-1, 1), "batch": index.view(1, -1), "year": index.T}[self.group]
        views = torch.empty(len(flat), 3, self.size, self.size, device=images.device)
        for rows in groups:
            draw = self.draw(generator)
            here = (rows >= first) & (rows < first + len(flat))
            rows = (rows[here] - first).to(images.device)
            seen = warp(flat[rows], draw, self.size) if len(rows) else views[:0]
            seen = add_weather(seen, self.clouds, self.haze, generator, here)
            if len(rows):
                views[rows] = jitter(seen, draw)
        return views.unflatten(0, (-1, years))

    def draw(self, generator):
        """-> a Draw."""
        def uniform(low, high, count=()):
            return torch.rand(count, generator=generator) * (high - low) + low

        # The perspective moves each corner inwards by up to half the distortion scale of a side.
        quad = SQUARE * (1 - uniform(0, self.perspective, (4, 2)))
        stretch = self.aspect ** uniform(-0.5, 0.5)
        angle = uniform(-self.rotation, self.rotation) * math.pi / 180
        cos, sin = torch.cos(angle), torch.sin(angle)
        quad = quad * torch.stack([stretch, 1 / stretch]) @ torch.stack([torch.stack([cos, sin]),
                                                                         torch.stack([-sin, cos])])
        low, high = quad.amin(dim=0), quad.amax(dim=0)
        scale = (2 / (high - low)).amin().clamp(max=1) * uniform(self.min_crop, 1)
        room = 2 - (high - low) * scale
        quad = (quad - low) * scale - 1 + room * uniform(0, 1, (2,))
        # torchvision's ranges: a factor in [max(0, 1 - x), 1 + x].
        factors = [uniform(max(0.0, 1 - x), 1 + x).item() for x in (self.brightness, self.contrast, self.saturation)]
        return Draw(quad, *factors, hue=uniform(-self.hue, self.hue).item(),
                    order=tuple(torch.randperm(4, generator=generator).tolist()))


def warp(images, draw, size):
    """A Draw's quadrilateral of all images (N, 3, H, W) float32 -> (N, 3, size, size), one bilinear sampling.

    Nothing is filtered before the warp: load images at about size / mean crop scale (--source_size).
    """
    homography = get_perspective_transform(SQUARE[None], draw.quad[None])
    centers = create_meshgrid(size, size, normalized_coordinates=False) + 0.5  # pixel centres of the output
    grid = transform_points(homography, (centers * (2 / size) - 1).reshape(1, -1, 2)).view(1, size, size, 2)
    grid = grid.to(images.device).expand(len(images), -1, -1, -1)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=False)


def jitter(images, draw):
    """Colour jitter with torchvision's maths, in the draw's order. (N, 3, H, W) in [0, 1] -> the same."""
    for step in draw.order:
        if step == 0 and draw.brightness != 1:
            images = (images * draw.brightness).clamp(0, 1)
        elif step == 1 and draw.contrast != 1:
            images = enhance.adjust_contrast_with_mean_subtraction(images, draw.contrast)
        elif step == 2 and draw.saturation != 1:
            images = enhance.adjust_saturation_with_gray_subtraction(images, draw.saturation)
        elif step == 3 and draw.hue != 0:
            images = enhance.adjust_hue(images, draw.hue * 2 * math.pi)
    return images
