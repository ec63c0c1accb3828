"""The whole Earth in one small file: what a model made of regions of the grid, compressed, to be searched anywhere.

A region stands in it once: instead of the image, the photo is turned. Descriptors are projected onto their first
principal directions and kept as half a byte a value, so 512 values are 256 bytes a region; scores are cosines of what
is kept.

python -m retrieval.earth_index INDEX --resume WEIGHTS --dataset_path FOLDER makes one of a data set's images of 2021.
"""

import json
from collections.abc import Callable
from functools import cached_property, partial
from pathlib import Path
from typing import Annotated, Self

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from datasets import grid
from datasets.sets import read_database
from models.earthloc import load_model
from models.weights import weights_fingerprint
from retrieval.describe import describe_catalogue
from retrieval.recall import first_of_each, take
from retrieval.search import search
from utils.arguments import positive
from utils.files import replacing
from utils.flags import command

FORMAT, OLDER = "earthloc index 2", "earthloc index 1"  # the older one has a byte a value, and does not say so
# Bits: share of values beyond either end of what codes stand for. Of a normal distribution that is 2.5 and 3.7
# deviations, near the least squared error (Max, "Quantizing for Minimum Distortion", 1960).
CLIPPED = {4: 6e-3, 8: 1e-4}
TURNS = (0, 90, 180, 270)  # degrees that a photo is turned counter-clockwise before it is described


class EarthIndex:
    """Regions (N, 3) of zoom, row, col and their descriptors as codes, uint8: (N, K) of 8 bits, or of 4 bits two in a
    byte (N, ceil(K / 2)), the first in the lower half.

    A descriptor x (D,) becomes axes.T @ (x - mean), (K,); code c of column k stands for low[k] + c * step[k].
    fingerprint: `weights_fingerprint` of the model that made it.
    """

    def __init__(
        self,
        regions: np.ndarray,
        codes: np.ndarray,
        low: np.ndarray,
        step: np.ndarray,
        axes: np.ndarray,
        mean: np.ndarray,
        fingerprint: str,
        bits: int,
    ) -> None:
        self.regions, self.codes, self.low, self.step = regions, codes, low, step
        self.axes, self.mean, self.fingerprint, self.bits = axes, mean, fingerprint, bits

    def __len__(self) -> int:
        return len(self.regions)

    @cached_property
    def footprints(self) -> np.ndarray:
        """(N, 4, 2) degrees, BL, TL, TR, BR."""
        return grid.footprints(self.regions)

    @cached_property
    def vectors(self) -> np.ndarray:
        """(N, K) float32 of unit length."""
        codes = self.codes if self.bits == 8 else _unpack(self.codes)[:, : len(self.low)]
        return _unit(codes * self.step + self.low)

    def search(
        self, photos: np.ndarray, rows: np.ndarray, k: int, nearest: Callable | None = None
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """photos (4, Q, D): descriptors of each photo in TURNS; rows (m,): where to look -> scores, rows of the index
        and rotations (degrees, as predict.py counts them: of the image, counter-clockwise), each (Q, k), best first.

        A region counts in its best rotation. Fewer than k rows: score -inf, row -1. ValueError on other shapes.
        nearest(queries, k, rows): a search of `vectors` elsewhere, as those of `make_search`.
        """
        turns, count, dim = photos.shape
        if turns != len(TURNS) or dim != len(self.mean):
            raise ValueError(f"photos of shape {photos.shape}: expected ({len(TURNS)}, photos, {len(self.mean)})")
        rows = np.asarray(rows)
        nearest = nearest or partial(search, self.vectors)
        scores, found = nearest(self.project(photos.reshape(-1, dim)), min(k, len(rows)), rows)
        # Turning a photo by t is turning the images by -t.
        rotations = np.broadcast_to((-np.array(TURNS) % 360)[:, None, None], (turns, count, scores.shape[1]))
        # A photo's turns side by side, each with its k best.
        side_by_side = lambda each: each.reshape(turns, count, -1).swapaxes(0, 1).reshape(count, -1)
        scores, found, rotations = map(side_by_side, (scores, np.where(found < 0, -1, rows[found]), rotations))
        order = np.argsort(-scores, axis=1, kind="stable")
        scores, found, rotations = (np.take_along_axis(each, order, axis=1) for each in (scores, found, rotations))
        first = first_of_each(found, k)
        return take(scores, first, -np.inf), take(found, first, -1), take(rotations, first, 0)

    def project(self, descriptors: np.ndarray) -> np.ndarray:
        """(…, D) -> (…, K) float32 of unit length, to be compared with `vectors`."""
        return _unit((descriptors - self.mean) @ self.axes)

    def save(self, path: str | Path) -> None:
        """Writes all of it to one .safetensors file."""
        arrays = {name: getattr(self, name) for name in ("regions", "codes", "low", "step", "axes", "mean")}
        metadata = {"format": FORMAT, "fingerprint": self.fingerprint, "bits": str(self.bits)}
        with replacing(path) as file:
            file.write(save({name: np.ascontiguousarray(array) for name, array in arrays.items()}, metadata))

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """What `save` wrote. FileNotFoundError, ValueError where there is none or something else."""
        if not Path(path).is_file():
            raise FileNotFoundError(f"--index {path}: no such file; make one by `python -m retrieval.earth_index`")
        try:
            with safe_open(path, framework="np") as file:
                metadata = file.metadata() or {}
                if metadata.get("format") not in (FORMAT, OLDER):
                    raise ValueError(f"--index {path}: not an index of the Earth ({json.dumps(metadata)[:80]})")
                arrays = {name: file.get_tensor(name) for name in file.keys()}
        except (SafetensorError, OSError) as error:
            raise ValueError(f"--index {path}: truncated, or no index ({error}); fetch or make it again") from error
        arrays["axes"] = arrays["axes"].astype(np.float32)
        return cls(**arrays, fingerprint=metadata["fingerprint"], bits=int(metadata.get("bits", 8)))


def compress(regions: np.ndarray, descriptors: np.ndarray, dim: int, fingerprint: str, bits: int = 4) -> EarthIndex:
    """regions (N, 3), descriptors (N, D) -> EarthIndex of their first `dim` principal directions, `bits` (4 or 8) each.

    The few values of a column beyond what its codes stand for are cut off (CLIPPED). ValueError where one is not
    finite, or dim is larger than D.
    """
    if not np.isfinite(descriptors).all():
        raise ValueError("descriptors are not finite: has the model diverged?")
    require_dim(dim, descriptors.shape[1])
    mean = descriptors.mean(axis=0, dtype=np.float64).astype(np.float32)
    centred = descriptors - mean
    axes = np.linalg.eigh(centred.T.astype(np.float64) @ centred).eigenvectors[:, ::-1][:, :dim].astype(np.float16)
    values = _unit(centred @ axes.astype(np.float32))
    low, high = np.quantile(values, (CLIPPED[bits], 1 - CLIPPED[bits]), axis=0).astype(np.float32)
    most = 2**bits - 1
    step = np.maximum(high - low, 1e-12) / np.float32(most)
    codes = ((values - low) / step).round().clip(0, most).astype(np.uint8)
    codes = codes if bits == 8 else _pack(codes)
    return EarthIndex(np.asarray(regions, np.int32), codes, low, step, axes.astype(np.float32), mean, fingerprint, bits)


def _pack(codes: np.ndarray) -> np.ndarray:
    """(N, K) below 16 -> (N, ceil(K / 2)) uint8."""
    even = np.pad(codes, ((0, 0), (0, codes.shape[1] % 2)))
    return even[:, ::2] | even[:, 1::2] << 4


def _unpack(packed: np.ndarray) -> np.ndarray:
    """(N, M) uint8 -> (N, 2 * M), below 16."""
    return np.stack([packed & 15, packed >> 4], axis=2).reshape(len(packed), -1)


def require_dim(dim: int, values: int) -> None:
    if not 1 <= dim <= values:
        raise ValueError(f"--dim {dim}: the model's descriptors have {values} values")


def _unit(vectors: np.ndarray) -> np.ndarray:
    vectors = np.asarray(vectors, np.float32)
    return vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12)


