"""Makes data sets in EarthLoc's layout, and looks after them: python -m datasets.build COMMAND …; --help lists them.

Each command is a module of this package with `main`, whose parameters are its flags (utils/flags.py) and which returns
what to say at the end.
"""

import argparse
import sys
from collections.abc import Sequence

from datasets.build import cache, check, demo, earth, earth_photos, earth_raster, own, rasters, tiles
from utils.arguments import HelpFormatter
from utils.flags import add_flags

COMMANDS = {
    "demo": demo,
    "earth_raster": earth_raster,
    "earth": earth,
    "earth_photos": earth_photos,
    "tiles": tiles,
    "raster": rasters,
    "own": own,
    "cache": cache,
    "check": check,
}


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m datasets.build", description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    for name, module in COMMANDS.items():
        about, _, more = module.__doc__.partition("\n")
        about = about.split(": python -m")[0]
        command = commands.add_parser(name, help=about, description=f"{about}. {more}", formatter_class=HelpFormatter)
        add_flags(command, module.main)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """-> exit code: 0; 1 where check found problems; 2 where the input or a flag is wrong; 130 when stopped."""
    try:
        flags = vars(parse_arguments(arguments))
        message = COMMANDS[flags.pop("command")].main(**flags)
    except SystemExit as end:  # argparse's, after --help or a wrong flag
        return end.code
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; run again to continue", file=sys.stderr)
        return 130
    if isinstance(message, int):  # check's
        return message
    print(message)
    return 0


if __name__ == "__main__":
    sys.exit(main())
