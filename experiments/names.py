"""Does the grid make the public names, character by character? python -m experiments.names DATABASE [--queries NAMES]

DATABASE is a data set's folder, or a text file with one database path a line. Each of 2021 is made again from its
zoom_row_col and year; each query name is read and written again. Every name that differs is listed with the fields that
do.
"""

from argparse import Namespace
from collections import Counter
from collections.abc import Callable, Iterable

from datasets import grid
from datasets.names import FIELDS, Catalogue, ImageName
from utils.arguments import add_shared, make_parser, run


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


def main(args: Namespace) -> int:
    """-> how many names differ."""
    jobs = [(args.names, "database", made_path)]
    if args.queries:
        jobs.append((args.queries, "queries", lambda path: path[: path.find("@")] + str(ImageName.parse(path))))
    different = 0
    for names, folder, make in jobs:
        catalogue = Catalogue.read_source(names, folder)
        found = compare(catalogue.paths, make)
        different += len(found)
        for real, made, fields in found[: args.shown]:
            print(f"{', '.join(fields)}:\n    is   {real}\n    made {made}")
        counts = Counter(field for *_, fields in found for field in fields)
        print(
            f"{names}: {len(catalogue) - len(found):,} of {len(catalogue):,} names of {folder} come out the same"
            + (f"; fields that differ: {dict(counts)}" if found else "")
        )
    return different


def parse_arguments(argv: list[str] | None = None) -> Namespace:
    parser = make_parser(__doc__)
    parser.add_argument("names", help="data set's folder, or a text file of database paths")
    parser.add_argument("--queries", help="data set's folder, or a text file of query names")
    parser.add_argument("--shown", type=int, default=20, help="differing names printed in full")
    add_shared(parser)
    return parser.parse_args(argv)


if __name__ == "__main__":
    run(main, parse_arguments())
