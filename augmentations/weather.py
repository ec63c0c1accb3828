"""Clouds, haze and exposure: what astronaut photos have and the database of cloud-free composites has not (not in the
paper).

Drawn for each image on its own, whatever the other augmentations share: weather is no mark of a year. Half of the
images become such photos, the others stay clear, as the database is.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

CELLS = (3, 6, 12, 24, 48)  # noise of so many cells a side, coarse to fine
NOISE = sum((cells + 1) ** 2 for cells in CELLS)  # values of an image's clouds
HAZE_COLOUR = (0.55, 0.65, 0.80)
MIDDLE_GREY = 0.42


def draw_weather(count: int, own: slice, generator: torch.Generator) -> tuple[Tensor, Tensor, int]:
    """Of `count` images -> those in the slice `own` that become photos, rows (K,); their values (K, 8) in [0, 1), see
    `add_weather`; and a seed for the noise of all."""
    seed = int(torch.randint(2**62, (), generator=generator))
    uniform = torch.rand(count, 9, generator=generator)
    rows = torch.nonzero(uniform[own, 8] < 0.5).flatten() + own.start
    return rows, uniform[rows, :8], seed


def noise_of(rows: Tensor, count: int, seed: int) -> Tensor:
    """Noise of the rows (K,) among `count` images -> (K, NOISE), normal, drawn on their device."""
    generator = torch.Generator(rows.device).manual_seed(seed)
    return torch.randn(count, NOISE, generator=generator, device=rows.device)[rows]


def fractal(roughness: Tensor, noise: Tensor, size: int) -> Tensor:
    """roughness (N, 1, 1, 1), noise (N, NOISE) -> (N, 1, size, size): smooth random fields of mean 0 and spread 1."""
    field = torch.zeros(len(noise), 1, size, size, device=noise.device)
    parts = noise.split([(cells + 1) ** 2 for cells in CELLS], dim=1)
    for octave, (cells, part) in enumerate(zip(CELLS, parts)):
        if cells <= size:
            part = part.unflatten(1, (1, cells + 1, cells + 1))
            part = F.interpolate(part, size=(size, size), mode="bicubic", align_corners=True)
            field.addcmul_(part, roughness**octave)
    field -= field.mean(dim=(2, 3), keepdim=True)
    return field / field.std(dim=(2, 3), keepdim=True).clamp(min=1e-6) if len(field) else field  # torch warns at none


def cloud_opacity(coverage: float, uniform: Tensor, noise: Tensor, size: int) -> Tensor:
    """uniform (N, 4) in [0, 1), noise (N, NOISE) normal -> (N, 1, size, size) in [0, 1): zero outside the clouds, which
    cover up to `coverage`, mostly less."""
    roughness, share, depth, density = uniform.T[..., None, None, None]
    field = fractal(0.5 + 0.4 * roughness, noise, size)
    ordered = field.flatten(1).sort(dim=1, descending=True).values
    place = coverage * share.view(-1, 1) ** 2 * (ordered.shape[1] - 1)
    edge = ordered.gather(1, place.long())[:, :, None, None]
    thick = (0.5 + 3.5 * depth) * (field - edge).clamp(min=0)
    return (0.75 + 0.25 * density) * (1 - torch.exp(-thick))


def haze_opacity(haze: float, uniform: Tensor, size: int) -> Tensor:
    """uniform (N, 3) in [0, 1) -> (N, 1, size, size) in [0, haze]: in any direction thicker towards one side."""
    places = torch.linspace(-1, 1, size, device=uniform.device)
    angle, thickest, spread = uniform.T[..., None, None, None]
    angle = 2 * torch.pi * angle
    slope = (torch.cos(angle) * places + torch.sin(angle) * places[:, None]) / 2**0.5  # in [-1, 1]
    return haze * thickest * (1 + spread * slope) / 2


def expose(images: Tensor, strength: Tensor) -> Tensor:
    """images (N, 3, S, S), strength (N, 1, 1, 1) -> each brought from its mean towards middle grey, a soft shoulder.

    Strength 1 is a camera's full automatic, 0 changes nothing but the shoulder.
    """
    gain = (MIDDLE_GREY / images.mean(dim=(1, 2, 3), keepdim=True).clamp(min=0.02)) ** strength
    return 1 - torch.exp(-1.3 * gain * images)


def add_weather(
    images: Tensor, rows: Tensor, uniform: Tensor, noise: Tensor, clouds: float, haze: float, exposure: float
) -> Tensor:
    """images (N, 3, S, S) float32 in [0, 1] -> those at rows (K,) behind bluish air, under white clouds, exposed anew.

    uniform (K, 8): three values for the haze, four for clouds, one for the exposure. noise (K, NOISE): of clouds, else
    not looked at. clouds: largest share of an image under clouds. haze: largest opacity of the air. exposure: largest
    strength of the automatic exposure.
    """
    photos, size = images[rows], images.shape[-1]
    if haze:
        opacity = haze_opacity(haze, uniform[:, :3], size)
        for channel, colour in zip(photos.split(1, dim=1), HAZE_COLOUR):
            channel += opacity * (colour - channel)
    if clouds:
        photos += cloud_opacity(clouds, uniform[:, 3:7], noise, size) * (1 - photos)
    if exposure:
        photos = expose(photos, exposure * uniform[:, 7:, None, None])
    return images.index_copy_(0, rows, photos)
