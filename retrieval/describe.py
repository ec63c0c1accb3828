"""Describe images, search, and count: the array side of evaluation. Nothing here knows a data set's layout."""

import hashlib
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from datasets.images import read_image, resize
from retrieval.search import SEARCHES, make_search, search  # noqa: F401  (one interface, three ways)
from retrieval.store import DescriptorFile, Rows, descriptor_file, file_name, image_fingerprints, model_fingerprint
from utils import distributed, geo
from utils.precision import autocast
from utils.signals import ignore_signals, iterate
from utils.tables import Strings

ROTATIONS = (0, 90, 180, 270)  # 4x90TTA (paper, sec. 5.1.2): degrees that a database image is turned counter-clockwise
RANKS = (1, 5, 10, 20, 100)


class ImageFiles(Dataset):
    """Paths -> (row, uint8 (3, size, size), error). A file that cannot be read says so and gives no pixels to use.
    upright: as a viewer shows them (EXIF), see read_image. A uint8 tensor (3, H, W) may stand in a path's place."""

    def __init__(self, paths: Sequence, size: int, upright: bool = False) -> None:
        as_is = isinstance(paths, Strings)  # a million names in little memory
        self.paths = paths if as_is else [path if torch.is_tensor(path) else str(path) for path in paths]
        self.size, self.upright = size, upright

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, row: int) -> tuple:
        path = self.paths[row]
        try:
            if torch.is_tensor(path):
                return row, resize(path.permute(1, 2, 0), self.size).permute(2, 0, 1).contiguous(), ""
            return row, read_image(path, self.size, self.upright), ""
        except (ValueError, OSError) as error:
            return row, torch.zeros(3, self.size, self.size, dtype=torch.uint8), str(error) or type(error).__name__


