"""What lies in a data set's folder, as a table, kept in a file beside it so that the next start takes no listing.

A large folder (database/ of the public data set: 700,000 names in 3,500 folders) is listed and parsed once; its table
goes to index_database.parquet in the data set's folder. At every later start only the folders' times are asked for. A
folder is listed again when its modification or change time is not the one that the index holds: both move when a file
or folder in it comes, goes or is renamed, and the change time cannot be set back (rsync -a, tar and cp -a set the other
one). A folder that changed within RACY_SECONDS before it was listed could change again without a new time, so the index
takes no note of it and the next start lists it again. Contents of images are not looked at: names are all that counts.

The index is written whole or not at all, and its checksums are tested on reading; one that cannot be used is made
again. Deleting it does no harm. Where it cannot be written, the folder is listed at every start, and the log says so.

It is a GeoParquet file (1.1) of "path", the fields of the name and the footprint as "geometry", which geopandas, DuckDB
and QGIS open. There, corners are in circular order, and a footprint over the antimeridian is a MultiPolygon of its two
sides, as RFC 7946 has it; lat1 … lon4 are as the name says.
"""

import logging
import os
import re
import time
from collections.abc import Callable, Iterator
from itertools import groupby
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from datasets.listing import as_known, walk
from utils.outlines import GEO, geometry
from utils.tables import ROW_GROUP, Damaged, as_text, in_one, opened, or_anew, read_rows, store

VERSION = 2  # raise when the columns change
MIN_IMAGES = 20_000  # below, listing takes less than a second and no index is written


def read_table(
    root: str | Path, folder: str, parse: Callable, prefix: str = "", min_images: int | None = None
) -> pa.Table:
    """The images under root/folder -> table of "path" and what `parse` gives, sorted by folder, then name.

    parse: Arrow array of paths relative to root, bytes -> table with the column "path"; it sees the names in folders
    that are not as the index holds them. prefix: only folders whose path, with a slash at its end, starts so. The file
    is written for min_images names or more, by default MIN_IMAGES.
    """
    root, min_images = Path(root), MIN_IMAGES if min_images is None else min_images
    file = root / f"index_{folder}.parquet"
    return or_anew(lambda trusted: _read(root, folder, parse, prefix, min_images, file, trusted), file)


def _read(
    root: Path, folder: str, parse: Callable, prefix: str, min_images: int, file: Path, trusted: bool
) -> pa.Table:
    began = time.perf_counter()
    old = opened(file) if trusted else None
    if old and old[1]["version"] != VERSION:
        raise Damaged("another version")
    known = {os.fsencode(name): (tuple(times), count) for name, times, count in old[1]["folders"]} if old else {}
    unchanged = as_known({name: times for name, (times, _) in known.items()})
    found = [
        (name, times, images if images is None else pa.array([name + b"/" + each for each in images], pa.binary()))
        for name, times, images, _ in walk(root, folder, unchanged)
    ]
    wanted = [(name + b"/").startswith(os.fsencode(prefix)) for name, *_ in found]
    counts = np.array([known[name][1] if images is None else len(images) for name, _, images in found], dtype=np.int64)
    first, count = int(counts[: np.argmax(wanted)].sum()) if any(wanted) else 0, int(counts[wanted].sum())
    columns = [name for name in old[0].schema_arrow.names if name != "geometry"] if old else []
    if old and len(found) == len(known) and all(images is None for *_, images in found):
        return _checked(read_rows(old[0], columns, first, count), folder)

    writable = os.access(root, os.W_OK)
    if not writable:
        found, first = [each for each, is_wanted in zip(found, wanted) if is_wanted], 0
    table = _joined(found, known, lambda: _checked(read_rows(old[0], columns), folder), parse)
    if old or counts.sum() >= min_images:
        state = {
            "version": VERSION,
            "folders": [[os.fsdecode(name), times, int(count)] for (name, times, _), count in zip(found, counts)],
        }
        if writable and store(file, _for_others(table), state, GEO, distinct=("path", "geometry")):
            end = f"{file.name} written for the next start"
        else:
            end = f"{root} cannot be written to, so there is no {file.name} and every start lists them"
        logging.info(f"{root / folder}: {len(table):,} images listed in {time.perf_counter() - began:.1f} s; {end}")
    return table.slice(first, count)


def _joined(found: list[tuple], known: dict, read_old: Callable, parse: Callable) -> pa.Table:
    """[(folder, times, paths or None for those of the index)], sorted -> the table of all."""
    starts = dict(zip(known, np.cumsum([0, *(count for _, count in known.values())]).tolist()))
    old = read_old() if any(images is None for *_, images in found) else None
    parts = [parse(pa.array([], pa.binary()))]
    for listed, group in groupby(found, key=lambda each: each[2] is not None):
        if listed:
            parts.append(parse(pa.concat_arrays([images for *_, images in group])))
        else:
            parts += [old.slice(starts[name], known[name][1]) for name, *_ in group]
    return pa.concat_tables(parts)


def _checked(table: pa.Table, folder: str) -> pa.Table:
    """Table -> itself. Raises Damaged where a path leads out of the folder."""
    paths = in_one(table["path"])
    leaves = re.search(rb"/\.\./", paths.buffers()[2] or b"")  # all texts at once: a false alarm needs a path of ".."
    if leaves or pc.any(pc.invert(pc.starts_with(paths, f"{folder}/"))).as_py():
        raise Damaged(f"a path leads out of {folder}/")
    return table


def _for_others(table: pa.Table) -> Iterator[pa.Table]:
    """Table -> tables of a row group each, with text as text and the geometry."""
    texts = {name: as_text(table[name]) for name in table.column_names if table[name].type == pa.binary()}
    table = pa.table({name: texts.get(name, table[name]) for name in table.column_names})
    for start in range(0, max(len(table), 1), ROW_GROUP):
        part = table.slice(start, ROW_GROUP)
        corners = np.stack([part[f"{axis}{corner}"] for corner in range(1, 5) for axis in ("lat", "lon")], axis=-1)
        yield part.append_column("geometry", geometry(corners.reshape(-1, 4, 2)))
