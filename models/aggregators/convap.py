"""Conv-AP (Ali-bey et al., Neurocomputing 2022): a 1 x 1 convolution, then the mean over a grid of cells."""

from typing import Annotated

import torch.nn.functional as F
from torch import Tensor, nn

from models.normalise import l2_normalise
from utils.settings import require_at_least


class ConvAP(nn.Module):
    """(B, C, H, W) -> (B, conv_channels * conv_grid ** 2), L2-normalised, float32. The paper's sec. 3.2."""

    def __init__(
        self,
        channels: int,
        height: int,
        width: int,
        descriptor_dim: int,
        conv_channels: Annotated[int | None, "output channels; default: descriptor_dim / conv_grid^2"] = None,
        conv_grid: Annotated[int, "averages over so many cells a side"] = 2,
    ) -> None:
        super().__init__()
        if not 1 <= conv_grid <= min(height, width):
            raise ValueError(
                f"--conv_grid {conv_grid}: must be at least 1 and no finer than the {height} x {width} features"
            )
        if conv_channels is None and descriptor_dim % conv_grid**2:
            raise ValueError(
                f"--descriptor_dim {descriptor_dim} is no multiple of {conv_grid**2} cells: change --conv_grid or set "
                "--conv_channels"
            )
        require_at_least(1, conv_channels=conv_channels)
        conv_channels = conv_channels or descriptor_dim // conv_grid**2
        self.grid, self.out_dim = conv_grid, conv_channels * conv_grid**2
        self.channel_pool = nn.Conv2d(channels, conv_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return l2_normalise(F.adaptive_avg_pool2d(self.channel_pool(x), self.grid).flatten(1))
