"""A data set made smaller once, so that reading it is fast for ever: python -m datasets.build cache data --size 512

The result, data_512, is a data set with the same names: give it as --dataset_path. An image's shorter side has at most
`size` pixels; what is smaller already is copied as it is. A second run goes on where the first one stopped, and makes
again what has changed: a cached image carries its source's time of change. train.py and eval.py say when one is stale;
they look at folders' times and compare the images in those that have changed.
"""

import json
import os
import shutil
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
from torch.nn import functional as F

from datasets.build import flags, jobs
from datasets.images import encode_jpeg, read_pixels
from datasets.listing import UNSETTLED, as_known, list_files, list_folder, walk
from datasets.overlap import INTERSECTIONS_FILE
from utils.arguments import positive
from utils.files import replacing

INFO_FILE = "cache.json"
FOLDERS_FILE = "cache_folders.json"  # folders' times when the cache was made
FOLDERS = ("database", "queries")
SAME_TIME_NS = 10**6  # some file systems round times


def stamps(root: str | Path, folders: Iterable[str] | None = None) -> dict[str, int]:
    """Data set folder -> {path of an image relative to it: time of change, ns}, of all or those right in `folders`."""
    if folders is None:
        paths = [path for part in FOLDERS for path in list_files(root, part)[0]]
    else:
        places = [(folder, os.fsencode(Path(root, folder))) for folder in folders if Path(root, folder).is_dir()]
        paths = [os.path.join(folder, os.fsdecode(name)) for folder, place in places for name in list_folder(place)[1]]
    return {path: _time(os.path.join(root, path)) for path in paths}


def _time(path: str) -> int:
    try:
        return os.stat(path).st_mtime_ns
    except FileNotFoundError:  # a link to nothing: it is named when it is to be read
        return -1


def folder_times(root: str | Path, known: dict | None = None) -> dict[str, tuple[int, int]]:
    """Data set folder -> {folder relative to it: its times}; folders with the `known` ones are not listed for it."""
    known = {os.fsencode(folder): tuple(times) for folder, times in (known or {}).items()}
    return {os.fsdecode(folder): times for part in FOLDERS for folder, times, *_ in walk(root, part, as_known(known))}


def stale(source: dict[str, int], cached: dict[str, int]) -> tuple[list[str], list[str]]:
    """Two stamps -> paths that the cache lacks or holds of another time, and those that the source no longer has."""
    old = sorted(path for path, time in source.items() if path not in cached or abs(cached[path] - time) > SAME_TIME_NS)
    return old, sorted(set(cached) - set(source))


def shrink(path: Path, size: int) -> torch.Tensor | None:
    """Image file -> uint8 (H, W, 3) whose shorter side has `size` pixels; None if it has no more than that."""
    pixels = read_pixels(path)
    height, width = pixels.shape[:2]
    if min(height, width) <= size:
        return None
    if height == width:  # decoded again at a power-of-two scale, if one is right: sharper and faster than resizing
        return read_pixels(path, size)
    sides = [round(side * (size / min(height, width))) for side in (height, width)]
    return F.interpolate(pixels.permute(2, 0, 1)[None], sides, mode="bicubic", antialias=True)[0].permute(1, 2, 0)


def store(path: str, source: str | Path, output: str | Path, size: int, quality: int) -> str | None:
    """Puts one image into the cache -> None, or what is wrong with it. Never leaves half a file under its name."""
    origin, target = Path(source, path), Path(output, path)
    try:
        times = origin.stat()
        pixels = shrink(origin, size)
    except (ValueError, FileNotFoundError) as error:
        target.unlink(missing_ok=True)
        return str(error)
    target.parent.mkdir(parents=True, exist_ok=True)
    with replacing(target, sync=False) as file:
        file.write(origin.read_bytes() if pixels is None else encode_jpeg(pixels.numpy(), quality))
        file.flush()
        os.utime(file.fileno(), ns=(times.st_atime_ns, times.st_mtime_ns))
    return None


