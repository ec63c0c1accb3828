"""A client for tile servers (XYZ, WMTS): URL templates, the rate, retries, and what counts as a tile."""

import argparse
import io
import random
import re
import threading
import time
from collections import Counter, deque
from collections.abc import Hashable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import urllib3
from PIL import Image

from datasets.build.flags import ABOVE_0
from datasets.images import open_image, to_rgb
from utils.arguments import positive, whole

RETRIED_STATUS = (408, 425, 429, 500, 502, 503, 504)
BACKOFF_SECONDS, MAX_BACKOFF_SECONDS, MAX_RETRY_AFTER_SECONDS = 0.5, 60, 900
REDIRECTS_ONLY = urllib3.Retry(
    total=3, connect=0, read=0, redirect=3, status=0, other=0, raise_on_status=False, respect_retry_after_header=False
)
FAILURES_IN_A_ROW = 32  # tiles whose every try failed, one after another: the server is gone, or refuses
FRUITLESS = 128  # tiles that the server does not have before the first one that it has: the template is wrong
PLACEHOLDERS = {"{TileMatrix}": "{z}", "{TileRow}": "{y}", "{TileCol}": "{x}"}  # as WMTS capabilities call them


class TileError(Exception):
    """A tile that cannot be had, and why."""


class ServerError(ValueError):
    """The server serves nothing that could be used: going on makes no sense."""


def check_template(template: str, years: Iterable[int]) -> str:
    """URL template -> the same one with {z} {x} {y} (or {-y}, rows counted from the south) and {year}. ValueError."""
    for other, ours in PLACEHOLDERS.items():
        template = template.replace(other, ours)
    found = re.findall(r"\{([^{}]*)\}", template)
    if not re.match(r"https?://[^/]", template):
        raise ValueError(f"--url {template}: expected http://… or https://…")
    unknown = sorted(set(found) - {"z", "x", "y", "-y", "year"})
    if unknown:
        raise ValueError(
            f"--url {template}: unknown {', '.join('{' + name + '}' for name in unknown)}; only {{z}} "
            f"{{x}} {{y}} (or {{-y}}) and {{year}} are filled in, write the rest out"
        )
    missing = [f"{{{name}}}" for name in ("z", "x", "y") if name not in found and f"-{name}" not in found]
    if missing:
        raise ValueError(f"--url {template}: {' and '.join(missing)} is missing")
    if "year" not in found and len(set(years)) > 1:
        raise ValueError(
            f"--url {template}: {{year}} is missing, so all of --years {sorted(set(years))} would be the "
            f"same images; add it, or build one year at a time"
        )
    return template


def tile_url(template: str, year: int, zoom: int, row: int, col: int) -> str:
    """Template -> the address of one tile."""
    values = {"{z}": zoom, "{x}": col, "{y}": row, "{-y}": 2**zoom - 1 - row, "{year}": year}
    return re.sub("|".join(map(re.escape, values)), lambda match: str(values[match[0]]), template)


def open_tile(data: bytes, size: int) -> Image.Image:
    """Bytes -> RGB picture of size × size. Raises TileError where they hold no such image, or not all of it."""
    try:
        with open_image(io.BytesIO(data)) as image:
            if image.size != (size, size):
                raise TileError(f"is {image.width} × {image.height} pixels, not {size} × {size}")
            return to_rgb(image)  # transparent, so black, is where the server has nothing
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise TileError(f"is no whole image ({error})") from None


def is_blank(tile: Image.Image, tolerance: int = 3) -> bool:
    """RGB picture -> whether it is one colour but for compression."""
    return all(high - low <= tolerance for low, high in tile.getextrema())


def black_tile(size: int) -> bytes:
    """-> bytes of a PNG."""
    stream = io.BytesIO()
    Image.new("RGB", (size, size)).save(stream, "PNG")
    return stream.getvalue()


def name_and_value(text: str) -> tuple[str, str]:
    """Type of a flag: NAME:VALUE."""
    if not re.match(r"[\w-]+:", text):
        raise argparse.ArgumentTypeError(f"{text!r}: expected NAME:VALUE")
    name, _, value = text.partition(":")
    return name, value.strip()


class RateLimit:
    """At most `rate` requests a second over all threads; a pause holds all of them."""

    def __init__(self, rate: float, stop: threading.Event) -> None:
        self.interval, self.stop = 1 / rate, stop
        self.next, self.lock = 0.0, threading.Lock()

    def wait(self) -> None:
        with self.lock:
            turn = max(self.next, time.monotonic())
            self.next = turn + self.interval
        self.stop.wait(max(0.0, turn - time.monotonic()))

    def pause(self, seconds: float) -> None:
        with self.lock:
            self.next = max(self.next, time.monotonic() + seconds)


