"""Kinds of flags that the commands share, and the flags that say which regions a data set is built from."""

import argparse
from pathlib import Path

from datasets.names import YEARS


def quality(text: str) -> int:
    """Type of a flag: the quality of JPEGs."""
    if not (text.isdigit() and 1 <= int(text) <= 100):
        raise argparse.ArgumentTypeError(f"{text}: expected 1 to 100")
    return int(text)


def share(text: str) -> float:
    """Type of a flag: a number from 0 to 1."""
    if not 0 <= float(text) <= 1:
        raise argparse.ArgumentTypeError(f"{text}: expected 0 to 1")
    return float(text)


def folder(text: str) -> Path:
    """Type of a flag: a folder that is there or will be made."""
    if Path(text).exists() and not Path(text).is_dir():
        raise argparse.ArgumentTypeError(f"{text}: is a file; name a folder for the data set")
    return Path(text)


def year_and_file(text: str) -> tuple[int, Path]:
    """Type of a flag: YEAR=FILE."""
    year, _, file = text.partition("=")
    if not (year.isdigit() and file):
        raise argparse.ArgumentTypeError(f"{text!r}: expected YEAR=FILE")
    return int(year), Path(file)


def add_area_arguments(parser: argparse.ArgumentParser, years: bool = True) -> None:
    """The flags of area.select_regions, and --years."""
    parser.add_argument("--zooms", type=int, nargs="+", default=[9, 10, 11], help="Web Mercator zooms")
    if years:
        parser.add_argument("--years", type=int, nargs="+", default=list(YEARS), help="one image a region for each")
    parser.add_argument(
        "--bbox",
        type=float,
        nargs=4,
        metavar=("SOUTH", "WEST", "NORTH", "EAST"),
        help="degrees; WEST > EAST spans the antimeridian; default: the whole Earth",
    )
    parser.add_argument(
        "--land_only", action=argparse.BooleanOptionalAction, default=True, help="only regions that hold land"
    )
