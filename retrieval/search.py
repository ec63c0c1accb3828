"""Nearest neighbours by inner product behind one interface: search(queries, k, rows) -> scores, indices.

FlatSearch multiplies in float32 and is what the others are compared with. ExactSearch finds candidates in low
precision, as fast as the hardware multiplies, and comes to the same result. CompressedSearch needs little memory and
looks at a part of the database only: it may miss some neighbours.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import ArrayLike

Found = tuple[np.ndarray, np.ndarray]  # scores (Q, k), indices (Q, k)
SEARCHES = ("exact", "flat", "compressed")
MIN_COMPRESSED = 5_000  # rows: below that there is nothing to gain, and too little to learn a compression from


def make_search(kind: str, database: np.ndarray, device: str | torch.device = "cpu") -> Search:
    """One of SEARCHES, database (M, D) float32 or float16, may be a memory map -> an object to search with.

    Its search(queries (Q, D), k, rows=None) gives scores (Q, k) and indices (Q, k), best first. rows (m,) restricts it
    to those rows without copying the database; indices then count in rows. Where fewer than k are found the score is
    -inf and the index -1. Raises ValueError on a value that is not finite, and on queries of another D. Where the
    device does not multiply in low precision, "exact" is "flat"; a database too small to compress is searched exactly.
    """
    if kind not in SEARCHES:
        raise ValueError(f"--search {kind}: unknown; choose one of {', '.join(SEARCHES)}")
    if kind == "compressed" and len(database) >= MIN_COMPRESSED and database.shape[1] > 1:
        return CompressedSearch(database)
    dtype = low_precision(device)
    return FlatSearch(database) if kind == "flat" or dtype is None else ExactSearch(database, device, dtype)


def low_precision(device: str | torch.device) -> torch.dtype | None:
    """The type in which the device multiplies matrices faster than in float32, or None."""
    if torch.device(device).type == "cuda":
        return torch.float16  # as exact as the stored descriptors; sums are in float32
    supported = [getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported")]
    return torch.bfloat16 if any(check is not None and check() for check in supported) else None


def search(
    database: np.ndarray, queries: np.ndarray, k: int, rows: ArrayLike | None = None, block: int = 65536
) -> Found:
    """Exact nearest neighbours in float32: database (M, D), queries (Q, D) -> scores (Q, k), indices (Q, k).

    Results, rows and errors as `make_search` says. Works in blocks of database rows, so that a float16 or
    memory-mapped database needs float32 for one block only.
    """
    import faiss  # loads its own OpenMP: only where it is used

    queries = _as_queries(queries, database.shape[1])
    rows = np.arange(len(database)) if rows is None else np.asarray(rows)
    scores, indices = _nothing(len(queries), k)
    if not len(queries):
        return scores, indices
    for start in range(0, len(rows), block):
        part = rows[start : start + block]
        vectors = np.ascontiguousarray(database[part], dtype=np.float32)
        _require_finite(~np.isfinite(vectors).all(axis=1), "database", part)
        found, where = faiss.knn(queries, vectors, min(k, len(part)), metric=faiss.METRIC_INNER_PRODUCT)
        found = np.where(where < 0, -np.inf, found)
        where = np.where(where < 0, -1, where + start)  # faiss's -1 is "nothing", not the last image
        scores = np.concatenate([scores, found], axis=1)
        indices = np.concatenate([indices, where], axis=1)
        best = np.argsort(-scores, axis=1, kind="stable")[:, :k]
        scores, indices = np.take_along_axis(scores, best, axis=1), np.take_along_axis(indices, best, axis=1)
    return scores, indices


class FlatSearch:
    """The plain way, `search` above; keeps nothing but the database."""

    def __init__(self, database: np.ndarray) -> None:
        self.database = database

    def search(self, queries: np.ndarray, k: int, rows: ArrayLike | None = None) -> Found:
        return search(self.database, queries, k, rows)


class ExactSearch:
    """Candidates by a product in low precision, in blocks, re-scored in float32 from the database.

    Which candidates: all whose score lies within twice the rounding error of the k-th best. No other row can be among
    the k best. A query with more of them than were kept is searched the plain way; `fallbacks` counts those.
    Keeps a copy in low precision, 2 bytes a value, on the device.
    """

    def __init__(
        self,
        database: np.ndarray,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.bfloat16,
        block: int = 16384,
    ) -> None:
        self.database, self.block, self.fallbacks = database, block, 0
        try:
            self.vectors = torch.empty(database.shape, dtype=dtype, device=device)
        except RuntimeError as error:  # torch's for no memory, of the host or of a GPU
            raise ValueError(
                f"--search exact: {2 * np.prod(database.shape) / 1e9:.2f} GB for the database do not fit "
                f"on {device}; --search flat and compressed leave it on the disk"
            ) from error
        self.bad = np.zeros(len(database), dtype=bool)
        self.longest = 0.0
        for start in range(0, len(database), block):
            part = np.asarray(database[start : start + block], dtype=np.float32)
            norms = np.linalg.norm(part, axis=1)
            self.bad[start : start + block] = ~np.isfinite(norms)
            self.longest = max(self.longest, float(norms[np.isfinite(norms)].max(initial=0)))
            self.vectors[start : start + block] = torch.from_numpy(part).to(device, dtype)

    def search(self, queries: np.ndarray, k: int, rows: ArrayLike | None = None) -> Found:
        """As `make_search` says."""
        queries = _as_queries(queries, self.database.shape[1])
        rows = None if rows is None else np.ascontiguousarray(rows, dtype=np.int64)
        _require_finite(self.bad if rows is None else self.bad[rows], "database", rows)
        results = [self._search(queries[start : start + 1024], k, rows) for start in range(0, len(queries), 1024)]
        return tuple(map(np.concatenate, zip(*results))) if results else _nothing(0, k)

    def _search(self, queries: np.ndarray, k: int, rows: np.ndarray | None):
        count = len(self.database) if rows is None else len(rows)
        kept = min(count, 2 * k + 64)
        if kept * 8 >= count:  # a small database: to re-score that many is no less work than to search it
            return search(self.database, queries, k, rows)
        low, candidates = self._candidates(queries, kept, rows)
        error = self._error(queries, low)
        limit = low[:, min(k, kept) - 1] - 2 * error
        wanted = low >= limit[:, None]
        cut = wanted[:, -1] & (kept < count)  # more candidates may lie beyond the last that was kept
        scores = np.full(low.shape, -np.inf, dtype=np.float32)
        own, rescore = candidates if rows is None else rows[candidates], _Rescore(self.database, kept)
        for q in np.flatnonzero(~cut):
            scores[q, wanted[q]] = rescore(own[q, wanted[q]], queries[q])
        scores, indices = _best(scores, candidates, k)
        if cut.any():
            self.fallbacks += int(cut.sum())
            scores[cut], indices[cut] = search(self.database, queries[cut], k, rows)
        return scores, indices

    def _candidates(self, queries: np.ndarray, kept: int, rows: np.ndarray | None):
        """The `kept` best in low precision -> scores (Q, kept) float32, best first, and positions in rows."""
        device = self.vectors.device
        turned = torch.from_numpy(queries).to(device, self.vectors.dtype)
        rows = None if rows is None else torch.as_tensor(rows, device=device)
        best, where = (
            torch.empty(len(queries), 0, device=device),
            torch.empty(len(queries), 0, dtype=torch.long, device=device),
        )
        count = len(self.vectors) if rows is None else len(rows)
        for start in range(0, count, self.block):
            stop = min(start + self.block, count)
            part = self.vectors[start:stop] if rows is None else self.vectors[rows[start:stop]]
            scores, columns = (turned @ part.T).topk(min(kept, stop - start), dim=1)
            best, where = torch.cat([best, scores.float()], 1), torch.cat([where, columns + start], 1)
            best, order = best.topk(min(kept, best.shape[1]), dim=1)
            where = where.gather(1, order)
        return best.cpu().numpy(), where.cpu().numpy()

    def _error(self, queries: np.ndarray, low: np.ndarray):
        """How far a low-precision score can be off -> (Q,).

        Rounding the score: half a unit in its last place. Rounding the factors: each product is off by a relative
        error of at most 2 u, independent of the others; six standard deviations of the sum, with the length of
        (x_i q_i) at most max |q_i| |x|. Sums are in float32.
        """
        unit = torch.finfo(self.vectors.dtype).eps / 2
        length = np.linalg.norm(queries, axis=1) * self.longest
        factors = 6 * unit * (2 / 3) ** 0.5 * np.abs(queries).max(axis=1, initial=0) * self.longest
        factors = np.minimum(factors, 2 * unit * length)  # by Cauchy and Schwarz it is never more
        return factors + unit * np.abs(low).max(axis=1) + queries.shape[1] ** 0.5 * 2.0**-23 * length


class CompressedSearch:
    """Few bytes a vector in memory, candidates from a part of it, re-scored in float32 from the database on disk.

    The first `dim` principal components are kept, four bits for each two of them, in lists around `lists` centers of
    k-means; a search reads the `probes` lists nearest to the query (faiss's IVF and PQ fast-scan) and re-scores its
    best candidates, at least `rescored` of them. Scores are exact, but neighbours may be missed. A small part of the
    database (rows) is searched exactly. Learned and built on the CPU, the same way for the same database.
    """

    def __init__(
        self,
        database: np.ndarray,
        dim: int = 256,
        lists: int | None = None,
        probes: int | None = None,
        rescored: int = 200,
        exact_below: int = 20_000,
        block: int = 8192,
    ) -> None:
        import faiss

        self.database, self.rescored, self.exact_below = database, rescored, exact_below
        count = len(database)
        dim = min(dim, database.shape[1] // 2 * 2)
        sample = np.unique(np.linspace(0, count - 1, min(count, 32_768)).astype(np.int64))
        sample = np.asarray(database[sample], dtype=np.float32)
        sample = torch.from_numpy(sample[np.isfinite(sample).all(axis=1)])
        if len(sample) < 16:  # a code of four bits has 16 values
            raise ValueError(
                f"--search compressed: only {len(sample)} of the database's descriptors looked at are "
                f"finite, too few to learn from; has the model diverged? --search exact needs none"
            )
        lists = min(lists or int(max(16, min(4096, 1.5 * count**0.5))), len(sample))
        self.probes = probes or max(8, lists // 8)
        self.mean = sample.mean(0)
        sample -= self.mean
        self.axes = torch.linalg.eigh(sample.T @ sample)[1][:, -dim:].contiguous()
        self.index = faiss.index_factory(dim, f"IVF{lists},PQ{dim // 2}x4fs", faiss.METRIC_INNER_PRODUCT)
        self.index.cp.seed, self.index.cp.niter, self.index.cp.max_points_per_centroid = 0, 10, 64
        self.index.cp.min_points_per_centroid = 1
        self.index.train((sample @ self.axes).numpy())
        self.bad = np.zeros(count, dtype=bool)
        for start in range(0, count, block):
            part = torch.from_numpy(np.asarray(database[start : start + block])).float()
            bad = ~torch.isfinite(part).all(dim=1)
            part[bad] = self.mean  # holds the row's place; no search gets as far as to return it
            self.bad[start : start + block] = bad.numpy()
            self.index.add(((part - self.mean) @ self.axes).numpy())

    @property
    def bytes_in_memory(self) -> int:
        import faiss

        return faiss.serialize_index(self.index).nbytes + 4 * (self.axes.numel() + self.mean.numel())

    def search(self, queries: np.ndarray, k: int, rows: ArrayLike | None = None) -> Found:
        """As `make_search` says, but that neighbours may be missed."""
        import faiss

        queries = _as_queries(queries, self.database.shape[1])
        rows = None if rows is None else np.ascontiguousarray(rows, dtype=np.int64)
        _require_finite(self.bad if rows is None else self.bad[rows], "database", rows)
        count = len(self.database) if rows is None else len(rows)
        kept = max(self.rescored, 2 * k)
        if count <= max(self.exact_below, kept) or not len(queries):
            return search(self.database, queries, k, rows)
        chosen = None
        if rows is not None:
            inside = np.zeros(len(self.database), dtype=bool)
            inside[rows] = True
            bits = np.packbits(inside, bitorder="little")
            chosen = faiss.IDSelectorBitmap(bits)
        # The scores of a query all lack the same number, its product with the mean: the order is the same.
        reduced = (torch.from_numpy(queries) @ self.axes).numpy()
        _, found = self.index.search(reduced, kept, params=faiss.SearchParametersIVF(sel=chosen, nprobe=self.probes))
        scores, rescore = np.full(found.shape, -np.inf, dtype=np.float32), _Rescore(self.database, kept)
        for q, candidates in enumerate(found):
            there = candidates >= 0
            scores[q, there] = rescore(candidates[there], queries[q])
        if rows is not None:
            order = np.argsort(rows, kind="stable")
            found = order[np.searchsorted(rows, np.maximum(found, 0), sorter=order).clip(max=count - 1)]
        return _best(scores, found, k)


Search = FlatSearch | ExactSearch | CompressedSearch


class _Rescore:
    """Inner products in float32 with some rows of the database. The buffers are used again for each query: fresh
    memory for each costs many times the arithmetic, and torch widens float16 several times as fast as numpy."""

    def __init__(self, database: np.ndarray, rows: int) -> None:
        self.database = database
        self.stored = np.empty((rows, database.shape[1]), database.dtype)
        self.wide = torch.empty(rows, database.shape[1])

    def __call__(self, rows: np.ndarray, query: np.ndarray) -> np.ndarray:
        """rows (n,), query (D,) -> scores (n,)."""
        count = len(rows)
        np.take(self.database, rows, axis=0, out=self.stored[:count], mode="clip")
        self.wide[:count] = torch.from_numpy(self.stored[:count])
        return torch.mv(self.wide[:count], torch.from_numpy(query)).numpy()


def _nothing(count: int, k: int):
    return np.full((count, k), -np.inf, dtype=np.float32), np.full((count, k), -1, dtype=np.int64)


def _best(scores: np.ndarray, indices: np.ndarray, k: int):
    """Candidates (Q, K) in any order, -inf for none -> the k best, ties by index, filled up with -inf and -1."""
    order = np.lexsort((indices, -scores), axis=1)[:, :k]
    scores, indices = np.take_along_axis(scores, order, axis=1), np.take_along_axis(indices, order, axis=1)
    indices = np.where(np.isneginf(scores), -1, indices)
    fill = ((0, 0), (0, k - scores.shape[1]))
    return np.pad(scores, fill, constant_values=-np.inf), np.pad(indices, fill, constant_values=-1)


def _as_queries(queries: np.ndarray, dim: int):
    queries = np.ascontiguousarray(queries, dtype=np.float32)
    if queries.ndim != 2 or queries.shape[1] != dim:
        raise ValueError(f"queries of shape {queries.shape}: the database's descriptors have {dim} values")
    _require_finite(~np.isfinite(queries).all(axis=1), "query", None)
    return queries


def _require_finite(bad: np.ndarray, kind: str, rows: np.ndarray | None):
    """bad (n,) bool of these rows (None: all)."""
    if bad.any():
        first = int(np.argmax(bad)) if rows is None else rows[np.argmax(bad)]
        raise ValueError(
            f"{int(bad.sum())} {kind} descriptors are not finite (NaN or infinite), the first is row "
            f"{first}: an unreadable image was not left out, or the model diverged"
        )