def claim(source: Path, output: Path, size: int, quality: int) -> None:
    """Marks `output` as the cache of `source`. Raises ValueError where it is something else."""
    info = {"source": str(source.resolve()), "size": size, "quality": quality}
    file = output / INFO_FILE
    there = json.loads(file.read_text()) if file.exists() else info
    if there != info:
        raise ValueError(f"{output}: holds a cache of {there}, not of {info}; remove it or choose another --output")
    if not file.exists() and output.exists() and any(output.iterdir()):
        raise ValueError(f"{output}: is not empty and no cache; choose another --output")
    output.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(info, indent=2) + "\n")


def make_cache(
    source: str | Path, output: str | Path, size: int = 512, quality: int = 90, num_workers: int = 2
) -> tuple[int, list[str]]:
    """Fills folder `output` -> number of images made now, and a list of what could not be read.

    Raises ValueError or FileNotFoundError that names the folder.
    """
    source, output = Path(source), Path(output)
    if not (source / "database").is_dir():
        raise FileNotFoundError(f"{source / 'database'}: no such folder; give the folder of a data set")
    claim(source, output, size, quality)
    times = folder_times(source)  # before the images are read
    paths, orphans = stale(stamps(source), stamps(output))
    for path in orphans:
        (output / path).unlink()
    put = partial(store, source=source, output=output, size=size, quality=quality)
    errors = [error for error in jobs.run(paths, put, num_workers, f"caching at {size} px") if error]
    if (source / INTERSECTIONS_FILE).exists():
        shutil.copyfile(source / INTERSECTIONS_FILE, output / INTERSECTIONS_FILE)
    unfit = {os.path.dirname(path) for found in stale(stamps(source), stamps(output)) for path in found}
    states = {folder: os.stat(output / folder) for folder in folder_times(output)}
    kept = {
        "source": {folder: UNSETTLED if folder in unfit else each for folder, each in times.items()},
        "cache": {folder: (state.st_mtime_ns, state.st_ctime_ns) for folder, state in states.items()},
    }
    with replacing(output / FOLDERS_FILE) as opened:
        opened.write(json.dumps(kept).encode())
    return len(paths) - len(errors), errors


def cache_note(dataset_path: str | Path, loaded_size: int) -> str | None:
    """A sentence for the log where the data set is a cache: of what, and whether it is up to date. Otherwise None.

    Images are compared in folders whose times have changed since the cache was made. An image that was overwritten in
    place changes none: only a second run of the command finds it.
    """
    file = Path(dataset_path) / INFO_FILE
    if not file.exists():
        return None
    info = json.loads(file.read_text())
    note = f"{dataset_path} is a cache of {info['source']} at {info['size']} px"
    if loaded_size > info["size"]:
        note += f", less than the {loaded_size} px at which images are loaded: make one with --size {loaded_size}"
    if not Path(info["source"], "database").is_dir():
        return f"{note}; the source is not here to compare with"
    kept, changed = file.with_name(FOLDERS_FILE), set()
    kept = json.loads(kept.read_text()) if kept.exists() else {"source": {}, "cache": {}}
    for root, known in ((info["source"], kept["source"]), (dataset_path, kept["cache"])):
        now = folder_times(root, known)
        settled = {folder for folder in now if tuple(known.get(folder, UNSETTLED)) == now[folder] != UNSETTLED}
        changed |= {*now, *known} - settled
    old, orphans = stale(stamps(info["source"], changed), stamps(dataset_path, changed))
    if old or orphans:
        return (
            f"{note}; STALE: {len(old)} images are new, changed or unreadable, {len(orphans)} are gone; bring it "
            f"up to date: python -m datasets.build cache {info['source']} --size {info['size']} "
            f"--quality {info['quality']} --output {dataset_path}"
        )
    return f"{note}, up to date"


def main(
    dataset_path: Annotated[Path, "folder with database/ and queries/"],
    size: Annotated[int, "pixels of the shorter side; train.py loads 512 by default", {"type": positive}] = 512,
    quality: flags.Quality = 90,
    output: Annotated[Path | None, "default: the data set's folder with _SIZE after its name"] = None,
    num_workers: flags.Workers = flags.CORES,
) -> str:
    """-> How many images were made, and left out."""
    output = output or Path(f"{dataset_path}_{size}")
    made, errors = make_cache(dataset_path, output, size, quality, num_workers)
    for error in errors:
        print(f"left out: {error}")
    return f"{output}: {made} images made now, {len(errors)} left out; use it with --dataset_path {output}"
