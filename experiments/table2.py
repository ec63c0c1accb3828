"""The paper's Table 2 beside what was measured here: python -m experiments.table2 results.csv

results.csv grows by a line with each python eval.py --method NAME --results results.csv …, or --resume. Cells are R@1 /
R@10 / R@100. A method of the paper that was not evaluated has the paper's row alone; the newest line of each method and
weights counts. The paper's last row is Table 3's row without the neutral-aware loss; the whole method is the one after
it, whose R@10 the paper does not print. Its naive rows, recomputed: python -m experiments.table1.
"""

from collections.abc import Sequence
from typing import Annotated

from datasets.sets import POINTS_OF_INTEREST
from retrieval.leaderboard import read_lines, set_recalls
from utils.flags import command

# A method's name (methods/; none here for what has a space or a capital), and R@1 R@10 R@100 of the six sets.
PAPER = {
    "Nadir": "2.4 - - 1.2 - - 2.4 - - 1.8 - - 3.1 - - 1.4 - -",
    "Random Choice": "0.2 1.7 15.5 0.1 1.1 11.6 0.2 2.3 20.1 0.1 1.0 13.2 0.1 1.1 11.5 0.2 1.2 9.1",
    "netvlad": "3.6 13.4 34.8 5.2 15.2 36.2 4.3 14.4 39.0 2.1 7.7 24.5 6.6 19.9 46.3 9.6 22.5 45.6",
    "sfrs": "6.8 17.4 40.9 7.0 17.8 41.4 5.4 17.2 44.4 5.2 14.7 37.6 9.4 23.8 52.5 10.8 20.4 42.4",
    "convap": "3.7 13.5 37.7 2.0 8.8 25.0 3.8 15.4 41.2 3.7 9.0 24.2 7.0 21.1 47.7 5.0 12.3 32.6",
    "cosplace": "4.9 15.2 42.0 5.9 19.3 45.2 4.8 15.2 43.3 7.9 17.5 39.5 8.5 23.9 54.4 9.8 25.4 53.0",
    "mixvpr": "4.5 15.3 40.1 3.1 8.6 22.6 4.4 17.5 43.2 4.0 10.1 24.5 9.8 28.7 58.7 5.9 15.4 36.5",
    "eigenplaces": "6.4 21.6 52.4 8.7 21.4 50.3 6.0 22.8 54.3 8.1 20.0 40.9 10.9 26.5 57.9 14.3 30.9 60.4",
    "anyloc": "44.1 68.7 87.8 40.7 70.8 92.0 48.7 75.0 91.6 28.7 57.0 81.7 38.6 63.8 86.2 63.7 84.5 96.3",
    "torchgeo_moco": "1.0 3.2 11.6 0.3 1.3 5.7 1.1 4.3 16.4 0.4 2.8 8.3 1.9 6.6 19.4 0.7 2.9 9.9",
    "torchgeo_seco": "6.1 15.6 41.7 7.4 20.2 49.2 5.1 14.5 37.1 3.7 14.0 38.9 4.6 13.3 32.9 5.7 15.6 38.5",
    "torchgeo_gassl": "9.7 22.8 46.4 9.1 23.1 50.5 13.3 31.4 58.8 6.3 17.5 45.4 8.3 20.3 40.1 20.4 38.6 64.2",
    "ogcl_convnext": "16.2 35.3 65.8 14.4 34.1 64.7 19.6 42.1 71.0 5.5 20.5 45.3 10.0 26.3 54.7 21.1 38.4 63.4",
    "ogcl_vit": "17.6 33.2 55.9 14.6 33.2 63.9 22.8 48.1 74.9 7.6 22.8 50.1 20.4 39.1 62.5 31.8 51.8 74.4",
    "mbeg": "7.0 17.6 35.1 6.6 19.3 45.9 8.7 20.7 41.5 4.4 15.0 38.0 6.4 17.1 39.3 8.1 20.7 49.1",
    "EarthLoc": "54.6 72.1 87.5 53.9 71.9 87.2 55.9 74.6 91.6 46.8 65.0 82.9 45.6 66.6 82.4 67.6 80.3 91.9",
    "EarthLoc, Table 3": "55.9 - 88.3 58.4 - 89.5 58.0 - 91.4 51.1 - 86.5 47.2 - 84.6 72.2 - 93.3",
}


def table(lines: Sequence[dict[str, str]]) -> list[str]:
    """Lines of the file of results, of one data set -> lines of markdown: each of the paper's rows, followed by ours of
    that method; then what the paper has not."""
    newest = {(line["method"], line["weights"], line["tta"]): line for line in lines}
    rows = [["method", *POINTS_OF_INTEREST], ["---"] * (1 + len(POINTS_OF_INTEREST))]
    for method, numbers in PAPER.items():
        values = iter(numbers.split())
        rows.append([f"{method} (paper)", *(" / ".join(each) for each in zip(values, values, values))])
        rows += [own_row(line) for line in newest.values() if line["method"] == method]
    rows += [own_row(line) for line in newest.values() if line["method"] not in PAPER]
    return [f"| {' | '.join(row)} |" for row in rows]


def own_row(line: dict[str, str]) -> list[str]:
    """A line of the file of results -> its cells."""
    told = f"{line['method']}, {line['weights']}" + ("" if line["tta"] == "4x90" else f", tta {line['tta']}")
    return [told.replace("|", "\\|"), *(set_recalls(line, name) for name in POINTS_OF_INTEREST)]


def main(
    file: Annotated[str, "as eval.py --results writes it"],
    dataset: Annotated[str | None, "only this one; default: a table for each"] = None,
) -> None:
    """Prints a table for each data set."""
    lines = read_lines(file)
    datasets = list(dict.fromkeys(line["dataset"] for line in lines))
    if dataset not in (None, *datasets):
        raise ValueError(f"--dataset {dataset}: no line of {file} has it; there are {', '.join(datasets)}")
    for one in datasets if dataset is None else [dataset]:
        print(f"\n{one}\n\n" + "\n".join(table([line for line in lines if line["dataset"] == one])))


if __name__ == "__main__":
    command(main)
