"""What a change of the recipe does, over seeds: python -m experiments.ablation @presets/demo.args --seeds 0 1 2
--change image_size=128 "loss=circle gamma=40"

The recipe as it is and each change of it (train.py's flags as NAME=VALUE, several in one pair of quotes) are trained
with every seed, and the last checkpoints evaluated on the six sets. All other flags are train.py's. A run whose results
are there is not done again.
"""

import argparse
from typing import Annotated, Literal

import numpy as np

import train
from experiments.runs import mean_and_deviation, recalls_over_seeds
from utils.flags import OTHERS, command

RANKS = ("1", "10", "100")


def parse_change(text: str) -> list[str]:
    """Type of a flag: "loss=circle gamma=40" -> ["--loss=circle", "--gamma=40"]; train.py's parser checks them."""
    words = text.split()
    if not words or not all(name and value for name, _, value in (word.partition("=") for word in words)):
        raise argparse.ArgumentTypeError(f"{text!r}: expected NAME=VALUE, as image_size=128")
    return [f"--{word}" for word in words]


def main(
    others: Annotated[list[str], OTHERS],
    *,
    change: Annotated[list[list[str]], "to try, each alone", {"type": parse_change, "metavar": "NAME=VALUE"}],
    seeds: Annotated[list[int], "one training each"] = (0,),
    rotate: Annotated[Literal["database", "queries"], "what evaluation turns"] = "database",
) -> None:
    """Trains and evaluates what is not done yet, and prints the table: recalls, and by how much R@1 differs from the
    recipe's with the same seed."""
    recipes = {"as it is": []} | {" ".join(flags).replace("--", ""): flags for flags in change}
    for flags in recipes.values():
        train.parse_arguments([*others, *flags])  # a wrong flag is better met now than after hours
    table = {}
    for title, flags in recipes.items():
        name = f"ablation/{title.replace(' ', '_')}"
        table[title] = recalls_over_seeds(name, [*others, *flags], seeds, f"--rotate={rotate}")
    base = table["as it is"]["1"]
    print(f"\nmean ± deviation of {len(seeds)} seeds")
    print("| recipe | " + " | ".join(f"R@{k}" for k in RANKS) + " | R@1 more |")
    print("| --- " * (len(RANKS) + 2) + "|")
    for title, recalls in table.items():
        cells = [mean_and_deviation(recalls[k]) for k in RANKS]
        print(f"| {title} | {' | '.join(cells)} | {mean_and_deviation(np.subtract(recalls['1'], base))} |")


if __name__ == "__main__":
    command(main)
