"""Builds the database from raster files, one a year: python -m datasets.build raster OUTPUT --rasters 2021=FILE …

Any file that GDAL reads and knows the place of (GeoTIFF; several files as one .vrt), in any projection, or a picture of
the whole Earth (equirectangular, 180 W to 180 E, twice as wide as high). Regions outside of it, or mostly without data,
are left out. Written whole or not at all: a second run continues.
"""

import argparse
import threading
import warnings
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from datasets import grid
from datasets.build.area import add_area_arguments, check_years, image_paths, select_regions
from datasets.images import save_jpeg

MERCATOR_HALF = np.pi * 6378137  # metres: the edge of Web Mercator's square


class Raster:
    """One file, opened once in each thread that reads it."""

    def __init__(self, path, bands=None, scale=None):
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

    def source(self):
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

    def read(self, region, size):
        """(zoom, row, col) -> uint8 (size, size, 3), north up in Web Mercator, and the share of pixels with data."""
        zoom, row, col = region
        tile = 2 * MERCATOR_HALF / 2**zoom
        left, top = col * tile - MERCATOR_HALF, MERCATOR_HALF - row * tile
        pixels, there = None, None
        for turn in self._turns(region):
            found, mask = self._warp(left, top, grid.TILES * tile, size, turn, self._scales(region, size))
            if pixels is None:
                pixels, there = found, mask
            else:
                pixels, there = np.where(there, pixels, found), there | mask
        if pixels is None:
            return None, 0.0
        if self.scale is not None:
            low, high = self.scale
            pixels = np.round((np.nan_to_num(pixels.astype(np.float64)) - low) * (255 / (high - low))).clip(0, 255)
        pixels = np.where(there, pixels, 0).astype(np.uint8)
        if len(pixels) == 1:
            pixels = np.repeat(pixels, 3, axis=0)
        return pixels.transpose(1, 2, 0), float(there.mean())

    def corners(self):
        """x (4,) and y (4,) of the file's corners in its own coordinate system."""
        source, move = self.source(), self.transform
        places = [(col, row) for col in (0, source.width) for row in (0, source.height)]
        return tuple(
            zip(*[(move.a * col + move.b * row + move.c, move.d * col + move.e * row + move.f) for col, row in places])
        )

    def _turns(self, region):
        """Whole turns by which the file's longitudes are to be moved to see the region: files can run from 0 to 360."""
        if not self.is_geographic:
            return (0,)
        ends, _ = self.corners()
        west, east = grid.tile_longitude(region[0], region[2]), grid.tile_longitude(region[0], region[2] + grid.TILES)
        return [turn for turn in (0, -360, 360) if min(ends) + turn < east and max(ends) + turn > west]

    def _scales(self, region, size):
        """GDAL's warp options XSCALE and YSCALE, an image's pixels for one of the file's, where both are degrees.

        GDAL guesses them from the ground that it reads, too much of it where a region touches the file's seam at 0
        degrees: the image comes out blurred.
        """
        if not self.is_geographic or self.transform.b or self.transform.d:
            return {}
        corners = grid.footprints([region])[0]
        height, width = np.abs(corners[2] - corners[0]) / size
        return {"XSCALE": str(abs(self.transform.a) / width), "YSCALE": str(abs(self.transform.e) / height)}

    def _warp(self, left, top, side, size, turn, options):
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

    def close(self):
        for source in self.opened:
            source.close()


def _place(path, source):
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


def within(raster, regions):
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