def main(
    index: Annotated[Path, "file to write, .safetensors"],
    *,
    resume: Annotated[str, "weights or checkpoint"],
    dataset_path: Annotated[str, "folder with database/, images named by the grid"],
    dim: Annotated[int, "values a region", {"type": positive}] = 512,
    bits: Annotated[int, "of each value", {"choices": tuple(CLIPPED)}] = 4,
    **describing: Annotated[object, describe_catalogue],
) -> EarthIndex:
    """-> the EarthIndex, written to its file."""
    model, database = load_model(resume).eval(), read_database(dataset_path)
    require_dim(dim, model.config.descriptor_dim)  # now, not after an hour
    index.parent.mkdir(parents=True, exist_ok=True)
    regions = grid.regions_of(database.ids)
    strange = np.flatnonzero(np.abs(grid.footprints(regions) - database.footprints).max(axis=(1, 2)) > 1e-4)
    if len(strange):
        raise ValueError(
            f"{database.paths[strange[0]]}: its corners are not those of its region, so no index of the grid can hold "
            f"it ({len(strange)} of {len(database)} images); leave it out of the database"
        )
    described, failures = describe_catalogue(model, database, **describing)
    rows = np.setdiff1d(np.arange(len(database)), [row for row, _ in failures])
    vectors = np.asarray(described[0, rows], np.float32)
    earth = compress(regions[rows], vectors, dim, weights_fingerprint(model), bits)
    earth.save(index)
    print(f"{index}: {len(earth):,} regions, {index.stat().st_size / 1e6:.1f} MB, {len(failures)} failed")
    return earth


if __name__ == "__main__":
    command(main)
