"""The locator in a process of its own: whatever happens to it, the page answers.

A library that crashes or runs out of memory ends its process without a word, and one that computes without letting go
of Python's lock stops all threads of it.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
from collections.abc import Callable
from multiprocessing.connection import Connection

NICE = 5  # the browser goes first
GRACE = 3  # seconds to leave by itself


class Apart:
    """`make_locate` of web/desk.py that calls another one, which goes to the new process (pickle).

    Where the process ends, the photo that it worked on fails, and the next one gets a new process. Use as a context.
    """

    def __init__(self, make_locate: Callable[[], tuple[Callable, str]]) -> None:
        self.make_locate, self.process, self.pipe = make_locate, None, None

    def __enter__(self) -> Apart:
        return self

    def __exit__(self, *_) -> None:
        if self.process is not None:
            self.pipe.close()
            self.process.join(GRACE)
            self.process.kill()  # it was at work
            self.process.join()

    def __call__(self) -> tuple[Callable, str]:
        """-> `locate`, and the line that tells what it searches. RuntimeError where that cannot be loaded."""
        return self.locate, self._begin()

    def locate(self, *question) -> tuple:
        """As the other process answers. RuntimeError where that raises, or ends."""
        if self.process is None or not self.process.is_alive():
            self._begin()
        return self._answer(question)

    def _begin(self):
        new = multiprocessing.get_context("spawn")  # a fork would copy locks that other threads hold
        self.pipe, there = new.Pipe()
        self.process = new.Process(target=work, args=(there, self.make_locate), name="locator", daemon=True)
        self.process.start()
        there.close()  # the other process's now: when that ends, so does the pipe
        return self._answer()

    def _answer(self, question: tuple | None = None):
        try:
            if question is not None:
                self.pipe.send(question)
            answer, error = self.pipe.recv()
        except (EOFError, ConnectionError):
            self.process.join()
            raise RuntimeError(f"the process that locates ended ({how_it_ended(self.process.exitcode)})") from None
        if error:
            raise RuntimeError(error)
        return answer


def how_it_ended(code: int | None) -> str:
    """Exit code of a process, negative: by a signal, None: another thread has it -> in words."""
    if code is None or code >= 0:
        return f"exit code {code}"
    name = signal.Signals(-code).name
    return f"{name}; too little memory?" if name == "SIGKILL" else name


def work(pipe: Connection, make_locate: Callable) -> None:
    """The other process: answers until the pipe ends, which it does with the page's own process."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s   %(message)s", datefmt="%Y-%m-%d %H:%M:%S")
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to both; the page ends this one
    os.nice(NICE)
    locate = told(pipe, make_locate, lambda made: made[1])
    while locate is not None:
        try:
            question = pipe.recv()
        except (EOFError, ConnectionError):
            return
        told(pipe, lambda: locate[0](*question), lambda answer: answer)


def told(pipe: Connection, call: Callable, part: Callable) -> object:
    """The call's result, of which a part goes through the pipe; None, and the error, where it raises."""
    try:
        result = call()
        pipe.send((part(result), ""))
        return result
    except Exception as error:
        logging.exception("the process that locates")
        pipe.send((None, str(error) or type(error).__name__))
