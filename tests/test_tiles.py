"""The tile builder against a real HTTP server that serves tiles cut from the Blue Marble, and misbehaves on purpose."""

import contextlib
import csv
import io
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlparse

import numpy as np
import pytest
from PIL import Image

from datasets import grid
from datasets.build import __main__ as build
from datasets.build import tile_server, tiles
from datasets.build.area import in_box, select_regions
from datasets.names import Catalogue

ROOT = Path(__file__).parent.parent
SIZE = 32  # pixels of a tile
ZOOM = 6
BOX = (38, 72, 46, 95)  # central Asia: no tile is blank


@pytest.fixture(scope="module")
def marble():
    with Image.open(ROOT / "datasets" / "build" / "blue_marble" / "bmng_may_2048.jpg") as image:
        return np.asarray(image.convert("RGB"))


def cut(marble, zoom, row, col, size=SIZE):
    """One tile, nearest pixel by pixel -> uint8 (size, size, 3)."""
    y = (row + (np.arange(size) + 0.5) / size) / 2**zoom
    x = (col + (np.arange(size) + 0.5) / size) / 2**zoom
    latitude = np.degrees(2 * np.arctan(np.exp(np.pi * (1 - 2 * y))) - np.pi / 2)
    height, width = marble.shape[:2]
    return marble[((90 - latitude) / 180 * height).astype(int)[:, None], (x * width).astype(int)[None]]


def encode(pixels, format="PNG"):
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, format)
    return stream.getvalue()


