"""Clocks, memory and tables of measurements. Ways that are compared take turns, the median of their turns counts."""

import re
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import median
from typing import TypeVar

import torch

T = TypeVar("T")


def timed(function: Callable[[], T], clock: Callable[[], float] = time.perf_counter) -> tuple[T, float]:
    """-> what function() returns, and seconds: on the clock, or of CPU with time.process_time, which other jobs on the
    machine disturb less."""
    began = clock()
    result = function()
    return result, clock() - began


def timed_twice(function: Callable[[], T]) -> tuple[T, float, float]:
    """-> what function() returns, seconds on the clock, and seconds of CPU."""
    (result, seconds), cpu = timed(lambda: timed(function), time.process_time)
    return result, seconds, cpu


def seconds_on(device: str | torch.device) -> Callable[[], float]:
    """-> a clock for what runs on a device: CPU time of this process, or elapsed time once a GPU has done its work."""

    def synchronised():
        torch.cuda.synchronize()
        return time.perf_counter()

    return synchronised if torch.device(device).type == "cuda" else time.process_time


def own_memory(field: str) -> int:
    """Bytes of this process: its peak ("VmHWM"), or what belongs to it alone ("RssAnon"); 0 where Linux is not."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(f"{field}:")), 0)


def take_turns(cases: dict[T, Callable[[], object]], repeats: int, clock: Callable[[], float]) -> dict[T, float]:
    """{name: function} -> {name: median seconds}; the first turn, of warming up, does not count."""
    times = {name: [] for name in cases}
    for _ in range(repeats + 1):
        for name, function in cases.items():
            times[name].append(timed(function, clock)[1])
    return {name: median(each[1:]) for name, each in times.items()}


def show(columns: dict[str, str], rows: Iterable[tuple]) -> None:
    """Prints a table, each row as it comes. columns: {title: format such as "8.1f"}; None is an empty cell."""
    widths = [int(re.match(r"[<>+]*(\d+)", each)[1]) for each in columns.values()]
    print(
        " ".join(
            f"{title:{'>' if column else '<'}{width}}" for column, (title, width) in enumerate(zip(columns, widths))
        )
    )
    for row in rows:
        cells = [
            " " * width if cell is None else f"{cell:{each}}"
            for cell, each, width in zip(row, columns.values(), widths)
        ]
        print(" ".join(cells), flush=True)
