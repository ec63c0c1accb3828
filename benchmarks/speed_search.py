"""Memory, build time, ms a query and loss of R@1 of the searches, on a large database made from real descriptors.

python -m benchmarks.speed_search --dataset_path data/demo_world --resume CHECKPOINT --rows 100000

The database: the data set's images, four rotations each, and more around them: between an image and one of its ten
nearest, plus noise along the differences to these ten, so that neighbours stay about as close as real ones are, and
recall does not saturate. An image made around another counts as that one. Every way searches the same float16 memory
map, in one process, one after the other. Limit: the bare product of queries and database, without anything else.
"""

import math
import tempfile
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.timing import seconds_on, show, timed, timed_twice
from datasets.sets import load_evaluation_data
from models.aggregators import GeM
from models.earthloc import load_model
from retrieval.describe import ROTATIONS, Describer
from retrieval.evaluation import describe_sets
from retrieval.search import CompressedSearch, ExactSearch, low_precision
from utils.flags import DESCRIPTORS, DEVICE, DatasetPath, Device, command
from utils.precision import default_precision, require_device

FULL = 700_000  # 175,000 regions, four rotations
NEAREST = 10


class Wide(nn.Module):
    """The backbone of a trained model, pooled over as many cells as `dim` values need, and turned to dim values.

    For a demo checkpoint with small descriptors: 4096 values that are no mixture of fewer.
    """

    def __init__(self, model: nn.Module, dim: int) -> None:
        super().__init__()
        self.model, channels = model, model.backbone.out_channels
        cells = math.ceil((dim / channels) ** 0.5)
        self.pool = GeM(channels, cells, cells, cells)
        self.image_size = max(model.config.image_size, cells * model.backbone.stride)  # no cell without features
        turn = torch.randn(self.pool.out_dim, dim, generator=torch.Generator().manual_seed(0))
        self.register_buffer("turn", torch.linalg.qr(turn).Q)

    def forward(self, images: Tensor) -> Tensor:
        features = self.model.backbone((images - self.model.mean) / self.model.std)
        with torch.autocast(images.device.type, enabled=False):
            return self.pool(features.float()) @ self.turn


def real_descriptors(
    device: torch.device,
    *,
    resume: Annotated[str, "checkpoint"],
    dim: Annotated[int, "of the descriptors, see Wide where the model has fewer"] = 4096,
    descriptors: Annotated[str, "folder for the data set's descriptors"] = DESCRIPTORS,
    dataset_path: DatasetPath = "data/demo_world",
) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[np.ndarray]]:
    """-> queries (Q, D) float32, database (M, D) float32, both centred, of unit length; image of each of the M; and Q
    arrays of images that are right."""
    model = load_model(resume)
    size = model.config.image_size
    if model.config.descriptor_dim != dim:
        model = Wide(model, dim)
        size = model.image_size
    model = model.to(device, memory_format=torch.channels_last)
    describer = Describer(model, size, device=device, precision=default_precision(device), rotations=ROTATIONS)
    found, data = describe_sets(describer, load_evaluation_data(dataset_path), keep=descriptors)
    layers, images, _ = found.database.shape
    database = np.asarray(found.database.reshape(layers * images, dim), dtype=np.float32)
    mean = database.mean(axis=0)
    position = np.full(len(data.database), -1)
    position[found.database_rows] = np.arange(images)
    pairs = data.pairs[position[data.pairs[:, 1]] >= 0]
    right = [position[pairs[pairs[:, 0] == row, 1]] for row in found.query_rows]
    counted = [q for q, each in enumerate(right) if len(each)]
    return (
        unit(found.queries[counted].astype(np.float32) - mean),
        unit(database - mean),
        np.tile(np.arange(images), layers),
        [right[q] for q in counted],
    )


def unit(vectors: np.ndarray) -> np.ndarray:
    """(N, D) -> the same, each of length 1."""
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def spread(real: np.ndarray, count: int, path: Path, seed: int = 0, block: int = 2048) -> tuple[np.ndarray, np.ndarray]:
    """Real descriptors (M, D) -> a float16 memory map (count, D) at path, and (count,) which real one each is around.

    The real ones come first.
    """
    rng = np.random.default_rng(seed)
    tensor = torch.from_numpy(real)
    near = [(part @ tensor.T).topk(NEAREST + 1, dim=1).indices[:, 1:].numpy() for part in tensor.split(block)]
    nearest = np.concatenate(near)
    around = np.concatenate([np.arange(len(real)), rng.integers(len(real), size=max(0, count - len(real)))])[:count]
    made = np.lib.format.open_memmap(path, "w+", np.float16, (count, real.shape[1]))
    for start in range(0, count, block):
        rows = around[start : start + block]
        fresh = (np.arange(start, start + len(rows)) >= len(real))[:, None]
        share = rng.uniform(0, 0.5, len(rows)) / NEAREST**0.5
        weights = rng.normal(size=(len(rows), NEAREST)) * 0.3 / NEAREST**0.5
        weights[np.arange(len(rows)), rng.integers(NEAREST, size=len(rows))] += share * NEAREST**0.5
        weights = (weights * fresh).astype(np.float32)
        vectors = real[rows] * (1 - weights.sum(axis=1, keepdims=True))
        for j in range(NEAREST):
            vectors += weights[:, j, None] * real[nearest[rows, j]]
        made[start : start + block] = unit(vectors)
    return made, around


