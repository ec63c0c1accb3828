"""The Earth at true scale: python -m datasets.build earth OUTPUT --raster FILE.tif --months FOLDER

Regions of the paper's own grid, cut out of one Web Mercator raster of a single month, pixel for pixel. The other years
of a region are other months of it: the raster's fine detail times the ratio of the two months' coarse mosaics, both
smoothed, so colours, snow and vegetation change and the ground stays where it is.
"""

import argparse
import dataclasses
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

import numpy as np
import torch
from kornia.filters import gaussian_blur2d
from torch.nn import functional as F

from datasets import grid
from datasets.build import flags, jobs
from datasets.build.area import select_regions
from datasets.build.demo import read_mosaic
from datasets.build.plan import fingerprint, kept_plan
from datasets.images import encode_jpeg, resize
from datasets.names import YEARS
from utils.files import replacing
from utils.geo import MERCATOR_HALF

if TYPE_CHECKING:
    from rasterio import DatasetReader

MONTHS = (2, 5, 11, 8)  # of YEARS: a winter, a spring, an autumn, and the raster's own, in which evaluation searches
RASTER_MONTH = 8
SMOOTH = 2.0  # pixels of the monthly mosaics, the standard deviation of the smoothing: about 15 km
MIN_SIDE = 32  # pixels: a region that shows fewer is too small for the raster
VERSION = 1  # raise when the same parameters begin to give other pictures


def image_side(text: str) -> int:
    """Type of a flag: pixels a side."""
    if int(text) < MIN_SIDE:
        raise argparse.ArgumentTypeError(f"{text}: at least {MIN_SIDE}")
    return int(text)


class MercatorRaster(NamedTuple):
    """An open file in Web Mercator, and how many of its pixels go around the Earth."""

    source: "DatasetReader"
    around: int


def open_raster(path: str | Path) -> MercatorRaster:
    """Raises FileNotFoundError or ValueError naming what is wrong with the file."""
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
    return MercatorRaster(source, round(around))


def windows(raster: MercatorRaster, regions: Sequence) -> np.ndarray:
    """regions (N, 3) -> (N, 3) int: left, top, side in the raster's pixels. ValueError where a region has too few."""
    source, around = raster
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


def read_window(raster: MercatorRaster, left: int, top: int, width: int, height: int) -> np.ndarray:
    """-> uint8 (height, width, 3). Rows end with the raster; columns go on around the Earth, if it does."""
    from rasterio.windows import Window

    (source, around), parts = raster, []
    while width > 0:
        left = left % around if source.width == around else left
        here = min(width, source.width - left)
        parts.append(source.read([1, 2, 3], window=Window(left, top, here, height)))
        left, width = left + here, width - here
    return np.concatenate(parts, axis=2).transpose(1, 2, 0)


def smooth_month(path: Path) -> torch.Tensor:
    """Equirectangular picture of the whole Earth -> float32 (3, H, W), smoothed, brighter by 8. ValueError."""
    pad = int(4 * SMOOTH)
    padded = F.pad(F.pad(read_mosaic(path)[None].float(), (pad, pad, 0, 0), "circular"), (0, 0, pad, pad), "replicate")
    blurred = gaussian_blur2d(padded, 2 * pad + 1, (SMOOTH, SMOOTH))
    return blurred[0, :, pad:-pad, pad:-pad] + 8  # not 0: in the dark a ratio says nothing


def month_ratios(folder: Path, months: Sequence[int]) -> Iterator[tuple[int, np.ndarray]]:
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
def stored_ratios(folder: Path, months: Sequence[int]) -> Iterator[dict[int, Path]]:
    """As month_ratios, but a dict of files for np.load, which many processes share; they go at the block's end."""
    with tempfile.TemporaryDirectory() as place:
        paths = {}
        for month, ratio in month_ratios(folder, months):
            paths[month] = Path(place) / f"{month:02d}.npy"
            np.save(paths[month], ratio)
        yield paths


def sample_ratio(ratio: np.ndarray, region: Sequence[int], size: int) -> np.ndarray:
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


