"""Tables in Parquet files, and their texts in memory: 700,000 Python strings take time, and fork cannot share them."""

from __future__ import annotations

import json
import logging
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from utils.files import replacing

T = TypeVar("T")
STATE = b"state"  # key of the file's metadata: what the one who wrote it wants to know again
CHECKSUM_BYTES = 4  # before the footer, where Parquet's readers do not look: of all else (pages alone could have one)
ROW_GROUP = 65_536


class Damaged(Exception):
    """A file that is there and cannot be used."""


class Strings(Sequence):
    """Texts of an Arrow array of bytes, picked by rows (N,), or (N, K) for tuples of K; reads like a list.

    An integer gives a str (or a tuple of them), any other index Strings that share the array.
    """

    def __init__(self, texts: Iterable[str] | pa.Array | pa.ChunkedArray = (), rows: np.ndarray | None = None) -> None:
        is_arrow = isinstance(texts, (pa.Array, pa.ChunkedArray))
        self.array = in_one(texts if is_arrow else pa.array([os.fsencode(each) for each in texts], pa.binary()))
        self.rows = np.arange(len(self.array)) if rows is None else rows

    @property
    def column(self) -> pa.Array:
        """The picked texts as an Arrow array (N,), or (N * K,)."""
        rows = self.rows.ravel()
        if len(rows) == len(self.array) and (np.diff(rows, prepend=-1) == 1).all():
            return self.array  # all of them in order: no copy
        return self.array.take(pa.array(rows))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: object) -> str | tuple | Strings:
        rows = self.rows[index]
        if rows.ndim == 0:
            return os.fsdecode(self.array[int(rows)].as_py())
        found = Strings(self.array, rows)
        return tuple(found) if rows.ndim < self.rows.ndim else found

    def __iter__(self) -> Iterator:
        for start in range(0, len(self), 4096):  # a block at a time, so that not all of them exist at once
            block = self[start : start + 4096]
            texts = map(os.fsdecode, block.column.to_pylist())
            yield from texts if self.rows.ndim == 1 else zip(*[texts] * self.rows.shape[1])

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, (Strings, list, tuple)):
            return NotImplemented
        return len(self) == len(other) and all(a == b for a, b in zip(self, other))

    __hash__ = None


def in_one(column: pa.Array | pa.ChunkedArray) -> pa.Array:
    """Arrow column -> Arrow array; no copy where it is in one piece."""
    if isinstance(column, pa.Array):
        return column
    return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()


def find(texts: Strings, wanted: Strings) -> np.ndarray:
    """Strings (N,) and (M,) -> (M,) int: where each wanted one stands in texts (the last of equals), -1 for nowhere."""
    backwards = Strings(texts.array, texts.rows[::-1]).column
    return len(texts) - 1 - pc.index_in(wanted.column, backwards).fill_null(len(texts)).to_numpy().astype(np.int64)


def base_names(paths: pa.Array) -> pa.Array:
    """Arrow array of posix paths, bytes -> what follows the last slash."""
    parts = pc.split_pattern(paths, b"/", max_splits=1, reverse=True)
    return parts.flatten().take(pa.array(parts.offsets.to_numpy()[1:] - 1))


def as_text(column: pa.Array | pa.ChunkedArray) -> pa.Array:
    """Arrow bytes -> strings, which other programs show, or the bytes as they are where one is not UTF-8."""
    try:
        return column.cast(pa.string())
    except pa.ArrowInvalid:
        return column


def store(
    file: str | Path,
    tables: Iterable[pa.Table],
    state: object,
    metadata: dict[bytes, bytes] | None = None,
    distinct: Sequence[str] = (),
) -> bool:
    """Writes tables of one schema one after the other, whole or not at all -> whether the folder allowed it.

    state: what JSON holds; `opened` gives it back. metadata: of the schema, dict of bytes. distinct: those whose values
    hardly repeat; of the others, each value is stored once.
    """
    metadata = {**(metadata or {}), STATE: json.dumps(state).encode()}
    try:
        with replacing(file) as out:
            tables = iter(tables)
            first = next(tables)
            repeating = [name for name in first.column_names if name not in distinct]
            with pq.ParquetWriter(
                out,
                first.schema.with_metadata(metadata),
                compression="zstd",
                use_dictionary=repeating,
                dictionary_pagesize_limit=1 << 30,
            ) as writer:
                for table in (first, *tables):
                    writer.write_table(table.replace_schema_metadata(metadata))
            start = _footer_start(out)
            footer = out.read()
            checksum = zlib.crc32(footer, _checksum(out, start))
            out.seek(start)
            out.write(checksum.to_bytes(CHECKSUM_BYTES, "little") + footer)
    except OSError:
        return False
    return True


