"""Low precision around the network only: descriptors, loss and augmentation stay in float32."""

import torch

PRECISIONS = ("fp32", "bf16")


def autocast(device: str | torch.device, precision: str) -> torch.autocast:
    """Context manager: bfloat16 autocast on the device, or nothing at "fp32"."""
    return torch.autocast(torch.device(device).type, torch.bfloat16, enabled=precision == "bf16")


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
