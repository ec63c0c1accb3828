"""Kinds of flags that builders share; utils/flags.py makes flags of a function's parameters."""

import argparse
from pathlib import Path
from typing import Annotated

from utils.arguments import positive, whole
from utils.workers import usable_cores


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
