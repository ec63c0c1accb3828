"""Descriptors kept on disk: float16, memory-mapped, written as they come. Nothing is described twice.

Two files hold what one model made of one data set's images in one list of rotations, whoever asked for them:
`NAME.f16` the vectors (K, D), `NAME.marks` a mark for each image. Both begin with a header (4096 bytes: one line of
JSON, padded with spaces). A mark names the image's path, what its file looked like (path, size, time of change), where
its vectors lie (rotation i is vector `first + i * step`) and their checksum. A run adds room for the images it lacks,
at the end or where room is left over. A mark is filled in after its vectors are on the disk, so a run that was killed
leaves no half-written descriptor that a later one would trust, and no temporary file; the next run uses its room.

Several processes: one at a time describes into a file. It holds a lock on the marks (flock, which ends with the
process), the others wait for it and then find its descriptors there. Reading needs no lock: files only grow, and what
is marked for an image that has not changed is never moved or overwritten.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import logging
import os
import re
import shutil
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch

FORMAT = "earthloc descriptors 2"
RECIPE = 2  # to be raised when the same model and file come to another descriptor: reading, resizing, turning
PAGE = 4096
MARK = np.dtype([("path", "<u8"), ("image", "<u8"), ("first", "<u8"), ("step", "<u4"), ("checksum", "<u4")])


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

    def __array__(self, dtype: type | None = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self[...], dtype)

    def reshape(self, *shape: int) -> Rows:
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


def image_fingerprints(root: str | Path, paths: Sequence) -> np.ndarray:
    """Files -> (N, 2) uint64: of each one's path, and of its path, size and time of change (0: no such file)."""
    marks = np.zeros((len(paths), 2), dtype=np.uint64)
    for row, path in enumerate(paths):
        marks[row, 0] = _digest(path)
        try:
            status = os.stat(Path(root) / path)
        except OSError:
            continue
        marks[row, 1] = _digest(f"{path} {status.st_size} {status.st_mtime_ns}")
    return marks


def _digest(text: str):
    return int.from_bytes(hashlib.blake2b(os.fsencode(text), digest_size=8).digest(), "little") or 1


def file_name(root: str | Path, fingerprint: str, rotations: Sequence[int]) -> str:
    """`demo_world_1f2e3d4c_0123456789abcdef_0-90-180-270.f16`: the folder's name, its path's digest, the model's, and
    the degrees."""
    root = Path(root).resolve()
    place = hashlib.sha256(os.fsencode(root)).hexdigest()[:8]
    return f"{root.name}_{place}_{fingerprint[:16]}_{'-'.join(map(str, rotations))}.f16"


