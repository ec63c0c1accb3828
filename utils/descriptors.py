"""Descriptors kept on disk: float16, memory-mapped, written as they come. Nothing is described twice.

One file holds one list of images described by one model: a header (4096 bytes: one line of JSON, padded with spaces),
a mark for each image, and the descriptors (layers, N, D), one layer a rotation. An image's mark names what the file
looked like (path, size, time of change) and the checksum of its descriptors. It is written after them, when they are
on the disk, so a run that was killed leaves no half-written descriptor that a later run would trust.
"""

import errno
import hashlib
import json
import logging
import os
import shutil
import zlib
from pathlib import Path

import numpy as np
import torch

FORMAT = "earthloc descriptors 1"
RECIPE = 2  # to be raised when the same model and file come to another descriptor: reading, resizing, turning
PAGE = 4096
MARK = np.dtype([("image", "<u8"), ("checksum", "<u4"), ("unused", "<u4")])


def model_fingerprint(model, image_size, precision, rotations):
    """All that decides what an image's descriptor is, but the image -> 64 hexadecimal digits.

    Counts the modules and their settings as the model prints them, all parameters and buffers, and how it is used.
    """
    digest = hashlib.sha256(json.dumps([RECIPE, str(model), getattr(model, "config", None), image_size, precision,
                                        list(rotations)], default=str).encode())
    for name, tensor in sorted([*model.named_parameters(), *model.named_buffers()]):
        tensor = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def image_fingerprints(root, paths):
    """Files -> (N,) uint64 of each one's path, size and time of change; 0 where there is no such file."""
    marks = np.zeros(len(paths), dtype=np.uint64)
    for row, path in enumerate(paths):
        try:
            status = os.stat(Path(root) / path)
        except OSError:
            continue
        text = f"{path} {status.st_size} {status.st_mtime_ns}".encode()
        marks[row] = int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") or 1
    return marks


def file_name(label, root, fingerprint):
    """`database_demo_world_1f2e3d4c_0123456789abcdef.f16`: the folder's name, its path's digest, the model's."""
    root = Path(root).resolve()
    return f"{label}_{root.name}_{hashlib.sha256(str(root).encode()).hexdigest()[:8]}_{fingerprint[:16]}.f16"


class DescriptorFile:
    """Descriptors of N images on disk: `values` (layers, N, D) float16 is the memory map, `described` (N,) bool says
    which rows of it hold. `write` takes descriptors of some rows, `commit` makes them last."""

    def __init__(self, path, images, shape):
        self.path, self.images = Path(path), images
        self.marks = np.memmap(path, MARK, "r+", PAGE, (max(1, shape[1]),))[:shape[1]]
        self.values = np.memmap(path, np.float16, "r+", _data_start(shape[1]), (max(1, int(np.prod(shape))),))
        self.values = self.values[:int(np.prod(shape))].reshape(shape)
        self.described = _described(self.marks, self.values, images)
        self.pending = []

    @classmethod
    def open(cls, path, fingerprint, images, layers, dim):
        """The file of one model and these images (N,) uint64, with what of it still holds; made where there is none.

        Says in the log what was kept and what has to be described (again). Raises ValueError where the disk is full.
        """
        path, shape = Path(path), (layers, len(images), dim)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError):
            raise ValueError(f"--descriptors {path.parent}: is a file or lies in one; give a folder, or none") from None
        header = {"format": FORMAT, "model": fingerprint, "layers": layers, "dim": dim, "dtype": "float16"}
        old, remark = _read(path, header)
        if old is not None and np.array_equal(_expected(old[0], images), images):
            kept = cls(path, images, shape)
        else:  # another list of images, or none: a new file, with what the old one has of them
            temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
            _make(temporary, {**header, "images": len(images)}, shape)
            kept = cls(temporary, images, shape)
            if old is not None:
                kept._take_from(*old)
            os.replace(temporary, path)
            kept.path = path
        count, gone = int(kept.described.sum()), 0 if old is None else int((old[0]["image"] != 0).sum())
        stale = f", {gone - count} entries are stale (image changed or gone, or broken)" if gone > count else ""
        rest = f", {len(images) - count} are not yet" if count < len(images) else ""
        logging.info(f"{path}: {remark}{count} of {len(images)} images are described{stale}{rest}")
        return kept

    def write(self, rows, descriptors):
        """rows (B,), descriptors (layers, B, D) -> into the map. They last only after `commit`, and if finite."""
        self.values[:, rows] = descriptors
        finite = np.isfinite(self.values[:, rows]).all(axis=(0, 2))
        self.pending += [row for row in rows[finite].tolist() if self.images[row]]

    def commit(self):
        """Descriptors to the disk first, their marks after that."""
        if not self.pending:
            return
        self.values.flush()
        rows = np.array(self.pending)
        self.marks["checksum"][rows] = _checksums(self.values, rows)
        self.marks["image"][rows] = self.images[rows]
        self.marks.flush()
        self.described[rows] = True
        self.pending = []

    def _take_from(self, marks, values):
        """Descriptors of the same images from another file's marks and values."""
        old_row = {image: row for row, image in enumerate(marks["image"].tolist()) if image}
        pairs = [(row, old_row[image]) for row, image in enumerate(self.images.tolist()) if image in old_row]
        for start in range(0, len(pairs), 1024):
            rows, old = np.array(pairs[start:start + 1024]).T
            sound = _checksums(values, old) == marks["checksum"][old]
            self.write(rows[sound], values[:, old[sound]])
        self.commit()


