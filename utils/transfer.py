"""To a GPU in one copy that the host does not wait for."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

WIDEST = 8  # bytes of a value: where every type may begin


def to_device(tensors: Sequence[Tensor], device: str | torch.device) -> list[Tensor]:
    """CPU tensors of any types -> the same on the device, out of one piece of page-locked memory."""
    if torch.device(device).type == "cpu":
        return list(tensors)
    return unpacked(packed(tensors).pin_memory().to(device, non_blocking=True), tensors)


def packed(tensors: Sequence[Tensor]) -> Tensor:
    """Tensors -> their bytes, uint8."""
    pieces = [each.contiguous().flatten().view(torch.uint8) for each in tensors]
    return torch.cat([F.pad(each, (0, -len(each) % WIDEST)) for each in pieces])


def unpacked(flat: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """The inverse of `packed`, into shapes and types of `like`."""
    parts = flat.split([each.nbytes + -each.nbytes % WIDEST for each in like])
    return [part[: each.nbytes].view(each.dtype).view(each.shape) for part, each in zip(parts, like)]
