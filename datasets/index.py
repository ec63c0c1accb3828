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
    file = root / f"index_{folder}.npz"
    began = time.perf_counter()
    old = load(file)
    folders, listed = scan(root, folder, old)
    if old is not None and np.array_equal(folders["folder_kept"], np.arange(len(old["folders"]))):  # nothing changed
        columns = {key: old[key] for key in old if not key.startswith("folder")}
    else:
        writable = os.access(root, os.W_OK)
        everything = writable or not prefix
        columns = assemble(old, folders, listed, parse, "" if everything else prefix)
        count = len(columns["paths"])
        if count >= min_images or old is not None:
            seconds = time.perf_counter() - began
            if writable and try_store(file, {**columns, **folders}):
                logging.info(f"{root / folder}: {count:,} images listed in {seconds:.1f} s, {file.name} written for "
                             f"the next start")
            else:
                logging.info(f"{root / folder}: {count:,} images listed in {seconds:.1f} s; {root} cannot be written "
                             f"to, so there is no {file.name} and every start lists them")
        columns.pop("folder_of")
    if prefix:
        rows = np.char.startswith(columns["paths"], os.fsencode(prefix))
        columns = {key: column[rows] for key, column in columns.items()}
    return columns


def scan(root, folder, old=None):
    """Lists the folders whose times are not those of the old index.

    -> {"folders" (F,) bytes, sorted; "folder_times" (F, 2) int ns, -1 for what may still change; "folder_kept" (F,)
    int, the folder's row in the old index or -1}, and the images in the others: paths (N,) bytes, folder rows (N,).
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
    listed = (np.concatenate([*blocks, np.array(images, dtype=np.bytes_)]),
              np.repeat(np.array([position[name] for name, _ in counts], dtype=np.int32),
                        np.array([count for _, count in counts], dtype=np.int64)))
    folders = {"folders": np.array(order, dtype=np.bytes_),
               "folder_times": np.array([found[name][0] for name in order], dtype=np.int64).reshape(-1, 2),
               "folder_kept": np.array([found[name][1] for name in order], dtype=np.int64)}
    return folders, listed


def _subfolders(names):
    inside = {}
    for name in names:
        inside.setdefault(name.rsplit(b"/", 1)[0], []).append(name)
    return inside


def assemble(old, folders, listed, parse, prefix=""):
    """Old rows of the folders that did not change, and rows of the listed images -> columns, sorted by path.

    Listed images that the old index knows are not parsed again. "folder_of" (N,) is each row's folder.
    """
    kept = folders.pop("folder_kept")
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
    parts.append((new, slice(None), folder_of))
    order, columns = None, {}
    for key in list(new):  # one column at a time: the old ones go as the sorted ones come
        column = np.concatenate([part[key][rows] for part, rows, _ in parts])
        order = np.argsort(column, kind="stable") if order is None else order  # paths come first
        columns[key] = column[order]
        del new[key]
    columns["folder_of"] = np.concatenate([of for *_, of in parts])[order]
    return columns


def try_store(file, arrays):
    """dict of arrays -> .npz, whole or not at all -> whether it could be written; the folder may be read-only."""
    try:
        with replacing(file) as opened:
            np.savez(opened, version=VERSION, **arrays)
    except OSError:
        return False
    return True


def load(file):
    """-> dict of arrays as `try_store` got them; None where there is no such file, or it is damaged or of another version."""
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
