"""Several processes (torchrun): who am I, and what has to be shared. In a single process all of it does nothing.

Ranks take equal parts of each batch. Every rank computes the loss of the whole batch from gathered descriptors, so the
gradient that comes back to a rank is world times too large, and the mean of the gradients over the ranks is that of a
single process.
"""

import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx
from torch.nn.parallel import DistributedDataParallel

T = TypeVar("T")


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    """Number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


@contextmanager
def processes(device: torch.device, timeout: float) -> Iterator[torch.device]:
    """Joins the processes that torchrun started, and leaves them at the end -> this one's device.

    timeout: seconds after which a process gives up on one that does not answer. gloo carries what lies in main memory,
    NCCL what lies on GPUs; GPU i of a machine goes to its i-th process. Raises ValueError without enough GPUs.
    """
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        yield device
        return
    backend = "gloo"
    if device.type == "cuda":
        local = int(os.environ.get("LOCAL_RANK", 0))
        if local >= torch.cuda.device_count():
            raise ValueError(
                f"process {local} of this machine has no GPU, it has {torch.cuda.device_count()}: "
                f"torchrun --nproc_per_node {torch.cuda.device_count()}"
            )
        device, backend = torch.device("cuda", local), "cpu:gloo,cuda:nccl"
        torch.cuda.set_device(device)
    dist.init_process_group(backend, timeout=timedelta(seconds=timeout))
    yield device
    dist.destroy_process_group()  # not after an error: the others see that this process is gone, and leave as well


def part(count: int) -> slice:
    """This rank's slice of `count` rows. Raises ValueError where they cannot be shared equally."""
    if count % world():
        raise ValueError(
            f"--batch_size {count} does not divide among {world()} processes; "
            f"{count // world() * world() or world()} would"
        )
    size = count // world()
    return slice(rank() * size, (rank() + 1) * size)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, values: Tensor) -> Tensor:
        ctx.rows = len(values)
        parts = [torch.empty_like(values) for _ in range(world())]
        dist.all_gather(parts, values)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: FunctionCtx, gradient: Tensor) -> Tensor:
        gradient = gradient.contiguous().clone()
        dist.all_reduce(gradient)
        return gradient[rank() * ctx.rows : (rank() + 1) * ctx.rows]


def gather(values: Tensor) -> Tensor:
    """(N, …) with the same N on every rank -> (world × N, …) in the order of ranks, with gradient to every rank."""
    return _Gather.apply(values.contiguous()) if world() > 1 else values


def gather_objects(value: object) -> list:
    """-> list of every rank's plain value."""
    if world() == 1:
        return [value]
    values = [None] * world()
    dist.all_gather_object(values, value)
    return values


def gather_objects_if(value: object) -> list:
    """As gather_objects, but [] and hardly any traffic while all of them are false."""
    some = torch.tensor(int(bool(value)))
    if world() > 1:
        dist.all_reduce(some)
    return gather_objects(value) if some else []


def from_first(make: Callable[[], T]) -> T:
    """make() on rank 0 alone -> its plain value on every rank. What goes wrong there is raised on every rank."""
    if world() == 1:
        return make()
    result = [None, None]
    if rank() == 0:
        try:
            result[0] = make()
        except (ValueError, OSError, RuntimeError) as error:
            result[1] = error
    dist.broadcast_object_list(result, src=0)
    if result[1] is not None:
        raise result[1]
    return result[0]


def gather_parts(own: Tensor, counts: Sequence[int]) -> list[Tensor]:
    """own (counts[rank], D) on the CPU, any count on each rank -> every rank's, a list, without padding."""
    parts = [torch.empty(count, *own.shape[1:], dtype=own.dtype) for count in counts]
    parts[rank()] = own
    for source, values in enumerate(parts):
        if len(values) and world() > 1:
            dist.broadcast(values, src=source)
    return parts


def wrap(model: nn.Module) -> nn.Module:
    """-> what to call in place of the model in training: torch's DistributedDataParallel, with BatchNorm over the whole
    batch; the model itself in a single process. The parameters are the model's, which is what to save and to validate.
    """
    if world() == 1:
        return model
    # Looking for unused parameters (there are none) is what keeps DDP from filling its buckets anew after the first
    # iteration, in another order of sums: with three or more ranks a resumed run would not end with the same bits.
    # Neither one bucket nor static_graph prevents that: of 160,000 weights 25,000 differed after six iterations.
    warnings.filterwarnings("ignore", "find_unused_parameters=True was specified")
    return DistributedDataParallel(use_global_batchnorm(model), broadcast_buffers=False, find_unused_parameters=True)


def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Replaces the gradients by their mean over the ranks, added in one fixed order."""
    gradients = [each.grad for each in parameters if each.grad is not None]
    if world() == 1 or not gradients:
        return
    flat = torch.cat([each.flatten() for each in gradients])
    dist.all_reduce(flat)
    flat /= world()
    for gradient, mean in zip(gradients, flat.split([each.numel() for each in gradients])):
        gradient.copy_(mean.view_as(gradient))


class GlobalBatchNorm(nn.BatchNorm2d):
    """BatchNorm over the whole batch of all ranks, on CPUs: torch's own SyncBatchNorm knows GPUs only."""

    def forward(self, x: Tensor) -> Tensor:
        return activated(self, self.normalise(x) if self.training else super().forward(x))

    def normalise(self, x: Tensor) -> Tensor:
        """(B, C, H, W) of this rank -> the same, by mean and variance of all ranks' rows, which move the averages."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        var, mean = torch.var_mean(wide, dim=(0, 2, 3), correction=0)
        means, variances = gather(torch.stack([mean, var])[None]).unbind(dim=1)  # (world, C) each
        mean = means.mean(dim=0)
        var = (variances + (means - mean) ** 2).mean(dim=0)
        with torch.no_grad():
            count = world() * x.numel() // x.shape[1]
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
            self.running_var.lerp_((var * count / max(count - 1, 1)).to(self.running_var.dtype), self.momentum)
        scale = self.weight * torch.rsqrt(var + self.eps)
        return (wide * scale[:, None, None] + (self.bias - mean * scale)[:, None, None]).to(x.dtype)


class SyncBatchNorm(nn.SyncBatchNorm, nn.BatchNorm2d):
    """torch's own, which stays a BatchNorm2d: what folds and freezes those knows it."""

    process_group = None  # all ranks

    def forward(self, x: Tensor) -> Tensor:
        return activated(self, super().forward(x))


def activated(layer: nn.Module, x: Tensor) -> Tensor:
    """What timm's BatchNorm does after it has normalised; torch's does nothing."""
    return layer.act(layer.drop(x)) if hasattr(layer, "act") else x


def use_global_batchnorm(model: nn.Module) -> nn.Module:
    """Makes every BatchNorm2d of the model global, by the device it is on; names and values stay."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.__class__ = SyncBatchNorm if module.weight.is_cuda else GlobalBatchNorm
    return model
