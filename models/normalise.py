"""Unit length."""

import torch
import torch.nn.functional as F
from torch import Tensor


def l2_normalise(x: Tensor) -> Tensor:
    """Rows of unit length, computed and returned in float32 (float64 stays)."""
    return F.normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=-1)