def build_rasters(output, rasters, regions, image_size=1024, min_coverage=0.5, quality=90, num_workers=2):
    """rasters: {year: Raster} -> Counter of made, there, outside (the file's box) and empty (too little data).

    A region's share of pixels with data must be at least min_coverage; what lacks is black.
    """
    output, years = Path(output), sorted(rasters)
    visible = np.stack([within(rasters[year], regions) for year in years], axis=1)
    counts, jobs = Counter(outside=int((~visible).sum())), []
    for region, seen in zip(regions.tolist(), visible.tolist()):
        paths = image_paths(region, years)
        jobs += [(output / path, year, region) for path, year, sees in zip(paths, years, seen) if sees]
    missing = [job for job in jobs if not job[0].exists()]
    counts["there"] = len(jobs) - len(missing)

    def make(job):
        path, year, region = job
        pixels, share = rasters[year].read(region, image_size)
        if share < min_coverage or not share:
            return "empty"
        save_jpeg(path, Image.fromarray(pixels), quality)
        return "made"

    with ThreadPoolExecutor(max(1, num_workers)) as pool:
        try:
            with tqdm(total=len(jobs), initial=counts["there"], desc="rasters", unit="image", mininterval=0.5) as bar:
                for result in pool.map(make, missing):
                    counts[result] += 1
                    bar.update()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return counts


def year_and_file(text):
    year, _, file = text.partition("=")
    if not (year.isdigit() and file):
        raise argparse.ArgumentTypeError(f"{text!r}: expected YEAR=FILE")
    return int(year), Path(file)


def add_command(commands, formatter):
    parser = commands.add_parser(
        "raster", help="a database from GeoTIFFs or equirectangular pictures, one a year", formatter_class=formatter
    )
    parser.add_argument("output", type=Path, help="folder of the data set; a second run continues")
    parser.add_argument(
        "--rasters",
        type=year_and_file,
        nargs="+",
        required=True,
        metavar="YEAR=FILE",
        help="GeoTIFF, .vrt (gdalbuildvrt joins files), or equirectangular picture of the whole Earth",
    )
    add_area_arguments(parser, years=False)
    parser.add_argument("--image_size", type=int, default=1024, help="side of an image, pixels")
    parser.add_argument("--bands", type=int, nargs="+", help="red, green and blue, or grey; default: the first three")
    parser.add_argument(
        "--scale",
        type=float,
        nargs=2,
        metavar=("LOW", "HIGH"),
        help="values that become black and white; needed unless the bands are 8 bit",
    )
    parser.add_argument("--min_coverage", type=float, default=0.5, help="share of an image that must hold data")
    parser.add_argument("--quality", type=int, default=90, help="of the JPEG files")
    parser.add_argument("--num_workers", type=int, default=2, help="threads")
    parser.set_defaults(command_main=main)


def main(args):
    """The command -> what to tell at its end."""
    years = [year for year, _ in args.rasters]
    check_years(years)
    if len(set(years)) < len(years):
        raise ValueError(f"--rasters: {max(years, key=years.count)} is there twice; join its files with gdalbuildvrt")
    if args.image_size < 1 or not 0 <= args.min_coverage <= 1 or not 1 <= args.quality <= 100:
        raise ValueError(
            f"--image_size {args.image_size} --min_coverage {args.min_coverage} --quality {args.quality}: "
            f"expected 1 or more, 0 to 1, and 1 to 100"
        )
    if args.scale and args.scale[0] >= args.scale[1]:
        raise ValueError(f"--scale {args.scale[0]:g} {args.scale[1]:g}: LOW must be less than HIGH")
    if args.output.exists() and not args.output.is_dir():
        raise ValueError(f"{args.output}: is a file; name a folder for the data set")
    rasters = {year: Raster(file, args.bands, args.scale) for year, file in args.rasters}
    try:
        regions = select_regions(args.zooms, args.bbox, args.land_only)
        counts = build_rasters(
            args.output, rasters, regions, args.image_size, args.min_coverage, args.quality, args.num_workers
        )
    finally:
        for raster in rasters.values():
            raster.close()
    if not counts["made"] + counts["there"]:
        raise ValueError(
            f"none of {len(regions):,} regions lies within the rasters with {args.min_coverage:.0%} of "
            f"data; do --zooms {args.zooms} and --bbox fit them? A region of zoom 9 is 300 km wide at the "
            f"equator"
        )
    return (
        f"{args.output}: {counts['made']:,} images made now, {counts['there']:,} were there, {counts['empty']:,} "
        f"left out for lack of data, {counts['outside']:,} lie outside of their raster"
    )
