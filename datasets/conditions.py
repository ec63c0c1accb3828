"""How each photo was taken, as far as it is known: conditions.csv beside a data set's queries/.

A line a photo: `id` (mission-roll-frame), `tilt` (degrees between straight down and where the camera looks) and
`clouds` (percent of the photo under clouds). A cell may be empty. The builders write it for the photos that they
render.
"""

import csv
from pathlib import Path

from datasets.csv_rows import read_csv
from utils.files import replacing_text

CONDITIONS_FILE = "conditions.csv"
CONDITIONS = ("tilt", "clouds")


def write_conditions(root: str | Path, conditions: dict[str, tuple[float, float]]) -> None:
    """{photo's id: (tilt degrees, clouds percent)} -> root/conditions.csv."""
    with replacing_text(Path(root) / CONDITIONS_FILE) as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("id", *CONDITIONS))
        writer.writerows((photo, f"{tilt:.2f}", f"{clouds:.2f}") for photo, (tilt, clouds) in conditions.items())


def read_conditions(root: str | Path) -> dict[str, dict[str, float]]:
    """A data set's folder -> {"tilt": {photo's id: degrees}, "clouds": {photo's id: percent}}, of what is known.

    Both empty without the file. ValueError names the file, line and column that does not fit.
    """
    path = Path(root) / CONDITIONS_FILE
    known = {name: {} for name in CONDITIONS}
    if not path.exists():
        return known
    expected = f"the columns id, {', '.join(CONDITIONS)}"
    (_, header), *rows = read_csv(path, expected)
    if header != ["id", *CONDITIONS]:
        raise ValueError(f"{path}: its header is {','.join(header)}; expected {expected}, in that order")
    for line, (photo, *cells) in rows:
        for name, cell in zip(CONDITIONS, cells):
            if cell:
                known[name][photo] = _number(cell, f"{path}, line {line}, {name}")
    return known


def _number(cell: str, where: str) -> float:
    try:
        return float(cell)
    except ValueError:
        raise ValueError(f"{where}: {cell!r} is no number; leave the cell empty where it is not known") from None
