"""Clouds, haze and exposure: what astronaut photos have and the database of cloud-free composites has not (not in the
paper).

Drawn for each image on its own, whatever the other augmentations share: weather is no mark of a year. Half of the
images become such photos, the others stay clear, as the database is.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

CELLS = (3, 6, 12, 24, 48)  # noise of so many cells a side, coarse to fine
HAZE_COLOUR = (0.55, 0.65, 0.80)
MIDDLE_GREY = 0.42


ALL = slice(None)


def uniform(
    low: float,
    high: float,
    count: int,
    generator: torch.Generator,
    rows: slice | Tensor = ALL,
    device: str | torch.device = "cpu",
) -> Tensor:
    """(count, 1, 1, 1) uniform draws, of which `rows` are returned: here and below, the others are drawn only.

    Drawn on the CPU, where the generator is; what is made of it is made on the device, which does not wait.
    """
    return torch.rand(count, 1, 1, 1, generator=generator)[rows].to(device, non_blocking=True) * (high - low) + low


def fractal(
    count: int, size: int, generator: torch.Generator, rows: slice | Tensor = ALL, device: str | torch.device = "cpu"
) -> Tensor:
    """(count, 1, size, size) smooth random fields of mean 0 and spread 1, some rough, some soft."""
    roughness = uniform(0.5, 0.9, count, generator, rows, device)
    field = torch.zeros(len(roughness), 1, size, size, device=device)
    for octave, cells in enumerate(each for each in CELLS if each <= size):
        noise = torch.randn(count, 1, cells + 1, cells + 1, generator=generator)[rows].to(device, non_blocking=True)
        field += roughness**octave * F.interpolate(noise, size=(size, size), mode="bicubic", align_corners=True)
    field -= field.mean(dim=(2, 3), keepdim=True)
    return field / field.std(dim=(2, 3), keepdim=True).clamp(min=1e-6) if len(field) else field  # torch warns at none


def cloud_opacity(
    coverage: float,
    count: int,
    size: int,
    generator: torch.Generator,
    rows: slice | Tensor = ALL,
    device: str | torch.device = "cpu",
) -> Tensor:
    """(count, 1, size, size) in [0, 1): zero outside the clouds, which cover up to `coverage`, mostly less."""
    field = fractal(count, size, generator, rows, device)
    share = coverage * torch.rand(count, generator=generator)[rows].to(device, non_blocking=True) ** 2
    ordered = field.flatten(1).sort(dim=1, descending=True).values
    edge = ordered.gather(1, (share * (ordered.shape[1] - 1)).long()[:, None])
    depth = uniform(0.5, 4, count, generator, rows, device) * (field - edge[:, :, None, None]).clamp(min=0)
    return uniform(0.75, 1, count, generator, rows, device) * (1 - torch.exp(-depth))


def haze_opacity(
    haze: float,
    count: int,
    size: int,
    generator: torch.Generator,
    rows: slice | Tensor = ALL,
    device: str | torch.device = "cpu",
) -> Tensor:
    """(count, 1, size, size) in [0, haze]: in any direction thicker towards one side."""
    places = torch.linspace(-1, 1, size, device=device)
    angle = uniform(0, 2 * torch.pi, count, generator, rows, device)
    slope = (torch.cos(angle) * places + torch.sin(angle) * places[:, None]) / 2**0.5  # in [-1, 1]
    thickest, spread = (uniform(0, high, count, generator, rows, device) for high in (haze, 1))
    return thickest * (1 + spread * slope) / 2


def expose(images: Tensor, strength: Tensor) -> Tensor:
    """images (N, 3, S, S), strength (N, 1, 1, 1) -> each brought from its mean towards middle grey, a soft shoulder.

    Strength 1 is a camera's full automatic, 0 changes nothing but the shoulder.
    """
    gain = (MIDDLE_GREY / images.mean(dim=(1, 2, 3), keepdim=True).clamp(min=0.02)) ** strength
    return 1 - torch.exp(-1.3 * gain * images)


def add_weather(
    images: Tensor, clouds: float, haze: float, exposure: float, generator: torch.Generator, here: Tensor | None = None
) -> Tensor:
    """images (N, 3, S, S) float32 in [0, 1] -> half of them behind bluish air, under white clouds, exposed anew.

    clouds: largest share of an image under clouds. haze: largest opacity of the air. exposure: largest strength of the
    automatic exposure. Zeros draw nothing. here (M,) bool: the images are only these N of M, and get what they would
    get among all of them.
    """
    if not (clouds or haze or exposure):
        return images
    here = torch.ones(len(images), dtype=torch.bool) if here is None else here
    count, size, device = len(here), images.shape[-1], images.device
    chosen = torch.randint(2, (count, 1, 1, 1), generator=generator).flatten().bool()
    rows = torch.nonzero(here & chosen).flatten()  # among all
    own = torch.nonzero(chosen[here]).flatten().to(device, non_blocking=True)  # among the images
    photos = images[own]
    if haze:
        opacity = haze_opacity(haze, count, size, generator, rows, device)
        colour = torch.tensor(HAZE_COLOUR).to(device, non_blocking=True)
        photos = photos + opacity * (colour[:, None, None] - photos)
    if clouds:
        opacity = cloud_opacity(clouds, count, size, generator, rows, device)
        photos = photos + opacity * (1 - photos)
    if exposure:
        photos = expose(photos, uniform(0, exposure, count, generator, rows, device))
    return images.index_copy(0, own, photos)
