"""Start-up at full size: python -m benchmarks.full_size --queries NAMES makes 737,692 empty files and opens them.

The tree has the database of all regions with land in four years, the queries of NAMES (a data set's folder or a text
file; without it, one made-up query a region of zoom 9), and their positives. It goes to a temporary folder, or to
--folder, where it stays and is used again. Each opening is a process of its own, as train.py and eval.py are: the first
one lists and writes the index, the others read it. Memory is the peak of the process, of which the imports (torch) take
what is printed first.
"""

import json
import multiprocessing
import os
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import numpy as np

from benchmarks.timing import own_memory, show, timed, timed_twice
from datasets import grid
from datasets.names import DATABASE_YEAR, YEARS, Catalogue, ImageName
from datasets.overlap import INTERSECTIONS_FILE, intersections_table, save_intersections, share_ground
from datasets.regions import Regions
from datasets.sets import load_evaluation_data
from utils.flags import command


def made_up_queries(regions: np.ndarray) -> list[str]:
    """One query name a region: its footprint, north up."""

    def name(number: int, corners: np.ndarray):
        nadir, area = tuple(corners.mean(axis=0).round(1).tolist()), int(grid.quadrilateral_area(corners))
        places = tuple(map(tuple, corners.tolist()))
        return str(ImageName(places, f"MADE00-E-{number}", "20200101", nadir, area, 0.0))

    return [name(number, corners) for number, corners in enumerate(grid.footprints(regions))]


def make_tree(folder: Path, queries: str | None, regions: Callable[[], np.ndarray]) -> int:
    """Empty files of the regions × four years and of the queries, and the intersections file -> number of files.

    regions: function that gives rows of zoom, row, col, sorted. queries: as for --queries, or None.

    full_size.json marks the folder as such a tree, and whole once it holds the number; an unfinished one goes on.
    Raises ValueError where the folder holds anything else: a data set must not be filled with empty files.
    """
    done = folder / "full_size.json"
    if done.exists() and (count := json.loads(done.read_text())["files"]):
        return count
    if not done.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder}: is not empty and no tree of this script; name a new folder")
    done.write_text(json.dumps({"files": 0}))
    regions = regions()
    if queries:
        names = [Path(path).name for path in Catalogue.read_source(queries, "queries").paths]
    else:
        names = made_up_queries(regions[regions[:, 0] == regions[0, 0]])
    paths = [grid.image_path(*region, DATABASE_YEAR) for region in regions.tolist()]
    everything = [grid.image_path(*region, year) for year in YEARS for region in regions.tolist()]
    everything += [f"queries/{name}" for name in names]
    for place in {path.rsplit("/", 1)[0] for path in everything}:
        (folder / place).mkdir(parents=True, exist_ok=True)
    for path in everything:
        os.close(os.open(folder / path, os.O_CREAT | os.O_WRONLY))
    table = intersections_table(Catalogue.from_paths(folder, names), Catalogue.from_paths(folder, paths))
    save_intersections(folder / INTERSECTIONS_FILE, table)
    done.write_text(json.dumps({"files": len(everything)}))
    return len(everything)


def measured(function: Callable, *args: object) -> tuple[object, float, float, float, float]:
    """Runs it in a fresh process -> (what it returns, seconds, those of CPU, peak memory in GB before and after)."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_measure, (function, *args))


def _measure(function: Callable, *args):
    before = _peak_gb()
    return *timed_twice(lambda: function(*args)), before, _peak_gb()


def _peak_gb():
    # On Linux ru_maxrss would be no less than the parent's; macOS counts it in bytes.
    return (own_memory("VmHWM") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) / 2**30


def open_for_training(folder: Path) -> str:
    """As train.py opens its regions."""
    regions, missing = Regions.read(folder)
    return f"{len(regions):,} regions with four years, {len(missing)} without"


def open_for_evaluation(folder: Path) -> str:
    """As eval.py opens its sets."""
    data = load_evaluation_data(folder)
    return f"{len(data.queries):,} queries, {len(data.database):,} images, {len(data.pairs):,} positives"


def open_both(folder: Path) -> str:
    """As train.py does."""
    return f"{open_for_training(folder)}; {open_for_evaluation(folder)}"


def neutral_test(folder: Path, batches: int = 100, size: int = 32) -> str:
    """Milliseconds for one batch's table of which regions share ground."""
    footprints = Regions.read(folder)[0].footprints
    rng = np.random.default_rng(0)
    drawn = [footprints[rng.integers(len(footprints), size=size)] for _ in range(batches)]
    _, seconds = timed(lambda: [share_ground(each, each) for each in drawn])
    return f"{1000 * seconds / batches:.1f} ms a batch of {size}"


def main(
    folder: Annotated[str | None, "where the tree goes and stays; default: a temporary folder"] = None,
    queries: Annotated[str | None, "data set's folder, or a text file of query names"] = None,
    zooms: Annotated[list[int], "of the regions"] = (9, 10, 11),
) -> None:
    """Prints a row for each way to open the tree."""
    with tempfile.TemporaryDirectory(prefix="full_size_") as temporary:
        folder = Path(folder or temporary)
        folder.mkdir(parents=True, exist_ok=True)
        count, seconds = timed(lambda: make_tree(folder, queries, lambda: grid.land_regions(zooms)))
        print(f"{folder}: {count:,} empty files, ready in {seconds:.0f} s", flush=True)
        for file in folder.glob("index_*.parquet"):
            file.unlink()
        time.sleep(3)  # folders that changed a moment ago are not trusted
        one = next((folder / "database" / f"{DATABASE_YEAR}_{zooms[0]:02d}").iterdir())
        steps = [
            ("training, no index", open_for_training, None),
            ("training, index", open_for_training, None),
            ("evaluation, no index", open_for_evaluation, None),
            ("evaluation, index", open_for_evaluation, None),
            ("train.py: both, index", open_both, None),
            ("both, one folder changed", open_both, one / "@stranger.txt"),
            ("neutral test", neutral_test, None),
        ]

        def rows():
            for title, function, touched in steps:
                if touched:
                    touched.touch()
                said, *numbers = measured(function, folder)
                yield title, *numbers, said
                if touched:
                    touched.unlink()

        columns = {
            "": "25",
            "seconds": "7.2f",
            "CPU s": "7.2f",
            "GB imports": "11.2f",
            "GB peak": "8.2f",
            "  found": "<7",
        }
        show(columns, rows())
        for file in sorted(folder.glob("index_*.parquet")):
            print(f"{file.name}: {file.stat().st_size / 1e6:.0f} MB")


if __name__ == "__main__":
    command(main)
