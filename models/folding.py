"""BatchNorm in eval mode is a fixed scale and shift: folded into the convolution before it, it costs nothing."""

import copy

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval


def fold_batchnorm(parts: list[nn.Module]) -> nn.Sequential:
    """Copies of modules that run one after the other, in eval mode, each BatchNorm folded into its convolution.

    A BatchNorm that takes something else than a convolution's output, as in a pre-activation network, stays as it is.
    """
    with torch.inference_mode(False), torch.no_grad():  # what is made in inference mode could not be trained with
        folded = nn.Sequential(*[copy.deepcopy(part) for part in parts]).eval().requires_grad_(False)
        for convolution, norm in _pairs(folded):
            layer = folded.get_submodule(norm)
            folded.set_submodule(
                convolution, fuse_conv_bn_eval(folded.get_submodule(convolution), layer).requires_grad_(False)
            )
            folded.set_submodule(norm, getattr(layer, "act", nn.Identity()))  # timm's BatchNorm brings its activation
    return folded


def _pairs(network: nn.Module) -> list[tuple[str, str]]:
    """Names of each convolution and the BatchNorm that takes its output, seen in a run on a small black image."""
    outputs, pairs, hooks = [], [], []
    for name, module in network.named_modules():
        if isinstance(module, nn.Conv2d):
            hooks.append(
                module.register_forward_hook(lambda module, inputs, output, name=name: outputs.append((output, name)))
            )
        elif isinstance(module, nn.BatchNorm2d):
            hooks.append(
                module.register_forward_pre_hook(
                    lambda module, inputs, name=name: pairs.extend(
                        (convolution, name) for output, convolution in outputs if output is inputs[0]
                    )
                )
            )
    if any(isinstance(module, nn.BatchNorm2d) for module in network.modules()):
        example = next(network.parameters())
        network(torch.zeros(1, 3, 64, 64, dtype=example.dtype, device=example.device))
    for hook in hooks:
        hook.remove()
    return pairs


def fingerprint(parts: list[nn.Module]) -> tuple[tuple[int, int], ...]:
    """Changes when a parameter or buffer of the modules is written to or moved, without a look at values.

    Writing through `.data` goes unseen, as it does by autograd.
    """
    tensors: list[Tensor] = [each for part in parts for each in (*part.parameters(), *part.buffers())]
    return tuple((each.data_ptr(), 0 if each.is_inference() else each._version) for each in tensors)
