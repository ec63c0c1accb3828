"""Many images, one after another or by several workers, behind a progress bar."""

import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.pool import ThreadPool

import torch
from tqdm import tqdm

_work = None  # of a worker process: set once by its initializer


def run(
    jobs: Sequence, work: Callable, num_workers: int, desc: str, unit: str = "image", threads: bool = False
) -> Iterator:
    """Yields work(job) of each job, in order. work goes to each process once, so it may keep what it has opened.

    Processes have one torch thread each, so that sums come out the same whatever their number; few jobs are done here.
    threads: for work that leaves Python's lock and can share what is open.
    """
    bar = tqdm(total=len(jobs), desc=desc, unit=unit, mininterval=0.5, disable=not jobs)
    with bar:
        for result in _results(jobs, work, num_workers, threads):
            bar.update()
            yield result


def _results(jobs: Sequence, work: Callable, num_workers: int, threads: bool) -> Iterator:
    if threads:
        with ThreadPool(max(1, num_workers)) as pool:
            yield from pool.imap(work, jobs)
        return
    num_workers = min(num_workers, len(jobs) // 16)  # a process takes seconds to start
    if num_workers:
        with multiprocessing.get_context("spawn").Pool(num_workers, _start, (work,)) as pool:
            yield from pool.imap(_do, jobs, chunksize=8)
        return
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield from map(work, jobs)
    finally:
        torch.set_num_threads(before)


def _start(work: Callable) -> None:
    global _work
    torch.set_num_threads(1)
    _work = work


def _do(job: object) -> object:
    return _work(job)
