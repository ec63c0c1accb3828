"""Image files -> descriptors: in memory, kept on disk, or a batch at a time."""

import hashlib
import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from datasets.images import read_image, resize
from datasets.names import Catalogue
from retrieval import store
from retrieval.store import DescriptorFile, Rows
from utils import distributed
from utils.flags import DESCRIPTORS, DEVICE, WORKERS, BatchSize, Device, Precision, Workers
from utils.precision import autocast, chosen_precision, require_device
from utils.signals import ignore_signals, iterate
from utils.tables import Strings
from utils.workers import PREFETCH, fitting_workers, free_shared_memory

ROTATIONS = (0, 90, 180, 270)  # 4x90TTA (paper, sec. 5.1.2): degrees that a database image is turned counter-clockwise
Failures = list[tuple[int, str]]  # (row, what went wrong)
Batch = tuple[np.ndarray, np.ndarray, Failures]


class ImageFiles(Dataset):
    """Paths -> (row, uint8 (3, size, size), error). A file that cannot be read says so and gives no pixels to use.
    upright: as a viewer shows them (EXIF), see read_image. A uint8 tensor (3, H, W) may stand in a path's place."""

    def __init__(self, paths: Sequence[str | Path | Tensor], size: int, upright: bool = False) -> None:
        as_is = isinstance(paths, Strings)  # a million names in little memory
        self.paths = paths if as_is else [path if torch.is_tensor(path) else str(path) for path in paths]
        self.size, self.upright = size, upright

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, row: int) -> tuple[int, Tensor, str]:
        try:
            return row, self.read(self.paths[row]), ""
        except (ValueError, OSError) as error:
            return row, torch.zeros(3, self.size, self.size, dtype=torch.uint8), str(error) or type(error).__name__

    def read(self, path: str | Tensor) -> Tensor:
        """-> uint8 (3, size, size). Raises ValueError or OSError naming the file."""
        if torch.is_tensor(path):
            return resize(path.permute(1, 2, 0), self.size).permute(2, 0, 1).contiguous()
        return read_image(path, self.size, self.upright)


