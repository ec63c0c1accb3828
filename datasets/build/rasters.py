"""A database from raster files, one a year: python -m datasets.build raster OUTPUT --rasters 2021=FILE …

Any file that GDAL reads and knows the place of (GeoTIFF; several files as one .vrt), in any projection, or a picture of
the whole Earth (equirectangular, 180 W to 180 E, twice as wide as high). Regions outside of it, or mostly without data,
are left out. Written whole or not at all: a second run continues.
"""

import threading
import warnings
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import numpy as np
from PIL import Image

from datasets import grid
from datasets.build import flags, jobs
from datasets.build.area import check_years, select_regions
from datasets.images import save_jpeg
from utils.geo import MERCATOR_HALF

if TYPE_CHECKING:
    from rasterio import DatasetReader


class Raster:
    """One file, opened once in each thread that reads it."""

    def __init__(
        self, path: str | Path, bands: Sequence[int] | None = None, scale: tuple[float, float] | None = None
    ) -> None:
        self.path, self.scale = Path(path), scale
        self.local, self.opened = threading.local(), []
        source = self.source()
        self.bands = list(bands or (range(1, 4) if source.count >= 3 else [1]))
        if max(self.bands) > source.count or min(self.bands) < 1 or len(self.bands) not in (1, 3):
            raise ValueError(f"{path}: --bands {self.bands}, the file has {source.count}; give three of them, or one")
        types = {source.dtypes[band - 1] for band in self.bands}
        if types != {"uint8"} and scale is None:
            raise ValueError(
                f"{path}: holds {', '.join(sorted(types))}; say with --scale LOW HIGH which values are "
                f"to be black and white (for instance 0 3000 for Sentinel-2 reflectances)"
            )
        if source.count == 1 and source.colorinterp[0].name == "palette":
            raise ValueError(f"{path}: holds a palette; make colours of it first: gdal_translate -expand rgb")
        self.crs, self.transform = _place(path, source)
        self.is_geographic = self.crs.is_geographic

    def source(self) -> "DatasetReader":
        """This thread's open file."""
        import rasterio  # here, not above: only this command needs GDAL

        if not hasattr(self.local, "source"):
            if not self.path.is_file():
                raise FileNotFoundError(f"{self.path}: no such raster file")
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", rasterio.errors.NotGeoreferencedWarning)
                    source = rasterio.open(self.path)
            except rasterio.errors.RasterioIOError as error:
                raise ValueError(f"{self.path}: cannot be read as a raster ({error})") from error
            self.opened.append(source)
            self.local.source = source
        return self.local.source

    def read(self, region: Sequence[int], size: int) -> tuple[np.ndarray | None, float]:
        """(zoom, row, col) -> uint8 (size, size, 3), north up in Web Mercator, and the share of pixels with data."""
        zoom, row, col = region
        tile = 2 * MERCATOR_HALF / 2**zoom
        left, top = col * tile - MERCATOR_HALF, MERCATOR_HALF - row * tile
        turns = self._turns(region)
        if not turns:
            return None, 0.0
        there = np.zeros((size, size), dtype=bool)
        pixels = np.zeros((), dtype=np.uint8)
        for turn in turns:
            found, mask = self._warp(left, top, grid.TILES * tile, size, turn, self._scales(region, size))
            pixels, there = np.where(there, pixels, found), there | mask
        if self.scale is not None:
            low, high = self.scale
            pixels = np.round((np.nan_to_num(pixels.astype(np.float64)) - low) * (255 / (high - low))).clip(0, 255)
        pixels = np.where(there, pixels, 0).astype(np.uint8)
        if len(pixels) == 1:
            pixels = np.repeat(pixels, 3, axis=0)
        return pixels.transpose(1, 2, 0), float(there.mean())

    def corners(self) -> tuple[tuple, tuple]:
        """x (4,) and y (4,) of the file's corners in its own coordinate system."""
        source = self.source()
        return tuple(zip(*[self.transform * (col, row) for col in (0, source.width) for row in (0, source.height)]))

    def _turns(self, region: Sequence[int]) -> Sequence[int]:
        """Whole turns by which the file's longitudes are to be moved to see the region: files can run from 0 to 360."""
        if not self.is_geographic:
            return (0,)
        ends, _ = self.corners()
        west, east = grid.tile_longitude(region[0], region[2]), grid.tile_longitude(region[0], region[2] + grid.TILES)
        return [turn for turn in (0, -360, 360) if min(ends) + turn < east and max(ends) + turn > west]

    def _scales(self, region: Sequence[int], size: int) -> dict[str, str]:
        """GDAL's warp options XSCALE and YSCALE, an image's pixels for one of the file's, where both are degrees.

        GDAL guesses them from the ground that it reads, too much of it where a region touches the file's seam at 0
        degrees: the image comes out blurred.
        """
        if not self.is_geographic or self.transform.b or self.transform.d:
            return {}
        corners = grid.footprints([region])[0]
        height, width = np.abs(corners[2] - corners[0]) / size
        return {"XSCALE": str(abs(self.transform.a) / width), "YSCALE": str(abs(self.transform.e) / height)}

    def _warp(
        self, left: float, top: float, side: float, size: int, turn: int, options: dict
    ) -> tuple[np.ndarray, np.ndarray]:
        """Square of Web Mercator -> (bands, size, size) of the file's type, bool (size, size) where there is data."""
        from affine import Affine
        from rasterio.enums import Resampling
        from rasterio.vrt import WarpedVRT

        source, move, pixel = self.source(), self.transform, side / size
        moved = Affine(move.a, move.b, move.c + turn, move.d, move.e, move.f)
        # Bilinear widens with the scale, so that finer pixels are averaged. A file's own alpha band stays the last one.
        with WarpedVRT(
            source,
            src_crs=self.crs,
            src_transform=moved,
            crs="EPSG:3857",
            transform=Affine(pixel, 0, left, 0, -pixel, top),
            width=size,
            height=size,
            resampling=Resampling.bilinear,
            add_alpha=source.colorinterp[-1].name != "alpha",
            **options,
        ) as view:
            return view.read(self.bands), view.read(view.count) > 0

    def close(self) -> None:
        for source in self.opened:
            source.close()


