"""Clocks of the speed measurements. Ways that are compared take turns, and the median of their turns counts."""

import time
from statistics import median

import torch


def timed(function, clock=time.perf_counter):
    """-> what function() returns, and seconds: on the clock, or of CPU with time.process_time, which other jobs on the
    machine disturb less."""
    began = clock()
    result = function()
    return result, clock() - began


def seconds_on(device):
    """-> a clock for what runs on a device: CPU time of this process, or elapsed time once a GPU has done its work."""

    def synchronised():
        torch.cuda.synchronize()
        return time.perf_counter()

    return synchronised if torch.device(device).type == "cuda" else time.process_time


def take_turns(cases, repeats, clock):
    """{name: function} -> {name: median seconds}; the first turn, of warming up, does not count."""
    times = {name: [] for name in cases}
    for _ in range(repeats + 1):
        for name, function in cases.items():
            times[name].append(timed(function, clock)[1])
    return {name: median(each[1:]) for name, each in times.items()}
