"""Does the grid make the public names, character by character? python -m experiments.names DATABASE [--queries NAMES]

DATABASE is a data set's folder, or a text file with one database path a line. Each of 2021 is made again from its
zoom_row_col and year; each query name is read and written again. Every name that differs is listed with the fields that
do.
"""

from collections import Counter
from collections.abc import Callable, Iterable
from typing import Annotated

from datasets import grid
from datasets.names import FIELDS, Catalogue, ImageName
from utils.flags import command


def made_path(path: str) -> str:
    """Database path -> the path that the grid makes from its id and year. ValueError where the id is no region."""
    name = ImageName.parse(path)
    try:
        zoom, row, col = map(int, name.image_id.split("_"))
    except ValueError:
        raise ValueError(f"{path}: field image_id is {name.image_id!r}, expected zoom_row_col") from None
    return grid.image_path(zoom, row, col, name.year)


def differing_fields(real: str, made: str) -> tuple[str, ...]:
    """Two paths -> the fields that differ, ("folder",) where only that does. A bare name has no folder to differ."""
    if "/" not in real:
        made = made.rsplit("/", 1)[-1]
    labels = ("folder", *FIELDS, "suffix")
    return tuple(label for label, a, b in zip(labels, real.split("@"), made.split("@"), strict=True) if a != b)


def compare(paths: Iterable[str], make: Callable[[str], str]) -> list[tuple[str, str, tuple]]:
    """-> [(path, what make(path) gives, fields that differ)] of those that differ."""
    compared = ((path, made, differing_fields(path, made)) for path in paths for made in [make(path)])
    return [each for each in compared if each[2]]


def main(
    names: Annotated[str, "data set's folder, or a text file of database paths"],
    queries: Annotated[str | None, "data set's folder, or a text file of query names"] = None,
    shown: Annotated[int, "differing names printed in full"] = 20,
) -> int:
    """-> how many names differ."""
    jobs = [(names, "database", made_path)]
    if queries:
        jobs.append((queries, "queries", lambda path: path[: path.find("@")] + str(ImageName.parse(path))))
    different = 0
    for source, folder, make in jobs:
        catalogue = Catalogue.read_source(source, folder)
        found = compare(catalogue.paths, make)
        different += len(found)
        for real, made, fields in found[:shown]:
            print(f"{', '.join(fields)}:\n    is   {real}\n    made {made}")
        counts = Counter(field for *_, fields in found for field in fields)
        print(
            f"{source}: {len(catalogue) - len(found):,} of {len(catalogue):,} names of {folder} come out the same"
            + (f"; fields that differ: {dict(counts)}" if found else "")
        )
    return different


if __name__ == "__main__":
    command(main)
