"""BatchNorm in eval mode is a fixed scale and shift: folded into the convolution before it, it costs nothing."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval


def fold_batchnorm(parts: list[nn.Module]) -> nn.Sequential:
    """Copies of modules that run one after the other, in eval mode, each BatchNorm folded into its convolution.

    In the backbones here a BatchNorm is registered right after its convolution; one without is left as it is.
    """
    with torch.inference_mode(False), torch.no_grad():  # what is made in inference mode could not be trained with
        folded = nn.Sequential(*[copy.deepcopy(part) for part in parts]).eval().requires_grad_(False)
        last = None
        for name, module in list(folded.named_modules()):
            if isinstance(module, nn.Conv2d):
                last = name
            elif isinstance(module, nn.BatchNorm2d) and last is not None:
                convolution = folded.get_submodule(last)
                if convolution.out_channels != module.num_features:
                    raise ValueError(f"{name}: a BatchNorm of {module.num_features} channels after a convolution of "
                                     f"{convolution.out_channels}; cannot be folded")
                folded.set_submodule(last, fuse_conv_bn_eval(convolution, module).requires_grad_(False))
                # timm's BatchNorm brings its activation.
                folded.set_submodule(name, getattr(module, "act", nn.Identity()))
                last = None
    return folded


def fingerprint(parts: list[nn.Module]) -> tuple[tuple[int, int], ...]:
    """Changes when a parameter or buffer of the modules is written to or moved, without a look at values.

    Writing through `.data` goes unseen, as it does by autograd.
    """
    tensors: list[Tensor] = [each for part in parts for each in (*part.parameters(), *part.buffers())]
    return tuple((each.data_ptr(), 0 if each.is_inference() else each._version) for each in tensors)
