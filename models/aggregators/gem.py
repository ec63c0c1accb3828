"""Generalised-mean pooling (Radenovic et al., TPAMI 2018), globally or over a grid of cells."""

from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.normalise import l2_normalise


class GeM(nn.Module):
    """(B, C, H, W) -> (B, C * gem_grid ** 2), L2-normalised, float32. Radenovic et al. 2018, eq. 3, with a learned p.

    With gem_grid = 2 each quarter of the image is pooled on its own and the four are concatenated, so that the layout
    of the ground is kept. Negative features count as zero.
    """

    def __init__(
        self,
        channels: int,
        height: int,
        width: int,
        gem_grid: Annotated[int, "pools over so many cells a side"] = 1,
        p: float = 3.0,
        eps: float = 1e-6,
    ) -> None:
        super().__init__()
        if not 1 <= gem_grid <= min(height, width):
            raise ValueError(
                f"--gem_grid {gem_grid}: must be at least 1 and no finer than the {height} x {width} "
                "features; use another grid or another --image_size"
            )
        self.grid, self.eps = gem_grid, eps
        self.out_dim = channels * gem_grid * gem_grid
        self.p = nn.Parameter(torch.tensor([float(p)]))

    def forward(self, x: Tensor) -> Tensor:
        if min(x.shape[-2:]) < self.grid:
            raise ValueError(
                f"GeM pools over {self.grid} x {self.grid} cells and got features of {x.shape[-2]} x "
                f"{x.shape[-1]}: use a smaller --gem_grid or a larger --image_size"
            )
        # The power needs float32: in bfloat16 its relative error is three times that of the features.
        with torch.autocast(x.device.type, enabled=False):
            x = x.to(torch.promote_types(x.dtype, torch.float32)).clamp(min=self.eps)
            means = F.adaptive_avg_pool2d(x.pow(self.p), self.grid)
            return l2_normalise(means.pow(1 / self.p).flatten(1))
