"""Results of any number of photos, on the disk as they come: a run that was killed loses a batch, the next goes on.

In the folder: predictions.jsonl, a line a place, its properties and the footprint; predictions.parquet/, the same as
GeoParquet files of PART places; failures.csv, what has no place and why; progress.json, how far all of them are good.
A batch's lines are written first, progress.json after that, whole or not at all: what it does not know is cut off when
the folder is opened again. `finish` makes predictions.json, .csv and .geojson of it.

Shards of an archive have folders of their own, which `merge` puts together.
"""

from __future__ import annotations

import csv
import fcntl
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from datasets.names import CORNER_FIELDS
from retrieval.predictions import write_predictions
from utils.files import printable, replacing
from utils.outlines import GEO, geometry

PLACES, PARTS, FAILURES, PROGRESS = "predictions.jsonl", "predictions.parquet", "failures.csv", "progress.json"
PART = 10_000  # places in a file of Parquet
KINDS = {bool: pa.bool_(), int: pa.int64(), float: pa.float64(), str: pa.string()}


class Archive:
    """An open folder of results; made by `Archive.open`, used in a `with`. `done` (N,): sorted digests of the photos
    that have places there."""

    def __init__(self, folder: Path, settings: dict, columns: Mapping[str, type], progress: dict) -> None:
        self.folder, self.settings, self.columns = folder, settings, dict(columns)
        self.lock = self.lines = self.failures = None
        self.bytes, self.parts, self.parted = progress["bytes"], progress["parts"], progress["parted"]
        self.pending = []  # places that are in no file of Parquet yet
        self.failed = 0

    @classmethod
    def open(cls, folder: str | Path, settings: dict, columns: Mapping[str, type]) -> Archive:
        """A new folder, or one to go on with. settings: what the results depend on, for JSON; columns: properties of a
        place and their types (KINDS).

        Raises ValueError where the folder holds results of other settings or other files, or another process writes
        there.
        """
        folder = make_folder(folder)
        settings = json.loads(json.dumps(settings, default=str))
        lock = _lock(folder)
        try:
            progress = read_progress(folder)
            if progress is None and (folder / PLACES).exists():
                raise ValueError(f"{folder}: has a {PLACES}, but no {PROGRESS} to go on from; give another --output")
            if progress is None:
                progress = {"settings": settings, "bytes": 0, "parts": 0, "parted": 0, "finished": False}
            for name, value in settings.items():
                before = progress["settings"].get(name)
                if before != value:
                    raise ValueError(
                        f"{folder}: its results were made with {name} {before}, now it is {value}; give the same, or "
                        f"another --output"
                    )
            archive = cls(folder, settings, columns, progress)
            archive._begin()
        except BaseException:
            os.close(lock)
            raise
        archive.lock = lock
        return archive

    def _begin(self):
        """Opens the files, without what came after the last batch that counts."""
        self.lines = open(self.folder / PLACES, "a+b")
        if self.lines.seek(0, os.SEEK_END) < self.bytes:
            raise ValueError(f"{self.folder / PLACES}: was cut short; remove {PROGRESS} and it to begin anew")
        self.lines.truncate(self.bytes)
        self.lines.seek(0)
        self.done = np.unique(np.fromiter((digest(json.loads(line)["image"]) for line in self.lines), np.uint64))
        (self.folder / PARTS).mkdir(exist_ok=True)
        for path in (self.folder / PARTS).iterdir():
            if path.name > _part_name(self.parts):  # that one holds some of what is pending, and is written anew
                path.unlink()
        self.lines.seek(self.parted)
        self.pending = [json.loads(line) for line in self.lines]
        self.lines.seek(0, os.SEEK_END)
        # Failures are tried again: a disk may be back.
        self.failures = open(self.folder / FAILURES, "w", newline="", encoding="utf-8", errors="backslashreplace")
        csv.writer(self.failures).writerow(["image", "why"])
        self._commit(False)

    def __enter__(self) -> Archive:
        return self

    def __exit__(self, *_: object) -> None:
        self.lines.close()
        self.failures.close()
        os.close(self.lock)

    def is_done(self, image: str) -> bool:
        """Whether the photo had places when the folder was opened."""
        key = np.uint64(digest(image))
        place = np.searchsorted(self.done, key)
        return place < len(self.done) and self.done[place] == key

    def add(self, places: Iterable[tuple[dict, np.ndarray]], failures: Iterable[tuple[str, str]] = ()) -> None:
        """A batch: (properties, footprint (4, 2)) of places, and (image, why) of photos without one -> the disk."""
        added = [{**properties, "footprint": np.asarray(footprint).tolist()} for properties, footprint in places]
        self.lines.write("".join(json.dumps(each) + "\n" for each in added).encode())
        self.lines.flush()
        os.fsync(self.lines.fileno())
        self.bytes = self.lines.tell()
        self.pending += added
        for image, why in failures:
            csv.writer(self.failures).writerow([image, why])
            self.failed += 1
        self.failures.flush()
        if len(self.pending) >= PART:
            self._write_part()
        self._commit(False)

    def _write_part(self):
        with replacing(self.folder / PARTS / _part_name(self.parts)) as file:
            pq.write_table(as_table(self.pending, self.columns), file, compression="zstd")
        self.parts, self.parted, self.pending = self.parts + 1, self.bytes, []

    def _commit(self, finished: bool):
        progress = {
            "settings": self.settings,
            "bytes": self.bytes,
            "parts": self.parts,
            "parted": self.parted,
            "finished": finished,
        }
        with replacing(self.folder / PROGRESS) as file:
            file.write(json.dumps(progress, indent=2).encode())

    def finish(self) -> None:
        """The last file of Parquet, and predictions.json, .csv and .geojson. A later run may still add photos."""
        (self.folder / PARTS / _part_name(self.parts)).unlink(missing_ok=True)
        if self.pending:
            parts, parted, kept = self.parts, self.parted, self.pending
            self._write_part()
            # Not full: the next run writes it anew.
            self.parts, self.parted, self.pending = parts, parted, kept
        write_predictions(self.folder, lambda: read_places(self.folder))
        self._commit(True)


