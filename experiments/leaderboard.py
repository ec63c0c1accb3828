"""The table of a file of results: python -m experiments.leaderboard results.csv

The file grows by a line with each python eval.py --results results.csv …; the table is markdown, best first.
"""

from typing import Annotated

from retrieval.leaderboard import leaderboard, read_lines
from utils.flags import command


def main(file: Annotated[str, "as eval.py --results writes it"]) -> None:
    """Prints the table."""
    print(leaderboard(read_lines(file)))


if __name__ == "__main__":
    command(main)
