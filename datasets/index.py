"""What lies in a data set's folder, as columns, kept in a file beside it so that the next start takes no listing.

A large folder (database/ of the public data set: 700,000 names in 3,500 folders) is listed and parsed once; its columns
go to index_database.npz in the data set's folder. At every later start only the folders' times are asked for. A folder
is listed again when its modification or change time is not the one that the index holds: both move when a file or
folder in it comes, goes or is renamed, and the change time cannot be set back (rsync -a, tar and cp -a set the other
one). A folder that changed within RACY_SECONDS before it was listed could change again without a new time, so the index
takes no note of it and the next start lists it again. Contents of images are not looked at: names are all that counts.

The index is written whole or not at all, and its checksums are tested on reading; one that cannot be used is made
again. Deleting it does no harm. Where it cannot be written, the folder is listed at every start, and the log says so.
"""

import logging
import os
import time
import zipfile
import zlib
from pathlib import Path

import numpy as np

from utils.files import replacing
from utils.strings import Strings

VERSION = 1  # raise when the columns change
MIN_IMAGES = 20_000  # below, listing takes less than a second and no index is written
RACY_SECONDS = 2  # the coarsest time stamps of file systems in use
SUFFIXES = (b".jpg", b".jpeg")


def read_columns(root, folder, parse, prefix="", min_images=None):
    """The .jpg files under root/folder, sorted -> dict of columns (N, …): "paths" and what `parse` gives.

    parse: Strings of paths relative to root -> dict of columns; it sees only names that the index does not hold.
    prefix: only paths that start so. The file is written for min_images names or more, by default
    MIN_IMAGES.
    """
    root, min_images = Path(root), MIN_IMAGES if min_images is None else min_images
    file, began = root / f"index_{folder}.npz", time.perf_counter()
    old, writable = load(file), os.access(root, os.W_OK)
    arrays = assemble(old, *scan(root, folder, old), parse, "" if writable else prefix)
    count = len(arrays["paths"])
    if arrays is not old and (old is not None or count >= min_images):
        if writable and try_store(file, arrays):
            end = f"{file.name} written for the next start"
        else:
            end = f"{root} cannot be written to, so there is no {file.name} and every start lists them"
        logging.info(f"{root / folder}: {count:,} images listed in {time.perf_counter() - began:.1f} s; {end}")
    columns = {key: array for key, array in arrays.items() if not key.startswith("folder")}
    if prefix:
        rows = np.char.startswith(columns["paths"], os.fsencode(prefix))
        columns = {key: column[rows] for key, column in columns.items()}
    return columns


def scan(root, folder, old=None):
    """Lists the folders whose times are not those of the old index.

    -> {"folders" (F,) bytes, sorted; "folder_times" (F, 2) int ns, -1 for what may still change; "folder_kept" (F,)
    int, the folder's row in the old index or -1}, and the images in the others, sorted: paths (N,) bytes, their
    folders' rows (N,).
    """
    known = {name: row for row, name in enumerate(old["folders"].tolist())} if old is not None else {}
    inside = _subfolders(known)
    found, seen, images, blocks, counts = {}, set(), [], [], []
    waiting = [os.fsencode(folder)]
    top = os.fsencode(root)
    while waiting:
        name = waiting.pop()
        place = os.path.join(top, name)
        now = time.time_ns()
        try:
            state = os.stat(place)  # before listing: what comes in meanwhile gives the folder a later time
        except FileNotFoundError:  # the end of a link, or gone this moment
            continue
        if (state.st_dev, state.st_ino) in seen:  # a link back up
            continue
        seen.add((state.st_dev, state.st_ino))
        times = (state.st_mtime_ns, state.st_ctime_ns)
        row = known.get(name, -1)
        if row >= 0 and tuple(old["folder_times"][row].tolist()) == times:
            found[name] = (times, row)
            waiting += inside.get(name, ())
            continue
        if max(times) > now - RACY_SECONDS * 10**9:
            times = (-1, -1)
        found[name] = (times, -1)
        before = len(images)
        with os.scandir(place) as entries:
            for entry in entries:
                if entry.is_dir():
                    waiting.append(name + b"/" + entry.name)
                elif entry.name.lower().endswith(SUFFIXES):
                    images.append(name + b"/" + entry.name)
        counts.append((name, len(images) - before))
        if len(images) > 50_000:  # bytes objects take twice the room of an array
            blocks.append(np.array(images, dtype=np.bytes_))
            images = []
    order = sorted(found)
    position = {name: row for row, name in enumerate(order)}
    paths = np.concatenate([*blocks, np.array(images, dtype=np.bytes_)])
    del images, blocks
    folder_of = np.repeat(np.array([position[name] for name, _ in counts], dtype=np.int32),
                          np.array([count for _, count in counts], dtype=np.int64))
    by_path = np.argsort(paths, kind="stable")
    folders = {"folders": np.array(order, dtype=np.bytes_),
               "folder_times": np.array([found[name][0] for name in order], dtype=np.int64).reshape(-1, 2),
               "folder_kept": np.array([found[name][1] for name in order], dtype=np.int64)}
    return folders, (paths[by_path], folder_of[by_path])


