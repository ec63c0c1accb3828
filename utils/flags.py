"""A command's flags are the annotated parameters of its main, said once with their kind, default and help:

    def main(output: Output, *, raster: Annotated[Path, "GeoTIFF"], seed: Seed = 0, scale: Annotated[float, "…"] = 1.0)

Annotated[kind, help, {more for add_argument}]: what has no default is positional, or after the * a flag that has to be
given; list[int] takes one or more, tuple[float, float] two; **more: Annotated[object, function] stands for another
function's flags; others: Annotated[list[str], OTHERS] takes all that are not named, for another command.
"""

import argparse
import inspect
import typing
from collections.abc import Callable, Sequence
from typing import Annotated, TypeVar

import torch

from utils.arguments import WORKERS_HELP, make_parser, positive, run, whole
from utils.precision import PRECISION_HELP, PRECISIONS
from utils.workers import default_workers

T = TypeVar("T")
OTHERS = "all other flags"

DatasetPath = Annotated[str, "folder with database/, queries/ and the intersections"]
QueryNames = Annotated[str, "data set's folder, or a text file of query names"]
DatabaseNames = Annotated[str | None, "data set's folder, or a text file of database names; default: land regions"]
BatchSize = Annotated[int, "images that go through the network at a time", {"type": positive}]
Workers = Annotated[int, WORKERS_HELP, {"type": whole}]
Device = Annotated[str, "of the network"]
Precision = Annotated[str, PRECISION_HELP, {"choices": ("auto", *PRECISIONS)}]
Seed = Annotated[int, "of all that is drawn", {"type": whole}]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
WORKERS = default_workers()
DESCRIPTORS = "logs/descriptors"


def add_flags(parser: argparse.ArgumentParser, function: Callable) -> None:
    """Adds the function's flags; parameters that are not annotated are none."""
    for name, parameter, kind, text, more in _annotated(function):
        if parameter.kind is parameter.VAR_KEYWORD:
            add_flags(parser, text)
        elif text != OTHERS:
            flag = {**_taking(kind, parameter.default), "help": text, **more}
            option = flag.pop("option", f"--{name}")
            if parameter.default is not parameter.empty:
                parser.add_argument(option, dest=name, default=parameter.default, **flag)
            elif parameter.kind is parameter.KEYWORD_ONLY:
                parser.add_argument(option, dest=name, required=True, **flag)
            else:
                parser.add_argument(name, **flag)


def _annotated(function: Callable):
    """Yields (name, parameter, kind, help, more for add_argument) of the annotated parameters."""
    hints = typing.get_type_hints(function, include_extras=True)
    for name, parameter in inspect.signature(function).parameters.items():
        if typing.get_origin(hints.get(name)) is Annotated:
            kind, text, *more = typing.get_args(hints[name])
            yield name, parameter, kind, text, more[0] if more else {}


def _taking(kind: object, default: object) -> dict:
    """Kind of a parameter -> what add_argument is to do with its texts."""
    inside = [each for each in typing.get_args(kind) if each is not type(None)]
    if kind is bool:
        return {"action": argparse.BooleanOptionalAction if default else "store_true"}
    if not inside:
        return {"type": kind}
    if typing.get_origin(kind) is list:
        return {"type": inside[0], "nargs": "+"}
    if typing.get_origin(kind) is tuple:
        return {"type": inside[0], "nargs": len(inside)}
    if typing.get_origin(kind) is typing.Literal:
        return {"choices": inside}
    return _taking(inside[0], default)  # … | None


def parse(main: Callable, argv: Sequence[str] | None = None) -> tuple[dict, bool]:
    """The command line, or argv -> main's arguments, and whether a traceback is wanted. main's file describes it."""
    parser = make_parser(main.__globals__["__doc__"])
    add_flags(parser, main)
    parser.add_argument("--traceback", action="store_true", help="show the traceback of an error")
    args, others = parser.parse_known_args(argv)
    taking = [name for name, _, _, text, _ in _annotated(main) if text == OTHERS]
    if others and not taking:
        parser.error(f"unrecognized arguments: {' '.join(others)}")
    flags = {**vars(args), **dict.fromkeys(taking, others)}
    return flags, flags.pop("traceback")


def call(main: Callable[..., T], argv: Sequence[str]) -> T:
    """What the command with these words returns, or raises."""
    return main(**parse(main, argv)[0])


def command(main: Callable) -> None:
    """The command; expected errors are told as `run` does."""
    flags, traceback = parse(main)
    run(lambda _: main(**flags), argparse.Namespace(traceback=traceback))