def rotate(images: torch.Tensor, degrees: int) -> torch.Tensor:
    """(..., H, W) -> the same turned counter-clockwise by a multiple of 90 degrees, without resampling."""
    if degrees % 90:
        raise ValueError(f"rotation of {degrees} degrees: only multiples of 90 turn without resampling")
    return torch.rot90(images, degrees // 90, dims=(-2, -1))


@contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """In evaluation mode inside, as it was after."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def describe(
    model: torch.nn.Module,
    paths: Sequence,
    image_size: int,
    batch_size: int = 32,
    num_workers: int = 0,
    device: str | torch.device = "cpu",
    precision: str = "fp32",
    rotations: Sequence[int] = (0,),
    label: str = "describing",
    progress: bool = True,
    upright: bool = False,
) -> tuple[np.ndarray, list]:
    """Image files -> descriptors (len(rotations), N, D) float32, and failures: a list of (row, what went wrong).

    Each file is read once, as uint8, and turned on the device. Rows of failures are NaN: a search refuses them, so
    they have to be left out. The model takes float RGB in [0, 1], (B, 3, H, W) -> (B, D). Of several processes, each
    describes every world-th batch, and all of them return all of it. upright: by the photos' EXIF orientation.
    """
    shares = [batches_of(len(paths), batch_size)[rank :: distributed.world()] for rank in range(distributed.world())]
    descriptors, failures = None, []
    with evaluating(model):
        for rows, described, failed in describe_batches(
            model,
            paths,
            shares[distributed.rank()],
            image_size,
            num_workers,
            device,
            precision,
            rotations,
            label,
            progress,
            upright,
        ):
            if descriptors is None:
                shape = (len(rotations), len(paths), described.shape[2])
                descriptors = np.full(shape, np.nan, dtype=np.float32)
            descriptors[:, rows] = described
            failures += failed
    if distributed.world() > 1:
        descriptors, failures = _from_all(descriptors, failures, shares, (len(rotations), len(paths)))
    if descriptors is None:
        descriptors = np.zeros((len(rotations), 0, 0), dtype=np.float32)
    return descriptors, failures


def _from_all(descriptors: np.ndarray | None, failures: list, shares: list, shape: tuple[int, ...]):
    """This rank's rows of descriptors (R, N, D), None without any -> the same with those of all ranks."""
    failures = sorted(sum(distributed.gather_objects(failures), []))
    dim = max(distributed.gather_objects(0 if descriptors is None else descriptors.shape[2]))
    if dim == 0:
        return None, failures
    if descriptors is None:
        descriptors = np.full((*shape, dim), np.nan, dtype=np.float32)
    rows = [np.array([row for batch in share for row in batch], dtype=np.int64) for share in shares]
    for layer in descriptors:  # one at a time, so that the copies stay small
        own = torch.from_numpy(layer[rows[distributed.rank()]])
        for theirs, values in zip(rows, distributed.gather_parts(own, [len(each) for each in rows])):
            layer[theirs] = values
    return descriptors, failures


def describe_kept(
    folder: str | Path,
    model: torch.nn.Module,
    root: str | Path,
    paths: Sequence,
    image_size: int,
    batch_size: int = 32,
    num_workers: int = 0,
    device: str | torch.device = "cpu",
    precision: str = "fp32",
    rotations: Sequence[int] = (0,),
    label: str = "images",
    progress: bool = True,
    commit_every: float = 2.0,
    wanted: np.ndarray | None = None,
) -> tuple[Rows, list]:
    """As `describe`, for paths relative to root, with the descriptors kept in a file in `folder` -> its Rows (float16).

    What the file has for this model and these images is not described again (retrieval/store.py). New ones are safe
    on disk every commit_every seconds, so a killed run goes on where it was. Unreadable images are tried each time.
    wanted: rows of paths that are needed, None for all; the others are not looked at and have no values.
    """
    fingerprint = model_fingerprint(model, image_size, precision)
    wanted = np.arange(len(paths)) if wanted is None else np.asarray(wanted, dtype=np.int64)
    names = [paths[row] for row in wanted]
    failures = []
    with evaluating(model):
        dim = descriptor_dim(model, image_size, device, precision)
        with descriptor_file(
            Path(folder) / file_name(root, fingerprint, rotations),
            fingerprint,
            rotations,
            dim,
            image_fingerprints(root, names),
        ) as kept:
            missing = np.flatnonzero(~kept.described)
            committed = time.monotonic()
            batches = [missing[each] for each in batches_of(len(missing), batch_size)]
            for rows, described, failed in describe_batches(
                model,
                [Path(root) / name for name in names],
                batches,
                image_size,
                num_workers,
                device,
                precision,
                rotations,
                f"describing {label}",
                progress,
            ):
                kept.write(rows, described)
                failures += [(int(wanted[row]), error) for row, error in failed]
                if time.monotonic() - committed >= commit_every:
                    kept.commit()
                    committed = time.monotonic()
    index = np.full((len(rotations), len(paths)), len(kept.values.vectors))  # none: to read it is an IndexError
    index[:, wanted] = kept.values.index
    return Rows(kept.values.vectors, index), failures


def describe_in_order(
    model: torch.nn.Module,
    paths: Sequence,
    image_size: int,
    batch_size: int = 32,
    num_workers: int = 0,
    device: str | torch.device = "cpu",
    precision: str = "fp32",
    rotations: Sequence[int] = (0,),
    kept: DescriptorFile | None = None,
) -> Iterator[tuple[np.ndarray, np.ndarray, list]]:
    """As `describe`, for photos (upright), a batch at a time: yields rows (B,), descriptors (len(rotations), B, D)
    float32, and failures. Memory does not grow with the number of paths.

    kept: a DescriptorFile of these paths, of which what it has is taken, and which keeps what is new.
    """
    batches = [np.arange(each.start, each.stop) for each in batches_of(len(paths), batch_size)]
    known = np.zeros(len(paths), dtype=bool) if kept is None else kept.described.copy()
    fresh = describe_batches(
        model,
        paths,
        [rows[~known[rows]] for rows in batches if not known[rows].all()],
        image_size,
        num_workers,
        device,
        precision,
        rotations,
        "",
        progress=False,
        upright=True,
    )
    with evaluating(model):
        for rows in batches:
            old, failures, descriptors = known[rows], [], None
            if not old.all():
                _, described, failures = next(fresh)
                if kept is not None:
                    described = described.astype(np.float16).astype(np.float32)  # as they will be found next time
                    kept.write(rows[~old], described)
                    kept.commit()
                descriptors = np.full((len(rotations), len(rows), described.shape[2]), np.nan, dtype=np.float32)
                descriptors[:, ~old] = described
            if old.any():
                before = np.asarray(kept.values[:, rows[old]], dtype=np.float32)
                if descriptors is None:
                    descriptors = before
                descriptors[:, old] = before
            yield rows, descriptors, failures


@contextmanager
def kept_descriptors(
    folder: str | Path,
    name: str,
    model: torch.nn.Module,
    paths: Sequence,
    image_size: int,
    device: str | torch.device = "cpu",
    precision: str = "fp32",
    rotations: Sequence[int] = (0,),
) -> Iterator[DescriptorFile]:
    """The file NAME_… in the folder, for the descriptors of these photos -> DescriptorFile for `describe_in_order`."""
    fingerprint = model_fingerprint(model, image_size, precision)
    images = image_fingerprints("", Strings(os.path.abspath(path) for path in paths))
    path = Path(folder) / f"{name}_{fingerprint[:16]}_{'-'.join(map(str, rotations))}.f16"
    dim = descriptor_dim(model, image_size, device, precision)
    with descriptor_file(path, fingerprint, rotations, dim, images) as kept:
        yield kept


def kept_photos(
    folder: str | Path,
    source: Sequence,
    shard: tuple[int, int],
    model: torch.nn.Module,
    photos: Sequence,
    image_size: int,
    rotations: tuple = (0,),
    **settings: object,
) -> AbstractContextManager[DescriptorFile]:
    """`kept_descriptors` of a run's photos, by what it reads and writes (source: paths) and its shard (i, n)."""
    place = hashlib.sha256(os.fsencode("\0".join(map(os.path.abspath, source)))).hexdigest()[:8]
    name = f"photos_{place}_{shard[0]}-of-{shard[1]}"
    return kept_descriptors(folder, name, model, photos, image_size, rotations=rotations, **settings)


def descriptor_dim(
    model: torch.nn.Module, image_size: int, device: str | torch.device = "cpu", precision: str = "fp32"
) -> int:
    """Values in a descriptor of the model."""
    with evaluating(model), torch.inference_mode(), autocast(torch.device(device), precision):
        return model(torch.zeros(1, 3, image_size, image_size, device=device)).shape[1]


def batches_of(count: int, batch_size: int) -> list[range]:
    """-> list of ranges that cover range(count), each of batch_size but the last."""
    return [range(start, min(start + batch_size, count)) for start in range(0, count, batch_size)]


def describe_batches(
    model: torch.nn.Module,
    paths: Sequence,
    batches: Sequence[range],
    image_size: int,
    num_workers: int,
    device: str | torch.device,
    precision: str,
    rotations: Sequence[int],
    label: str,
    progress: bool,
    upright: bool = False,
) -> Iterator[tuple[np.ndarray, np.ndarray, list]]:
    """Of each batch of rows of paths, yields rows (B,), descriptors (len(rotations), B, D) float32, NaN for failures,
    and these: (row, error)."""
    device = torch.device(device)
    loader = DataLoader(
        ImageFiles(paths, image_size, upright),
        batch_sampler=batches,
        num_workers=num_workers,
        pin_memory=device.type == "cuda",
        worker_init_fn=ignore_signals,
    )
    with tqdm(
        total=sum(map(len, batches)),
        desc=label,
        unit="img",
        leave=False,
        disable=not progress or distributed.rank() > 0,
    ) as bar:
        for rows, images, errors in iterate(loader):
            layers = []
            with torch.inference_mode():
                images = images.to(device, non_blocking=True).float() / 255
                for degrees in rotations:
                    # Channels last is faster in both precisions: 139 for 61 images/s in fp32, 293 for 203 in bf16
                    # (ResNet-18 at 128 px, 2 cores).
                    view = rotate(images, degrees).contiguous(memory_format=torch.channels_last)
                    with autocast(device, precision):
                        layers.append(model(view).float())
                described = torch.stack(layers).cpu().numpy()  # one wait for the device, not one a rotation
            described[:, [i for i, error in enumerate(errors) if error]] = np.nan
            yield rows.numpy(), described, [(int(row), error) for row, error in zip(rows, errors) if error]
            bar.update(len(rows))


def first_of_each(images: np.ndarray, k: int) -> np.ndarray:
    """Ranked lists with repeats (Q, K) int -> positions (Q, k) in the list of each image's first entry; -1 fills up.

    An entry of -1 is no image. This turns the count "as they come" into the count over distinct images.
    """
    images = np.asarray(images)
    order = np.argsort(images, axis=1, kind="stable")
    ordered = np.take_along_axis(images, order, axis=1)
    first = np.ones_like(ordered, dtype=bool)
    first[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    keep = np.zeros_like(first)
    np.put_along_axis(keep, order, first & (ordered >= 0), axis=1)
    kept_first = np.argsort(~keep, axis=1, kind="stable")[:, :k]
    positions = np.where(np.take_along_axis(keep, kept_first, axis=1), kept_first, -1)
    return np.pad(positions, ((0, 0), (0, k - positions.shape[1])), constant_values=-1)


def take(values: np.ndarray, positions: np.ndarray, missing: float) -> np.ndarray:
    """values (Q, K) at positions (Q, k), with `missing` where a position is -1."""
    return np.where(positions < 0, missing, np.take_along_axis(values, np.maximum(positions, 0), axis=1))


def is_correct(predictions: np.ndarray, positives: Sequence) -> np.ndarray:
    """predictions (Q, K) int, -1 for none; positives: Q sets or arrays -> (Q, K) bool."""
    predictions = np.asarray(predictions, dtype=np.int64)
    if len(predictions) != len(positives):
        raise ValueError(f"{len(predictions)} lists of predictions for {len(positives)} queries")
    right = [np.fromiter(each, dtype=np.int64, count=len(each)) for each in positives]
    flat = np.concatenate(right) if right else np.zeros(0, dtype=np.int64)
    query = np.repeat(np.arange(len(right)), [len(each) for each in right])
    size = 1 + max(predictions.max(initial=0), flat.max(initial=0))
    keys = np.arange(len(predictions))[:, None] * size + predictions
    return np.isin(keys, query * size + flat) & (predictions >= 0)


def recall_at(predictions: np.ndarray, positives: Sequence, ks: Sequence[int] = RANKS) -> dict[int, float]:
    """Share of queries with a right image among the first k, in percent: {k: recall} (paper, sec. 5.1.2).

    predictions (Q, K) int, best first, -1 for none. With fewer than k predictions, those that exist count.
    """
    return recall_of(is_correct(predictions, positives), ks)


def recall_of(correct: np.ndarray, ks: Sequence[int] = RANKS) -> dict[int, float]:
    """correct (Q, K) bool, best first -> {k: percent}."""
    if not len(correct):
        raise ValueError("recall over no queries: skip the empty set")
    return {k: 100 * float(correct[:, :k].any(axis=1).mean()) for k in ks}


def random_choice_recall(positives: np.ndarray, images: int, ks: Sequence[int] = RANKS) -> dict[int, float]:
    """Expected recall of drawing k of `images` without repeats, exact: 1 - C(M - p, k) / C(M, k), mean over queries.

    positives (Q,) int: how many of the M images are right for each query. {k: percent}, paper's row "Random Choice".
    """
    positives = np.asarray(positives)
    log_factorial = np.concatenate([[0], np.cumsum(np.log(np.arange(1, images + 1)))])
    recalls = {}
    for k in ks:
        drawn = min(k, images)
        rest = images - positives - drawn  # wrong images that are not drawn
        log_miss = (
            log_factorial[images - positives]
            + log_factorial[images - drawn]
            - log_factorial[np.maximum(rest, 0)]
            - log_factorial[images]
        )
        recalls[k] = 100 * float(np.where(rest < 0, 1, -np.expm1(np.minimum(log_miss, 0))).mean())
    return recalls


def nearest_to_nadir(nadirs: np.ndarray, centers: np.ndarray, k: int, block: int = 512) -> np.ndarray:
    """Database images ranked by distance of their centre (M, 2) from each nadir (Q, 2) -> (Q, k) int, -1 fills up.

    What is found without looking at the photo, by guessing that it shows what lies below the station. The paper's row
    "Nadir" has a fifth to a tenth of these recalls and does not say what it counts (docs/decisions.md).
    """
    nadirs, centers = geo.to_unit_vectors(nadirs), geo.to_unit_vectors(centers)
    width = min(k, len(centers))
    ranked = np.full((len(nadirs), k), -1, dtype=np.int64)
    for start in range(0, len(nadirs), block):
        cosines = nadirs[start : start + block] @ centers.T
        near = np.argpartition(-cosines, width - 1, axis=1)[:, :width]
        order = np.argsort(-np.take_along_axis(cosines, near, axis=1), axis=1, kind="stable")
        ranked[start : start + block, :width] = np.take_along_axis(near, order, axis=1)
    return ranked


def orientation_of(rotation: np.ndarray | float) -> np.ndarray | float:
    """Rotation of the matched database image, degrees counter-clockwise -> the query's orientation, in [0, 360).

    The names' orientation is the angle in the photo from its up direction to north, clockwise: the compass azimuth of
    up is minus the orientation. Found on the 17,752 public names: their corners run top-left, bottom-left,
    bottom-right, top-right, and minus the azimuth of up that follows is within 45 degrees of the label for 74 % of
    them (median 3.7 off). The others list their corners from the one that makes up the side nearest north (97 %), and
    agree with their label (median 3.7 off as well, landscape format) once counted from a later corner.
    A north-up image turned counter-clockwise by 90 has north at its left: orientation -90, so 270.
    """
    return (-np.asarray(rotation)) % 360


def orientation_error(estimate: np.ndarray | float, label: np.ndarray | float) -> np.ndarray | float:
    """Smallest angle between two orientations in degrees -> [0, 180]; broadcasts, any number of turns."""
    return np.abs((np.asarray(estimate, dtype=np.float64) - label + 180) % 360 - 180)
