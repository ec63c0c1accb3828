"""The Earth at true scale: python -m datasets.build earth OUTPUT --raster FILE.tif --months FOLDER

Regions of the paper's own grid, cut out of one Web Mercator raster of a single month, pixel for pixel. The other years
of a region are other months of it: the raster's fine detail times the ratio of the two months' coarse mosaics, both
smoothed, so colours, snow and vegetation change and the ground stays where it is.
"""

import multiprocessing
import tempfile
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import simplejpeg
import torch
from kornia.filters import gaussian_blur2d
from torch.nn import functional as F
from tqdm import tqdm

from datasets import grid
from datasets.build.area import add_area_arguments, image_paths, select_regions
from datasets.build.plan import fingerprint, read_plan, write_plan
from datasets.images import read_image, resize
from datasets.names import YEARS
from utils.files import replacing

MONTHS = (2, 5, 11, 8)  # of YEARS: a winter, a spring, an autumn, and the raster's own, in which evaluation searches
RASTER_MONTH = 8
SMOOTH = 2.0  # pixels of the monthly mosaics, the standard deviation of the smoothing: about 15 km
MERCATOR_HALF = np.pi * 6378137  # metres: the edge of Web Mercator's square
MIN_SIDE = 32  # pixels: a region that shows fewer is too small for the raster
VERSION = 1  # raise when the same parameters begin to give other pictures


def open_raster(path):
    """-> open rasterio file in Web Mercator, and how many of its pixels go around the Earth. Raises ValueError."""
    import rasterio  # here, not above: only this command and `raster` need GDAL

    if not Path(path).is_file():
        raise FileNotFoundError(f"--raster {path}: no such file")
    try:
        source = rasterio.open(path)
    except rasterio.errors.RasterioIOError as error:
        raise ValueError(f"--raster {path}: cannot be read as a raster ({error})") from error
    around = 2 * MERCATOR_HALF / source.transform.a
    if source.crs is None or source.crs.to_epsg() != 3857 or source.count < 3 or source.dtypes[0] != "uint8":
        raise ValueError(
            f"--raster {path}: expected three bands of uint8 in Web Mercator (EPSG:3857); other rasters go "
            f"through `python -m datasets.build raster`, or gdalwarp -t_srs EPSG:3857"
        )
    if (
        abs(around - round(around)) > 1e-3 * around / source.width
        or abs(source.transform.a + source.transform.e) > 1e-6
    ):
        raise ValueError(
            f"--raster {path}: {around:.2f} of its pixels go around the Earth; they must be square, and a "
            f"whole number of them"
        )
    return source, round(around)


def windows(source, around, regions):
    """regions (N, 3) -> (N, 3) int: left, top, side in the raster's pixels. ValueError where a region has too few."""
    zoom, row, col = np.asarray(regions).reshape(-1, 3).T
    tile = around / 2.0**zoom
    if len(tile) and (tile.min() * grid.TILES < MIN_SIDE or (tile % 1).any()):
        finest = int(np.floor(np.log2(around * grid.TILES / MIN_SIDE)))
        raise ValueError(
            f"--zooms {sorted(set(zoom.tolist()))}: at zoom {zoom[tile.argmin()]} a region would show "
            f"{tile.min() * grid.TILES:g} of the raster's pixels; zooms up to {finest} can be built"
        )
    left = col * tile - round((source.transform.c + MERCATOR_HALF) / source.transform.a)
    top = row * tile - round((MERCATOR_HALF - source.transform.f) / source.transform.a)
    return np.stack([left, top, grid.TILES * tile], axis=1).astype(np.int64)


def read_window(source, around, left, top, width, height):
    """Open raster -> uint8 (height, width, 3). Rows end with the raster; columns go on around the Earth, if it does."""
    from rasterio.windows import Window

    parts = []
    while width > 0:
        left = left % around if source.width == around else left
        here = min(width, source.width - left)
        parts.append(source.read([1, 2, 3], window=Window(left, top, here, height)))
        left, width = left + here, width - here
    return np.concatenate(parts, axis=2).transpose(1, 2, 0)


def smooth_month(path):
    """Equirectangular picture of the whole Earth -> float32 (3, H, W), smoothed, brighter by 8. ValueError."""
    mosaic = read_image(path)
    if mosaic.shape[2] != 2 * mosaic.shape[1]:
        raise ValueError(
            f"{path}: {mosaic.shape[2]} × {mosaic.shape[1]} pixels; a monthly mosaic is equirectangular, "
            f"the whole Earth, so exactly twice as wide as high"
        )
    pad = int(4 * SMOOTH)
    padded = F.pad(F.pad(mosaic[None].float(), (pad, pad, 0, 0), "circular"), (0, 0, pad, pad), "replicate")
    blurred = gaussian_blur2d(padded, 2 * pad + 1, (SMOOTH, SMOOTH))
    return blurred[0, :, pad:-pad, pad:-pad] + 8  # not 0: in the dark a ratio says nothing


