"""One line an evaluation in a CSV file, and the table of them: python -m experiments.leaderboard FILE."""

import csv
import fcntl
import io
import os
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from datasets.sets import POINTS_OF_INTEREST
from retrieval.evaluation import Evaluation
from retrieval.recall import RANKS

SET_RANKS = (1, 10, 100)  # as the paper's Table 2
AVERAGES = tuple(f"average R@{k}" for k in RANKS)
FIELDS = (
    "date",
    "method",
    "weights",
    "dataset",
    "tta",
    *AVERAGES,
    *(f"{name} R@{k}" for name in POINTS_OF_INTEREST for k in SET_RANKS),
    "command",
)


def result_line(result: Evaluation, **told: str) -> dict[str, str]:
    """Evaluation -> a line of the file. told: method, weights, dataset, tta and command. Recalls are percent, of the
    paper's counting; a set that was skipped has none."""
    line = {"date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S"), **told}
    line |= {f"average R@{k}": f"{value:.2f}" for k, value in result.average().items()}
    for each in result.test_results:
        line |= {f"{each.set.name} R@{k}": f"{each.recalls[k]:.2f}" for k in SET_RANKS if k in each.recalls}
    return line


def append_line(path: str | Path, line: dict[str, str]) -> None:
    """Adds a line to the file, made with its header where there is none; of two processes at once one waits.

    ValueError where the file is another one.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    text = io.StringIO()
    writer = csv.DictWriter(text, FIELDS, restval="", lineterminator="\n")
    with open(path, "a+", newline="") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        start = file.readline()
        if not start:
            writer.writeheader()
        elif tuple(next(csv.reader([start]))) != FIELDS:
            raise ValueError(f"--results {path}: its first line is not that of such a file; give another name")
        writer.writerow({key: " ".join(str(value).split()) for key, value in line.items()})
        file.seek(0, os.SEEK_END)
        file.write(text.getvalue())
        file.flush()
        os.fsync(file.fileno())


def read_lines(path: str | Path) -> list[dict[str, str]]:
    """The file's lines, in order. FileNotFoundError, or ValueError where it is another file."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such file; python eval.py --results {path} makes it")
    with open(path, newline="") as file:
        reader = csv.DictReader(file)
        if tuple(reader.fieldnames or ()) != FIELDS:
            raise ValueError(f"{path}: its first line is not that of a file of eval.py --results")
        return list(reader)


def leaderboard(lines: Sequence[dict[str, str]]) -> str:
    """Lines of the file -> a table in markdown: R@1 / R@10 / R@100 of each set and on average, the best first, a part
    for each data set. Of several lines of the same method and weights there the newest counts."""
    newest = {(line["dataset"], line["method"], line["weights"], line["tta"]): line for line in lines}
    sets = [name for name in POINTS_OF_INTEREST if any(line[f"{name} R@1"] for line in newest.values())]
    titles = ["data set", "method", "weights", "tta", *sets, "average", "date"]
    rows = [titles, ["---"] * len(titles)]
    for line in sorted(newest.values(), key=lambda line: (line["dataset"], -float(line["average R@1"] or -1))):
        recalls = [set_recalls(line, name) for name in (*sets, "average")]
        told = [line[name].replace("|", "\\|") for name in ("dataset", "method", "weights", "tta")]
        rows.append([*told, *recalls, line["date"][:10]])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def set_recalls(line: dict[str, str], name: str) -> str:
    """A line and a set's name, or "average" -> "54.6 / 72.1 / 87.5", R@1, R@10 and R@100."""
    return " / ".join(_short(line[f"{name} R@{k}"]) for k in SET_RANKS)


def _short(value: str) -> str:
    return f"{float(value):.1f}" if value else "-"
