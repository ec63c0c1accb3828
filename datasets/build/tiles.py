"""A database from a tile server (XYZ or WMTS): python -m datasets.build tiles OUTPUT --url TEMPLATE

4 × 4 tiles make one image. Neighbouring regions overlap by half, so a tile belongs to up to four of them: regions are
built row by row and a tile is kept, as it came, until the last region that needs it is written. Every image is written
whole or not at all, so a second run after a kill continues with the images that are missing.
"""

import csv
from collections.abc import Sequence
from contextlib import closing
from itertools import groupby
from pathlib import Path
from typing import Annotated

import numpy as np
from PIL import Image
from tqdm import tqdm

from datasets import grid
from datasets.build import flags
from datasets.build.area import check_years, select_regions
from datasets.build.tile_server import TileError, TileServer, check_template, is_blank, open_tile
from datasets.images import save_jpeg
from datasets.names import YEARS
from utils.files import replacing_text

LEFT_OUT_FILE = "left_out.csv"
IMAGE_KB = 97  # an image of 1024 × 1024 of the public data set


def tiles_of(year: int, region: Sequence[int]) -> list[tuple[int, int, int, int]]:
    """The 16 tiles (year, zoom, row, col) of a region, by rows."""
    zoom, row, col = region
    return [(year, zoom, row + i, col + j) for i in range(grid.TILES) for j in range(grid.TILES)]