def rotate(images: Tensor, degrees: int) -> Tensor:
    """(..., H, W) -> the same turned counter-clockwise by a multiple of 90 degrees, without resampling."""
    if degrees % 90:
        raise ValueError(f"rotation of {degrees} degrees: only multiples of 90 turn without resampling")
    return torch.rot90(images, degrees // 90, dims=(-2, -1))


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """In evaluation mode inside, as it was after."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


@dataclass(frozen=True)
class Describer:
    """A model, and how images go through it: float RGB in [0, 1], (B, 3, H, W) -> (B, D), each turned by `rotations`.

    image_size: pixels a side. upright: photos as a viewer shows them, by EXIF. progress: with a bar. Every file is read
    once, as uint8, and turned on the device. Paths may be uint8 tensors (3, H, W).
    """

    model: nn.Module
    image_size: int
    batch_size: int = 32
    num_workers: int = 0
    device: str | torch.device = "cpu"
    precision: str = "fp32"
    rotations: Sequence[int] = (0,)
    upright: bool = False
    progress: bool = True

    @property
    def fingerprint(self) -> str:
        return store.model_fingerprint(self.model, self.image_size, self.precision)

    def __call__(self, paths: Sequence, label: str = "images") -> tuple[np.ndarray, Failures]:
        """-> descriptors (len(rotations), N, D) float32, and failures.

        Rows of failures are NaN: a search refuses them, so they have to be left out. Of several processes, each
        describes every world-th batch, and all of them return all of it.
        """
        batches = batches_of(np.arange(len(paths)), self.batch_size)
        shares = [batches[rank :: distributed.world()] for rank in range(distributed.world())]
        descriptors, failures, shape = None, [], (len(self.rotations), len(paths))
        for rows, described, failed in self.batches(paths, shares[distributed.rank()], label):
            if descriptors is None:
                descriptors = np.full((*shape, described.shape[2]), np.nan, dtype=np.float32)
            descriptors[:, rows] = described
            failures += failed
        if distributed.world() > 1:
            descriptors, failures = _from_all(descriptors, failures, shares, shape)
        return np.zeros((*shape, 0), dtype=np.float32) if descriptors is None else descriptors, failures

    def kept(
        self,
        folder: str | Path,
        root: str | Path,
        paths: Sequence[str],
        label: str = "images",
        wanted: np.ndarray | None = None,
        commit_every: float = 2.0,
    ) -> tuple[Rows, Failures]:
        """As a call, for paths relative to root, with the descriptors kept in a file in `folder` -> its Rows (float16).

        What the file has for this model and these images is not described again (retrieval/store.py). New ones are safe
        on disk every commit_every seconds, so a killed run goes on where it was. Unreadable images are tried each time.
        wanted: rows of paths that are needed, None for all; the others are not looked at and have no values.
        """
        wanted = np.arange(len(paths)) if wanted is None else np.asarray(wanted, dtype=np.int64)
        names, failures = [paths[row] for row in wanted], []
        with self.file(folder, store.place_name(root), names, root) as kept:
            missing = batches_of(np.flatnonzero(~kept.described), self.batch_size)
            committed = time.monotonic()
            for rows, described, failed in self.batches([Path(root) / name for name in names], missing, label):
                kept.write(rows, described)
                failures += [(int(wanted[row]), error) for row, error in failed]
                if time.monotonic() - committed >= commit_every:
                    kept.commit()
                    committed = time.monotonic()
        index = np.full((len(self.rotations), len(paths)), len(kept.values.vectors))  # none: reading is an IndexError
        index[:, wanted] = kept.values.index
        return Rows(kept.values.vectors, index), failures

    def file(
        self, folder: str | Path, name: str, paths: Sequence[str | Path], root: str | Path = ""
    ) -> AbstractContextManager[DescriptorFile]:
        """The file NAME_… in the folder, for the descriptors of these images, their paths relative to root."""
        path = Path(folder) / store.file_name(name, self.fingerprint, self.rotations)
        black = torch.zeros(1, 3, self.image_size, self.image_size, device=self.device)
        with evaluating(self.model), torch.inference_mode(), autocast(self.device, self.precision):
            dim = self.model(black).shape[1]
        return store.descriptor_file(path, len(self.rotations), dim, store.image_fingerprints(root, paths))

    def photos_file(
        self, folder: str | Path, source: Sequence[str], shard: tuple[int, int], photos: Sequence[str | Path]
    ) -> AbstractContextManager[DescriptorFile]:
        """`file` of a run's photos, by what it reads and writes (source: paths) and its shard (i, n)."""
        place = hashlib.sha256(os.fsencode("\0".join(map(os.path.abspath, source)))).hexdigest()[:8]
        return self.file(folder, f"photos_{place}_{shard[0]}-of-{shard[1]}", Strings(map(os.path.abspath, photos)))

    def in_order(self, paths: Sequence, kept: DescriptorFile | None = None) -> Iterator[Batch]:
        """A batch at a time: yields rows (B,), descriptors (len(rotations), B, D) float32, and failures. Memory does
        not grow with the number of paths.

        kept: a DescriptorFile of these paths, of which what it has is taken, and which keeps what is new.
        """
        batches = batches_of(np.arange(len(paths)), self.batch_size)
        new = batches if kept is None else [each[~kept.described[each]] for each in batches]
        fresh = self.batches(paths, [each for each in new if len(each)], "")
        if kept is None:
            yield from fresh
            return
        for rows, unknown in zip(batches, new):
            failures = []
            if len(unknown):
                _, described, failures = next(fresh)
                kept.write(unknown, described)
                kept.commit()
            yield rows, np.asarray(kept.values[:, rows], dtype=np.float32), failures

    def batches(self, paths: Sequence, batches: list[np.ndarray], label: str) -> Iterator[Batch]:
        """Of each batch of rows of paths, yields rows (B,), descriptors (len(rotations), B, D) float32, NaN for
        failures, and these. label: of the progress bar, "" for none."""

        def forward(images: Tensor):
            # Channels last is faster in both precisions: 139 for 61 images/s in fp32, 293 for 203 in bf16 (ResNet-18
            # at 128 px, 2 cores).
            views = (rotate(images, turn).contiguous(memory_format=torch.channels_last) for turn in self.rotations)
            with autocast(self.device, self.precision):
                return torch.stack([self.model(view).float() for view in views])

        files = ImageFiles(paths, self.image_size, self.upright)
        title = f"describing {label}" if label and self.progress else ""
        with evaluating(self.model):
            yield from through(forward, files, batches, self.num_workers, self.device, title)


def describe_catalogue(
    model: nn.Module,
    catalogue: Catalogue,
    rotations: Sequence[int] = (0,),
    *,
    descriptors: Annotated[str, "folder where whole descriptors are kept"] = DESCRIPTORS,
    batch_size: BatchSize = 32,
    num_workers: Workers = WORKERS,
    device: Device = DEVICE,
    precision: Precision = "fp32",
) -> tuple[Rows, Failures]:
    """A data set's photos or images -> Rows (len(rotations), N, D), kept as `Describer.kept` does, and failures. Its
    keywords are flags of all commands that take them."""
    device = require_device(device)
    how = model.config.image_size, batch_size, num_workers, device, chosen_precision(precision, device), rotations
    name = catalogue.root.name
    return Describer(model.to(device), *how).kept(descriptors, catalogue.root, catalogue.paths, name)


def _from_all(descriptors: np.ndarray | None, failures: Failures, shares: list[list[np.ndarray]], shape: tuple):
    """This rank's rows of descriptors (R, N, D), None without any -> the same with those of all ranks."""
    failures = sorted(sum(distributed.gather_objects(failures), []))
    dim = max(distributed.gather_objects(0 if descriptors is None else descriptors.shape[2]))
    if dim == 0:
        return None, failures
    if descriptors is None:
        descriptors = np.full((*shape, dim), np.nan, dtype=np.float32)
    rows = [np.concatenate([*share, np.zeros(0, dtype=np.int64)]) for share in shares]
    for layer in descriptors:  # one at a time, so that the copies stay small
        own = torch.from_numpy(layer[rows[distributed.rank()]])
        for theirs, values in zip(rows, distributed.gather_parts(own, [len(each) for each in rows])):
            layer[theirs] = values
    return descriptors, failures


def batches_of(rows: np.ndarray, batch_size: int) -> list[np.ndarray]:
    """(N,) -> list of arrays, each of batch_size but the last."""
    return [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]


def image_loader(
    files: ImageFiles, batches: Iterable, batch_size: int, num_workers: int, device: str | torch.device
) -> DataLoader:
    """Batches (lists of rows, batch_size at most) of files, with as many of the workers as shared memory has room for:
    fewer are slower, which a line tells, but an error could come hours into a training."""
    fitting, why = fitting_workers(num_workers, batch_size * 3 * files.size**2, free_shared_memory())
    if fitting < num_workers:
        logging.warning(f"{why}. {fitting} read now, which is slower")
    pinned = torch.device(device).type == "cuda"
    more = {"worker_init_fn": ignore_signals, "prefetch_factor": PREFETCH} if fitting else {}
    return DataLoader(files, batch_sampler=batches, num_workers=fitting, pin_memory=pinned, **more)


def through(
    forward: Callable[[Tensor], Tensor],
    files: ImageFiles,
    batches: list[np.ndarray],
    num_workers: int,
    device: str | torch.device,
    label: str,
) -> Iterator[Batch]:
    """Images through a network: forward takes (B, 3, size, size) in [0, 1] on the device and gives (…, B, D) float32.

    Of each batch of rows, yields rows (B,), what came out, NaN for failures, and these. label: of the progress bar.
    """
    workers = min(num_workers, len(batches))  # one photo wants no more than one
    loader = image_loader(files, batches, max(map(len, batches), default=0), workers, device)
    silent = not label or distributed.rank() > 0
    with tqdm(total=sum(map(len, batches)), desc=label, unit="img", leave=False, disable=silent) as bar:
        for rows, images, errors in iterate(loader):
            with torch.inference_mode():
                found = forward(images.to(device, non_blocking=True).float() / 255)
            found = found.cpu().numpy()  # one wait for the device, not one a rotation
            found[..., [i for i, error in enumerate(errors) if error], :] = np.nan
            yield rows.numpy(), found, [(int(row), error) for row, error in zip(rows, errors) if error]
            bar.update(len(rows))