def _footer_start(file: BinaryIO):
    """Binary file of Parquet -> where its footer begins; the file is there then."""
    file.seek(-8, os.SEEK_END)  # the footer's length and the letters PAR1 are last
    return file.seek(-8 - int.from_bytes(file.read(4), "little"), os.SEEK_END)


def _checksum(file: BinaryIO, end: int):
    """Binary file -> CRC-32 of its first `end` bytes."""
    file.seek(0)
    checksum = 0
    while piece := file.read(min(end - file.tell(), 1 << 20)):
        checksum = zlib.crc32(piece, checksum)
    return checksum


def opened(file: str | Path) -> tuple[pq.ParquetFile, object] | None:
    """-> (the opened file, its state), None where there is none. Raises Damaged."""
    try:
        with open(file, "rb") as stored:
            start = _footer_start(stored)
            footer = stored.read()
            checksum = zlib.crc32(footer, _checksum(stored, start - CHECKSUM_BYTES))
            if stored.read(CHECKSUM_BYTES) != checksum.to_bytes(CHECKSUM_BYTES, "little"):
                raise ValueError("wrong checksum")
        parquet = pq.ParquetFile(file)
        return parquet, json.loads(parquet.metadata.metadata[STATE])
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise Damaged(str(error)) from None


def read_rows(parquet: pq.ParquetFile, columns: list[str], start: int = 0, count: int | None = None) -> pa.Table:
    """Rows start … start + count of an opened file -> table of the columns, texts as bytes. Raises Damaged."""
    sizes = [parquet.metadata.row_group(k).num_rows for k in range(parquet.num_row_groups)]
    ends = np.cumsum(sizes)
    count = sum(sizes) - start if count is None else count
    groups = np.flatnonzero((ends > start) & (ends - sizes < start + count)).tolist()
    skipped = start - int(ends[groups[0]] - sizes[groups[0]]) if groups else 0
    try:
        return pa.table([_read_column(parquet, groups, name).slice(skipped, count) for name in columns], columns)
    except (OSError, ValueError, KeyError) as error:
        raise Damaged(str(error)) from None


def _read_column(parquet: pq.ParquetFile, groups: list[int], name: str):
    """-> Arrow array. Texts are put into one array group by group: joined at the end, they would be there twice."""
    if not groups or parquet.schema_arrow.field(name).type not in (pa.string(), pa.binary()):
        return in_one(parquet.read_row_groups(groups, [name], use_threads=False)[name])
    rows = [parquet.metadata.row_group(group).num_rows for group in groups]
    offsets, data, row = np.zeros(sum(rows) + 1, dtype=np.int32), bytearray(), 0
    for group in groups:
        piece = in_one(parquet.read_row_group(group, [name], use_threads=False)[name])
        ends = np.frombuffer(piece.buffers()[1], dtype=np.int32)[: len(piece) + 1]
        offsets[row + 1 : row + len(ends)] = ends[1:] - ends[0] + len(data)
        data += memoryview(piece.buffers()[2])[ends[0] : ends[-1]]
        row += len(piece)
    return pa.BinaryArray.from_buffers(pa.binary(), row, [None, pa.py_buffer(offsets), pa.py_buffer(data)])


def or_anew(read: Callable[[bool], T], file: str | Path) -> T:
    """read(True), which may use the file; where that is damaged, a line in the log and read(False)."""
    try:
        return read(True)
    except Damaged as error:
        logging.warning(f"{file}: cannot be used ({error}); it is made again")
        return read(False)