def make_image(results: dict, tile_size: int, image_size: int, max_blank: int) -> tuple[Image.Image | None, list]:
    """{tile: bytes or TileError}, 16 by rows -> (RGB picture or None, [(tile, what is wrong with it)])."""
    problems = [(tile, str(data)) for tile, data in results.items() if isinstance(data, TileError)]
    if problems:
        return None, problems
    side, seen = grid.TILES * tile_size, set()
    image = Image.new("RGB", (side, side))
    for position, (place, data) in enumerate(results.items()):
        tile = open_tile(data, tile_size)
        if is_blank(tile):
            problems.append((place, "is blank"))
        elif data in seen:  # no ground looks so, only placeholders do
            return None, [(place, "is the same picture as another tile of its region: a placeholder")]
        seen.add(data)
        image.paste(tile, (position % grid.TILES * tile_size, position // grid.TILES * tile_size))
    if len(problems) > max_blank:
        return None, problems
    return image.resize((image_size, image_size), Image.Resampling.LANCZOS) if side != image_size else image, problems


def plan(output: Path, regions: np.ndarray, years: Sequence[int]) -> tuple[list[tuple], int]:
    """-> jobs that are missing, (path, year, region) by year, zoom, row and col; and the number of all images."""
    years = sorted(set(years))
    regions = [tuple(region) for region in regions.tolist()]
    paths = [grid.image_paths(region, years) for region in regions]
    jobs = [(paths[i][k], year, region) for k, year in enumerate(years) for i, region in enumerate(regions)]
    return [job for job in jobs if not (output / job[0]).exists()], len(jobs)


def year_and_zoom(job: tuple) -> tuple[int, int]:
    """Jobs that share tiles have the same."""
    return job[1], job[2][0]


def describe_plan(jobs: list[tuple], total: int, rate: float, image_size: int, tile_kb: float) -> str:
    """What --dry_run says."""
    requests = 0
    for (_, zoom), group in groupby(jobs, year_and_zoom):
        corners = np.array([row * 2**zoom + col for _, _, (_, row, col) in group])
        offsets = [i * 2**zoom + j for i in range(grid.TILES) for j in range(grid.TILES)]
        requests += len(np.unique(corners[:, None] + offsets))
    disk = len(jobs) * IMAGE_KB * (image_size / 1024) ** 2
    hours = requests / rate / 3600
    return (
        f"{total:,} images, {total - len(jobs):,} of them are there, {len(jobs):,} to build: {requests:,} requests "
        f"({16 * len(jobs):,} if tiles were not shared), {requests * tile_kb / 1e6:,.1f} GB to download at "
        f"{tile_kb:g} kB a tile, {disk / 1e6:,.1f} GB of images, at least {hours:,.1f} h at {rate:g} requests/s"
    )


def build_tiles(
    output: str | Path,
    server: TileServer,
    regions: np.ndarray,
    years: Sequence[int],
    image_size: int = 1024,
    max_blank: int = 15,
    quality: int = 90,
) -> tuple[int, int]:
    """Fetches what is missing -> images made, images left out. left_out.csv lists tiles that are no good.

    max_blank: a region with more blank tiles of its 16 is left out. Raises ServerError where the server serves nothing.
    """
    output = Path(output)
    jobs, total = plan(output, regions, years)
    problems, made, left_out = {}, 0, 0
    bar = tqdm(total=total, initial=total - len(jobs), desc="tiles", unit="image", smoothing=0.05, mininterval=0.5)
    try:
        for _, group in groupby(jobs, year_and_zoom):
            for path, results in server.fetch_all([(path, tiles_of(year, region)) for path, year, region in group]):
                image, wrong = make_image(results, server.tile_size, image_size, max_blank)
                problems[path] = [(tile, problem, image is None) for tile, problem in wrong]
                if image is None:
                    left_out += 1
                    bar.set_postfix(left_out=left_out, refresh=False)
                else:
                    save_jpeg(output / path, image, quality)
                    made += 1
                bar.update()
    finally:
        bar.close()
        write_left_out(output, problems)
    return made, left_out


def write_left_out(output: Path, problems: dict[str, list[tuple]]) -> None:
    """{path: [(tile, problem, left out)]} -> left_out.csv. What it says of images that were not tried now stays."""
    file, rows = output / LEFT_OUT_FILE, []
    if file.exists():
        with open(file, newline="") as stream:
            rows = [row for row in list(csv.reader(stream))[1:] if row and row[0] not in problems]
    for path, wrong in problems.items():
        rows += [
            [path, f"{zoom}/{col}/{row}", "left out" if gone else "written", problem]
            for (_, zoom, row, col), problem, gone in wrong
        ]
    if rows or file.exists():
        output.mkdir(parents=True, exist_ok=True)
        with replacing_text(file) as stream:
            csv.writer(stream).writerows([["image", "tile z/x/y", "image was", "the tile"], *rows])


def main(
    output: flags.Output,
    *,
    url: Annotated[
        str,
        "with {z} {x} {y} (or {-y}) and {year}, or WMTS's {TileMatrix} {TileCol} {TileRow}",
        {"metavar": "TEMPLATE"},
    ],
    zooms: flags.Zooms = (9, 10, 11),
    years: flags.Years = YEARS,
    bbox: flags.Box = None,
    land_only: flags.LandOnly = True,
    image_size: flags.Side = 1024,
    max_blank: Annotated[int, "one-coloured tiles of 16 that an image may have"] = 15,
    quality: flags.Quality = 90,
    tile_kb: Annotated[float, "size of a tile that --dry_run reckons with", flags.ABOVE_0] = 12,
    dry_run: Annotated[bool, "say how many requests and GB, and ask for nothing"] = False,
    **server: Annotated[object, TileServer.__init__],
) -> str:
    """-> How many images were made now, or with dry_run what it would take."""
    check_years(years)
    with closing(TileServer(check_template(url, years), **server)) as client:
        regions = select_regions(zooms, bbox, land_only)
        if dry_run:
            return describe_plan(*plan(output, regions, years), server["rate"], image_size, tile_kb)
        made, left_out = build_tiles(output, client, regions, years, image_size, max_blank, quality)
    return f"{output}: {made:,} images made now with {client.requests:,} requests, {left_out:,} left out" + (
        f" (see {output / LEFT_OUT_FILE}; run again to try them again)" if left_out else ""
    )
