"""The paper's Table 4 on any data set: R@1 without and with the four rotations of test-time augmentation.

python -m experiments.table4 WEIGHTS … --dataset_path FOLDER: all other flags are eval.py's. Several weights are the
same recipe with other seeds: mean ± standard deviation over them. An evaluation whose results are there is not done
again.
"""

from typing import Annotated

import numpy as np

import eval as evaluation
from datasets.sets import POINTS_OF_INTEREST
from experiments.runs import evaluated, mean_and_deviation
from utils.flags import OTHERS, command

PAPER = {"none": (32.6, 30.9, 31.1, 30.4, 27.2, 39.1), "4x90": (54.6, 53.9, 55.9, 46.8, 45.6, 67.6)}


def main(
    weights: Annotated[list[str], "checkpoints, one for each seed", {"metavar": "WEIGHTS"}],
    others: Annotated[list[str], OTHERS],
) -> None:
    """Evaluates what is not done yet, and prints the table."""
    evaluation.parse_arguments(others)  # a wrong flag is better met now than after hours
    names = list(POINTS_OF_INTEREST)
    lines = [f"| test-time augmentation | {' | '.join(names)} | average |", "| --- " * (len(names) + 2) + "|"]
    for way, paper in PAPER.items():
        runs = [evaluated(each, f"table4/{way}", *others, "--tta", way)[0]["sets"] for each in weights]
        ours = np.array([[sets[name]["recalls"]["1"] if name in sets else np.nan for name in names] for sets in runs])
        cells = [mean_and_deviation(column) for column in (*ours.T, np.nanmean(ours, axis=1))]
        lines.append(f"| {way} | {' | '.join(cells)} |")
        cells = [f"{value:.1f}" for value in (*paper, np.mean(paper))]
        lines.append(f"| {way}, paper | {' | '.join(cells)} |")
    print("\n" + "\n".join(lines))


if __name__ == "__main__":
    command(main)