class Server:
    """faults: (zoom, row, col) -> list of what to answer the first times; the last one stays if it is 'always …'."""

    def __init__(self, marble):
        self.marble, self.faults, self.requests = marble, {}, Counter()
        self.lock, self.active, self.most_active = threading.Lock(), 0, 0
        self.barrier, self.closing = threading.Barrier(1), threading.Event()  # requests that wait for each other
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self):
                with outer.lock:
                    outer.active += 1
                    outer.most_active = max(outer.most_active, outer.active)
                try:
                    outer.answer(self)
                except (BrokenPipeError, ConnectionResetError):
                    self.close_connection = True
                finally:
                    with outer.lock:
                        outer.active -= 1

            def log_message(self, *_):
                pass

        class Quiet(ThreadingHTTPServer):
            def handle_error(self, *_):  # a client that was killed
                pass

        self.http = Quiet(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def met(self, tile):
        """How often a tile was asked for, in any year."""
        with self.lock:
            return sum(count for (_, *asked), count in self.requests.items() if tuple(asked) == tile)

    def answer(self, handler):
        url = urlparse(handler.path)
        fields = {key: values[0] for key, values in parse_qs(url.query).items()} or dict(
            zip(("year", "z", "y", "x"), url.path.strip("/").removesuffix(".png").split("/"))
        )
        tile = tuple(int(fields[key]) for key in ("z", "y", "x"))
        with self.lock:
            self.requests[(int(fields["year"]), *tile)] += 1
            turns = self.faults.get(tile, [])
            fault = turns[0] if turns and turns[0].startswith("always") else turns.pop(0) if turns else ""
        self.barrier.wait(60)
        self.send(handler, fault.removeprefix("always "), tile)

    def send(self, handler, fault, tile):
        status, headers, body = 200, {}, encode(cut(self.marble, *tile))
        if fault == "slow":
            self.closing.wait()
            return
        elif fault == "429":
            status, headers, body = 429, {"Retry-After": "7"}, b"too many"
        elif fault in ("404", "403", "500", "503"):
            status, body = int(fault), b"<html>sorry</html>"
        elif fault == "truncated":
            body = encode(cut(self.marble, *tile), "JPEG")
            body = body[: len(body) // 2]
        elif fault == "cut connection":
            handler.send_response(200)
            handler.send_header("Content-Length", str(len(body)))
            handler.end_headers()
            handler.wfile.write(body[:50])
            handler.close_connection = True
            return
        elif fault == "wrong size":
            body = encode(cut(self.marble, *tile, size=SIZE // 2))
        elif fault == "html":
            body = b"<html>no such layer</html>"
        elif fault == "blank":
            body = encode(np.full((SIZE, SIZE, 3), 200, np.uint8))
        elif fault == "placeholder":
            body = placeholder()
        else:
            assert fault == "", fault
        handler.send_response(status)
        for name, value in {**headers, "Content-Length": len(body)}.items():
            handler.send_header(name, str(value))
        handler.end_headers()
        handler.wfile.write(body)


def placeholder():
    stripes = np.zeros((SIZE, SIZE, 3), np.uint8)
    stripes[::4] = 255
    return encode(stripes)


@pytest.fixture
def server(marble):
    server = Server(marble)
    yield server
    server.closing.set()
    server.http.shutdown()
    server.http.server_close()


@pytest.fixture(autouse=True)
def short_waits(monkeypatch):
    monkeypatch.setattr(tile_server, "BACKOFF_SECONDS", 0.01)


@pytest.fixture
def impatient(server, monkeypatch):
    """What the server never answers is given up once it has met the request, and nothing else, however busy the machine
    is."""
    request = tile_server.urllib3.PoolManager.request

    def patient_with_others(pool, method, url, **more):
        tile = tuple(map(int, url.removesuffix(".png").split("/")[-3:]))
        if "slow" not in " ".join(server.faults.get(tile, [])[:1]):
            return request(pool, method, url, **more)
        met = server.met(tile)
        try:
            return request(pool, method, url, **more, timeout=tile_server.urllib3.Timeout(connect=60, read=0.1))
        except tile_server.urllib3.exceptions.HTTPError:
            while server.met(tile) == met:
                time.sleep(0.01)
            raise

    monkeypatch.setattr(tile_server.urllib3.PoolManager, "request", patient_with_others)


class Clock:
    """In place of time and of waiting for an event: whoever waits moves it on."""

    def __init__(self):
        self.now = 100.0

    def monotonic(self):
        return self.now

    def wait(self, seconds):
        self.now += seconds


@pytest.fixture(scope="module")
def regions():
    return select_regions([ZOOM], BOX, land_only=False)


def client_of(server, **settings):
    settings = {"tile_size": SIZE, "rate": 5000, "timeout": 100, "retries": 3, **settings}
    return tile_server.TileServer(server.url + "/{year}/{z}/{y}/{x}.png", **settings)


def fetch(server, output, regions, years=(2021,), max_blank=15, quality=90, **settings):
    with contextlib.closing(client_of(server, **settings)) as client:
        counts = tiles.build_tiles(output, client, regions, years, 4 * SIZE, max_blank, quality)
    return *counts, client.requests


def pixels_of(path):
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB")).astype(float)


def expected(marble, region):
    zoom, row, col = region
    return np.concatenate(
        [np.concatenate([cut(marble, zoom, row + i, col + j) for j in range(4)], axis=1) for i in range(4)], axis=0
    ).astype(float)


def left_out(output):
    with open(output / tiles.LEFT_OUT_FILE, newline="") as stream:
        return list(csv.reader(stream))[1:]


def test_images_are_the_ground_of_their_names(server, marble, tmp_path, regions):
    made, lost, _ = fetch(server, tmp_path, regions, years=(2020, 2021), quality=95)
    catalogue = Catalogue.read(tmp_path, "database")
    assert (made, lost) == (2 * len(regions), 0) and len(catalogue) == made and len(regions) >= 6
    for path, image_id in zip(catalogue.paths, catalogue.ids):
        region = tuple(map(int, image_id.split("_")))
        pixels = pixels_of(tmp_path / path)
        assert pixels.shape == (4 * SIZE, 4 * SIZE, 3)
        assert np.abs(pixels - expected(marble, region)).mean() < 8  # JPEG at 95, chroma halved
        assert np.abs(np.roll(pixels, SIZE, axis=1) - expected(marble, region)).mean() > 12
    assert not (tmp_path / tiles.LEFT_OUT_FILE).exists()


def test_a_tile_is_asked_for_once_though_four_regions_hold_it(server, tmp_path, regions):
    _, _, requests = fetch(server, tmp_path, regions)
    needed = {(2021, zoom, row + i, col + j) for zoom, row, col in regions.tolist() for i in range(4) for j in range(4)}
    assert set(server.requests) == needed and set(server.requests.values()) == {1}
    assert requests == len(needed) < 16 * len(regions) / 2


@pytest.mark.parametrize("fault", ["429", "500", "503", "truncated", "cut connection", "wrong size", "slow", "html"])
def test_a_fault_that_passes_leaves_no_trace(server, marble, tmp_path, regions, fault, impatient, monkeypatch):
    bad = tuple(regions[0] + [0, 1, 1])
    server.faults[bad] = [fault, fault]
    pauses = []
    monkeypatch.setattr(tile_server.RateLimit, "pause", lambda _, seconds: pauses.append(seconds))
    made, lost, _ = fetch(server, tmp_path, regions[:1], quality=95)
    assert (made, lost) == (1, 0) and server.requests[(2021, *bad)] == 3
    path = tmp_path / grid.image_path(*regions[0], 2021)
    assert np.abs(pixels_of(path) - expected(marble, tuple(regions[0]))).mean() < 8
    assert pauses == ([7, 7] if fault == "429" else [])


@pytest.mark.parametrize(
    "fault, reason, tries",
    [
        ("404", "HTTP 404", 1),
        ("403", "HTTP 403", 1),
        ("500", "HTTP 500", 4),
        ("truncated", "no whole image", 4),
        ("wrong size", "16 × 16 pixels, not 32 × 32", 4),
        ("slow", "ReadTimeoutError", 4),
        ("html", "no whole image", 4),
    ],
)
def test_a_fault_that_stays_leaves_the_region_out_and_says_why(
    server, tmp_path, regions, impatient, fault, reason, tries
):
    bad = tuple(regions[0].tolist())  # its first tile: in no other region's first rows or columns
    server.faults[bad] = ["always " + fault]
    made, lost, _ = fetch(server, tmp_path, regions)
    holders = [
        grid.image_path(*region, 2021)
        for region in regions.tolist()
        if 0 <= bad[1] - region[1] < 4 and 0 <= bad[2] - region[2] < 4
    ]
    assert made == len(regions) - len(holders) and lost == len(holders) >= 1
    assert server.requests[(2021, *bad)] == tries
    rows = left_out(tmp_path)
    assert sorted(row[0] for row in rows) == sorted(holders)
    assert all(row[1] == f"{bad[0]}/{bad[2]}/{bad[1]}" and row[2] == "left out" and reason in row[3] for row in rows)
    assert not any((tmp_path / path).exists() for path in holders) and not list(tmp_path.rglob("*.tmp"))

    server.faults.clear()  # the server recovers: only what is missing is asked for
    server.requests.clear()
    assert fetch(server, tmp_path, regions)[0] == len(holders)
    assert sum(server.requests.values()) <= 16 * len(holders)
    assert left_out(tmp_path) == [] and len(Catalogue.read(tmp_path, "database")) == len(regions)


@pytest.mark.parametrize(
    "blank, max_blank, kept",
    [(0, 0, True), (1, 0, False), (3, 3, True), (4, 3, False), (15, 15, True), (16, 15, False), (16, 16, True)],
)
def test_as_many_blank_tiles_as_max_blank_says_are_kept(blank, max_blank, kept):
    results = {}
    for i in range(16):
        content, shades = io.BytesIO(), np.arange(64).reshape(8, 8) * (0 if i < blank else 2) + i
        Image.fromarray(shades.astype(np.uint8)).save(content, "PNG")
        results[i] = content.getvalue()
    image, problems = tiles.make_image(results, 8, 32, max_blank)
    assert (image is not None) == kept and problems == [(i, "is blank") for i in range(blank)]


def test_tiles_of_sixteen_bits_and_no_postscript():
    picture, shade = io.BytesIO(), np.arange(64, dtype=np.uint16).reshape(8, 8)
    Image.fromarray(shade * 4 * 257).save(picture, "PNG")
    assert np.array_equal(np.asarray(tile_server.open_tile(picture.getvalue(), 8))[..., 1], shade * 4)
    with pytest.raises(
        tile_server.TileError, match="no whole image"
    ):  # Pillow alone would start ghostscript for its pixels
        tile_server.open_tile(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n%%EOF\n", 8)


def test_blank_tiles_are_listed_and_wholly_blank_regions_left_out(server, tmp_path, regions):
    first, other = regions[0], regions[-1]
    for tile in tiles.tiles_of(2021, other):
        server.faults[tile[1:]] = ["always blank"]
    server.faults[tuple(first)] = ["always blank"]
    made, lost, _ = fetch(server, tmp_path, np.array([first, other]))
    assert (made, lost) == (1, 1)
    rows = left_out(tmp_path)
    assert Counter((row[0], row[2], row[3]) for row in rows) == {
        (grid.image_path(*other, 2021), "left out", "is blank"): 16,
        (grid.image_path(*first, 2021), "written", "is blank"): 1,
    }
    (tmp_path / grid.image_path(*first, 2021)).unlink()
    assert fetch(server, tmp_path, np.array([first]), max_blank=0)[:2] == (0, 1)
    assert len([row for row in left_out(tmp_path) if row[0] == grid.image_path(*other, 2021)]) == 16  # not tried: stays


def test_placeholders_are_no_ground(server, tmp_path, regions):
    one = tuple(regions[0])
    server.faults[one] = server.faults[tuple(regions[0] + [0, 3, 3])] = ["always placeholder"]
    assert fetch(server, tmp_path / "twice", regions[:1])[:2] == (0, 1)
    assert "placeholder" in left_out(tmp_path / "twice")[0][3]
    del server.faults[tuple(regions[0] + [0, 3, 3])]
    assert fetch(server, tmp_path / "once", regions[:1])[:2] == (1, 0)  # only once: nothing gives it away …
    (tmp_path / "error.png").write_bytes(placeholder())
    known = fetch(server, tmp_path / "known", regions[:1], error_tile=[tmp_path / "error.png"])
    assert known[:2] == (0, 1)  # … unless known


def test_a_status_that_counts_as_blank(server, marble, tmp_path, regions):
    """One tile at sea costs no coast, a region all at sea is still left out, and other statuses stay what they are."""
    first, other = regions[0], regions[-1]
    for tile in tiles.tiles_of(2021, other):
        server.faults[tile[1:]] = ["always 404"]
    server.faults[tuple(first)] = ["always 404"]
    assert fetch(server, tmp_path, np.array([first, other]), blank_status=[404], quality=95)[:2] == (1, 1)
    assert Counter((row[0], row[2], row[3]) for row in left_out(tmp_path)) == {
        (grid.image_path(*other, 2021), "left out", "is blank"): 16,
        (grid.image_path(*first, 2021), "written", "is blank"): 1,
    }
    ground = expected(marble, tuple(first))
    ground[:SIZE, :SIZE] = 0
    assert np.abs(pixels_of(tmp_path / grid.image_path(*first, 2021)) - ground).mean() < 8
    server.faults[tuple(first)] = ["always 403"]
    assert fetch(server, tmp_path / "403", np.array([first]), blank_status=[404])[:2] == (0, 1)
    assert fetch(server, tmp_path / "both", np.array([first]), blank_status=[404, 403])[:2] == (1, 0)


def test_each_request_has_its_turn_and_a_pause_holds_all(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(tile_server, "time", clock)
    limit, turns = tile_server.RateLimit(40, clock), []
    for number in range(8):
        if number == 5:
            limit.pause(7)
        limit.wait()
        turns.append(clock.now - 100)
    assert turns == pytest.approx([0, 1 / 40, 2 / 40, 3 / 40, 4 / 40, *(7 + (4 + k) / 40 for k in range(3))])


def test_so_many_requests_at_a_time(server, tmp_path, regions, monkeypatch):
    """Nothing is answered before three ask, so as many do; a pool of three asks no more."""
    server.barrier, sizes, patience = threading.Barrier(3), [], []

    def pool(size, **more):
        sizes.append(size)
        return ThreadPoolExecutor(size, **more)

    monkeypatch.setattr(tile_server, "ThreadPoolExecutor", pool)
    client = tile_server.urllib3.PoolManager
    monkeypatch.setattr(tile_server.urllib3, "PoolManager", lambda **more: patience.append(more) or client(**more))
    assert fetch(server, tmp_path, regions[:2], concurrency=3, timeout=77)[2] == 24
    assert server.most_active == 3 and sizes == [3]
    assert (patience[0]["maxsize"], patience[0]["timeout"].read_timeout) == (3, 77)


def test_a_server_that_is_gone_stops_the_build(server, tmp_path, regions, monkeypatch):
    monkeypatch.setattr(tile_server, "FAILURES_IN_A_ROW", 5)
    server.http.shutdown()
    server.http.server_close()
    with pytest.raises(tile_server.ServerError, match=r"\d tiles in a row.*2 tries.*is the server up"):
        fetch(server, tmp_path, regions, retries=1)


@pytest.mark.parametrize("blank", [{}, {"blank_status": [404]}])
def test_a_wrong_address_stops_the_build_early(server, tmp_path, monkeypatch, regions, blank):
    monkeypatch.setattr(tile_server, "FRUITLESS", 20)
    for region in regions:
        for tile in tiles.tiles_of(2021, region):
            server.faults[tile[1:]] = ["always 404"]
    with pytest.raises(tile_server.ServerError, match="first 20 tiles.*HTTP 404.*--url"):
        fetch(server, tmp_path, regions, concurrency=8, **blank)
    assert 20 <= sum(server.requests.values()) <= 20 + 7  # each of the other threads may have asked once more
    assert not (tmp_path / tiles.LEFT_OUT_FILE).exists() or {row[3] for row in left_out(tmp_path)} <= {
        "HTTP 404",
        "is blank",
    }  # nothing is called left out that was stopped


@pytest.mark.parametrize("fault, retries, requests", [("404", 3, 20), ("500", 3, 32 * 4)])
def test_after_the_last_failure_nothing_is_asked_for(server, regions, fault, retries, requests, monkeypatch):
    monkeypatch.setattr(tile_server, "FRUITLESS", 20)
    client = client_of(server, retries=retries)
    needed = [tile for region in regions.tolist() for tile in tiles.tiles_of(2021, region)]
    server.faults |= {tile[1:]: ["always " + fault] for tile in needed}
    monkeypatch.setattr(client.stop, "wait", lambda _: None)
    with pytest.raises(tile_server.ServerError) as raised:
        for tile in needed:
            with contextlib.suppress(tile_server.TileError):
                client.fetch(tile)
    assert client.stop.is_set() and client.failure is raised.value
    server.faults.clear()
    with pytest.raises(tile_server.TileError, match="stopped"):
        client.fetch(needed[0])
    assert sum(server.requests.values()) == client.requests == requests


def test_a_failure_in_one_thread_stops_the_others_and_is_what_is_raised(server, tmp_path, regions, monkeypatch):
    """The second region's last tile fails; the first region's first tile waits for that, as one at work would."""
    real, first, bad = tile_server.TileServer._try, tuple(regions[0]), tuple(regions[1] + [0, 3, 3])

    def attempt(client, url, number):
        tile = tuple(map(int, url.removesuffix(".png").split("/")[-3:]))
        if tile == bad:
            raise ZeroDivisionError("a mistake of ours")
        if tile == first:
            assert client.stop.wait(60)
        return real(client, url, number)

    monkeypatch.setattr(tile_server.TileServer, "_try", attempt)
    with pytest.raises(ZeroDivisionError, match="a mistake of ours"):
        fetch(server, tmp_path, regions)
    assert not os.listdir(tmp_path)  # nothing is called left out that was stopped


KILLED = """
import os, signal, sys
from datasets.build import __main__ as build
replace, images = os.replace, 0
def dies_at_the_third_image(source, target):
    global images
    images += str(target).endswith(".jpg")
    if images == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    replace(source, target)
os.replace = dies_at_the_third_image
build.main(sys.argv[1:])
"""


def test_kill_and_resume_gives_the_same_files_and_no_half_image(server, tmp_path, regions):
    fetch(server, tmp_path / "whole", regions)
    command = [
        sys.executable,
        "-c",
        KILLED,
        "tiles",
        str(tmp_path / "killed"),
        "--url",
        server.url + "/{year}/{z}/{y}/{x}.png",
        "--zooms",
        str(ZOOM),
        "--years",
        "2021",
        "--bbox",
        *map(str, BOX),
        "--no-land_only",
        "--tile_size",
        str(SIZE),
        "--image_size",
        str(4 * SIZE),
        "--rate",
        "5000",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    before = sorted((tmp_path / "killed").rglob("*.jpg"))
    assert len(before) == 2 and len(list((tmp_path / "killed").rglob("*.tmp"))) == 1
    for path in before:
        with Image.open(path) as image:
            image.load()
    assert fetch(server, tmp_path / "killed", regions)[0] == len(regions) - len(before)
    files = {path.relative_to(tmp_path / "whole"): path.read_bytes() for path in (tmp_path / "whole").rglob("*.jpg")}
    assert files == {
        path.relative_to(tmp_path / "killed"): path.read_bytes() for path in (tmp_path / "killed").rglob("*.jpg")
    }


def test_wmts_template_and_rows_from_the_south(server, tmp_path, regions):
    wmts = "/?SERVICE=WMTS&year={year}&x={TileCol}&y={TileRow}&z={TileMatrix}"
    arguments = [
        "tiles",
        str(tmp_path),
        "--url",
        server.url + wmts,
        "--zooms",
        str(ZOOM),
        "--years",
        "2019",
        "--bbox",
        *map(str, BOX),
        "--no-land_only",
        "--tile_size",
        str(SIZE),
        "--image_size",
        "64",
        "--rate",
        "5000",
    ]
    assert build.main(arguments) == 0
    assert len(Catalogue.read(tmp_path, "database", 2019)) == len(regions)
    assert {pixels_of(path).shape for path in tmp_path.rglob("*.jpg")} == {(64, 64, 3)}
    assert tile_server.tile_url("http://a/{-y}/{y}/{x}/{z}/{year}", 2020, 3, 1, 5) == "http://a/6/1/5/3/2020"


def test_dry_run_says_how_much_and_asks_for_nothing(server, tmp_path, regions, capsys):
    arguments = [
        "tiles",
        str(tmp_path / "new"),
        "--url",
        server.url + "/{year}/{z}/{y}/{x}.png",
        "--zooms",
        str(ZOOM),
        "--years",
        "2020",
        "2021",
        "--bbox",
        *map(str, BOX),
        "--no-land_only",
        "--dry_run",
        "--tile_kb",
        "100",
    ]
    assert build.main(arguments) == 0
    needed = {(row + i, col + j) for _, row, col in regions.tolist() for i in range(4) for j in range(4)}
    out = capsys.readouterr().out
    assert f"{2 * len(needed):,} requests" in out and f"{2 * len(needed) * 1e5 / 1e9:.1f} GB to download" in out
    assert not server.requests and not (tmp_path / "new").exists()


def test_box_over_the_antimeridian():
    regions = grid.all_regions([6])
    inside = regions[in_box(regions, (-20, 170, -10, -170))]
    # Left edges step by 2 · 360 / 64 = 11.25 degrees, a region is 22.5 wide, and none crosses the antimeridian itself.
    assert sorted(set(grid.footprints(inside)[:, 0, 1])) == [-180, 157.5]
    everywhere = select_regions([6], (-20, -180, -10, 180), land_only=False)
    assert len(everywhere) == 31 * len({row for _, row, _ in everywhere.tolist()})  # 64 columns in steps of 2


def test_regions_that_only_touch_the_box_stay_outside():
    corner = grid.footprints([(6, 24, 30)])[0]
    regions = grid.all_regions([6])
    bottom, left, top, right = corner[0, 0], corner[0, 1], corner[2, 0], corner[2, 1]
    inside = {tuple(region) for region in regions[in_box(regions, (bottom, left, top, right))].tolist()}
    assert inside == {(6, 24 + i, 30 + j) for i in (-2, 0, 2) for j in (-2, 0, 2)}


def test_paths_of_several_years_are_the_grids():
    for region in ((9, 262, 202), (10, 2, 0), (11, 700, 2044)):
        years = (2018, 2021, 2030)
        assert grid.image_paths(region, years) == [grid.image_path(*region, year) for year in years]


def test_land_only_leaves_the_ocean_out():
    box = (-5, -140, 20, -70)  # Pacific to Colombia
    land, every = (select_regions([5], box, land_only) for land_only in (True, False))
    assert set(map(tuple, land)) < set(map(tuple, every))


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--url", "http://a/{z}/{x}"], "{y} is missing"),
        (["--url", "http://a/{z}/{x}/{y}"], "{year} is missing"),
        (["--url", "http://a/{z}/{x}/{y}/{year}/{s}"], "unknown {s}"),
        (["--url", "a/{z}/{x}/{y}/{year}"], "expected http"),
        (["--bbox", "40", "0", "30", "10"], "south is 40.0, north is 30.0"),
        (["--bbox", "30", "190", "40", "10"], "west is 190"),
        (["--zooms", "30"], "from 2 to 19"),
        (["--years", "21"], "four digits"),
        (["--rate", "0"], "--rate: 0: expected more than 0"),
        (["--header", "secret"], "NAME:VALUE"),
        (["--blank_status", "404", "200"], "--blank_status 404 200: expected 201 to 599"),
        (["--error_tile", "nowhere.png"], "nowhere.png"),
    ],
)
def test_wrong_flags_are_named(tmp_path, capsys, flags, message):
    base = ["tiles", str(tmp_path), "--url", "http://127.0.0.1:9/{z}/{x}/{y}/{year}", "--zooms", "5", "--no-land_only"]
    assert build.main(base + flags) == 2
    assert message in capsys.readouterr().err
    assert not os.listdir(tmp_path)
