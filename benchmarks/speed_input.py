"""From files to batches: decoders, and the loader against bare decoding. python -m benchmarks.speed_input

1,024 px JPEGs of about 97 KB, as the public data set's, made from the demo world's mosaic. All ways take turns, each is
the median of its turns; decoding counts CPU time on one core, so that other jobs on the machine disturb little.
"""

import io
import os
import tempfile
import time
from contextlib import closing
from pathlib import Path

import numpy as np
import simplejpeg
import torch
from PIL import Image
from torchvision.transforms import functional as TF

from benchmarks.speed_augmentation import pictures
from benchmarks.timing import take_turns
from datasets.batches import BatchLoader
from datasets.build.cache import store
from datasets.images import read_pixels, resize
from datasets.names import YEARS
from datasets.regions import RegionDataset, Regions
from utils.arguments import make_parser
from utils.arguments import run as run_script

SIDE, BYTES = 1024, 97_000


def make_files(folder, count):
    """`count` JPEGs of the public data set's size in folder/database -> paths relative to folder."""
    Path(folder, "database").mkdir()
    rng, paths = np.random.default_rng(0), []
    for number, picture in enumerate(pictures(count, SIDE // 2)):
        fine = resize(picture.permute(1, 2, 0).contiguous(), SIDE).numpy().astype(np.float32)
        grain = np.kron(rng.normal(0, 6, (SIDE // 2, SIDE // 2, 1)), np.ones((2, 2, 1)))
        pixels = (fine + grain).clip(0, 255).astype(np.uint8)
        encoded = (simplejpeg.encode_jpeg(pixels, quality, colorsubsampling="420") for quality in range(90, 20, -4))
        paths.append(f"database/{number}.jpg")
        Path(folder, paths[-1]).write_bytes(next(each for each in encoded if len(each) <= BYTES))
    return paths


def pil(content, size=None, draft=False):
    with Image.open(io.BytesIO(content)) as image:
        if draft:
            image.draft("RGB", (size, size))
        image = image.convert("RGB")
        return np.array(image.resize((size, size), Image.Resampling.BICUBIC) if size else image)


def decoders(image_size):
    """{name: function of a JPEG's bytes}."""
    ways = {
        f"baseline: PIL, {round(2.5 * image_size)} px, float32": lambda content: TF.to_tensor(
            pil(content, round(2.5 * image_size))
        ),
        "PIL, whole": pil,
        "PIL, half": lambda content: pil(content, SIDE // 2, draft=True),
        f"PIL, half, to {image_size} px": lambda content: pil(content, image_size, draft=True),
        "simplejpeg, whole": simplejpeg.decode_jpeg,
        "simplejpeg, half": lambda content: simplejpeg.decode_jpeg(content, min_height=512, min_width=512),
        f"simplejpeg, half, to {image_size} px": lambda content: resize(
            torch.from_numpy(simplejpeg.decode_jpeg(content, min_height=512, min_width=512)), image_size
        ),
    }
    try:
        from torchcodec.decoders import decode_jpeg

        ways["torchcodec, whole"] = decode_jpeg
    except (ImportError, RuntimeError):
        print("torchcodec is not installed: left out")
    return ways


class Decoding(RegionDataset):
    """Pixels stay in the worker, in one place that is used for all: what the same processes do if they only decode."""

    def __init__(self, regions, size):
        super().__init__(regions, size)
        self.own, self.shape = torch.empty(self.shape, dtype=torch.uint8), (0,) * 4

    def fill(self, places, row):
        super().fill(self.own, row)
        return places


def make_regions(folder, paths, count):
    """`count` regions of four files each, the files taking turns."""
    rows = [tuple(paths[(4 * row + year) % len(paths)] for year in range(4)) for row in range(count)]
    return Regions(Path(folder), rows, np.zeros((count, 4, 2)), [str(row) for row in range(count)], YEARS)


def loader_rates(regions, size, workers, batches, repeats):
    """-> images a second of bare decoding in the workers, and of the loader; elapsed time, the two taking turns."""
    schedule = np.arange(len(regions)).reshape(-1, 16)[np.arange(batches) % (len(regions) // 16)]
    with (
        closing(BatchLoader(Decoding(regions, size), workers)) as bare,
        closing(BatchLoader(RegionDataset(regions, size), workers)) as loader,
    ):
        found = take_turns(
            {
                name: lambda each=each: [None for _ in each.serve(schedule)]
                for name, each in (("bare", bare), ("loader", loader))
            },
            repeats,
            time.perf_counter,
        )
    return {name: schedule.size * 4 / each for name, each in found.items()}


def main(args):
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        paths = make_files(folder, 16)
        contents = [Path(folder, path).read_bytes() for path in paths]
        Path(folder, "cache").mkdir()
        for path in paths:
            store(path, folder, Path(folder, "cache"), 512, 90)
        cached = [Path(folder, "cache", path).read_bytes() for path in paths]
        ways = decoders(args.image_size)
        cases = {name: lambda way=way: [way(each) for each in contents] for name, way in ways.items()}
        cases["cached 512 px, simplejpeg"] = lambda: [simplejpeg.decode_jpeg(each) for each in cached]
        cases["cached 512 px, PIL"] = lambda: [pil(each) for each in cached]
        for size in sorted({args.image_size, 512}):
            cases[f"ours: file to {size} px"] = lambda size=size: [
                read_pixels(Path(folder, path), size) for path in paths
            ]
            cases[f"ours: cached file to {size} px"] = lambda size=size: [
                read_pixels(Path(folder, "cache", path), size) for path in paths
            ]
        found = take_turns(cases, args.repeats, time.process_time)
        print(
            f"{np.mean([len(each) for each in contents]) / 1000:.0f} KB a file, {SIDE} px; cached: "
            f"{np.mean([len(each) for each in cached]) / 1000:.0f} KB\n{'one image, one core':40} ms"
        )
        for name, each in found.items():
            print(f"{name:36} {each / len(paths) * 1000:7.2f}")

        print(f"\n{'loader, ' + str(args.num_workers) + ' workers':36} {'bare/s':>8} {'loader/s':>8} {'share':>6}")
        for size, title, root in (
            (512, "files", folder),
            (512, "cached files", Path(folder, "cache")),
            (256, "files", folder),
            (256, "cached files", Path(folder, "cache")),
        ):
            rates = loader_rates(make_regions(root, paths, 64), size, args.num_workers, args.batches, args.repeats)
            name = f"{title} to {size} px"
            print(f"{name:36} {rates['bare']:8.0f} {rates['loader']:8.0f} {rates['loader'] / rates['bare']:6.1%}")


if __name__ == "__main__":
    parser = make_parser(__doc__)
    parser.add_argument("--image_size", type=int, default=320)
    parser.add_argument("--num_workers", type=int, default=os.cpu_count())
    parser.add_argument("--batches", type=int, default=8, help="of 16 quadruplets, in each turn of a loader")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--traceback", action="store_true", help="show the traceback of an error")
    run_script(main, parser.parse_args())
