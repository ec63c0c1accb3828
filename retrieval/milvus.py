"""The search of retrieval/search.py on Milvus: a file here (milvus-lite) or a cluster by its URI, with the same code.

A collection holds a row's number, its vector, and the latitude and longitude of its centre, so that a search can keep
to what lies around a nadir. Vectors come from a descriptor file (retrieval/store.py) or an index of the Earth.
pip install pymilvus milvus-lite; neither is needed for anything else.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Self

import numpy as np

from utils import geo

if TYPE_CHECKING:
    from pymilvus import MilvusClient

    from retrieval.earth_index import EarthIndex

# Index of the vectors -> Milvus's name of it. Codes: sq8 a byte a value, pq a byte for each four values (not in
# milvus-lite), flat float32.
KEYS = {"sq8": "IVF_SQ8", "pq": "IVF_PQ", "flat": "FLAT"}
MOST = 16_384  # Milvus's limit to k and to rows read at once
BLOCK_BYTES = 8_000_000  # of a message; Milvus takes 64 MB
QUERIES = 500  # at a time
NAME = "earthloc"


class MilvusSearch:
    """search(queries, k, rows) -> scores, indices, as the searches of `make_search`; near= keeps to a circle.

    uri: a file that ends in .db, or http://HOST:PORT of a cluster; token: "USER:PASSWORD" or a key. probes: lists of
    the IVF index that are looked at; default an eighth of them. Made by `fill`, or here of what is there already.
    Raises ValueError where there is no such collection, RuntimeError without pymilvus.
    """

    def __init__(self, uri: str | Path, name: str = NAME, token: str = "", probes: int | None = None) -> None:
        self.client, self.uri, self.name = connect(uri, token), uri, name
        if not self.client.has_collection(name):
            raise ValueError(f"{uri}: has no collection {name}, it has {self.client.list_collections()}; make it first")
        self.client.load_collection(name)
        vector = next(each for each in self.client.describe_collection(name)["fields"] if each["name"] == "vector")
        self.dim = int(vector["params"]["dim"])
        self.count = int(self.client.get_collection_stats(name)["row_count"])
        self.probes = probes or max(8, lists_for(self.count) // 8)

    @classmethod
    def fill(
        cls,
        uri: str | Path,
        vectors: np.ndarray,
        centers: np.ndarray,
        key: str = "sq8",
        name: str = NAME,
        token: str = "",
        probes: int | None = None,
    ) -> Self:
        """vectors (N, D) of unit length, may be a memory map or Rows; centers (N, 2) degrees; key: one of KEYS -> the
        search, of a new collection. Raises ValueError where there is one of that name, or a vector is not finite."""
        if len(vectors) != len(centers):
            raise ValueError(f"{len(vectors)} vectors and {len(centers)} centers: give a center for each")
        if key == "pq" and is_lite(uri):
            raise ValueError(f"--key pq: milvus-lite has no {KEYS[key]}; give --key sq8, or the URI of a cluster")
        client = connect(uri, token)
        if client.has_collection(name):
            raise ValueError(f"{uri}: has a collection {name} already; give another name, or remove it")
        dim, count = vectors.shape[1], len(vectors)
        client.create_collection(name, schema=_schema(client, dim), consistency_level="Strong")
        try:
            block = max(1, BLOCK_BYTES // (4 * dim))
            for start in range(0, count, block):
                part = np.asarray(vectors[start : start + block], dtype=np.float32)
                bad = np.flatnonzero(~np.isfinite(part).all(axis=1))
                if len(bad):
                    raise ValueError(f"row {start + bad[0]} is not finite: an unreadable image was not left out")
                where = np.asarray(centers[start : start + block], dtype=np.float64)
                client.insert(
                    name,
                    [
                        {"row": start + i, "vector": vector, "lat": float(lat), "lon": float(lon)}
                        for i, (vector, (lat, lon)) in enumerate(zip(part, where))
                    ],
                )
            client.flush(name)
            client.create_index(name, _index(client, key, dim, count))
        except BaseException:  # half a collection would be found as a whole one
            client.drop_collection(name)
            raise
        return cls(uri, name, token, probes)

    @classmethod
    def of_index(cls, uri: str | Path, index: EarthIndex, key: str = "sq8", token: str = "") -> Self:
        """The search of an index of the Earth, in a collection named after its content: filled now where there is none
        yet. ValueError where another process was killed while it filled it. All lists are looked at: a photo is less
        like its place than two images of that are, so its neighbours are in any of them, and around a nadir are few."""
        content = hashlib.sha256(index.codes.tobytes() + index.regions.tobytes() + index.axes.tobytes())
        name = f"{NAME}_{key}_{content.hexdigest()[:12]}"
        client, probes = connect(uri, token), lists_for(len(index))
        there = client.has_collection(name)
        client.close()
        if not there:
            logging.info(f"{uri}: {len(index):,} vectors are put in, once, which takes minutes")
            return cls.fill(uri, index.vectors, geo.centers(index.footprints), key, name, token, probes)
        engine = cls(uri, name, token, probes)
        if len(engine) != len(index):
            raise ValueError(
                f"{uri}: collection {name} has {len(engine)} of {len(index)} vectors, it was not filled to the end; "
                f"remove it (or the file)"
            )
        return engine

    def __len__(self) -> int:
        return self.count

    def search(
        self,
        queries: np.ndarray,
        k: int,
        rows: np.ndarray | None = None,
        near: tuple[float, float] | None = None,
        km: float = 2500.0,
    ) -> tuple[np.ndarray, np.ndarray]:
        """queries (Q, D) -> scores and indices, each (Q, k), best first; indices count in rows (m,), if given. near
        (lat, lon) and km: only rows whose centre lies that near; with both, Milvus is told of the circle alone, which
        is quicker than many rows. Fewer than k: score -inf, index -1.

        Scores are those of the index's codes, and neighbours may be missed.
        """
        queries = np.ascontiguousarray(queries, dtype=np.float32)
        if queries.ndim != 2 or queries.shape[1] != self.dim or not np.isfinite(queries).all():
            raise ValueError(f"queries of shape {queries.shape}: expected finite ones of {self.dim} values")
        if not 0 < k <= MOST:
            raise ValueError(f"k {k}: Milvus finds 1 to {MOST} neighbours")
        scores, found = np.full((len(queries), k), -np.inf, np.float32), np.full((len(queries), k), -1)
        places = None if rows is None else {int(row): i for i, row in enumerate(rows)}
        if places is not None and not places:
            return scores, found
        expression = _box(near, km) if near is not None or rows is None else f"row in {list(places)}"

        def inside(hits: list[dict]) -> list[dict]:
            if near is None or not hits:
                return hits
            points = [(hit["entity"]["lat"], hit["entity"]["lon"]) for hit in hits]
            there = geo.distance_km(points, near) <= km
            return [hit for hit, at in zip(hits, there) if at and (places is None or hit["row"] in places)]

        for start in range(0, len(queries), QUERIES):
            part = queries[start : start + QUERIES]
            for q, hits in enumerate(self._hits(part, k, expression, inside, k if near is None else 2 * k + 16), start):
                for column, (row, score) in enumerate(hits):
                    scores[q, column], found[q, column] = score, row if places is None else places[row]
        return scores, found

    def _hits(self, queries: np.ndarray, k: int, expression: str, inside: Callable, asked: int):
        """-> a list of at most k (row, score) for each query. A box is a fifth and more larger than its circle, so more
        than k are asked for, and again where too few of them are inside."""
        asked = min(MOST, asked)
        found, left = [None] * len(queries), np.arange(len(queries))
        while len(left):
            answers = self.client.search(
                self.name,
                data=list(queries[left]),
                anns_field="vector",
                limit=asked,
                filter=expression,
                output_fields=["lat", "lon"],
                search_params={"metric_type": "IP", "params": {"nprobe": self.probes}},
            )
            again = []
            for q, hits in zip(left, answers):
                kept = [(hit["row"], hit["distance"]) for hit in inside(hits)]
                found[q] = kept[:k]
                if len(kept) < k and len(hits) == asked < MOST:
                    again.append(q)
            left, asked = np.array(again, dtype=int), min(MOST, 4 * asked)
        return found

    def read(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """rows (n,) -> vectors (n, D) float32 and centers (n, 2) as they were put in. ValueError at one that is not
        there."""
        rows, block = np.asarray(rows, dtype=int), max(1, min(MOST, BLOCK_BYTES // (4 * self.dim)))
        vectors, centers = np.empty((len(rows), self.dim), np.float32), np.empty((len(rows), 2))
        for start in range(0, len(rows), block):
            part = rows[start : start + block]
            there = {each["row"]: each for each in self.client.get(self.name, ids=part.tolist())}
            for place, row in enumerate(part.tolist(), start):
                if row not in there:
                    raise ValueError(f"{self.uri}: collection {self.name} has no row {row}, it has {self.count} rows")
                vectors[place] = there[row]["vector"]
                centers[place] = there[row]["lat"], there[row]["lon"]
        return vectors, centers

    def close(self) -> None:
        """The file or the cluster keeps the collection."""
        self.client.close()


def is_lite(uri: str | Path) -> bool:
    """Whether a URI is a file, which milvus-lite opens in this process."""
    return str(uri).endswith(".db")


def lists_for(count: int) -> int:
    """How many lists an IVF index of so many rows has."""
    return int(max(16, min(4096, 1.5 * count**0.5)))


def connect(uri: str | Path, token: str = "") -> object:
    """-> pymilvus.MilvusClient. RuntimeError without the package, ValueError where nothing answers."""
    try:
        from pymilvus import MilvusClient
        from pymilvus.exceptions import MilvusException
    except ImportError as error:
        raise RuntimeError(f"Milvus needs {error.name}: pip install pymilvus milvus-lite") from error
    # A file's server takes pings every ten seconds, pymilvus's habit, for an attack while an index is built.
    options = {"grpc_options": {"grpc.keepalive_time_ms": 600_000}} if is_lite(uri) else {}
    try:
        return MilvusClient(str(uri), token=token, **options)
    except MilvusException as error:
        raise ValueError(f"{uri}: {error.message}; give a file ending in .db, or http://HOST:PORT") from error


def _schema(client: MilvusClient, dim: int):
    from pymilvus import DataType

    schema = client.create_schema(auto_id=False, enable_dynamic_field=False)
    schema.add_field("row", DataType.INT64, is_primary=True)
    schema.add_field("vector", DataType.FLOAT_VECTOR, dim=dim)
    schema.add_field("lat", DataType.DOUBLE)
    schema.add_field("lon", DataType.DOUBLE)
    return schema


def _index(client: MilvusClient, key: str, dim: int, count: int):
    params = {} if key == "flat" else {"nlist": lists_for(count)}
    if key == "pq":
        params |= {"m": next(parts for parts in range(max(1, dim // 4), 0, -1) if dim % parts == 0), "nbits": 8}
    index = client.prepare_index_params()
    index.add_index("vector", index_type=KEYS[key], metric_type="IP", params=params)
    return index


def _box(near: tuple[float, float] | None, km: float) -> str:
    """Milvus's expression for the smallest box of latitude and longitude around a circle; "" for everywhere."""
    if near is None:
        return ""
    lat, lon = near[0], float(geo.wrap_longitude(near[1]))
    radius = np.degrees(km / geo.EARTH_RADIUS_KM) + 1e-6
    south, north = lat - radius, lat + radius
    box = f"lat >= {south:.6f} and lat <= {north:.6f}"
    if south <= -90 or north >= 90:  # a pole is inside: all longitudes
        return box
    half = np.degrees(np.arcsin(min(1.0, np.sin(np.radians(radius)) / np.cos(np.radians(lat))))) + 1e-6
    west, east = lon - half, lon + half
    if west < -180 or east > 180:
        west, east = geo.wrap_longitude(west), geo.wrap_longitude(east)
        return f"{box} and (lon >= {west:.6f} or lon <= {east:.6f})"
    return f"{box} and lon >= {west:.6f} and lon <= {east:.6f}"
