"""Descriptors kept on disk: float16, memory-mapped, written as they come. Nothing is described twice.

Two files hold what one model made of one data set's images in one list of rotations, whoever asked for them: `NAME.f16`
the vectors (K, D), and `NAME.marks` a table of the images (SQLite). A row names the image's path, where its vectors lie
(rotation i is vector `first + i * step`), what the file looked like (path, size, time of change) and the vectors'
checksum. The last two are filled in after the vectors are on the disk, so a run that was killed leaves no half-written
descriptor that a later one would trust; the room that it made for an image stays that image's.

Several processes: one at a time describes into a file. It holds SQLite's lock on the table (which ends with the
process), the others wait for it and then find its descriptors there. Reading vectors needs no lock: files only grow,
and what is kept of an image that has not changed is never moved or overwritten. An image that changes keeps its room.
That of one that is gone is not taken back: the table knows images by their path's digest, and one that is not asked for
today may be wanted by another command.
"""

import hashlib
import json
import logging
import os
import re
import sqlite3
import time
import zlib
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path

import numpy as np
import torch

RECIPE = 2  # to be raised when the same model and file come to another descriptor: reading, resizing, turning
NAME = re.compile(r".+_([0-9a-f]{16})_\d+(-\d+)*\.f16")
OLDER = b'{"format": "earthloc descriptors '  # marks began so before they were in SQLite
TABLE = "images(path INTEGER PRIMARY KEY, first INTEGER, step INTEGER, image INTEGER, checksum INTEGER)"


class Rows:
    """Vectors that stay where they are: (*S, D) float16, of a memory map (K, D) those that an index (*S) names.

    Taking a part of it reads that part. Only what the searches need of an array.
    """

    def __init__(self, vectors: np.ndarray, index: np.ndarray) -> None:
        self.vectors, self.index = vectors, index

    dtype = property(lambda self: self.vectors.dtype)
    shape = property(lambda self: (*self.index.shape, self.vectors.shape[1]))
    ndim = property(lambda self: len(self.shape))

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, key: object) -> np.ndarray:
        return np.asarray(self.vectors[self.index[key]])

    def __array__(self, dtype: np.dtype | None = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self[...], dtype)

    def reshape(self, *shape: int) -> "Rows":
        """The last axis stays D."""
        return Rows(self.vectors, self.index.reshape(shape[:-1]))

    def take(self, rows: np.ndarray, axis: int = 0, out: np.ndarray | None = None, mode: str = "raise") -> np.ndarray:
        """As numpy's, along the first of two axes."""
        return np.take(self.vectors, self.index[rows], axis=axis, out=out, mode=mode)


def model_fingerprint(model: torch.nn.Module, image_size: int, precision: str) -> str:
    """All that decides what an image's descriptor is, but the image and how it is turned -> 64 hexadecimal digits.

    Counts the modules and their settings as the model prints them, all parameters and buffers, and how it is used.
    """
    digest = hashlib.sha256(
        json.dumps([RECIPE, str(model), getattr(model, "config", None), image_size, precision], default=str).encode()
    )
    for name, tensor in sorted([*model.named_parameters(), *model.named_buffers()]):
        tensor = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def image_fingerprints(root: str | Path, paths: Sequence[str]) -> np.ndarray:
    """Files -> (N, 2) int64: of each one's path, and of its path, size and time of change (0: no such file)."""
    marks = np.zeros((len(paths), 2), dtype=np.int64)
    for row, path in enumerate(paths):
        marks[row, 0] = _digest(path)
        try:
            status = os.stat(Path(root) / path)
        except OSError:
            continue
        marks[row, 1] = _digest(f"{path} {status.st_size} {status.st_mtime_ns}")
    return marks


def _digest(text: str):
    return int.from_bytes(hashlib.blake2b(os.fsencode(text), digest_size=8).digest(), "little", signed=True) or 1


def place_name(root: str | Path) -> str:
    """A folder's name and its path's digest: `demo_world_1f2e3d4c`."""
    root = Path(root).resolve()
    return f"{root.name}_{hashlib.sha256(os.fsencode(root)).hexdigest()[:8]}"


