"""Builds the database from a tile server: python -m datasets.build tiles OUTPUT --url TEMPLATE

4 × 4 tiles make one image. Neighbouring regions overlap by half, so a tile belongs to up to four of them: regions are
built row by row and a tile is kept, as it came, until the last region that needs it is written. Every image is written
whole or not at all, so a second run after a kill continues with the images that are missing.
"""

import csv
import io
import os
import random
import re
import threading
import time
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby
from pathlib import Path

import numpy as np
import urllib3
from PIL import Image
from tqdm import tqdm

from datasets import grid
from datasets.area import add_area_arguments, check_years, image_paths, select_regions
from datasets.images import save_jpeg

LEFT_OUT_FILE = "left_out.csv"
RETRIED_STATUS = (408, 425, 429, 500, 502, 503, 504)
BACKOFF_SECONDS, MAX_BACKOFF_SECONDS, MAX_RETRY_AFTER_SECONDS = 0.5, 60, 900
REDIRECTS_ONLY = urllib3.Retry(total=3, connect=0, read=0, redirect=3, status=0, other=0, raise_on_status=False,
                               respect_retry_after_header=False)
FAILURES_IN_A_ROW = 32  # tiles whose every try failed, one after another: the server is gone, or refuses
FRUITLESS = 128  # tiles that the server does not have before the first one that it has: the template is wrong
IMAGE_KB = 97  # an image of 1024 × 1024 of the public data set
PLACEHOLDERS = {"{TileMatrix}": "{z}", "{TileRow}": "{y}", "{TileCol}": "{x}"}  # as WMTS capabilities call them


class TileError(Exception):
    """A tile that cannot be had, and why."""


class ServerError(ValueError):
    """The server serves nothing that could be used: going on makes no sense."""


def check_template(template, years):
    """URL template -> the same one with {z} {x} {y} (or {-y}, rows counted from the south) and {year}. ValueError."""
    for other, ours in PLACEHOLDERS.items():
        template = template.replace(other, ours)
    found = re.findall(r"\{([^{}]*)\}", template)
    if not re.match(r"https?://[^/]", template):
        raise ValueError(f"--url {template}: expected http://… or https://…")
    unknown = sorted(set(found) - {"z", "x", "y", "-y", "year"})
    if unknown:
        raise ValueError(f"--url {template}: unknown {', '.join('{' + name + '}' for name in unknown)}; only {{z}} {{x}} "
                         f"{{y}} (or {{-y}}) and {{year}} are filled in, write the rest out")
    missing = [f"{{{name}}}" for name in ("z", "x", "y") if name not in found and f"-{name}" not in found]
    if missing:
        raise ValueError(f"--url {template}: {' and '.join(missing)} is missing")
    if "year" not in found and len(set(years)) > 1:
        raise ValueError(f"--url {template}: {{year}} is missing, so all of --years {sorted(set(years))} would be the "
                         f"same images; add it, or build one year at a time")
    return template


def tile_url(template, year, zoom, row, col):
    values = {"{z}": zoom, "{x}": col, "{y}": row, "{-y}": 2**zoom - 1 - row, "{year}": year}
    return re.sub("|".join(map(re.escape, values)), lambda match: str(values[match[0]]), template)


def tiles_of(year, region):
    """The 16 tiles (year, zoom, row, col) of a region, by rows."""
    zoom, row, col = region
    return [(year, zoom, row + i, col + j) for i in range(grid.TILES) for j in range(grid.TILES)]


