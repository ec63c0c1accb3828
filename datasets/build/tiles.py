"""Builds the database from a tile server: python -m datasets.build tiles OUTPUT --url TEMPLATE

4 × 4 tiles make one image. Neighbouring regions overlap by half, so a tile belongs to up to four of them: regions are
built row by row and a tile is kept, as it came, until the last region that needs it is written. Every image is written
whole or not at all, so a second run after a kill continues with the images that are missing.
"""

import csv
import os
import re
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from datasets import grid
from datasets.build.area import add_area_arguments, check_years, image_paths, select_regions
from datasets.build.tile_server import TileError, TileServer, check_template, is_blank, open_tile
from datasets.images import save_jpeg

LEFT_OUT_FILE = "left_out.csv"
IMAGE_KB = 97  # an image of 1024 × 1024 of the public data set


def tiles_of(year, region):
    """The 16 tiles (year, zoom, row, col) of a region, by rows."""
    zoom, row, col = region
    return [(year, zoom, row + i, col + j) for i in range(grid.TILES) for j in range(grid.TILES)]


def stitch(tiles, tile_size, image_size):
    """16 byte strings by rows -> (RGB picture of image_size, positions of the blank tiles).

    Raises TileError where two tiles are the same bytes and not blank: no ground looks so, only placeholders do.
    """
    side = grid.TILES * tile_size
    image, blank, seen = Image.new("RGB", (side, side)), [], set()
    for position, data in enumerate(tiles):
        tile = open_tile(data, tile_size)
        if is_blank(tile):
            blank.append(position)
        elif data in seen:
            raise TileError("is the same picture as another tile: a placeholder")
        seen.add(data)
        image.paste(tile, (position % grid.TILES * tile_size, position // grid.TILES * tile_size))
    if side != image_size:
        image = image.resize((image_size, image_size), Image.Resampling.LANCZOS)
    return image, blank


def fetch_regions(server, jobs, concurrency):
    """jobs: (path, year, region) of one year and zoom, sorted by rows -> yields (path, {tile: bytes or TileError}).

    Each tile is asked for once, and kept until its last region is yielded: about four rows of tiles. Raises what ended
    the server's fetches; regions that lack a tile because of it are not yielded.
    """
    uses = Counter(tile for _, year, region in jobs for tile in tiles_of(year, region))
    futures, window = {}, deque()
    pool = ThreadPoolExecutor(concurrency, thread_name_prefix="tiles")

    def finish(path, tiles):
        results = {}
        for tile in tiles:
            try:
                results[tile] = futures[tile].result()
            except TileError as error:
                results[tile] = error
        if server.failure and any(isinstance(each, TileError) for each in results.values()):
            raise server.failure
        for tile in tiles:
            uses[tile] -= 1
            if not uses[tile]:
                del futures[tile]
        return path, results

    try:
        for path, year, region in jobs:
            tiles = tiles_of(year, region)
            for tile in tiles:
                if tile not in futures:
                    futures[tile] = pool.submit(server.fetch, tile)
            window.append((path, tiles))
            if len(window) > 4 * concurrency:  # so far ahead, a tile that must wait does not hold up the others
                yield finish(*window.popleft())
        while window:
            yield finish(*window.popleft())
    except BaseException:
        server.stop.set()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def make_image(results, tile_size, image_size, max_blank):
    """{tile: bytes or TileError} -> (RGB picture or None, [(tile, what is wrong with it)])."""
    problems = [(tile, str(data)) for tile, data in results.items() if isinstance(data, TileError)]
    if problems:
        return None, problems
    tiles = list(results)
    try:
        image, blank = stitch(list(results.values()), tile_size, image_size)
    except TileError as error:
        return None, [(tiles[0], f"or another one of its region {error}")]
    problems = [(tiles[position], "is blank") for position in blank]
    return (None if len(blank) > max_blank else image), problems


def plan(output, regions, years):
    """-> jobs that are missing, (path, year, region) by year, zoom, row and col; and the number of all images."""
    years = sorted(set(years))
    regions = [tuple(region) for region in regions.tolist()]
    paths = [image_paths(region, years) for region in regions]
    jobs = [(paths[i][k], year, region) for k, year in enumerate(years) for i, region in enumerate(regions)]
    return [job for job in jobs if not (output / job[0]).exists()], len(jobs)


def year_and_zoom(job):
    return job[1], job[2][0]


def describe_plan(jobs, total, rate, image_size, tile_kb):
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
    output,
    template,
    regions,
    years,
    tile_size=256,
    image_size=1024,
    rate=10.0,
    concurrency=8,
    retries=5,
    timeout=30.0,
    headers=None,
    error_tiles=(),
    max_blank=15,
    quality=90,
    blank_status=(),
):
    """Fetches what is missing -> (images made, images left out, requests). left_out.csv lists tiles that are no good.

    max_blank: a region with more blank tiles of its 16 is left out. blank_status: HTTP statuses that count as a blank
    tile. Raises ServerError where the server serves nothing.
    """
    output = Path(output)
    jobs, total = plan(output, regions, years)
    server = TileServer(template, tile_size, rate, concurrency, retries, timeout, headers, error_tiles, blank_status)
    problems, made, left_out = {}, 0, 0
    bar = tqdm(total=total, initial=total - len(jobs), desc="tiles", unit="image", smoothing=0.05, mininterval=0.5)
    try:
        for _, group in groupby(jobs, year_and_zoom):
            for path, results in fetch_regions(server, list(group), concurrency):
                image, wrong = make_image(results, tile_size, image_size, max_blank)
                problems[path] = [(tile, problem, image is None) for tile, problem in wrong]
                if image is None:
                    left_out += 1
                    bar.set_postfix(left_out=left_out, refresh=False)
                else:
                    save_jpeg(output / path, image, quality)
                    made += 1
                bar.update()
    finally:
        server.close()
        bar.close()
        write_left_out(output, problems)
    return made, left_out, server.requests


def write_left_out(output, problems):
    """{path: [(tile, problem, left out)]} -> left_out.csv. What it says of images that were not tried now stays."""
    file = output / LEFT_OUT_FILE
    rows = []
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
        temporary = file.with_name(file.name + ".tmp")
        with open(temporary, "w", newline="") as stream:
            csv.writer(stream).writerows([["image", "tile z/x/y", "image was", "the tile"], *rows])
        os.replace(temporary, file)


def add_command(commands, formatter):
    parser = commands.add_parser("tiles", help="a database from a tile server (XYZ or WMTS)", formatter_class=formatter)
    parser.add_argument("output", type=Path, help="folder of the data set; a second run continues")
    parser.add_argument(
        "--url",
        required=True,
        metavar="TEMPLATE",
        help="with {z} {x} {y} (or {-y}) and {year}, or WMTS's {TileMatrix} {TileCol} {TileRow}",
    )
    add_area_arguments(parser)
    parser.add_argument("--tile_size", type=int, default=256, help="side of the server's tiles, pixels")
    parser.add_argument("--image_size", type=int, default=1024, help="side of an image of 4 × 4 tiles, pixels")
    parser.add_argument("--rate", type=float, default=10, help="requests a second at most: ask what the server allows")
    parser.add_argument("--concurrency", type=int, default=8, help="requests under way at a time")
    parser.add_argument("--retries", type=int, default=5, help="of a tile, after errors that may pass")
    parser.add_argument("--timeout", type=float, default=30, help="seconds without an answer")
    parser.add_argument("--header", action="append", default=[], metavar="NAME:VALUE", help="sent with each request")
    parser.add_argument(
        "--error_tile",
        action="append",
        default=[],
        type=Path,
        metavar="FILE",
        help="what the server sends where it has nothing, as it comes from it",
    )
    parser.add_argument("--max_blank", type=int, default=15, help="one-coloured tiles of 16 that an image may have")
    parser.add_argument(
        "--blank_status",
        type=int,
        nargs="*",
        default=[],
        metavar="STATUS",
        help="HTTP statuses that count as a one-coloured tile, not as a missing one: 404 for servers "
        "that have no tiles at sea",
    )
    parser.add_argument("--quality", type=int, default=90, help="of the JPEG files")
    parser.add_argument("--tile_kb", type=float, default=12, help="size of a tile that --dry_run reckons with")
    parser.add_argument("--dry_run", action="store_true", help="say how many requests and GB, and ask for nothing")
    parser.set_defaults(command_main=main)


def main(args):
    """The command -> what to tell at its end."""
    check_years(args.years)
    template = check_template(args.url, args.years)
    for name in ("tile_size", "image_size", "rate", "concurrency", "timeout", "tile_kb"):
        if not getattr(args, name) > 0:
            raise ValueError(f"--{name} {getattr(args, name)}: expected more than 0")
    if args.retries < 0 or not 1 <= args.quality <= 100:
        raise ValueError(f"--retries {args.retries} --quality {args.quality}: expected 0 or more, and 1 to 100")
    if any(not 201 <= status <= 599 for status in args.blank_status):
        raise ValueError(f"--blank_status {' '.join(map(str, args.blank_status))}: expected 201 to 599, such as 404")
    if args.output.exists() and not args.output.is_dir():
        raise ValueError(f"{args.output}: is a file; name a folder for the data set")
    wrong = [header for header in args.header if not re.match(r"[\w-]+:", header)]
    if wrong:
        raise ValueError(f"--header {wrong[0]!r}: expected NAME:VALUE")
    headers = {name: value.strip() for name, _, value in (header.partition(":") for header in args.header)}
    error_tiles = [file.read_bytes() for file in args.error_tile]
    regions = select_regions(args.zooms, args.bbox, args.land_only)
    if args.dry_run:
        jobs, total = plan(args.output, regions, args.years)
        return describe_plan(jobs, total, args.rate, args.image_size, args.tile_kb)
    made, left_out, requests = build_tiles(
        args.output,
        template,
        regions,
        args.years,
        args.tile_size,
        args.image_size,
        args.rate,
        args.concurrency,
        args.retries,
        args.timeout,
        headers,
        error_tiles,
        args.max_blank,
        args.quality,
        args.blank_status,
    )
    return f"{args.output}: {made:,} images made now with {requests:,} requests, {left_out:,} left out" + (
        f" (see {args.output / LEFT_OUT_FILE}; run again to try them again)" if left_out else ""
    )
