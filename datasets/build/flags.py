"""A command's flags are the annotated parameters of its function, said once with their kind, default and help:

    def main(output: Output, *, raster: Annotated[Path, "GeoTIFF"], seed: Seed = 0, scale: Annotated[float, "…"] = 1.0)

Annotated[kind, help, {more for add_argument}]: what has no default is positional, or after the * a flag that has to be
given; list[int] takes one or more, tuple[float, float] two; **more: Annotated[object, function] stands for another
function's flags.
"""

import argparse
import inspect
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

from utils.arguments import positive, whole
from utils.workers import usable_cores


def add_flags(parser: argparse.ArgumentParser, function: Callable) -> None:
    """Adds the function's flags; parameters that are not annotated are none."""
    hints = typing.get_type_hints(function, include_extras=True)
    for name, parameter in inspect.signature(function).parameters.items():
        if typing.get_origin(hints.get(name)) is not Annotated:
            continue
        kind, text, *more = typing.get_args(hints[name])
        if parameter.kind is parameter.VAR_KEYWORD:
            add_flags(parser, text)
            continue
        flag = {**_taking(kind, parameter.default), "help": text, **(more[0] if more else {})}
        option = flag.pop("option", f"--{name}")
        if parameter.default is not parameter.empty:
            parser.add_argument(option, dest=name, default=parameter.default, **flag)
        elif parameter.kind is parameter.KEYWORD_ONLY:
            parser.add_argument(option, dest=name, required=True, **flag)
        else:
            parser.add_argument(name, **flag)


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


def share(text: str) -> float:
    """Type of a flag: a number from 0 to 1."""
    if not 0 <= float(text) <= 1:
        raise argparse.ArgumentTypeError(f"{text}: expected 0 to 1")
    return float(text)


def above_0(text: str) -> float:
    """Type of a flag: a number of more than 0."""
    if not float(text) > 0:
        raise argparse.ArgumentTypeError(f"{text}: expected more than 0")
    return float(text)


def year_and_file(text: str) -> tuple[int, Path]:
    """Type of a flag: YEAR=FILE."""
    year, _, file = text.partition("=")
    if not (year.isdigit() and file):
        raise argparse.ArgumentTypeError(f"{text!r}: expected YEAR=FILE")
    return int(year), Path(file)


def _quality(text: str) -> int:
    if not (text.isdigit() and 1 <= int(text) <= 100):
        raise argparse.ArgumentTypeError(f"{text}: expected 1 to 100")
    return int(text)


def _folder(text: str) -> Path:
    if Path(text).exists() and not Path(text).is_dir():
        raise argparse.ArgumentTypeError(f"{text}: is a file; name a folder for the data set")
    return Path(text)


ABOVE_0 = {"type": above_0}
Output = Annotated[Path, "folder of the data set, where a second run continues", {"type": _folder}]
Quality = Annotated[int, "of the JPEGs", {"type": _quality}]
Seed = Annotated[int, "of all that is drawn", {"type": whole}]
Side = Annotated[int, "side of an image, pixels", {"type": positive}]
CORES = usable_cores()
Workers = Annotated[int, "processes or threads that work beside each other", {"type": whole}]

# Which regions a data set is built from.
Zooms = Annotated[list[int], "Web Mercator zooms"]
Years = Annotated[list[int], "one image a region for each"]
LandOnly = Annotated[bool, "only regions that hold land"]
Box = Annotated[
    list[float] | None,
    "degrees; WEST > EAST spans the antimeridian; default: the whole Earth",
    {"nargs": 4, "metavar": ("SOUTH", "WEST", "NORTH", "EAST")},
]