class TileServer:
    """Fetches tiles, from many threads, within the rate.

    What has one of the blank_status comes as a black tile. After a failure that is no single tile's, `failure` is that,
    and no further request is made.
    """

    def __init__(
        self,
        template: str,
        tile_size: Annotated[int, "side of the server's tiles, pixels", {"type": positive}] = 256,
        rate: Annotated[float, "requests a second at most: ask what the server allows", ABOVE_0] = 10.0,
        concurrency: Annotated[int, "requests under way at a time", {"type": positive}] = 8,
        retries: Annotated[int, "of a tile, after errors that may pass", {"type": whole}] = 5,
        timeout: Annotated[float, "seconds without an answer", ABOVE_0] = 30.0,
        blank_status: Annotated[
            list[int],
            "HTTP statuses that count as a one-coloured tile, not as a missing one: 404 for servers without any at sea",
            {"nargs": "*", "metavar": "STATUS"},
        ] = (),
        header: Annotated[
            list[tuple[str, str]] | None,
            "sent with each request",
            {"type": name_and_value, "nargs": None, "action": "append", "metavar": "NAME:VALUE"},
        ] = None,
        error_tile: Annotated[
            list[Path] | None,
            "what the server sends where it has nothing, as it comes from it",
            {"nargs": None, "action": "append", "metavar": "FILE"},
        ] = None,
    ) -> None:
        if any(not 201 <= status <= 599 for status in blank_status):
            raise ValueError(f"--blank_status {' '.join(map(str, blank_status))}: expected 201 to 599, such as 404")
        self.template, self.tile_size, self.retries, self.concurrency = template, tile_size, retries, concurrency
        self.stop, self.failure = threading.Event(), None
        self.limit = RateLimit(rate, self.stop)
        headers = {"User-Agent": "EarthLoc datasets.build", **dict(header or [])}
        self.http = urllib3.PoolManager(
            maxsize=concurrency, block=True, headers=headers, timeout=urllib3.Timeout(connect=timeout, read=timeout)
        )
        self.error_tiles = {file.read_bytes() for file in error_tile or []}
        self.blank_status, self.blank = frozenset(blank_status), black_tile(tile_size)
        self.lock, self.requests, self.got, self.failed, self.absent = threading.Lock(), 0, 0, 0, 0

    def fetch(self, tile: tuple[int, int, int, int]) -> bytes:
        """(year, zoom, row, col) -> the bytes of a whole image of the right size.

        Raises TileError, or ServerError after many tiles in a row that could not be had.
        """
        with self._ends_all():
            for attempt in range(self.retries + 1):
                data, problem, delay, again = self._try(tile_url(self.template, *tile), attempt)
                if self.stop.is_set() or not again:
                    break
                if attempt < self.retries:
                    self.stop.wait(delay)
            if problem:
                self._count_failure(problem, answered=not again)
            else:
                with self.lock:
                    self.got, self.failed = self.got + 1, 0
            if data is None:
                raise TileError(problem)
            return data

    @contextmanager
    def _ends_all(self) -> Iterator[None]:
        """What is raised within it, but for one tile's TileError, is kept, and nobody asks for anything after it."""
        try:
            yield
        except TileError:
            raise
        except BaseException as error:
            self.failure = self.failure or error
            self.stop.set()
            raise

    def _try(self, url: str, attempt: int) -> tuple[bytes | None, str | None, float, bool]:
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
        if response.status == 200:
            if response.data in self.error_tiles:
                return None, "is the server's error tile", delay, False
            try:
                open_tile(response.data, self.tile_size)
            except TileError as error:
                return None, str(error), delay, True
            return response.data, None, 0, False
        if response.status in self.blank_status:
            return self.blank, f"HTTP {response.status}", 0, False
        try:
            retry_after = urllib3.Retry().get_retry_after(response)
        except urllib3.exceptions.InvalidHeader:
            retry_after = None
        if retry_after and response.status in (429, 503):
            self.limit.pause(min(retry_after, MAX_RETRY_AFTER_SECONDS))  # the server means all of us
            delay = 0
        return None, f"HTTP {response.status}", delay, response.status in RETRIED_STATUS

    def _count_failure(self, problem: str, answered: bool) -> None:
        with self.lock, self._ends_all():  # within the lock: no other thread counts or asks on meanwhile
            if self.stop.is_set():  # the end has a reason already
                return
            if answered:
                self.absent += 1
            else:
                self.failed += 1
            if self.failed >= FAILURES_IN_A_ROW:
                raise ServerError(
                    f"{self.failed} tiles in a row could not be had in {self.retries + 1} tries each, "
                    f"the last one: {problem}; is the server up, and --rate within what it allows? What "
                    f"is built so far is whole, run again to continue"
                )
            if not self.got and self.absent >= FRUITLESS:
                raise ServerError(
                    f"the first {self.absent} tiles could not be had, the last one: {problem}; do --url, "
                    f"--header, --zooms and --years fit what the server has?"
                )

    def fetch_all(self, jobs: Sequence[tuple[Hashable, Sequence[tuple]]]) -> Iterator[tuple[Hashable, dict]]:
        """jobs: (key, tiles) -> yields (key, {tile: bytes or TileError}), in order.

        Each tile is asked for once, and kept until the last job that needs it is yielded. Raises what ended fetching;
        jobs that lack a tile because of it are not yielded.
        """
        uses = Counter(tile for _, tiles in jobs for tile in tiles)
        futures, window = {}, deque()
        pool = ThreadPoolExecutor(self.concurrency, thread_name_prefix="tiles")

        def finish(key: Hashable, tiles: Sequence[tuple]) -> tuple[Hashable, dict]:
            results = {}
            for tile in tiles:
                try:
                    results[tile] = futures[tile].result()
                except TileError as error:
                    results[tile] = error
            if self.failure and any(isinstance(each, TileError) for each in results.values()):
                raise self.failure
            for tile in tiles:
                uses[tile] -= 1
                if not uses[tile]:
                    del futures[tile]
            return key, results

        try:
            for key, tiles in jobs:
                for tile in tiles:
                    if tile not in futures:
                        futures[tile] = pool.submit(self.fetch, tile)
                window.append((key, tiles))
                if len(window) > 4 * self.concurrency:  # so far ahead, a tile that must wait does not hold up others
                    yield finish(*window.popleft())
            while window:
                yield finish(*window.popleft())
        except BaseException:
            self.stop.set()
            raise
        finally:
            pool.shutdown(cancel_futures=True)

    def close(self) -> None:
        self.stop.set()
        self.http.clear()
