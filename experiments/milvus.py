"""Milvus beside faiss: recall, memory, time; a descriptor file into Milvus and back.

python -m experiments.milvus                                               # the shipped index of the Earth, in a file
python -m experiments.milvus --dataset_path FOLDER --resume WEIGHTS        # the descriptors of a data set's images
python -m experiments.milvus --uri http://HOST:19530 --keys sq8 pq         # a cluster

Queries are rows that are left out of the database. --rows more than there are: others around them (see
benchmarks/speed_search.py). Each way runs in a process of its own. Without --uri a temporary file, removed at the end.
pip install pymilvus milvus-lite
"""

from __future__ import annotations

import gc
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import numpy as np

from benchmarks.speed_search import FaissFlat, spread
from benchmarks.timing import own_memory, timed
from retrieval.locator import EARTH_INDEX
from retrieval.milvus import KEYS, NAME, MilvusSearch, is_lite, lists_for
from retrieval.search import CompressedSearch, search
from utils import geo
from utils.arguments import positive
from utils.flags import DESCRIPTORS, DEVICE, Device, command

if TYPE_CHECKING:
    import faiss

    Engine = FaissFlat | CompressedSearch | MilvusSearch | faiss.Index

T = TypeVar("T")
Place = tuple[str, str, str]  # of Milvus: uri, name, token

WORLD = 46_000_000  # vectors: 11.5 million regions of zooms 9 to 14, four turns
K, SINGLES = 10, 20


def main(
    index: Annotated[str, "file of python -m retrieval.earth_index"] = str(EARTH_INDEX),
    dataset_path: Annotated[str | None, "in place of an index: a folder with database/, described by --resume"] = None,
    resume: Annotated[str | None, "weights, with --dataset_path"] = None,
    descriptors: Annotated[str, "folder where a data set's descriptors are kept"] = DESCRIPTORS,
    uri: Annotated[str | None, "a file that ends in .db, or http://HOST:PORT; default: a temporary file"] = None,
    name: Annotated[str, "collections made are NAME_KEY"] = NAME,
    token: Annotated[str, "of a cluster: USER:PASSWORD or a key"] = "",
    keys: Annotated[list[str], "indexes of Milvus; pq: on a cluster", {"choices": list(KEYS)}] = ("sq8",),
    rows: Annotated[int, "vectors", {"type": positive}] = 100_000,
    queries: Annotated[int, "how many", {"type": positive}] = 500,
    near_km: Annotated[float, "for the search around a nadir"] = 2500,
    device: Device = DEVICE,
) -> list[dict]:
    """-> a row of the table for each way."""
    vectors, centers = of_dataset(dataset_path, resume, descriptors, device) if dataset_path else of_index(index)
    rng = np.random.default_rng(0)
    asked, rest = np.split(rng.permutation(len(vectors)), [queries])
    asked_vectors, points = np.asarray(vectors[asked], np.float32), centers[asked]
    rest = np.sort(rest[:rows])
    real, centers = np.asarray(vectors[rest], np.float32), centers[rest]
    with tempfile.TemporaryDirectory() as temporary:
        file = Path(temporary) / "database.npy"
        if rows > len(real):
            made, around = spread(real, rows, file)
            centers = centers[around]
        else:
            np.save(file, real.astype(np.float16))
        made = np.load(file, mmap_mode="c")
        uri = uri or str(Path(temporary) / "earth.db")
        print(f"{len(made):,} vectors of {made.shape[1]} values, {queries} queries; Milvus at {uri}")
        right = search(made, asked_vectors, K)[1]
        near_rows = [np.flatnonzero(geo.distance_km(centers, point) <= near_km) for point in points[:SINGLES]]
        near_right = [nearest(made, asked_vectors[q : q + 1], near) for q, near in enumerate(near_rows)]
        ways = ["faiss flat", "faiss IVF, SQ8", "compressed", *(f"milvus {key}" for key in keys)]
        print(
            "| | recall@1 | recall@10 | memory, bytes/vector | disk | build s | ms, 100 at a time | ms, one | "
            "ms, one near its nadir | recall@10 there | 46 million: GB of memory |\n" + "| --- " * 11 + "|"
        )
        table = []
        for way in ways:
            place, build = (uri, name, token), None
            if way.startswith("milvus"):
                build = alone(fill, way, file, centers, place)
            found = alone(measure, way, file, asked_vectors, points, near_rows, place, near_km)
            table.append(found | recalls(found, right, near_right) | {"way": way, "build": build or found["build"]})
            print(line(table[-1]), flush=True)
    return table


def nearest(
    made: np.ndarray, query: np.ndarray, rows: np.ndarray, engine: CompressedSearch | None = None
) -> np.ndarray:
    """The K best of rows, at most, in order, by an engine or exactly."""
    _, found = search(made, query, K, rows) if engine is None else engine.search(query, K, rows)
    return rows[found[0][found[0] >= 0]]


def of_index(file: str) -> tuple[np.ndarray, np.ndarray]:
    """-> vectors (N, D) and centers (N, 2) degrees."""
    from retrieval.earth_index import EarthIndex

    index = EarthIndex.load(file)
    return index.vectors, geo.centers(index.footprints)


def of_dataset(dataset_path: str, weights: str, folder: str, device: str) -> tuple[np.ndarray, np.ndarray]:
    """As of_index, by weights; folder: where descriptors are kept."""
    from datasets.sets import read_database
    from models.earthloc import load_model
    from retrieval.describe import describe_catalogue

    model, database = load_model(weights).eval(), read_database(dataset_path)
    descriptors, failures = describe_catalogue(model, database, descriptors=folder, device=device)
    rows = np.setdiff1d(np.arange(len(database)), [row for row, _ in failures])
    return np.asarray(descriptors[0, rows]), geo.centers(database.footprints[rows])


