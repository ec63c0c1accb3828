"""Which image files lie in a folder: the one walk that the index, datasets.check, datasets.cache and predict.py share.

An image file has one of SUFFIXES and a name without a leading dot (macOS leaves ._x.jpg beside x.jpg). Links to files
and folders are followed, but a folder is entered once, so loops end. Names are bytes: any name that a file system holds
passes through, and os.fsdecode makes the str with which Python opens it.
"""

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
RACY_SECONDS = 2  # the coarsest time stamps of file systems in use
UNSETTLED = (-1, -1)  # in place of the times of a folder that could change again without new ones


def walk(
    root: str | Path, folder: str = "", subfolders_of: Callable = lambda folder, times: None
) -> Iterator[tuple[bytes, tuple[int, int], list[bytes] | None, list[bytes] | None]]:
    """Yields (folder, times, images, others) of root/folder and what is in it, sorted by folder + "/"; names are bytes.

    folder: relative to root. times: modification and change, ns; both move when a name in it comes, goes or changes.
    images, others: sorted names of files. subfolders_of(folder, times): the names of its subfolders where the caller
    knows that it is unchanged; it is not listed then, and images and others are None. No such folder: yields nothing.
    """
    top, seen, waiting = os.fsencode(root), set(), [os.fsencode(folder)]
    while waiting:
        folder = waiting.pop()
        now = time.time_ns()
        try:
            state = os.stat(os.path.join(top, folder))  # before listing: what comes in meanwhile gives a later time
        except FileNotFoundError:  # the end of a link, or gone this moment
            continue
        if (state.st_dev, state.st_ino) in seen:
            continue
        seen.add((state.st_dev, state.st_ino))
        times = (state.st_mtime_ns, state.st_ctime_ns)
        inside, images, others = subfolders_of(folder, times), None, None
        if inside is None:
            inside, images, others = list_folder(os.path.join(top, folder))
            times = UNSETTLED if max(times) > now - RACY_SECONDS * 10**9 else times
        yield folder, times, images, others
        waiting += [os.path.join(folder, name) for name in sorted(inside, key=lambda name: name + b"/", reverse=True)]


def list_folder(place: bytes) -> tuple[list[bytes], list[bytes], list[bytes]]:
    """Bytes path -> names of the folders in it, of the image files and of the other files, bytes, files sorted."""
    folders, images, others = [], [], []
    with os.scandir(place) as entries:
        for entry in entries:
            hidden = entry.name.startswith(b".")
            if os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir():
                folders += [] if hidden else [entry.name]
            else:
                is_image = not hidden and os.fsdecode(entry.name).lower().endswith(SUFFIXES)
                (images if is_image else others).append(entry.name)
    return folders, sorted(images), sorted(others)


def list_files(root: str | Path, folder: str = "") -> tuple[list[str], list[str]]:
    """-> paths relative to root, as str, of the image files under root/folder, and of the other files."""
    images, others = [], []
    for place, _, *names in walk(root, folder):
        for found, inside in zip((images, others), names):
            found += [os.fsdecode(os.path.join(place, name)) for name in inside]
    return images, others


def as_known(known: dict[bytes, tuple[int, int]]) -> Callable:
    """{folder: times} of an earlier walk, bytes -> subfolders_of for the next: what has those times is not listed."""
    inside = {}
    for folder in known:
        inside.setdefault(os.path.dirname(folder), []).append(os.path.basename(folder))
    return lambda folder, times: inside.get(folder, []) if known.get(folder) == times else None
