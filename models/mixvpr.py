"""MixVPR aggregation (Ali-bey et al., WACV 2023)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class FeatureMixer(nn.Module):
    """(..., positions) -> (..., positions): a residual MLP over the spatial positions. Ali-bey et al. 2023, eq. 2."""

    def __init__(self, positions: int, mlp_ratio: float = 1):
        super().__init__()
        hidden = int(positions * mlp_ratio)
        self.mix = nn.Sequential(
            nn.LayerNorm(positions), nn.Linear(positions, hidden), nn.ReLU(), nn.Linear(hidden, positions)
        )
        for linear in (self.mix[1], self.mix[3]):
            nn.init.trunc_normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mix(x)


class MixVPR(nn.Module):
    """(B, in_channels, in_h, in_w) -> (B, out_channels * out_rows), L2-normalised, at least float32.

    Channels are projected to `out_channels`, positions to `out_rows`; the flat output runs over rows fastest.
    """

    def __init__(
        self,
        in_channels: int,
        in_h: int,
        in_w: int,
        out_channels: int,
        mix_depth: int = 4,
        mlp_ratio: float = 1,
        out_rows: int = 4,
    ):
        super().__init__()
        self.in_channels, self.in_h, self.in_w = in_channels, in_h, in_w
        self.out_dim = out_channels * out_rows
        self.mix = nn.Sequential(*[FeatureMixer(in_h * in_w, mlp_ratio) for _ in range(mix_depth)])
        self.channel_proj = nn.Linear(in_channels, out_channels)
        self.row_proj = nn.Linear(in_h * in_w, out_rows)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1:] != (self.in_channels, self.in_h, self.in_w):
            raise ValueError(
                f"MixVPR was built for features of {self.in_channels} x {self.in_h} x {self.in_w} and got "
                f"{' x '.join(map(str, x.shape[1:]))}: images must have the size of the model's --image_size"
            )
        x = self.mix(x.flatten(2))
        x = self.channel_proj(x.transpose(1, 2)).transpose(1, 2)
        return l2_normalise(self.row_proj(x).flatten(1))


def l2_normalise(x: Tensor) -> Tensor:
    """Rows of unit length, computed and returned in float32 (float64 stays)."""
    return F.normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=-1)