def _subfolders(names):
    inside = {}
    for name in names:
        inside.setdefault(name.rsplit(b"/", 1)[0], []).append(name)
    return inside


def assemble(old, folders, listed, parse, prefix=""):
    """Rows of the old index in folders that did not change, and rows of the listed images -> all arrays of the index.

    Columns are sorted by path, "folder_of" (N,) is each row's folder. Listed images that the old index knows are not
    parsed again. Where nothing changed, old itself comes back; else its columns are taken out of it on the way, so that
    a full-size data set is not in memory twice.
    """
    kept = folders.pop("folder_kept")
    if old is not None and np.array_equal(kept, np.arange(len(old["folders"]))):
        return old
    paths, folder_of = listed
    if prefix:
        rows = np.char.startswith(paths, os.fsencode(prefix))
        paths, folder_of = paths[rows], folder_of[rows]
    parts = []  # (columns, their rows, the folders of those)
    if old is not None:
        place = np.full(len(old["folders"]), -1, dtype=np.int32)
        place[kept[kept >= 0]] = np.flatnonzero(kept >= 0)
        now = place[old["folder_of"]]
        parts.append((old, np.flatnonzero(now >= 0), now[now >= 0]))
    if old is not None and len(old["paths"]) and len(paths):
        where = np.minimum(np.searchsorted(old["paths"], paths), len(old["paths"]) - 1)
        again = old["paths"][where] == paths
        parts.append((old, where[again], folder_of[again]))
        paths, folder_of = paths[~again], folder_of[~again]
    new = {"paths": paths, **parse(Strings(paths))}
    if not parts:
        return {**folders, **new, "folder_of": folder_of}
    parts.append((new, np.arange(len(paths)), folder_of))
    del paths, listed
    order, arrays = None, dict(folders)
    for key in list(new):
        column = _gather(parts, key)
        order = np.argsort(column, kind="stable") if order is None else order  # paths come first
        arrays[key] = column[order]
    arrays["folder_of"] = np.concatenate([of for *_, of in parts])[order]
    return arrays


def _gather(parts, key, block=50_000):
    """One column of all parts, which is taken out of them."""
    columns = [(part[key], rows) for part, rows, _ in parts]
    for part, *_ in parts:
        part.pop(key, None)
    first = columns[-1][0]
    out = np.empty((sum(len(rows) for _, rows in columns), *first.shape[1:]),
                   dtype=np.result_type(*[column for column, _ in columns]))
    start = 0
    for column, rows in columns:
        for at in range(0, len(rows), block):
            chosen = column[rows[at:at + block]]
            out[start:start + len(chosen)] = chosen
            start += len(chosen)
    return out


def try_store(file, arrays):
    """dict of arrays -> .npz, whole or not at all -> whether it could be written; the folder may be read-only."""
    try:
        with replacing(file) as opened:
            np.savez(opened, version=VERSION, **arrays)
    except OSError:
        return False
    return True


def load(file):
    """-> dict of arrays as `try_store` got them; None where there is no such file, or one that cannot be used."""
    try:
        with np.load(file, allow_pickle=False) as stored:
            arrays = {key: stored[key] for key in stored.files}
        if int(arrays.pop("version")) == VERSION:
            return arrays
        reason = "another version"
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, EOFError, TypeError, zipfile.BadZipFile, zlib.error) as error:
        reason = str(error)
    logging.warning(f"{file}: cannot be used ({reason}); it is made again")
    return None