def month_ratios(folder, months):
    """Folder of 01.jpg … 12.jpg -> yields month, float16 (H, W, 3): that month over the raster's, both smoothed."""
    months = sorted(set(months) - {RASTER_MONTH})
    if not months:
        return
    reference = smooth_month(Path(folder) / f"{RASTER_MONTH:02d}.jpg")
    for month in months:
        smooth = smooth_month(Path(folder) / f"{month:02d}.jpg")
        if smooth.shape != reference.shape:
            raise ValueError(f"{folder}: {month:02d}.jpg and {RASTER_MONTH:02d}.jpg have different sizes")
        yield month, (smooth / reference).clamp(0.2, 5).permute(1, 2, 0).half().numpy()


@contextmanager
def stored_ratios(folder, months):
    """As month_ratios, but a dict of files for np.load, which many processes share; they go at the block's end."""
    with tempfile.TemporaryDirectory() as place:
        paths = {}
        for month, ratio in month_ratios(folder, months):
            paths[month] = Path(place) / f"{month:02d}.npy"
            np.save(paths[month], ratio)
        yield paths


def sample_ratio(ratio, region, size):
    """Ratio (H, W, 3) at the size × size pixel centres of a region, bilinear -> float32 (size, size, 3)."""
    height, width = ratio.shape[:2]
    zoom, row, col = region
    steps = (np.arange(size) + 0.5) / size * grid.TILES
    y = ((90 - grid.tile_latitude(zoom, row + steps)) / 180 * height - 0.5).clip(0, height - 1)
    x = (grid.tile_longitude(zoom, col + steps) + 180) / 360 * width - 0.5
    (rows, down), (cols, across) = _linear_weights(y), _linear_weights(x)
    patch = ratio[rows.clip(0, height - 1)][:, cols % width].astype(np.float32)
    # Across first, as that has few rows yet; the other way round, the result would not lie in order.
    wide = across @ patch
    return (down @ wide.reshape(len(wide), -1)).reshape(size, size, 3)


def _linear_weights(positions):
    """(N,) ascending -> the whole positions around them (M,), and (N, M) float32 weights of linear interpolation."""
    whole = np.arange(int(np.floor(positions[0])), int(np.floor(positions[-1])) + 2)
    return whole, (1 - np.abs(positions[:, None] - whole)).clip(0).astype(np.float32)


class Renderer:
    """Makes the images of one region after another; a worker process has one."""

    def __init__(self, output, raster, ratios, months, image_size, quality):
        self.output, self.months, self.image_size, self.quality = Path(output), months, image_size, quality
        self.source, self.around = open_raster(raster)
        self.ratios = {month: np.load(path, mmap_mode="r") for month, path in ratios.items()}

    def __call__(self, region):
        """(zoom, row, col) -> number of images made: those of its years that are not there yet."""
        paths = [self.output / path for path in image_paths(region, YEARS)]
        missing = [(path, month) for path, month in zip(paths, self.months) if not path.exists()]
        if not missing:
            return 0
        left, top, side = windows(self.source, self.around, [region])[0].tolist()
        pixels = read_window(self.source, self.around, left, top, side, side)
        if self.image_size is not None and side != self.image_size:
            pixels = resize(torch.from_numpy(np.ascontiguousarray(pixels)), self.image_size).numpy()
        pixels = np.ascontiguousarray(pixels)
        for path, month in missing:
            season = pixels
            if month != RASTER_MONTH:
                ratio = sample_ratio(self.ratios[month], region, len(pixels))
                season = np.multiply(pixels, ratio, out=ratio)
                season += 0.5
                season = np.minimum(season, 255, out=season).astype(np.uint8)
            path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(path, sync=False) as file:
                file.write(simplejpeg.encode_jpeg(np.ascontiguousarray(season), self.quality, colorsubsampling="420"))
        return len(missing)


_work_on = None  # of a worker process: set once by its initializer


def _start_worker(kind, setup):
    global _work_on
    torch.set_num_threads(1)
    _work_on = kind(*setup)


def _work(job):
    return _work_on(job)


