"""What the scripts' command lines share: flags files (@presets/paper.args), kinds of flags, and flags of a run."""

import argparse
import shlex
import sys
from collections.abc import Callable

import torch

from utils.memory import keep_freed_blocks
from utils.precision import DETERMINISTIC_HELP, PRECISION_HELP, PRECISIONS
from utils.workers import MOST, default_workers

WORKERS_HELP = f"processes that read images; as many as there are cores to use, but no more than {MOST}, if not given"


class Parser(argparse.ArgumentParser):
    """argparse with flags files: one or more flags a line, # starts a comment, later flags win over earlier ones."""

    def convert_arg_line_to_args(self, line: str) -> list[str]:
        return shlex.split(line, comments=True)


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows defaults, but for None, which says nothing."""

    def _get_help_string(self, action: argparse.Action):
        return action.help if action.default is None else super()._get_help_string(action)


def whole(text: str) -> int:
    """Type of a flag: an integer of at least 0."""
    return _at_least(0, text)


def positive(text: str) -> int:
    """Type of a flag: an integer of at least 1."""
    return _at_least(1, text)


def _at_least(low: int, text: str):
    try:
        value = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no integer") from None
    if value < low:
        raise argparse.ArgumentTypeError(f"{value} is less than {low}")
    return value


WORKERS = {"type": whole, "default": default_workers(), "help": WORKERS_HELP}


def make_parser(description: str) -> Parser:
    """-> a parser that shows defaults and reads @FILE."""
    return Parser(description=description, fromfile_prefix_chars="@", allow_abbrev=False, formatter_class=HelpFormatter)


def add_shared(parser: argparse._ActionsContainer, *names: str, **defaults: object) -> None:
    """Flags that many scripts have, as `shared` below knows them, with other defaults where given; and --traceback."""
    shared = {
        "dataset_path": {"required": True, "help": "folder with database/, queries/ and the intersections"},
        "log_dir": {"help": "outputs go to logs/LOG_DIR/date_time"},
        "batch_size": {"type": positive, "default": 32, "help": "images that go through the network at a time"},
        "num_workers": WORKERS,
        "device": {"default": "cuda" if torch.cuda.is_available() else "cpu"},
        "precision": {"choices": ("auto", *PRECISIONS), "default": "auto", "help": PRECISION_HELP},
        "seed": {"type": whole, "default": 0},
        "process_timeout": {
            "type": float,
            "default": 1800,
            "help": "seconds that processes wait for one that does not answer",
        },
    }
    for name in (*names, *defaults):
        options = {"required": False, "default": defaults[name]} if name in defaults else {}
        parser.add_argument(f"--{name}", **shared[name] | options)
    parser.add_argument("--traceback", action="store_true", help="show the traceback of an error")


def add_run_arguments(parser: Parser, log_dir: str, validate_every: int | str) -> argparse._ArgumentGroup:
    """-> the group of flags that both trainers have. validate_every: iterations, or the flag that is its default."""
    group = parser.add_argument_group("run")
    add_shared(group, "device", "precision", "seed", "process_timeout", log_dir=log_dir)
    add = group.add_argument
    add("--resume", help="a last.pt, a run's folder, a folder of runs, or auto: logs/LOG_DIR, if it has one")
    add("--deterministic", action="store_true", help=DETERMINISTIC_HELP)
    add("--save_every", type=positive, help="iterations between last.pt; default: validate_every")
    add("--max_skips", type=whole, default=0, help="updates with a nan or infinite loss or gradient that are left out")
    number = validate_every if isinstance(validate_every, int) else None
    told = "iterations" if number else f"iterations; default: {validate_every}"
    add("--validate_every", type=positive, default=number, help=told)
    add("--keep_every", type=positive, help="iterations between weights that stay, for python -m experiments.curve")
    add("--log_every", type=positive, default=50, help="iterations between scalars")
    return group


def run(main: Callable, args: argparse.Namespace, keep_memory: bool = True) -> object:
    """main(args), with expected errors (bad data, files or flags) as one line on stderr and exit code 2.

    keep_memory: see `keep_freed_blocks`; not for many threads, each of which would keep its own.
    """
    if keep_memory:
        keep_freed_blocks()
    try:
        return main(args)
    except (ValueError, OSError, RuntimeError) as error:
        if args.traceback:
            raise
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
