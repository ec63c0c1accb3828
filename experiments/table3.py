"""The paper's Table 3 on any data set: what regional quadruplets, clustered batches, year-wise augmentation and the
neutral-aware loss each add.

python -m experiments.table3 @presets/demo.args --seeds 0 1 2: all other flags are train.py's. Each run is trained and
its last checkpoint evaluated on the six sets; a run whose results are there is not done again.
"""

from typing import Annotated, Literal

import train
from experiments.runs import mean_and_deviation, recalls_over_seeds
from utils.flags import OTHERS, command

RANKS = ("1", "10", "100")
# What changes, the flags that make it so, and the paper's average R@1 and R@100.
ROWS = {
    "views": (
        "views of one image",
        "--positives views --batches random --augmentation image --neutral off",
        26.2,
        72.7,
    ),
    "quadruplets": ("regional quadruplets", "--batches random --augmentation image --neutral off", 45.4, 85.2),
    "clustered": ("+ clustered batches", "--batches clustered --augmentation image --neutral off", 49.8, 88.0),
    "year": ("+ year-wise augmentation", "--batches clustered --augmentation year --neutral off", 54.1, 87.2),
    "neutral": ("clustered + neutral-aware", "--batches clustered --augmentation image --neutral on", 54.9, 88.7),
    "all": ("everything", "--batches clustered --augmentation year --neutral on", 57.1, 88.9),
}


def main(
    others: Annotated[list[str], OTHERS],
    seeds: Annotated[list[int], "one training each"] = (0,),
    rows: Annotated[list[str], "of the table", {"choices": list(ROWS)}] = tuple(ROWS),
    rotate: Annotated[Literal["database", "queries"], "what evaluation turns"] = "database",
) -> None:
    """Trains and evaluates what is not done yet, and prints the table."""
    train.parse_arguments(others)  # a wrong flag is better met now than after hours
    table = []
    for name in rows:
        title, flags, *paper = ROWS[name]
        recalls = recalls_over_seeds(f"table3/{name}", [*others, *flags.split()], seeds, f"--rotate={rotate}")
        table.append((title, [mean_and_deviation(recalls[k]) for k in RANKS], paper))
    title = f"mean ± deviation of {len(seeds)} seeds"
    print(f"\n| {title:26} | R@1 | R@10 | R@100 | paper R@1 | paper R@100 |")
    print("| --- | --- | --- | --- | --- | --- |")
    for title, ours, paper in table:
        print(f"| {title:26} | {' | '.join(ours)} | {paper[0]} | {paper[1]} |")


if __name__ == "__main__":
    command(main)