def _linear_weights(positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(N,) ascending -> the whole positions around them (M,), and (N, M) float32 weights of linear interpolation."""
    whole = np.arange(int(np.floor(positions[0])), int(np.floor(positions[-1])) + 2)
    return whole, (1 - np.abs(positions[:, None] - whole)).clip(0).astype(np.float32)


@dataclasses.dataclass
class Opened:
    """What a worker opens once: the raster, and the months' ratios. path: the raster's. ratios: {month: file}."""

    output: Path
    path: Path
    ratios: dict

    @cached_property
    def raster(self) -> MercatorRaster:
        return open_raster(self.path)

    @cached_property
    def of_month(self) -> dict:
        return {month: np.load(path, mmap_mode="r") for month, path in self.ratios.items()}


@dataclasses.dataclass
class Renderer(Opened):
    """(zoom, row, col) -> number of images made: those of its years that are not there yet."""

    months: Sequence[int]
    image_size: int | None
    quality: int

    def __call__(self, region: tuple) -> int:
        paths = [self.output / path for path in grid.image_paths(region, YEARS)]
        missing = [(path, month) for path, month in zip(paths, self.months) if not path.exists()]
        if not missing:
            return 0
        left, top, side = windows(self.raster, [region])[0].tolist()
        pixels = np.ascontiguousarray(read_window(self.raster, left, top, side, side))
        if self.image_size is not None and side != self.image_size:
            pixels = np.ascontiguousarray(resize(torch.from_numpy(pixels), self.image_size))
        for path, month in missing:
            season = pixels
            if month != RASTER_MONTH:
                ratio = sample_ratio(self.of_month[month], region, len(pixels))
                season = np.multiply(pixels, ratio, out=ratio)
                season += 0.5
                season = np.minimum(season, 255, out=season).astype(np.uint8)
            path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(path, sync=False) as file:
                file.write(encode_jpeg(season, self.quality))
        return len(missing)


def main(
    output: flags.Output,
    *,
    raster: Annotated[Path, "Web Mercator GeoTIFF of the whole Earth, August; `earth_raster` makes it"],
    months: Annotated[
        Path,
        "01.jpg … 12.jpg, equirectangular; NASA's Visible Earth has them, August as "
        "https://eoimages.gsfc.nasa.gov/images/imagerecords/74000/74117/world.200408.3x5400x2700.jpg",
        {"metavar": "FOLDER"},
    ],
    seasons: Annotated[
        list[int],
        f"the months that stand for the years {YEARS[0]} to {YEARS[-1]}",
        {"nargs": len(YEARS), "choices": range(1, 13), "metavar": "MONTH"},
    ] = MONTHS,
    image_size: Annotated[
        int | None, "pixels a side; default: the raster's own at each zoom", {"type": image_side}
    ] = None,
    regions: Annotated[int | None, "only so many, drawn by --seed; default: all", {"metavar": "N"}] = None,
    seed: flags.Seed = 0,
    quality: flags.Quality = 92,
    num_workers: flags.Workers = 2,
    zooms: flags.Zooms = (9, 10, 11),
    bbox: flags.Box = None,
    land_only: flags.LandOnly = True,
) -> str:
    """-> How many images were made now, and were there. Raises ValueError or FileNotFoundError naming the flag."""
    chosen = sample_of(select_regions(zooms, bbox, land_only), regions, seed)
    parameters = {
        "version": VERSION,
        "kind": "earth",
        "raster": fingerprint(raster),
        "zooms": sorted(set(zooms)),
        "months": month_prints(months, seasons),
        "seasons": seasons,
        "image_size": image_size,
        "bbox": bbox,
        "regions": regions,
        "seed": seed,
        "land_only": land_only,
        "quality": quality,
    }
    opened = open_raster(raster)
    places, source = windows(opened, chosen), opened.source
    kept_plan(output, parameters, folders=("database",))
    ends = places[:, :2] + places[:, 2:]
    inside = (places[:, :2] >= 0).all(axis=1) & (ends <= (source.width, source.height)).all(axis=1)
    # Along the raster's rows of blocks, so that each block is decoded about once.
    block = source.block_shapes[0][0]
    order = np.lexsort((places[:, 0] // block, places[:, 1] // block))
    wanted = [tuple(region) for region in chosen[order][inside[order]].tolist()]
    with stored_ratios(months, seasons) as ratios:
        render = Renderer(Path(output), raster, ratios, seasons, image_size, quality)
        made = sum(jobs.run(wanted, render, num_workers, "earth", "region"))
    return (
        f"{output}: {made:,} images made now, {len(YEARS) * len(wanted) - made:,} were there, {(~inside).sum():,} "
        f"regions lie outside the raster"
    )


def month_prints(folder: Path, months: Sequence[int]) -> dict:
    """Of a plan: {month: sha256} of the mosaics that the months need."""
    needed = sorted({*months, RASTER_MONTH})
    return {f"{month:02d}": fingerprint(Path(folder) / f"{month:02d}.jpg")["sha256"] for month in needed}


def sample_of(regions: np.ndarray, count: int | None, seed: int) -> np.ndarray:
    """(N, 3) -> at most `count` rows of it, drawn by seed, in order; all where count is None."""
    if count is None or count >= len(regions):
        return regions
    return regions[np.sort(np.random.default_rng(seed).choice(len(regions), count, replace=False))]