def _data_start(count):
    return PAGE + -(-count * MARK.itemsize // PAGE) * PAGE


def _make(path, header, shape):
    """An empty file of the full size. The space is reserved: a full disk is an error here, not a crash in the map."""
    size = _data_start(shape[1]) + max(1, int(np.prod(shape))) * 2
    free = shutil.disk_usage(path.parent).free
    remedy = f"{size / 1e9:.2f} GB for the descriptors; give --descriptors another folder, or none to keep no file"
    if size > free:
        raise ValueError(f"{path.parent}: {free / 1e9:.2f} GB are free, fewer than {remedy}")
    with open(path, "wb") as file:
        file.write(json.dumps(header).encode().ljust(PAGE - 1) + b"\n")
        file.flush()
        try:
            os.posix_fallocate(file.fileno(), 0, size)
        except AttributeError:  # macOS, Windows
            file.truncate(size)
        except OSError as error:
            if error.errno in (errno.EOPNOTSUPP, errno.EINVAL):  # not on this file system
                file.truncate(size)
                return
            os.unlink(path)
            raise ValueError(f"{path.parent}: no room ({error.strerror}) for {remedy}") from error


def _read(path, header):
    """-> (marks, values) of a whole file with this header, or None; and a remark on a file that cannot be used."""
    if not path.exists():
        return None, ""
    try:
        with open(path, "rb") as file:
            found = json.loads(file.read(PAGE))
        count = int(found["images"])
        shape = (header["layers"], count, header["dim"])
        whole = path.stat().st_size == _data_start(count) + max(1, int(np.prod(shape))) * 2
    except (ValueError, KeyError, TypeError):
        found, whole = {}, False
    if not whole or {key: found.get(key) for key in header} != header:
        return None, "the file there is truncated, broken or of another model, all is described anew; "
    marks = np.memmap(path, MARK, "r", PAGE, (max(1, count),))[:count]
    values = np.memmap(path, np.float16, "r", _data_start(count), (max(1, int(np.prod(shape))),))
    return (marks, values[:int(np.prod(shape))].reshape(shape)), ""


def _expected(marks, images):
    """The marks' images where they are written, else what is to come: equal to `images` if the list is the same."""
    if len(marks) != len(images):
        return None
    return np.where(marks["image"] == 0, images, marks["image"])


def _checksums(values, rows):
    """values (layers, N, D) at rows (B,) -> (B,) uint32, of all layers of an image together."""
    blocks = np.ascontiguousarray(values[:, rows].transpose(1, 0, 2))
    return np.array([zlib.crc32(block) for block in blocks], dtype=np.uint32)


def _described(marks, values, images, block=1024):
    """(N,) bool: marked for the same image as `images` says, with descriptors that have the marked checksum."""
    described = (marks["image"] == images) & (images != 0)
    rows = np.flatnonzero(described)
    for start in range(0, len(rows), block):
        part = rows[start:start + block]
        described[part] = _checksums(values, part) == marks["checksum"][part]
    return described
