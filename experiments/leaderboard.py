"""The table of a file of results: python -m experiments.leaderboard results.csv

The file grows by a line with each python eval.py --results results.csv …; the table is markdown, best first.
"""

from argparse import Namespace

from retrieval.leaderboard import leaderboard, read_lines
from utils.arguments import make_parser, run


def parse_arguments(argv: list[str] | None = None) -> Namespace:
    parser = make_parser(__doc__)
    parser.add_argument("file", help="as eval.py --results writes it")
    parser.add_argument("--traceback", action="store_true", help="show the traceback of an error")
    return parser.parse_args(argv)


def main(args: Namespace) -> None:
    print(leaderboard(read_lines(args.file)))


if __name__ == "__main__":
    run(main, parse_arguments())
