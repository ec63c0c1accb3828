"""To a GPU in one copy that the host does not wait for."""

from collections.abc import Sequence

import torch
from torch import Tensor


def to_device(tensors: Sequence[Tensor], device: str | torch.device) -> list[Tensor]:
    """CPU tensors -> the same on the device, out of one piece of page-locked memory.

    On the way they are float64, which holds float32, booleans and row numbers exactly.
    """
    if torch.device(device).type == "cpu":
        return list(tensors)
    flat = torch.cat([each.double().flatten() for each in tensors]).pin_memory().to(device, non_blocking=True)
    parts = flat.split([each.numel() for each in tensors])
    return [part.to(each.dtype).view(each.shape) for part, each in zip(parts, tensors)]
