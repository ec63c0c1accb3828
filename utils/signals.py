"""Signals that ask a run to leave: it stops between two iterations, writes a checkpoint, and can go on later."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

from torch.utils.data import DataLoader

from utils import distributed

T = TypeVar("T")
# Linux and macOS have all three; where one is missing, the scripts that only import this still work.
SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1") if hasattr(signal, name))
EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h: stopped, not failed; start it again
GRACE = 2.0  # seconds: launchers forward a signal that the processes have got already


class Stopped(BaseException):
    """The run was asked to leave; its message says by what. Like KeyboardInterrupt, no `except Exception` takes it: a
    reader that is interrupted would call its file damaged."""


class Stop:
    """Context manager that turns the first signal into a wish, looked at by `check`; the second one ends the process.

    `at_once` is for long parts that leave the run as it is (description, clustering): there, the wish is an exception.
    """

    def __init__(self) -> None:
        self.wish, self.since, self.process, self.interruptible = None, 0.0, os.getpid(), False

    def __enter__(self) -> Stop:
        self.before = {each: signal.signal(each, self.receive) for each in SIGNALS}
        return self

    def __exit__(self, *_) -> None:
        for each, handler in self.before.items():
            signal.signal(each, handler)

    def receive(self, number: int, _: object) -> None:
        if os.getpid() != self.process:  # a worker that has just been forked, before it ignores signals
            return
        if self.wish is None:
            self.wish, self.since = signal.Signals(number).name, time.monotonic()
            if distributed.world() == 1:
                for each in SIGNALS:
                    signal.signal(each, signal.SIG_DFL)
                if self.interruptible:
                    raise Stopped(self.wish)
        elif time.monotonic() - self.since > GRACE:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    def check(self) -> None:
        """Raises Stopped in all processes alike once one of them has got a signal."""
        wishes = [each for each in distributed.gather_objects_if(self.wish) if each]
        if wishes:
            raise Stopped(wishes[0])

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Within it, a signal raises Stopped right away. Not with several processes: those leave together."""
        if self.wish and distributed.world() == 1:
            raise Stopped(self.wish)
        self.interruptible = True
        try:
            yield
        except RuntimeError as error:  # a worker that was ended by the same signal before it could ignore it
            if self.wish is None:
                raise
            raise Stopped(self.wish) from error
        finally:
            self.interruptible = False


def interruptible(batches: Iterator[T], stop: Stop) -> Iterator[T]:
    """The same batches; a signal ends the wait for one (`Stop.at_once`), never the work on it."""
    while True:
        with stop.at_once():
            batch = next(batches, None)
        if batch is None:
            return
        yield batch


def iterate(loader: DataLoader) -> Iterator:
    """iter(loader), with workers that a signal cannot reach before they ignore it (see `ignore_signals`)."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # workers inherit it
    try:
        return iter(loader)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def ignore_signals(_: object) -> None:
    """worker_init_fn: signals go to a whole group of processes, and workers are needed until the run has stopped.

    SIGTERM also is how a loader ends a worker that does not answer, so it still does, a minute later.
    """
    for each in SIGNALS:
        signal.signal(each, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(60))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