class FaissFlat:
    """The baseline: faiss's flat index, the whole database in float32 in memory."""

    def __init__(self, database: np.ndarray) -> None:
        import faiss

        self.index = faiss.IndexFlatIP(database.shape[1])
        for start in range(0, len(database), 16384):
            self.index.add(database[start : start + 16384].astype(np.float32))

    def search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        return self.index.search(queries, k)


def bare_product(database: np.ndarray, queries: np.ndarray, dtype: torch.dtype, device: torch.device) -> float:
    """Seconds of the product of all queries with the database, from that of one block with it, best of three."""
    block = torch.from_numpy(np.asarray(database[:16384])).to(device, dtype)
    turned = torch.from_numpy(queries).to(device, dtype)
    once = min(timed(lambda: turned @ block.T, seconds_on(device))[1] for _ in range(3))
    return once * len(database) / len(block)


def main(
    rows: Annotated[int, "size of the database"] = 100_000,
    folder: Annotated[str | None, "where the large database goes; default: a temporary one, removed at the end"] = None,
    singles: Annotated[int, "queries for the time of one at a time"] = 20,
    device: Device = DEVICE,
    **source: Annotated[object, real_descriptors],
) -> None:
    """Prints a row for each search."""
    device = require_device(device)
    queries, real, image, right = real_descriptors(device, **source)
    if rows < len(real):
        raise ValueError(f"--rows {rows}: the data set has {len(real)} descriptors; give at least as many")
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(folder or temporary) / "database.npy"
        (made, around), seconds = timed(lambda: spread(real, rows, path))
        print(
            f"{len(real)} real descriptors, {rows} with those around them ({seconds:.0f} s), dimension "
            f"{made.shape[1]}, {len(queries)} queries, on {device}"
        )
        measure(made, image[around], queries, right, singles, device)


def measure(
    database: np.ndarray,
    labels: np.ndarray,
    queries: np.ndarray,
    right: list[np.ndarray],
    singles: int,
    device: torch.device,
) -> None:
    """Prints the table; a row a way."""
    (rows, dim), low = database.shape, low_precision(device)
    many = queries[np.arange(1000) % len(queries)]
    ways = [("faiss flat fp32", lambda: FaissFlat(database), 4 * dim, torch.float32)]
    if low is not None:
        ways.append((f"exact ({str(low)[6:]})", lambda: ExactSearch(database, device, low), 2 * dim, low))
    ways.append(("compressed", lambda: CompressedSearch(database), None, None))

    def measured():
        first = None
        for name, make, size, dtype in ways:
            index, build = timed(make)
            size = size or index.bytes_in_memory / rows
            index.search(queries[:2], 20)
            _, one = timed(lambda: [index.search(queries[q : q + 1], 20) for q in range(singles)])
            _, batch, cpu = timed_twice(lambda: index.search(many, 20))  # 1,000 queries: ms each
            limit = dtype and bare_product(database, many, dtype, device)
            best = index.search(queries, 20)[1][:, 0]
            recall = 100 * np.mean([labels[b] in r for b, r in zip(best, right)])
            first = first or (batch, cpu, recall, best)
            index = None  # its memory is for the next
            yield (
                *(name, size, size * FULL / 1e9, build, 1e3 * one / singles, batch, first[0] / batch),
                *(cpu, limit, first[1] / cpu, recall, first[2] - recall, 100 * np.mean(best == first[3])),
            )

    columns = {"": "18", "bytes/vector": "12.0f", "GB at 700,000": "13.2f", "build s": "8.1f", "ms, batch 1": "11.2f"}
    columns |= {"ms, 1000": "9.2f", "QPS, times": "10.1f", "CPU ms": "7.2f", "limit": "6.2f", "times": "6.1f"}
    show(columns | {"R@1": "6.2f", "loss": "5.2f", "same first, %": "13.1f"}, measured())
    print(
        f"GB at 700,000: bytes/vector extrapolated; the float16 file itself is {2 * dim * FULL / 1e9:.2f} GB on "
        f"disk. ms a query, 20 neighbours. At batch 1,000: QPS and CPU time against the first row, and the limit, "
        f"in CPU ms (on a GPU: in ms)."
    )


if __name__ == "__main__":
    command(main)
