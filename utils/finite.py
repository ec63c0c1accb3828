"""Watching for nan and inf without making a GPU wait."""

import torch


def finite_later(value):
    """0-d tensor -> a function that tells whether it is finite.

    On a GPU the answer travels while the device goes on. Asking waits for what was queued before this call and not for
    what was queued since: ask after the backward pass is queued, and the device is never idle.
    """
    flag = torch.isfinite(value.detach())
    if not flag.is_cuda:
        return lambda: bool(flag)
    answer = flag.to("cpu", non_blocking=True)  # into pinned memory
    copied = torch.cuda.Event()
    copied.record()

    def is_finite():
        copied.synchronize()
        return bool(answer)
    return is_finite
