"""GeoCLIP's location encoder: (lat, lon) -> embedding (Vivanco et al., NeurIPS 2023, arXiv 2309.16020, sec. 3.2)."""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

SIGMAS = (2.0**0, 2.0**4, 2.0**8)  # from coarse to fine (paper, sec. 3.2)
EMBEDDING_DIM = 512
# Equal Earth (Savric, Patterson, Jenny 2018).
A1, A2, A3, A4 = 1.340264, -0.081106, 0.000893, 0.003796
SCALE = 66.50336  # times 1/180: what the published weights were trained with


@contextmanager
def exact_float32(device_type: str) -> Iterator[None]:
    """No autocast, no TF32 and no bfloat16 inside float32 products; the settings from before come back after it.

    A phase of the finest capsule goes up to some thousand radians: with the 11 bits of TF32 it is a random number.
    """
    backends = [torch.backends.cuda.matmul, torch.backends.mkldnn.matmul]
    before = [backend.fp32_precision for backend in backends]
    changed = [(backend, value) for backend, value in zip(backends, before) if value not in ("ieee", "none")]
    for backend, _ in changed:
        backend.fp32_precision = "ieee"
    try:
        with torch.autocast(device_type, enabled=False):
            yield
    finally:
        for backend, value in changed:
            backend.fp32_precision = value


def equal_earth(points: Tensor) -> Tensor:
    """(..., 2) latitude, longitude in degrees -> (..., 2) x, y of the Equal Earth projection, about within ±1.

    x jumps at the antimeridian and a pole is a line: nearness on the map is not nearness on Earth.
    """
    lat, lon = torch.deg2rad(points).unbind(-1)
    root3 = 3**0.5  # a tensor would be a copy to the device that waits
    theta = torch.asin(root3 / 2 * torch.sin(lat))
    slope = 3 * (9 * A4 * theta**8 + 7 * A3 * theta**6 + 3 * A2 * theta**2 + A1)
    x = 2 * root3 * lon * torch.cos(theta) / slope
    y = A4 * theta**9 + A3 * theta**7 + A2 * theta**3 + A1 * theta
    return torch.stack([x, y], dim=-1) * SCALE / 180


class FourierFeatures(nn.Module):
    """(N, 2) -> (N, 2 * count): cos and sin of 2π B v, rows of B drawn from N(0, sigma²) once and frozen (eq. 2)."""

    def __init__(self, sigma: float, count: int = 256) -> None:
        super().__init__()
        # A parameter without gradient rather than a buffer: so it is in the published state dict.
        self.b = nn.Parameter(torch.randn(count, 2) * sigma, requires_grad=False)

    def forward(self, v: Tensor) -> Tensor:
        # 2π goes to v first: any other order rounds the phases differently, which the published weights would show.
        phases = 2 * math.pi * v @ self.b.T
        return torch.cat([torch.cos(phases), torch.sin(phases)], dim=-1)


class Capsule(nn.Module):
    """One scale of the location encoder: (N, 2) projected -> (N, 512)."""

    def __init__(self, sigma: float) -> None:
        super().__init__()
        self.capsule = nn.Sequential(
            FourierFeatures(sigma),
            nn.Linear(512, 1024),
            nn.ReLU(),
            nn.Linear(1024, 1024),
            nn.ReLU(),
            nn.Linear(1024, 1024),
            nn.ReLU(),
        )
        self.head = nn.Sequential(nn.Linear(1024, EMBEDDING_DIM))

    def forward(self, v: Tensor) -> Tensor:
        return self.head(self.capsule(v))


class LocationEncoder(nn.Module):
    """(N, 2) latitude, longitude in degrees -> (N, 512) float32, not normalised: the sum of the capsules (eq. 3).

    Always in exact float32, whatever autocast or TF32 is around it. State dict as published: `LocEnc{i}.capsule.0.b`,
    `LocEnc{i}.capsule.{1,3,5}.*`, `LocEnc{i}.head.0.*`. `sigmas`: one for each capsule, for fresh weights.
    """

    def __init__(self, sigmas: tuple[float, ...] = SIGMAS) -> None:
        super().__init__()
        for i, sigma in enumerate(sigmas):
            self.add_module(f"LocEnc{i}", Capsule(sigma))

    def forward(self, points: Tensor) -> Tensor:
        if points.dim() != 2 or points.shape[1] != 2:
            raise ValueError(f"points of shape {tuple(points.shape)}: expected (N, 2), latitude and longitude")
        with exact_float32(points.device.type):
            v = equal_earth(points.float())
            return sum(capsule(v) for capsule in self.children())
