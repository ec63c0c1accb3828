"""Clouds and haze: what astronaut photos have and the database of cloud-free composites does not (not in the paper).

Drawn for each image on its own, whatever the other augmentations share: weather is no mark of a year. About half of the
images get clouds, half get haze, and a quarter stays clear, as the database is.
"""

import torch
from torch.nn import functional as F

CELLS = (2, 4, 8, 16, 32)  # noise of so many cells a side, coarse to fine
HAZE_COLOUR = (0.55, 0.65, 0.80)


def uniform(low, high, count, generator):
    """(count, 1, 1, 1) uniform draws."""
    return torch.rand(count, 1, 1, 1, generator=generator) * (high - low) + low


def fractal(count, size, generator):
    """(count, 1, size, size) smooth random fields of mean 0 and spread 1, some rough, some soft."""
    roughness = uniform(0.4, 0.8, count, generator)
    field = torch.zeros(count, 1, size, size)
    for octave, cells in enumerate(each for each in CELLS if each <= size):
        noise = torch.randn(count, 1, cells + 1, cells + 1, generator=generator)
        field += roughness ** octave * F.interpolate(noise, size=(size, size), mode="bicubic", align_corners=True)
    field -= field.mean(dim=(2, 3), keepdim=True)
    return field / field.std(dim=(2, 3), keepdim=True).clamp(min=1e-6)


def cloud_opacity(coverage, count, size, generator):
    """(count, 1, size, size) in [0, 1): zero outside the clouds, which cover up to `coverage` of half of the images."""
    field = fractal(count, size, generator)
    share = coverage * torch.rand(count, generator=generator) * torch.randint(2, (count,), generator=generator)
    ordered = field.flatten(1).sort(dim=1, descending=True).values
    edge = ordered.gather(1, (share * (ordered.shape[1] - 1)).long()[:, None])
    return 1 - torch.exp(-uniform(1, 6, count, generator) * (field - edge[:, :, None, None]).clamp(min=0))


def haze_opacity(haze, count, size, generator):
    """(count, 1, size, size) in [0, haze]: on half of the images, in any direction thicker towards one side."""
    places = torch.linspace(-1, 1, size)
    angle = uniform(0, 2 * torch.pi, count, generator)
    slope = (torch.cos(angle) * places + torch.sin(angle) * places[:, None]) / 2 ** 0.5  # in [-1, 1]
    some = torch.randint(2, (count, 1, 1, 1), generator=generator)
    return some * uniform(0, haze, count, generator) * (1 + uniform(0, 1, count, generator) * slope) / 2


def add_weather(images, clouds, haze, generator, here=None):
    """images (N, 3, S, S) float32 in [0, 1] -> the same behind bluish air and under white clouds.

    clouds: largest share of an image under clouds. haze: largest opacity of the air. 0 draws nothing.
    here (M,) bool: the images are only these N of M, and get what they would get among all of them.
    """
    here = torch.ones(len(images), dtype=torch.bool) if here is None else here
    count, size = len(here), images.shape[-1]
    if haze:
        opacity = haze_opacity(haze, count, size, generator)[here].to(images.device)
        colour = torch.tensor(HAZE_COLOUR)[:, None, None].to(images.device)
        images = images + opacity * (colour - images)
    if clouds:
        opacity = cloud_opacity(clouds, count, size, generator)[here].to(images.device)
        brightness = uniform(0.75, 1, count, generator)[here].to(images.device)
        images = images + opacity * (brightness - images)
    return images
