"""Makes data sets in EarthLoc's layout, and looks after them: python -m datasets.build COMMAND …; --help lists them.

Each command is a module of this package with `add_command` (its flags) and `main` (flags -> what to say at the end).
"""

import argparse
import sys

from datasets.build import cache, check, demo, earth, earth_photos, earth_raster, own, rasters, tiles
from utils.arguments import HelpFormatter


def parse_arguments(arguments=None):
    parser = argparse.ArgumentParser(prog="python -m datasets.build", description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    for command in (demo, earth_raster, earth, earth_photos, tiles, rasters, own, cache, check):
        command.add_command(commands, HelpFormatter)
    return parser.parse_args(arguments)


def main(arguments=None):
    """-> exit code: 0; 1 where check found problems; 2 where the input or a flag is wrong; 130 when stopped."""
    args = parse_arguments(arguments)
    try:
        message = args.command_main(args)
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
