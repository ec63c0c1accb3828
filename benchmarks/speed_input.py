"""From files to batches: decoders, and the loader against bare decoding. python -m benchmarks.speed_input

1,024 px JPEGs of about 97 KB, as the public data set's, made from the demo world's mosaic. All ways take turns, each is
the median of its turns; decoding counts CPU time on one core, so that other jobs on the machine disturb little.
"""

import io
import tempfile
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Annotated

import numpy as np
import simplejpeg
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import functional as TF

from benchmarks.speed_augmentation import pictures
from benchmarks.timing import show, take_turns
from datasets.batches import BatchLoader
from datasets.build.cache import store
from datasets.images import encode_jpeg, read_pixels, resize
from datasets.names import YEARS
from datasets.regions import RegionDataset, Regions
from utils.flags import Workers, command
from utils.workers import usable_cores

SIDE, BYTES = 1024, 97_000
CORES = usable_cores()


def make_files(folder: str | Path, count: int) -> list[str]:
    """`count` JPEGs of the public data set's size in folder/database -> paths relative to folder."""
    Path(folder, "database").mkdir()
    rng, paths = np.random.default_rng(0), []
    for number, picture in enumerate(pictures(count, SIDE // 2)):
        fine = resize(picture.permute(1, 2, 0).contiguous(), SIDE).numpy().astype(np.float32)
        grain = np.kron(rng.normal(0, 6, (SIDE // 2, SIDE // 2, 1)), np.ones((2, 2, 1)))
        pixels = (fine + grain).clip(0, 255).astype(np.uint8)
        encoded = (encode_jpeg(pixels, quality) for quality in range(90, 20, -4))
        paths.append(f"database/{number}.jpg")
        Path(folder, paths[-1]).write_bytes(next(each for each in encoded if len(each) <= BYTES))
    return paths


def pil(content: bytes, size: int | None = None, draft: bool = False) -> np.ndarray:
    """JPEG -> uint8 (H, W, 3). draft: decoded at a coarser scale that is enough for the size."""
    with Image.open(io.BytesIO(content)) as image:
        if draft:
            image.draft("RGB", (size, size))
        image = image.convert("RGB")
        return np.array(image.resize((size, size), Image.Resampling.BICUBIC) if size else image)


def decoders(image_size: int) -> dict[str, Callable[[bytes], object]]:
    """{name: function of a JPEG's bytes}."""
    wide, to = round(2.5 * image_size), f"to {image_size} px"
    half = lambda content: simplejpeg.decode_jpeg(content, min_height=512, min_width=512)
    ways = {
        f"baseline: PIL, {wide} px, float32": lambda content: TF.to_tensor(pil(content, wide)),
        "PIL, whole": pil,
        "PIL, half": lambda content: pil(content, SIDE // 2, draft=True),
        f"PIL, half, {to}": lambda content: pil(content, image_size, draft=True),
        "simplejpeg, whole": simplejpeg.decode_jpeg,
        "simplejpeg, half": half,
        f"simplejpeg, half, {to}": lambda content: resize(torch.from_numpy(half(content)), image_size),
    }
    try:
        from torchcodec.decoders import decode_jpeg

        ways["torchcodec, whole"] = decode_jpeg
    except (ImportError, RuntimeError):
        print("torchcodec is not installed: left out")
    return ways


class Decoding(RegionDataset):
    """Pixels stay in the worker, in one place that is used for all: what the same processes do if they only decode."""

    def __init__(self, regions: Regions, size: int) -> None:
        super().__init__(regions, size)
        self.own, self.shape = torch.empty(self.shape, dtype=torch.uint8), (0,) * 4

    def fill(self, places: Tensor, row: int) -> Tensor:
        super().fill(self.own, row)
        return places


def make_regions(folder: str | Path, paths: list[str], count: int) -> Regions:
    """`count` regions of four files each, the files taking turns."""
    rows = [tuple(paths[(4 * row + year) % len(paths)] for year in range(4)) for row in range(count)]
    return Regions(Path(folder), rows, np.zeros((count, 4, 2)), [str(row) for row in range(count)], YEARS)


def loader_rates(regions: Regions, size: int, workers: int, batches: int, repeats: int) -> tuple[float, float]:
    """-> images a second of bare decoding in the workers, and of the loader; elapsed time, the two taking turns."""
    schedule = np.arange(len(regions)).reshape(-1, 16)[np.arange(batches) % (len(regions) // 16)]
    with (
        closing(BatchLoader(Decoding(regions, size), workers)) as bare,
        closing(BatchLoader(RegionDataset(regions, size), workers)) as loader,
    ):
        cases = {each: lambda each=each: [None for _ in each.serve(schedule)] for each in (bare, loader)}
        found = take_turns(cases, repeats, time.perf_counter)
    return schedule.size * 4 / found[bare], schedule.size * 4 / found[loader]


def main(
    image_size: Annotated[int, "pixels a side"] = 320,
    batches: Annotated[int, "of 16 quadruplets, in each turn of a loader"] = 8,
    repeats: Annotated[int, "turns"] = 7,
    num_workers: Workers = CORES,
) -> None:
    """Prints a row for each decoder and loader."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        paths, cache = make_files(folder, 16), Path(folder, "cache")
        for path in paths:
            store(path, folder, cache, 512, 90)
        contents, cached = ([Path(root, path).read_bytes() for path in paths] for root in (folder, cache))
        cases = {name: lambda way=way: [way(each) for each in contents] for name, way in decoders(image_size).items()}
        cases["cached 512 px, simplejpeg"] = lambda: [simplejpeg.decode_jpeg(each) for each in cached]
        cases["cached 512 px, PIL"] = lambda: [pil(each) for each in cached]
        roots = {"file": folder, "cached file": cache}
        for size in sorted({image_size, 512}):
            for name, root in roots.items():
                ours = lambda root=root, size=size: [read_pixels(Path(root, path), size) for path in paths]
                cases[f"ours: {name} to {size} px"] = ours
        found = take_turns(cases, repeats, time.process_time)
        whole, small = (sum(map(len, each)) / len(each) / 1000 for each in (contents, cached))
        print(f"{whole:.0f} KB a file, {SIDE} px; cached: {small:.0f} KB")
        show({"one image, one core": "36", "ms": "7.2f"}, [(name, 1e3 * each / 16) for name, each in found.items()])

        def rates():
            for size in (512, 256):
                for name, root in roots.items():
                    regions = make_regions(root, paths, 64)
                    bare, ours = loader_rates(regions, size, num_workers, batches, repeats)
                    yield f"{name}s to {size} px", bare, ours, ours / bare

        print()
        title = f"loader, {num_workers} workers"
        show({title: "36", "bare/s": "8.0f", "loader/s": "8.0f", "share": "6.1%"}, rates())


if __name__ == "__main__":
    command(main)
