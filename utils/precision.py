"""Low precision around the network only: descriptors, loss and augmentation stay in float32."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

PRECISIONS = ("fp32", "bf16")
PRECISION_HELP = (
    "of the network; auto: bf16 where the hardware multiplies in it. bf16: convolutions and products of matrices take "
    "factors of 7 bits in place of 23, and add in full. fp32: products in full; convolutions on a GPU in TF32 (factors "
    "of 10 bits), which is PyTorch's default"
)
DETERMINISTIC_HELP = "the same bits again on the same GPU and software: slower; an operation that cannot is an error"


def autocast(device: str | torch.device, precision: str) -> torch.autocast:
    """Context manager: bfloat16 autocast on the device, or nothing at "fp32"."""
    return torch.autocast(torch.device(device).type, torch.bfloat16, enabled=precision == "bf16")


@contextmanager
def deterministic(wanted: bool) -> Iterator[None]:
    """Inside, if wanted, a GPU adds in one order: two runs with one seed have the same bits. RuntimeError (torch's) at
    an operation that has no such way. To be entered before the GPU is first used: cuBLAS reads its setting once."""
    if not wanted:
        yield
        return
    before = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
    filled = torch.utils.deterministic.fill_uninitialized_memory
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # with fewer workspaces cuBLAS would be slower
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False  # would choose algorithms by the clock
    torch.utils.deterministic.fill_uninitialized_memory = False  # nothing here reads memory before it writes it
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.backends.cudnn.benchmark, torch.utils.deterministic.fill_uninitialized_memory = before[1], filled


def default_precision(device: str | torch.device) -> str:
    """ "bf16" where the hardware multiplies in it, else "fp32"."""
    if torch.device(device).type == "cuda":
        return "bf16" if torch.cuda.is_available() and torch.cuda.is_bf16_supported() else "fp32"
    return "bf16" if torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported() else "fp32"


def chosen_precision(flag: str, device: str | torch.device) -> str:
    """--precision, perhaps "auto" -> one of PRECISIONS."""
    return default_precision(device) if flag == "auto" else flag


def require_device(name: str) -> torch.device:
    """--device -> torch.device. Raises ValueError where this machine has no such device."""
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device {name}: no CUDA device is available here; use --device cpu")
    return device