def _place(path: str | Path, source: "DatasetReader") -> tuple:
    """-> (coordinate system, affine transform) of an open file. ValueError where nothing says where it lies."""
    from rasterio.crs import CRS
    from rasterio.transform import from_bounds

    if source.crs is not None and not source.transform.is_identity:
        return source.crs, source.transform
    if source.width == 2 * source.height:
        return CRS.from_epsg(4326), from_bounds(-180, -90, 180, 90, source.width, source.height)
    raise ValueError(
        f"{path}: nothing in the file says where it lies, and it is not twice as wide as high "
        f"({source.width} × {source.height}), so no picture of the whole Earth: georeference it "
        f"(gdal_translate -a_srs -a_ullr)"
    )


def within(raster: Raster, regions: np.ndarray) -> np.ndarray:
    """regions (N, 3) -> (N,) bool: the box around the file, in degrees, could show some of it; saves reading others."""
    from rasterio.warp import transform_bounds

    x, y = raster.corners()
    box = min(x), min(y), max(x), max(y)
    west, south, east, north = transform_bounds(raster.crs, "EPSG:4326", *box, densify_pts=101)
    boxes = grid.footprints(regions)
    left, right = boxes[:, 0, 1], boxes[:, 2, 1]
    if west > east:  # over the antimeridian
        east += 360
    across = np.any([(left + turn < east) & (right + turn > west) for turn in (-360, 0, 360)], axis=0)
    return across & (boxes[:, 0, 0] < north) & (boxes[:, 2, 0] > south)


def build_rasters(
    output: str | Path,
    rasters: dict[int, Raster],
    regions: np.ndarray,
    image_size: int = 1024,
    min_coverage: float = 0.5,
    quality: int = 90,
    num_workers: int = 2,
) -> Counter:
    """rasters: {year: Raster} -> Counter of made, there, outside (the file's box) and empty (too little data).

    A region's share of pixels with data must be at least min_coverage; what lacks is black.
    """
    output, years = Path(output), sorted(rasters)
    visible = np.stack([within(rasters[year], regions) for year in years], axis=1)
    wanted = []
    for region, seen in zip(regions.tolist(), visible.tolist()):
        paths = grid.image_paths(region, years)
        wanted += [(output / path, year, region) for path, year, sees in zip(paths, years, seen) if sees]
    missing = [job for job in wanted if not job[0].exists()]

    def make(job: tuple) -> str:
        path, year, region = job
        pixels, share = rasters[year].read(region, image_size)
        if share < min_coverage or not share:
            return "empty"
        save_jpeg(path, Image.fromarray(pixels), quality)
        return "made"

    counts = Counter(outside=int((~visible).sum()), there=len(wanted) - len(missing))
    counts.update(jobs.run(missing, make, num_workers, "rasters", threads=True))
    return counts


def main(
    output: flags.Output,
    *,
    rasters: Annotated[
        list[tuple[int, Path]],
        "GeoTIFF, .vrt (gdalbuildvrt joins files), or equirectangular picture of the whole Earth",
        {"type": flags.year_and_file, "metavar": "YEAR=FILE"},
    ],
    zooms: flags.Zooms = (9, 10, 11),
    bbox: flags.Box = None,
    land_only: flags.LandOnly = True,
    image_size: flags.Side = 1024,
    bands: Annotated[list[int] | None, "red, green and blue, or grey; default: the first three"] = None,
    scale: Annotated[
        tuple[float, float] | None,
        "values that become black and white; needed unless the bands are 8 bit",
        {"metavar": ("LOW", "HIGH")},
    ] = None,
    min_coverage: Annotated[float, "share of an image that must hold data", {"type": flags.share}] = 0.5,
    quality: flags.Quality = 90,
    num_workers: flags.Workers = 2,
) -> str:
    """-> How many images were made now, were there, and were left out."""
    years = [year for year, _ in rasters]
    check_years(years)
    if len(set(years)) < len(years):
        raise ValueError(f"--rasters: {max(years, key=years.count)} is there twice; join its files with gdalbuildvrt")
    if scale and scale[0] >= scale[1]:
        raise ValueError(f"--scale {scale[0]:g} {scale[1]:g}: LOW must be less than HIGH")
    with ExitStack() as stack:
        opened = {year: stack.enter_context(closing(Raster(file, bands, scale))) for year, file in rasters}
        regions = select_regions(zooms, bbox, land_only)
        counts = build_rasters(output, opened, regions, image_size, min_coverage, quality, num_workers)
    if not counts["made"] + counts["there"]:
        raise ValueError(
            f"none of {len(regions):,} regions lies within the rasters with {min_coverage:.0%} of "
            f"data; do --zooms {zooms} and --bbox fit them? A region of zoom 9 is 300 km wide at the "
            f"equator"
        )
    return (
        f"{output}: {counts['made']:,} images made now, {counts['there']:,} were there, {counts['empty']:,} "
        f"left out for lack of data, {counts['outside']:,} lie outside of their raster"
    )