class DescriptorFile:
    """Descriptors of N images in a file: `values` (layers, N, D) are Rows of it, `described` (N,) bool says which of
    them hold. `write` takes descriptors of some rows, `commit` makes them last. Made by `descriptor_file`."""

    def __init__(
        self, marks: np.ndarray, slots: np.ndarray, vectors: np.ndarray, images: np.ndarray, layers: int
    ) -> None:
        self.marks, self.slots, self.images = marks, slots, images
        self.values = Rows(vectors, _lie(marks[slots], layers))
        self.described = (marks["image"][slots] == images) & (images != 0)
        for rows in np.array_split(np.flatnonzero(self.described), 1 + len(images) // 1024):
            self.described[rows] = _checksums(self.values, rows) == marks["checksum"][slots[rows]]
        self.pending = []

    def write(self, rows: np.ndarray, descriptors: np.ndarray) -> None:
        """rows (B,), descriptors (layers, B, D) -> into the map. They last only after `commit`, and if finite."""
        self.values.vectors[self.values.index[:, rows]] = descriptors
        finite = np.isfinite(self.values[:, rows]).all(axis=(0, 2))
        self.pending += [row for row in rows[finite].tolist() if self.images[row]]

    def commit(self) -> None:
        """Descriptors to the disk first, their marks after that."""
        if not self.pending:
            return
        self.values.vectors.flush()
        rows = np.array(self.pending)
        self.marks["checksum"][self.slots[rows]] = _checksums(self.values, rows)
        self.marks["image"][self.slots[rows]] = self.images[rows]
        self.marks.flush()
        self.described[rows] = True
        self.pending = []


@contextmanager
def descriptor_file(
    path: str | Path, model: str, rotations: Sequence[int], dim: int, images: np.ndarray
) -> Iterator[DescriptorFile]:
    """The file of one model (its fingerprint) and these images, (N, 2) as `image_fingerprints` gives -> DescriptorFile.

    Made where there is none; no other process describes into it meanwhile. Says in the log what is described and what
    has to be (again). Looks at these images only, whatever else the file has. Raises ValueError where the disk is full.
    """
    path = Path(path)
    header = {"format": FORMAT, "model": model, "rotations": list(rotations), "dim": dim, "dtype": "float16"}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise ValueError(f"--descriptors {path.parent}: is a file or lies in one; give a folder") from None
    remark = ""
    with _locked(path.with_suffix(".marks")) as file:
        if (os.fstat(file).st_size or path.exists()) and not _is_whole(path, file, header):
            remark = "the file there is truncated, broken or of another model, all is described anew; "
            path.unlink(missing_ok=True)  # a new file: a process may still read from the old one
            os.ftruncate(file, 0)
        slots, known = _reserve(path, file, header, images[:, 0])
        marks = np.memmap(path.with_suffix(".marks"), MARK, "r+", PAGE, (max(1, _count(file)),))
        room = max(1, (path.stat().st_size - PAGE) // (2 * dim))
        kept = DescriptorFile(
            marks, slots, np.memmap(path, np.float16, "r+", PAGE, (room, dim)), images[:, 1], len(rotations)
        )
        count, before = int(kept.described.sum()), int((marks["image"][slots[known]] != 0).sum())
        stale = f", {before - count} entries are stale (image changed or gone, or broken)" if before > count else ""
        rest = f", {len(images) - count} are not yet" if count < len(images) else ""
        logging.info(f"{path}: {remark}{count} of {len(images)} images are described{stale}{rest}")
        try:
            yield kept
        finally:
            kept.commit()


@contextmanager
def _locked(path: str | Path, wait: bool = True):
    """Yields the open file, made where there is none, that no other process has locked; None if wait is False and one
    has. The lock goes with the process, however it ends."""
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if not wait:
                    yield None
                    return
                logging.info(f"{path}: another process describes with the same model, waiting for it")
                fcntl.flock(file, fcntl.LOCK_EX)
            except OSError as error:
                raise ValueError(
                    f"{path}: cannot be locked ({error.strerror}); give --descriptors a folder on another disk"
                ) from error
            if path.exists() and os.path.samestat(os.fstat(file), os.stat(path)):  # not removed while it waited
                yield file
                return
        finally:
            os.close(file)


def _count(file: BinaryIO):
    return (os.fstat(file).st_size - PAGE) // MARK.itemsize


def _marks(file: BinaryIO):
    return np.frombuffer(os.pread(file, _count(file) * MARK.itemsize, PAGE), MARK)


def _lie(marks: np.ndarray, layers: int):
    """marks (N,) -> (layers, N) numbers of their vectors."""
    return marks["first"].astype(np.int64) + np.arange(layers)[:, None] * marks["step"].astype(np.int64)


def _is_whole(path: str | Path, file: BinaryIO, header: dict):
    """Whether marks and vectors have this header, and the marks' vectors exist and are no other's."""
    if read_header(path) != header or read_header(path.with_suffix(".marks")) != header:
        return False
    marks = _marks(file)
    lie = _lie(marks[marks["step"] > 0], len(header["rotations"]))
    room = (path.stat().st_size - PAGE) // (2 * header["dim"])
    return lie.min(initial=0) >= 0 and lie.max(initial=-1) < room and len(np.unique(lie)) == lie.size


def read_header(path: str | Path) -> dict:
    """The header of a descriptor file, of whatever format, as a dict; {} where it is no such file."""
    try:
        with open(path, "rb") as file:
            header = json.loads(file.read(PAGE))
        return header if str(header.get("format")).startswith("earthloc descriptors ") else {}
    except (OSError, ValueError, AttributeError):
        return {}


def _reserve(path: str | Path, file: BinaryIO, header: dict, paths: np.ndarray):
    """Room for each of the paths (N,) uint64 -> (N,) which mark is whose, and (N,) bool: it was there already."""
    page = json.dumps(header).encode().ljust(PAGE - 1) + b"\n"
    if not path.exists():
        path.write_bytes(page)
        os.pwrite(file, page, 0)
    marks = _marks(file).copy()
    slots = np.full(len(paths), -1)
    if len(marks):
        order = np.argsort(marks["path"], kind="stable")
        found = order[np.searchsorted(marks["path"], paths, sorter=order).clip(max=len(marks) - 1)]
        slots = np.where((marks["path"][found] == paths) & (marks["step"][found] > 0), found, -1)
    known, lacking = slots >= 0, np.flatnonzero(slots < 0)
    left = np.setdiff1d(np.flatnonzero((marks["image"] == 0) & (marks["step"] > 0)), slots)[: len(lacking)]
    slots[lacking[: len(left)]] = left
    new, layers = len(lacking) - len(left), len(header["rotations"])
    slots[lacking[len(left) :]] = len(marks) + np.arange(new)
    marks["path"][left] = paths[lacking[: len(left)]]
    added = np.zeros(new, MARK)
    begin = int(_lie(marks[marks["step"] > 0], layers).max(initial=-1)) + 1
    added["path"], added["first"], added["step"] = paths[lacking[len(left) :]], begin + np.arange(new), new
    _grow(path, PAGE + (begin + layers * new) * header["dim"] * 2)
    if len(lacking):
        os.pwrite(file, np.concatenate([marks, added]).tobytes(), PAGE)
    return slots, known


def _grow(path: str | Path, size: int):
    """The file to this size. The space is reserved: a full disk is an error here, not a crash in the map."""
    before = path.stat().st_size
    if size <= before:
        return
    free = shutil.disk_usage(path.parent).free
    remedy = (
        f"{(size - before) / 1e9:.2f} GB for the descriptors; give --descriptors a folder on another disk, or "
        f"--forget_descriptors to remove those of other models"
    )
    if size - before > free:
        raise ValueError(f"{path.parent}: {free / 1e9:.2f} GB are free, fewer than {remedy}")
    with open(path, "r+b") as file:
        try:
            os.posix_fallocate(file.fileno(), before, size - before)
        except AttributeError:  # macOS
            file.truncate(size)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
                file.truncate(before)
                raise ValueError(f"{path.parent}: no room ({error.strerror}) for {remedy}") from error
            file.truncate(size)  # not on this file system


def _checksums(values: np.ndarray, rows: np.ndarray):
    """values (layers, N, D) at rows (B,) -> (B,) uint32, of all layers of an image together."""
    blocks = np.ascontiguousarray(values[:, rows].transpose(1, 0, 2))
    return np.array([zlib.crc32(block) for block in blocks], dtype=np.uint32)


def tidy(folder: str | Path, model: str, forget: bool = False) -> None:
    """Says in the log what descriptor files of other models than this (its fingerprint) lie in the folder; forget
    removes them, but those that a process is describing into.

    Earlier versions left temporary files when killed: these go always. A file without the header is not ours and stays.
    """
    found = {
        path: header
        for path in sorted(Path(folder).glob("*"))
        if path.is_file()
        and not path.is_symlink()
        and re.search(r"\.(f16|marks|f16\.\d+\.tmp)$", path.name)
        and (header := read_header(path))
    }
    temporary = {path for path in found if path.suffix == ".tmp"}
    _remove(
        [path for path in temporary if not _is_running(int(path.name.split(".")[-2]))],
        "left behind by a run that was killed",
    )
    others = [path for path, header in found.items() if header.get("model") != model and path not in temporary]
    if not forget:
        if others:
            logging.info(f"{folder}: {_amount(others)} of other models; --forget_descriptors removes them")
        return
    _remove([path for path in others if not path.with_suffix(".marks").exists()], "of an earlier version")
    for marks in [path for path in others if path.suffix == ".marks"]:
        with _locked(marks, wait=False) as file:
            if file is None:
                logging.info(f"{marks}: kept, another process describes into its file")
            else:  # the vectors first: while the marks are there and locked, nobody makes new ones
                _remove([path for path in (marks.with_suffix(".f16"), marks) if path in found], "of another model")


def _remove(paths: Iterable[Path], what: str):
    if paths:
        amount = _amount(paths)
        for path in paths:
            path.unlink(missing_ok=True)
        logging.info(f"removed {amount} {what}: {', '.join(map(str, paths))}")


def _amount(paths: Iterable[Path]):
    return f"{len(paths)} files ({sum(path.stat().st_size for path in paths) / 1e9:.2f} GB)"


def _is_running(process: int):
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