def make_folder(folder: str | Path) -> Path:
    """The folder of --output, made where it is not there. ValueError where it cannot be one."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--output {folder}: cannot be a folder ({error.strerror}); give another one") from None
    return Path(folder)


def read_progress(folder: str | Path) -> dict | None:
    """What progress.json holds, None where there is none. ValueError where it is damaged."""
    path = Path(folder) / PROGRESS
    try:
        progress = json.loads(path.read_text())
        if not {"settings", "bytes", "parts", "parted", "finished"} <= set(progress):
            raise ValueError("something else")
        return progress
    except FileNotFoundError:
        return None
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: damaged ({error}); remove it and {PLACES} to begin anew") from None


def read_places(folder: str | Path) -> Iterator[tuple[dict, np.ndarray]]:
    """The folder's places in their order, one at a time: properties, footprint (4, 2)."""
    with open(Path(folder) / PLACES, "rb") as file:
        for line in file:
            properties = json.loads(line)
            footprint = np.array(properties.pop("footprint"))
            yield properties, footprint


def read_failures(folder: str | Path) -> Iterator[tuple[str, str]]:
    """(image, why) of the photos that have no place."""
    with open(Path(folder) / FAILURES, newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            yield row["image"], row["why"]


def as_table(places: Sequence[dict], columns: Mapping[str, type]) -> pa.Table:
    """Places with their footprints -> table of the columns and `geometry` (GeoParquet 1.1; the corners in circular
    order, cut at the antimeridian), and of the photo's own corners, lat1, lon1 … lat4, lon4."""
    texts = lambda values: [printable(each) if isinstance(each, str) else each for each in values]
    arrays = [pa.array(texts([each[name] for each in places]), KINDS[kind]) for name, kind in columns.items()]
    corners = np.array([each["footprint"] for each in places], dtype=np.float64).reshape(-1, 8)
    arrays += [*map(pa.array, corners.T.copy()), geometry(corners.reshape(-1, 4, 2))]
    return pa.table(arrays, [*columns, *CORNER_FIELDS, "geometry"]).replace_schema_metadata(GEO)


def digest(image: str) -> int:
    """64 bits that stand for a photo's name."""
    return int.from_bytes(hashlib.blake2b(os.fsencode(image), digest_size=8).digest(), "little")


def _part_name(number: int):
    return f"part-{number:06d}.parquet"


def _lock(folder: Path):
    """-> the open file that says that this process writes in the folder; the lock ends with the process."""
    file = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(file)
        raise ValueError(f"{folder}: another process writes there; wait for it, or give another --output") from None
    except OSError as error:
        logging.warning(f"{folder}: cannot be locked ({error.strerror}); start no second process on it")
    return file


# ---- shards ----


def parse_shard(text: str | None, environment: Mapping[str, str] = os.environ) -> tuple[int, int]:
    """ "2/8" -> (2, 8), counted from 0; None: what SLURM's job array or torchrun say, else (0, 1).

    Raises ValueError where it is not one of so many.
    """
    source = "--shard"
    if text is None:
        if "SLURM_ARRAY_TASK_ID" in environment and "SLURM_ARRAY_TASK_COUNT" in environment:
            source = "SLURM_ARRAY_TASK_ID/SLURM_ARRAY_TASK_COUNT"
            number = int(environment["SLURM_ARRAY_TASK_ID"]) - int(environment.get("SLURM_ARRAY_TASK_MIN", 0))
            number, rest = divmod(number, int(environment.get("SLURM_ARRAY_TASK_STEP", 1)))
            text = f"{number if not rest else -1}/{environment['SLURM_ARRAY_TASK_COUNT']}"
        elif "RANK" in environment and "WORLD_SIZE" in environment:
            source, text = "RANK/WORLD_SIZE", f"{environment['RANK']}/{environment['WORLD_SIZE']}"
        else:
            return 0, 1
    try:
        number, count = map(int, text.split("/"))
    except ValueError:
        raise ValueError(f"{source} {text}: expected i/n, such as 0/4, the first of four") from None
    if not 0 <= number < count:
        raise ValueError(f"{source} {text}: shards of {count} are 0/{count} to {count - 1}/{count}")
    return number, count


def shard_rows(count: int, shard: tuple[int, int]) -> range:
    """Rows of `count` photos that are a shard's: a stretch, so that shards in a row have all in their order."""
    number, shards = shard
    return range(count * number // shards, count * (number + 1) // shards)


def shard_folder(folder: str | Path, shard: tuple[int, int]) -> Path:
    """Where a shard's results go: the folder itself where there is only one."""
    number, count = shard
    return Path(folder) if count == 1 else Path(folder) / f"shard_{number:0{len(str(count - 1))}d}_of_{count}"


def merge(folder: str | Path, columns_of: Callable[[dict], Mapping[str, type]]) -> dict[str, int]:
    """Puts the shards of a folder together, in it, as if one run had made all -> {"photos", "places", "failures"}.

    columns_of(properties) -> the columns and types of such places. A photo that two shards have, as happens when photos
    were added between their runs, counts once. Shards stay. Raises ValueError where one is missing or unfinished.
    """
    folder = Path(folder)
    shards = find_shards(folder)
    settings = read_progress(shards[0])["settings"]
    merged = read_progress(folder)
    if merged is not None and merged["settings"].get("shards") != len(shards):
        raise ValueError(f"--merge {folder}: holds results of its own; move its {PLACES} and {PROGRESS} elsewhere")
    if merged is not None:  # of an earlier merge
        for name in (PLACES, PROGRESS, FAILURES):
            (folder / name).unlink(missing_ok=True)
        shutil.rmtree(folder / PARTS, ignore_errors=True)
    first = next((properties for shard in shards for properties, _ in read_places(shard)), {})
    for shard in shards:
        if read_progress(shard)["settings"] != settings:
            raise ValueError(f"{shard}: was made with other settings than {shards[0]}; run it again in a new --output")
    photos = places = 0
    with Archive.open(folder, settings | {"shards": len(shards)}, columns_of(first)) as archive:
        before: set[int] = set()
        for shard in shards:
            own, block = set(), []
            for properties, footprint in read_places(shard):
                key = digest(properties["image"])
                if key in before:
                    continue
                own.add(key)
                block.append((properties, footprint))
                if len(block) == PART:
                    archive.add(block)
                    places, block = places + len(block), []
            archive.add(block)
            places, photos = places + len(block), photos + len(own)
            before |= own
        for shard in shards:
            archive.add([], ((image, why) for image, why in read_failures(shard) if digest(image) not in before))
        archive.finish()
        return {"photos": photos, "places": places, "failures": archive.failed}


def find_shards(folder: Path) -> list[Path]:
    """The folders of all shards, in order. Raises ValueError or FileNotFoundError naming those to be run."""
    found = {}
    for path in sorted(folder.glob("shard_*_of_*")):
        _, number, _, count = path.name.split("_")
        if number.isdigit() and count.isdigit():
            found.setdefault(int(count), {})[int(number)] = path
    if not found:
        raise FileNotFoundError(f"--merge {folder}: no folders shard_…_of_… in it; give the --output of the shards")
    if len(found) > 1:
        raise ValueError(f"--merge {folder}: shards of {' and of '.join(map(str, sorted(found)))}; remove the others")
    ((count, shards),) = found.items()
    unfinished = [
        f"{number}/{count}"
        for number in range(count)
        if number not in shards or not (read_progress(shards[number]) or {"finished": False})["finished"]
    ]
    if unfinished:
        raise ValueError(f"--merge {folder}: not finished: --shard {', '.join(unfinished[:20])}; run them again first")
    return [shards[number] for number in range(count)]