def alone(work: Callable[..., T], *values: object) -> T:
    """work(*values) in a process of its own."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(work, *values).result()


def fill(way: str, file: Path, centers: np.ndarray, place: Place) -> float:
    """Puts the vectors into Milvus, reads them back -> seconds that the first took. ValueError where they differ."""
    made, (uri, name, token), key = np.load(file, mmap_mode="c"), place, way.split()[1]
    engine, seconds = timed(lambda: MilvusSearch.fill(uri, made, centers, key, f"{name}_{key}", token))
    for start in range(0, len(made), 10_000):
        part = slice(start, start + 10_000)
        back, where = engine.read(np.arange(len(made))[part])
        if not (np.array_equal(back, made[part].astype(np.float32)) and np.array_equal(where, centers[part])):
            raise ValueError(f"{uri}: what comes back is not what was put in")
    engine.close()
    return seconds


def measure(
    way: str,
    file: Path,
    queries: np.ndarray,
    points: np.ndarray,
    near_rows: Sequence[np.ndarray],
    place: Place,
    near_km: float,
) -> dict:
    """One way -> what it found and what it took. Memory: of faiss the bytes of its index, of milvus-lite what the
    process has of its own, not mapped, after it opened the file, beyond what it has with a small one."""
    made, milvus = np.load(file, mmap_mode="c"), way.startswith("milvus")
    lite, memory = milvus and is_lite(place[0]), None
    if lite:
        with tempfile.TemporaryDirectory() as temporary:
            small = MilvusSearch.fill(Path(temporary) / "small.db", made[:100], np.zeros((100, 2)))
            small.search(queries[:2], K)
            small.close()
        gc.collect()
        before = own_memory("RssAnon")
    engine, build = timed(lambda: make(way, made, place))
    engine.search(queries[:2], K)
    if lite:
        gc.collect()
        memory = (own_memory("RssAnon") - before) / len(made)
    elif not milvus:
        memory = index_bytes(engine) / len(made)
    found = np.concatenate([engine.search(queries[q : q + 100], K)[1] for q in range(0, len(queries), 100)])
    batch = clock(lambda: engine.search(queries[:100], K)) / len(queries[:100])
    single = clock(lambda: [engine.search(queries[q : q + 1], K) for q in range(SINGLES)]) / SINGLES

    def one_near(q: int) -> np.ndarray:
        if milvus:
            return engine.search(queries[q : q + 1], K, near=points[q], km=near_km)[1][0]
        return nearest(made, queries[q : q + 1], near_rows[q], None if way.startswith("faiss") else engine)

    near = [one_near(q) for q in range(SINGLES)]
    seconds = clock(lambda: [one_near(q) for q in range(SINGLES)]) / SINGLES
    disk = 2 * made.shape[1] if way == "compressed" else folder_bytes(place[0]) / len(made) if milvus else 0
    return dict(
        found=found, near=near, memory=memory, disk=disk, build=build, batch=batch, single=single, near_time=seconds
    )


def index_bytes(engine: Engine) -> int:
    """Of faiss's index, and what the search keeps beside it."""
    import faiss

    if hasattr(engine, "bytes_in_memory"):
        return engine.bytes_in_memory
    return faiss.serialize_index(getattr(engine, "index", engine)).nbytes


def make(way: str, made: np.ndarray, place: Place) -> Engine:
    """What searches that way; Milvus's collection is there by then."""
    import faiss

    uri, name, token = place
    if way == "faiss flat":
        return FaissFlat(made)
    if way == "compressed":
        return CompressedSearch(made)
    if way == "faiss IVF, SQ8":  # the same index as Milvus's sq8
        lists = lists_for(len(made))
        index = faiss.index_factory(made.shape[1], f"IVF{lists},SQ8", faiss.METRIC_INNER_PRODUCT)
        index.train(made.astype(np.float32))
        index.add(made.astype(np.float32))
        index.nprobe = max(8, lists // 8)
        return index
    return MilvusSearch(uri, f"{name}_{way.split()[1]}", token)


def clock(work: Callable[[], object]) -> float:
    """Seconds, the best of three."""
    return min(timed(work)[1] for _ in range(3))


def folder_bytes(uri: str | Path) -> int:
    """Of a file of milvus-lite, which is a folder; 0 of a cluster."""
    return sum(file.stat().st_size for file in Path(uri).rglob("*") if file.is_file()) if is_lite(uri) else 0


def recalls(found: dict, right: np.ndarray, near_right: Sequence[np.ndarray]) -> dict[str, float]:
    """Shares in percent of the true first and of the true first ten that were found."""
    share = lambda some, true: 100 * np.mean([len(set(a) & set(b)) / len(b) for a, b in zip(some, true) if len(b)])
    return {
        "recall1": share(found["found"][:, :1], right[:, :1]),
        "recall10": share(found["found"], right),
        "near_recall": share(found["near"], near_right),
    }


def line(row: dict) -> str:
    """A row of the table."""
    memory = "" if row["memory"] is None else f"{row['memory']:.0f}"
    world = "" if row["memory"] is None else f"{row['memory'] * WORLD / 1e9:.0f}"
    milliseconds = " | ".join(f"{1e3 * row[name]:.2f}" for name in ("batch", "single", "near_time"))
    return (
        f"| {row['way']} | {row['recall1']:.1f} | {row['recall10']:.1f} | {memory} | {row['disk']:.0f} | "
        f"{row['build']:.1f} | {milliseconds} | {row['near_recall']:.1f} | {world} |"
    )


if __name__ == "__main__":
    command(main)