def open_tile(data, size):
    """Bytes -> RGB picture of size × size. Raises TileError where they hold no such image, or not all of it."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            if image.size != (size, size):
                raise TileError(f"is {image.width} × {image.height} pixels, not {size} × {size}")
            if "A" in image.mode or "transparency" in image.info:  # transparent is where the server has nothing: black
                image = image.convert("RGBA")
                return Image.alpha_composite(Image.new("RGBA", image.size, (0, 0, 0, 255)), image).convert("RGB")
            return image.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise TileError(f"is no whole image ({error})") from None


def is_blank(tile, tolerance=3):
    """RGB picture -> whether it is one colour but for compression."""
    return all(high - low <= tolerance for low, high in tile.getextrema())


class RateLimit:
    """At most `rate` requests a second over all threads; a pause holds all of them."""

    def __init__(self, rate, stop):
        self.interval, self.stop = 1 / rate, stop
        self.next, self.lock = 0.0, threading.Lock()

    def wait(self):
        with self.lock:
            turn = max(self.next, time.monotonic())
            self.next = turn + self.interval
        self.stop.wait(max(0.0, turn - time.monotonic()))

    def pause(self, seconds):
        with self.lock:
            self.next = max(self.next, time.monotonic() + seconds)


class TileServer:
    """Fetches tiles, from many threads, within the rate. error_tiles: pictures (bytes) it sends where it has nothing."""

    def __init__(self, template, tile_size=256, rate=10.0, concurrency=8, retries=5, timeout=30.0, headers=None,
                 error_tiles=()):
        self.template, self.tile_size, self.retries = template, tile_size, retries
        self.stop = threading.Event()
        self.limit = RateLimit(rate, self.stop)
        headers = {"User-Agent": "EarthLoc datasets.build", **(headers or {})}
        self.http = urllib3.PoolManager(maxsize=concurrency, block=True, headers=headers,
                                        timeout=urllib3.Timeout(connect=timeout, read=timeout))
        self.error_tiles = {bytes(data) for data in error_tiles}
        self.lock, self.requests, self.received, self.got, self.failed, self.absent = threading.Lock(), 0, 0, 0, 0, 0

    def fetch(self, tile):
        """(year, zoom, row, col) -> the bytes of a whole image of the right size.

        Raises TileError, or ServerError after many tiles in a row that could not be had.
        """
        for attempt in range(self.retries + 1):
            data, problem, delay, again = self._try(tile_url(self.template, *tile), attempt)
            if data is not None:
                with self.lock:
                    self.got, self.failed = self.got + 1, 0
                return data
            if not again or self.stop.is_set():
                break
            if attempt < self.retries:
                self.stop.wait(delay)
        self._count_failure(problem, answered=not again)
        raise TileError(problem)

    def _try(self, url, attempt):
        """One request -> (bytes or None, problem, seconds until the next try, whether one makes sense)."""
        delay = min(BACKOFF_SECONDS * 2**attempt, MAX_BACKOFF_SECONDS) * random.uniform(0.5, 1)
        self.limit.wait()
        if self.stop.is_set():
            return None, "stopped", 0, False
        with self.lock:
            self.requests += 1
        try:
            # Its own retries would not keep to the rate, and know nothing of broken images: only redirects are its.
            response = self.http.request("GET", url, retries=REDIRECTS_ONLY)
        except urllib3.exceptions.HTTPError as error:
            return None, f"no answer ({type(getattr(error, 'reason', None) or error).__name__})", delay, True
        with self.lock:
            self.received += len(response.data)
        if response.status == 200:
            if response.data in self.error_tiles:
                return None, "is the server's error tile", delay, False
            try:
                open_tile(response.data, self.tile_size)
            except TileError as error:
                return None, str(error), delay, True
            return response.data, None, 0, False
        try:
            retry_after = urllib3.Retry().get_retry_after(response)
        except urllib3.exceptions.InvalidHeader:
            retry_after = None
        if retry_after and response.status in (429, 503):
            self.limit.pause(min(retry_after, MAX_RETRY_AFTER_SECONDS))  # the server means all of us
            delay = 0
        return None, f"HTTP {response.status}", delay, response.status in RETRIED_STATUS

    def _count_failure(self, problem, answered):
        with self.lock:
            if answered:
                self.absent += 1
            else:
                self.failed += 1
            if self.failed >= FAILURES_IN_A_ROW:
                raise ServerError(f"{self.failed} tiles in a row could not be had in {self.retries + 1} tries each, the "
                                  f"last one: {problem}; is the server up, and --rate within what it allows? What is "
                                  f"built so far is whole, run again to continue")
            if not self.got and self.absent >= FRUITLESS:
                raise ServerError(f"the first {self.absent} tiles could not be had, the last one: {problem}; do --url, "
                                  f"--header, --zooms and --years fit what the server has?")

    def close(self):
        self.stop.set()
        self.http.clear()


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

    Each tile is asked for once, and kept until its last region is yielded: about four rows of tiles.
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
    return (f"{total:,} images, {total - len(jobs):,} of them are there, {len(jobs):,} to build: {requests:,} requests "
            f"({16 * len(jobs):,} if tiles were not shared), {requests * tile_kb / 1e6:,.1f} GB to download at "
            f"{tile_kb:g} kB a tile, {disk / 1e6:,.1f} GB of images, at least {hours:,.1f} hours at {rate:g} requests/s")


def build_tiles(output, template, regions, years, tile_size=256, image_size=1024, rate=10.0, concurrency=8, retries=5,
                timeout=30.0, headers=None, error_tiles=(), max_blank=15, quality=90):
    """Fetches what is missing -> (images made, images left out, requests). left_out.csv lists tiles that are no good.

    max_blank: a region with more blank tiles of its 16 is left out. Raises ServerError where the server serves nothing.
    """
    output = Path(output)
    jobs, total = plan(output, regions, years)
    server = TileServer(template, tile_size, rate, concurrency, retries, timeout, headers, error_tiles)
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
        rows += [[path, f"{zoom}/{col}/{row}", "left out" if gone else "written", problem]
                 for (_, zoom, row, col), problem, gone in wrong]
    if rows or file.exists():
        output.mkdir(parents=True, exist_ok=True)
        temporary = file.with_name(file.name + ".tmp")
        with open(temporary, "w", newline="") as stream:
            csv.writer(stream).writerows([["image", "tile z/x/y", "image was", "the tile"], *rows])
        os.replace(temporary, file)


def add_command(commands, formatter):
    parser = commands.add_parser("tiles", help="a database from a tile server (XYZ or WMTS)", formatter_class=formatter)
    parser.add_argument("output", type=Path, help="folder of the data set; a second run continues")
    parser.add_argument("--url", required=True, metavar="TEMPLATE",
                        help="with {z} {x} {y} (or {-y}) and {year}, or WMTS's {TileMatrix} {TileCol} {TileRow}")
    add_area_arguments(parser)
    parser.add_argument("--tile_size", type=int, default=256, help="side of the server's tiles, pixels")
    parser.add_argument("--image_size", type=int, default=1024, help="side of an image of 4 × 4 tiles, pixels")
    parser.add_argument("--rate", type=float, default=10, help="requests a second at most: ask what the server allows")
    parser.add_argument("--concurrency", type=int, default=8, help="requests under way at a time")
    parser.add_argument("--retries", type=int, default=5, help="of a tile, after errors that may pass")
    parser.add_argument("--timeout", type=float, default=30, help="seconds without an answer")
    parser.add_argument("--header", action="append", default=[], metavar="NAME:VALUE", help="sent with each request")
    parser.add_argument("--error_tile", action="append", default=[], type=Path, metavar="FILE",
                        help="what the server sends where it has nothing, as it comes from it")
    parser.add_argument("--max_blank", type=int, default=15, help="one-coloured tiles of 16 that an image may have")
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
        args.output, template, regions, args.years, args.tile_size, args.image_size, args.rate, args.concurrency,
        args.retries, args.timeout, headers, error_tiles, args.max_blank, args.quality)
    return (f"{args.output}: {made:,} images made now with {requests:,} requests, {left_out:,} left out"
            + (f" (see {args.output / LEFT_OUT_FILE}; run again to try them again)" if left_out else ""))