def file_name(name: str, fingerprint: str, rotations: Sequence[int]) -> str:
    """`demo_world_1f2e3d4c_0123456789abcdef_0-90-180-270.f16`: a name, the model's digest, and the degrees."""
    return f"{name}_{fingerprint[:16]}_{'-'.join(map(str, rotations))}.f16"


class DescriptorFile:
    """Descriptors of N images in a file: `values` (layers, N, D) are Rows of it, `described` (N,) bool says which of
    them hold. `write` takes descriptors of some rows, `commit` makes them last. Made by `descriptor_file`.

    images (N, 2) as `image_fingerprints` gives; known: (N, 4) first, step, image and checksum of the table.
    """

    def __init__(
        self, marks: sqlite3.Connection, images: np.ndarray, known: np.ndarray, vectors: np.ndarray, layers: int
    ) -> None:
        first, step, image, checksum = known.T
        self.marks, self.images, self.pending = marks, images, []
        self.values = Rows(vectors, first + np.arange(layers)[:, None] * step)
        self.described = (image == images[:, 1]) & (image != 0)
        for rows in np.array_split(np.flatnonzero(self.described), 1 + len(images) // 1024):
            self.described[rows] = _checksums(self.values, rows) == checksum[rows]

    def write(self, rows: np.ndarray, descriptors: np.ndarray) -> None:
        """rows (B,), descriptors (layers, B, D) -> into the map. They last only after `commit`, and if finite."""
        self.values.vectors[self.values.index[:, rows]] = descriptors
        finite = np.isfinite(self.values[:, rows]).all(axis=(0, 2))
        self.pending += [row for row in rows[finite].tolist() if self.images[row, 1]]

    def commit(self) -> None:
        """Descriptors to the disk first, their marks after that."""
        if not self.pending:
            return
        self.values.vectors.flush()
        rows = np.array(self.pending)
        marks = np.column_stack([self.images[rows, 1], _checksums(self.values, rows), self.images[rows, 0]])
        self.marks.executemany("UPDATE images SET image = ?, checksum = ? WHERE path = ?", marks.tolist())
        self.marks.commit()
        self.described[rows] = True
        self.pending = []


@contextmanager
def descriptor_file(path: str | Path, layers: int, dim: int, images: np.ndarray) -> Iterator[DescriptorFile]:
    """The file of one model in so many rotations and these images, (N, 2) as `image_fingerprints` gives.

    Made where there is none; no other process describes into it meanwhile. Says in the log what is described and what
    has to be (again). Looks at these images only, whatever else the file has. Raises ValueError where the disk is full.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise ValueError(f"--descriptors {path.parent}: is a file or lies in one; give a folder") from None
    with _locked(path.with_suffix(".marks")) as marks:
        known, room = _reserve(marks, images[:, 0], layers)
        _grow(path, 2 * dim * max(1, room))
        marks.commit()
        vectors = np.memmap(path, np.float16, "r+", shape=(max(1, room), dim))
        kept = DescriptorFile(marks, images, known, vectors, layers)
        count, before = int(kept.described.sum()), int((known[:, 2] != 0).sum())
        stale = f", {before - count} entries are stale (image changed or gone, or broken)" if before > count else ""
        rest = f", {len(images) - count} are not yet" if count < len(images) else ""
        logging.info(f"{path}: {count} of {len(images)} images are described{stale}{rest}")
        try:
            yield kept
        finally:
            kept.commit()


@contextmanager
def _locked(path: Path, wait: bool = True):
    """Yields the connection to a table of images, made where there is none or a broken file, that no other process
    has; None if wait is False and one has. The lock goes with the connection, or with the process."""
    while True:
        path.touch()
        file = path.stat().st_ino
        with closing(sqlite3.connect(path, timeout=0)) as marks:
            try:
                if not _lock(marks, path, wait):
                    yield None
                    return
                if not path.exists() or path.stat().st_ino != file:  # removed while it waited
                    continue
                marks.execute(f"CREATE TABLE IF NOT EXISTS {TABLE}")
            except sqlite3.DatabaseError as error:
                if error.sqlite_errorcode not in (sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_CORRUPT):
                    raise ValueError(
                        f"{path}: cannot be locked ({error}); give --descriptors a folder on another disk"
                    ) from error
                # A warning, because commands without a log of their own show nothing less.
                older = path.read_bytes().startswith(OLDER)
                why = "its marks are of an earlier version's form" if older else "its marks are truncated or broken"
                logging.warning(f"{path.parent}: {path.stem} is described anew, {why}")
                path.unlink()
                continue
            yield marks
            return


def _lock(marks: sqlite3.Connection, path: Path, wait: bool):
    """-> whether the table is this process's, to the connection's end. Not by SQLite's own timeout: signals are heard
    between the tries."""
    marks.execute("PRAGMA locking_mode = EXCLUSIVE")
    told = False
    while True:
        try:
            marks.execute("BEGIN EXCLUSIVE")
            return True
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode != sqlite3.SQLITE_BUSY:
                raise
        if not wait:
            return False
        if not told:
            logging.info(f"{path}: another process describes with the same model, waiting for it")
            told = True
        time.sleep(0.1)


def _reserve(marks: sqlite3.Connection, paths: np.ndarray, layers: int):
    """Room for each of the paths (N,) -> (N, 4) first, step, image and checksum, 0 for none; and the vectors in all."""
    table = {path: rest for path, *rest in marks.execute("SELECT * FROM images")}
    end = max((first + (layers - 1) * step + 1 for first, step, *_ in table.values()), default=0)
    new = [path for path in dict.fromkeys(paths.tolist()) if path not in table]
    table |= {path: (end + row, len(new), 0, 0) for row, path in enumerate(new)}
    marks.executemany("INSERT INTO images VALUES (?, ?, ?, ?, ?)", [(path, *table[path]) for path in new])
    known = np.array([table[path] for path in paths.tolist()], dtype=np.int64).reshape(-1, 4)
    return known, end + layers * len(new)


def _grow(path: Path, size: int):
    """The file to at least this size. The space is reserved: a full disk is an error here, not a crash in the map."""
    with open(path, "ab") as file:
        before = file.tell()
        if size <= before:
            return
        try:
            os.posix_fallocate(file.fileno(), before, size - before)
        except AttributeError:  # macOS
            file.truncate(size)
        except OSError as error:
            file.truncate(before)
            raise ValueError(
                f"{path.parent}: no room ({error.strerror}) for {(size - before) / 1e9:.2f} GB of descriptors; give "
                "--descriptors a folder on another disk, or --forget_descriptors to remove those of other models"
            ) from error


def _checksums(values: Rows, rows: np.ndarray):
    """values (layers, N, D) at rows (B,) -> (B,) int64, of all layers of an image together."""
    blocks = np.ascontiguousarray(values[:, rows].transpose(1, 0, 2))
    return np.array([zlib.crc32(block) for block in blocks], dtype=np.int64)


def tidy(folder: str | Path, model: str, forget: bool = False) -> None:
    """Says in the log what descriptor files of other models than this (its fingerprint) lie in the folder; forget
    removes them, but those that a process is describing into. A file of another kind of name is not ours and stays."""
    named = [(path, NAME.fullmatch(path.name)) for path in sorted(Path(folder).glob("*.f16")) if not path.is_symlink()]
    others = [path for path, match in named if match and match[1] != model[:16]]
    if others and not forget:
        amount = sum(path.stat().st_size for path in others) / 1e9
        logging.info(
            f"{folder}: {len(others)} files ({amount:.2f} GB) of other models; --forget_descriptors removes them"
        )
    for path in others if forget else ():
        table = path.with_suffix(".marks")
        with _locked(table, wait=False) as marks:
            if marks is None:
                logging.info(f"{path}: kept, another process describes into it")
                continue
            logging.info(f"removed {path} ({path.stat().st_size / 1e9:.2f} GB) of another model")
            path.unlink()  # first: while the table is there and locked, nobody makes new ones
            table.unlink()
