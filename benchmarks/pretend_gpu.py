"""A GPU that is not there, to count on: what the host asks of it, what it waits for, and what it sends.

torch's fake tensors say that they are on a GPU and hold nothing: operations on them tell shapes, types and devices,
and raise where the devices are mixed. What runs on the CPU is real.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

GPU = torch.device("cuda:0")
CPUGenerator = torch.Generator
aten = torch.ops.aten


class PretendGPU(TorchDispatchMode):
    """`operations`: how many there were, on both sides. `looks`: those for which the host waits; what it sees is all
    zeros, or True, and masks let all pass. `sent`: copies from the host, `uploads`: those among them for which it
    waits, because they are not non_blocking. `unpinned`: those out of memory that is not page-locked."""

    def __init__(self) -> None:
        super().__init__()
        self.operations, self.looks, self.sent, self.uploads, self.unpinned = 0, [], [], [], []
        self.pinned, self.generators = [], {}

    def generator(self, device: str | torch.device = "cpu") -> torch.Generator:
        """As torch.Generator, which knows real GPUs only."""
        made = CPUGenerator()
        if torch.device(device).type != "cpu":
            self.generators[made._cdata] = made
        return made

    def checked(self, result: object, leaves: Sequence) -> object:
        """What an operation made of these -> the same. Raises RuntimeError where it drew for another device."""
        for each in leaves:
            if isinstance(each, CPUGenerator):
                place = "cuda" if each._cdata in self.generators else "cpu"
                if place != result.device.type:
                    raise RuntimeError(f"Expected a generator for {result.device} but found one for {place}")
        return result

    def __torch_dispatch__(
        self, function: Callable, types: Sequence, args: tuple = (), kwargs: dict | None = None
    ) -> object:
        kwargs = kwargs or {}
        self.operations += function is not torch.ops.prim.device.default  # which only asks for an attribute
        leaves = tree_leaves((args, kwargs))
        if function is aten.is_pinned.default:
            return any(each is args[0] for each in self.pinned)
        if function is aten._pin_memory.default:
            with unset_fake_temporarily():
                self.pinned.append(args[0].clone())
            return self.pinned[-1]
        if not any(
            isinstance(each, FakeTensor) or isinstance(each, torch.device) and each.type == "cuda" for each in leaves
        ):
            with unset_fake_temporarily():
                return self.checked(function(*args, **kwargs), leaves)
        if function is aten._local_scalar_dense.default:
            self.looks.append("item")
            return args[0].dtype == torch.bool
        if function is aten.nonzero.default:
            self.looks.append("nonzero")
            return torch.empty(0, args[0].dim(), dtype=torch.long, device=GPU)
        if function is aten.bincount.default:
            self.looks.append("bincount")
            return torch.zeros(args[2], dtype=torch.long, device=GPU)
        if function is aten.index.Tensor and any(each is not None and each.dtype == torch.bool for each in args[1]):
            self.looks.append("nonzero")
            args = (
                args[0],
                [
                    each if each is None or each.dtype != torch.bool else torch.arange(len(each), device=GPU)
                    for each in args[1]
                ],
            )
        result = self.checked(function(*args, **kwargs), leaves)
        if function in (aten._to_copy.default, aten.copy_.default) and result.device == GPU:
            source, *flag = args if function is aten._to_copy.default else args[1:]
            if source.device.type == "cpu":
                self.sent.append(source.numel() * source.element_size())
                if not any(each is source for each in self.pinned):
                    self.unpinned.append(function)
                if not (kwargs.get("non_blocking") or any(flag)):
                    self.uploads.append(function)
        if isinstance(result, FakeTensor) and result.device.type == "cpu":
            if not kwargs.get("non_blocking"):
                self.looks.append("copy")
            with unset_fake_temporarily():
                return torch.zeros(result.shape, dtype=result.dtype)
        return result


@contextmanager
def pretended_gpu() -> Iterator[PretendGPU]:
    """Inside, the device GPU can be used."""
    pretend = PretendGPU()
    with (
        patch.object(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False),
        patch.object(torch.cuda, "is_bf16_supported", lambda *_: True),
        patch.object(torch, "Generator", pretend.generator),
        FakeTensorMode(allow_non_fake_inputs=True),
        pretend,
    ):
        yield pretend


def to_gpu(model: nn.Module) -> nn.Module:
    """As model.to(GPU), which fake tensors do not know how to do."""
    for module in model.modules():
        for name, each in module._parameters.items():
            if each is not None:
                module._parameters[name] = nn.Parameter(each.detach().to(GPU), each.requires_grad)
        for name, each in module._buffers.items():
            if each is not None:
                module._buffers[name] = each.to(GPU)
    return model


def backward_of(model: nn.Module) -> object:
    """A context in place of Tensor.backward, whose engine wants a real GPU: gradients of the right shape, type and
    device."""

    def backward(loss: Tensor) -> None:
        assert loss.requires_grad and loss.device == GPU
        for each in model.parameters():
            each.grad = torch.zeros_like(each) if each.requires_grad else None

    return patch.object(torch.Tensor, "backward", backward)