def run_jobs(jobs, kind, setup, num_workers, chunk=8):
    """Yields kind(*setup)(job) of each job, in order, each process with a `kind` of its own; few jobs are done here.

    One thread a process, so that sums come out the same whatever the number of workers.
    """
    num_workers = min(num_workers, len(jobs) // 64)  # a process takes seconds to start
    if num_workers == 0:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            yield from map(kind(*setup), jobs)
        finally:
            torch.set_num_threads(threads)
        return
    with multiprocessing.get_context("spawn").Pool(num_workers, _start_worker, (kind, setup)) as pool:
        yield from pool.imap(_work, jobs, chunksize=chunk)


def build_earth(output, raster, months_folder, regions, months=MONTHS, image_size=None, quality=92, num_workers=2):
    """regions (N, 3) rows of the grid -> Counter of images made now, and there already. A second run goes on.

    raster: file in Web Mercator. months_folder: 01.jpg … 12.jpg of the whole Earth. months: one for each of YEARS.
    image_size: pixels a side; None: the raster's own, so that each zoom has another. ValueError, FileNotFoundError.
    """
    output = Path(output)
    source, around = open_raster(raster)
    places = windows(source, around, regions)
    inside = (
        (places[:, 0] >= 0)
        & (places[:, 1] >= 0)
        & (places[:, 0] + places[:, 2] <= source.width)
        & (places[:, 1] + places[:, 2] <= source.height)
    )
    # Along the raster's rows of blocks, so that each block is decoded about once.
    block = source.block_shapes[0][0]
    order = np.lexsort((places[:, 0] // block, places[:, 1] // block))
    jobs = [tuple(region) for region in np.asarray(regions)[order][inside[order]].tolist()]
    with stored_ratios(months_folder, months) as ratios:
        setup = (output, raster, ratios, months, image_size, quality)
        counts = Counter(made=0, outside=int((~inside).sum()))
        with tqdm(total=len(YEARS) * len(jobs), desc="earth", unit="image", mininterval=0.5) as bar:
            for made in run_jobs(jobs, Renderer, setup, num_workers, chunk=64):
                counts["made"] += made
                bar.update(len(YEARS))
    counts["there"] = len(YEARS) * len(jobs) - counts["made"]
    return counts


def sample_of(regions, count, seed):
    """(N, 3) -> at most `count` rows of it, drawn by seed, in order; all where count is None."""
    if count is None or count >= len(regions):
        return regions
    return regions[np.sort(np.random.default_rng(seed).choice(len(regions), count, replace=False))]


def add_command(commands, formatter):
    parser = commands.add_parser(
        "earth",
        help="the Earth at true scale, from a Web Mercator raster and monthly mosaics",
        formatter_class=formatter,
    )
    parser.add_argument("output", type=Path, help="folder of the data set; a second run continues")
    parser.add_argument(
        "--raster",
        type=Path,
        required=True,
        help="Web Mercator GeoTIFF of the whole Earth, August; `earth_raster` makes it",
    )
    parser.add_argument(
        "--months",
        type=Path,
        required=True,
        metavar="FOLDER",
        help="01.jpg … 12.jpg, equirectangular; NASA's Visible Earth has them, August as "
        "https://eoimages.gsfc.nasa.gov/images/imagerecords/74000/74117/world.200408.3x5400x2700.jpg",
    )
    parser.add_argument(
        "--seasons",
        type=int,
        nargs=len(YEARS),
        default=list(MONTHS),
        choices=range(1, 13),
        metavar="MONTH",
        help=f"the months that stand for the years {YEARS[0]} to {YEARS[-1]}",
    )
    parser.add_argument("--image_size", type=int, help="pixels a side; default: the raster's own at each zoom")
    parser.add_argument("--regions", type=int, metavar="N", help="only so many, drawn by --seed; default: all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quality", type=int, default=92, help="of the JPEGs")
    parser.add_argument("--num_workers", type=int, default=2)
    add_area_arguments(parser, years=False)
    parser.set_defaults(command_main=main)


def main(args):
    if args.image_size is not None and args.image_size < MIN_SIDE:
        raise ValueError(f"--image_size {args.image_size}: at least {MIN_SIDE}")
    parameters = {
        "version": VERSION,
        "kind": "earth",
        "raster": fingerprint(args.raster),
        "zooms": sorted(set(args.zooms)),
        "months": {
            f"{m:02d}": fingerprint(args.months / f"{m:02d}.jpg")["sha256"]
            for m in sorted({*args.seasons, RASTER_MONTH})
        },
        "seasons": args.seasons,
        "image_size": args.image_size,
        "bbox": args.bbox,
        "regions": args.regions,
        "seed": args.seed,
        "land_only": args.land_only,
        "quality": args.quality,
    }
    if read_plan(args.output, parameters, folders=("database",)) is None:
        write_plan(args.output, {"parameters": parameters})
    regions = sample_of(select_regions(args.zooms, args.bbox, args.land_only), args.regions, args.seed)
    counts = build_earth(
        args.output,
        args.raster,
        args.months,
        regions,
        tuple(args.seasons),
        args.image_size,
        args.quality,
        args.num_workers,
    )
    return (
        f"{args.output}: {counts['made']:,} images made now, {counts['there']:,} were there, {counts['outside']:,} "
        f"regions lie outside the raster"
    )
