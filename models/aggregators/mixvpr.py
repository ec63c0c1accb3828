"""MixVPR aggregation (Ali-bey et al., WACV 2023)."""

from typing import Annotated

from torch import Tensor, nn

from models.normalise import l2_normalise
from utils.settings import require_at_least


class FeatureMixer(nn.Module):
    """(..., positions) -> (..., positions): a residual MLP over the spatial positions. Ali-bey et al. 2023, eq. 2."""

    def __init__(self, positions: int) -> None:
        super().__init__()
        self.mix = nn.Sequential(
            nn.LayerNorm(positions), nn.Linear(positions, positions), nn.ReLU(), nn.Linear(positions, positions)
        )
        for linear in (self.mix[1], self.mix[3]):
            nn.init.trunc_normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mix(x)


class MixVPR(nn.Module):
    """(B, channels, height, width) -> (B, mix_channels * out_rows), L2-normalised, at least float32.

    Channels are projected to `mix_channels`, positions to `out_rows`; the flat output runs over rows fastest.
    """

    def __init__(
        self,
        channels: int,
        height: int,
        width: int,
        descriptor_dim: int,
        mix_depth: Annotated[int, "mixers"] = 4,
        mix_channels: Annotated[int | None, "output channels; default: descriptor_dim / out_rows"] = None,
        out_rows: Annotated[int, "rows of the output"] = 4,
    ) -> None:
        super().__init__()
        require_at_least(0, mix_depth=mix_depth)
        require_at_least(1, mix_channels=mix_channels, out_rows=out_rows)
        if mix_channels is None and descriptor_dim % out_rows:
            raise ValueError(
                f"--descriptor_dim {descriptor_dim} is no multiple of --out_rows {out_rows}: "
                "change one of them or set --mix_channels"
            )
        mix_channels = mix_channels or descriptor_dim // out_rows
        self.shape = (channels, height, width)
        self.out_dim = mix_channels * out_rows
        self.mix = nn.Sequential(*[FeatureMixer(height * width) for _ in range(mix_depth)])
        self.channel_proj = nn.Linear(channels, mix_channels)
        self.row_proj = nn.Linear(height * width, out_rows)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1:] != self.shape:
            raise ValueError(
                f"MixVPR was built for features of {' x '.join(map(str, self.shape))} and got "
                f"{' x '.join(map(str, x.shape[1:]))}: images must have the size of the model's "
                "--image_size"
            )
        x = self.mix(x.flatten(2))
        x = self.channel_proj(x.transpose(1, 2)).transpose(1, 2)
        return l2_normalise(self.row_proj(x).flatten(1))
