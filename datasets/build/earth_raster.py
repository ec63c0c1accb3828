"""The raster of `earth` from a tile server: python -m datasets.build earth_raster OUTPUT.tif

Tiles of one zoom (default: NASA's Blue Marble of August) become one Web Mercator GeoTIFF of JPEG blocks. They are kept
as they came in OUTPUT.tif.mbtiles (SQLite, a format that GDAL and QGIS open) until all are there, so that a second run
fetches only what is missing; then the raster is written block by block, and they go.
"""

import os
import secrets
import sqlite3
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import numpy as np
from tqdm import tqdm

from datasets.build.area import check_box
from datasets.build.earth import MERCATOR_HALF
from datasets.build.tile_server import TileError, TileServer, check_template, open_tile

URL = (
    "https://gibs.earthdata.nasa.gov/wmts/epsg3857/best/BlueMarble_ShadedRelief_Bathymetry/default/"
    "GoogleMapsCompatible_Level8/{z}/{y}/{x}.jpeg"
)
WHOLE_EARTH = (-62.9, -180, 62.9, 180)  # holds all regions with their centres within ±60 degrees
BLOCK = 512  # pixels of a side of the raster's blocks
COMMIT = 64  # tiles: so many are lost at most when a run is killed


def tile_range(box, zoom, step):
    """(south, west, north, east) degrees -> rows and columns (top, left, bottom, right) of tiles, multiples of step."""
    south, west, north, east = box
    count = 2**zoom
    y = [(0.5 - np.arcsinh(np.tan(np.radians(lat))) / (2 * np.pi)) * count for lat in (north, south)]
    x = [(lon + 180) / 360 * count for lon in (west, east)]
    # An edge that is a tile's, but for rounding, takes no further tile.
    top, left = (int(np.floor(edge / step + 1e-6)) * step for edge in (y[0], x[0]))
    bottom, right = (int(np.ceil(edge / step - 1e-6)) * step for edge in (y[1], x[1]))
    return max(top, 0), max(left, 0), min(bottom, count), min(right, count)


class TileStore:
    """Tiles as they came, in an MBTiles file; what it was made for stands in its metadata."""

    def __init__(self, path, zoom, about):
        """about: {name: text}. ValueError where the file holds tiles for something else, or is none."""
        self.path, self.zoom = path, zoom
        self.file = sqlite3.connect(path)
        try:
            with self.file:
                self.file.execute("CREATE TABLE IF NOT EXISTS metadata (name TEXT PRIMARY KEY, value TEXT)")
                self.file.execute(
                    "CREATE TABLE IF NOT EXISTS tiles (zoom_level INTEGER, tile_column INTEGER, tile_row INTEGER, "
                    "tile_data BLOB, PRIMARY KEY (zoom_level, tile_column, tile_row))"
                )
                self.file.executemany("INSERT OR IGNORE INTO metadata VALUES (?, ?)", about.items())
            found = dict(self.file.execute("SELECT name, value FROM metadata"))
        except sqlite3.DatabaseError as error:
            self.file.close()
            raise ValueError(f"{path}: cannot be read as tiles ({error}); delete it and run again") from error
        different = [f"{key}: {found[key]} there, {about[key]} now" for key in about if found[key] != about[key]]
        if different:
            self.file.close()
            raise ValueError(
                f"{path}: holds tiles for something else ({'; '.join(different)}); delete it, or go on with those"
            )

    def _row(self, row):
        return 2**self.zoom - 1 - row  # MBTiles count rows from the south

    def rows(self):
        """-> set of (row, col) that are there."""
        return {(self._row(row), col) for row, col in self.file.execute("SELECT tile_row, tile_column FROM tiles")}

    def add(self, tiles):
        """[(row, col, bytes)], all of them or none."""
        with self.file:
            self.file.executemany(
                "INSERT OR REPLACE INTO tiles VALUES (?, ?, ?, ?)",
                [(self.zoom, col, self._row(row), data) for row, col, data in tiles],
            )

    def get(self, row, col):
        """-> bytes."""
        where = (self.zoom, col, self._row(row))
        query = "SELECT tile_data FROM tiles WHERE zoom_level = ? AND tile_column = ? AND tile_row = ?"
        return self.file.execute(query, where).fetchone()[0]

    def close(self):
        self.file.close()


def fetch_tiles(server, store, wanted, zoom, concurrency):
    """wanted: [(row, col)] -> {(row, col): what is wrong} of those that could not be had; the others are stored.

    Raises what ended the server's fetches; what came before is stored.
    """

    def fetch(place):
        try:
            return place, server.fetch((0, zoom, *place)), None
        except TileError as error:
            return place, None, str(error)

    problems = {}
    with ThreadPoolExecutor(concurrency, thread_name_prefix="tiles") as pool:
        try:
            for start in tqdm(range(0, len(wanted), COMMIT), desc="tiles", unit=f"{COMMIT} tiles", mininterval=0.5):
                found = []
                try:
                    for (row, col), data, problem in pool.map(fetch, wanted[start : start + COMMIT]):
                        if data is None:
                            problems[row, col] = problem
                        else:
                            found.append((row, col, data))
                finally:
                    store.add(found)
                if server.failure:
                    raise server.failure
        except BaseException:
            server.stop.set()
            raise
    return problems


def read_block(store, row, col, tile_size):
    """The block whose first tile is (row, col) -> uint8 (3, BLOCK, BLOCK)."""
    block = np.empty((BLOCK, BLOCK, 3), dtype=np.uint8)
    for i in range(BLOCK // tile_size):
        for j in range(BLOCK // tile_size):
            tile = np.asarray(open_tile(store.get(row + i, col + j), tile_size))
            block[i * tile_size : (i + 1) * tile_size, j * tile_size : (j + 1) * tile_size] = tile
    return block.transpose(2, 0, 1)


def write_raster(path, store, tiles, zoom, tile_size, quality):
    """All tiles of the range (top, left, bottom, right) -> GeoTIFF, whole or not at all, a block at a time."""
    import rasterio  # here, not above: only a few commands need GDAL
    from rasterio.transform import from_origin
    from rasterio.windows import Window

    top, left, bottom, right = tiles
    side = 2 * MERCATOR_HALF / 2**zoom  # metres of a tile
    profile = {
        "driver": "GTiff",
        "width": (right - left) * tile_size,
        "height": (bottom - top) * tile_size,
        "count": 3,
        "dtype": "uint8",
        "crs": "EPSG:3857",
        "transform": from_origin(
            left * side - MERCATOR_HALF, MERCATOR_HALF - top * side, side / tile_size, side / tile_size
        ),
        "tiled": True,
        "blockxsize": BLOCK,
        "blockysize": BLOCK,
        "compress": "jpeg",
        "photometric": "ycbcr",
        "jpeg_quality": quality,
        "bigtiff": "if_safer",
    }
    step = BLOCK // tile_size
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        with rasterio.open(temporary, "w", **profile) as file:
            for row in tqdm(range(top, bottom, step), desc="raster", unit="row", mininterval=0.5):
                for col in range(left, right, step):
                    window = Window((col - left) * tile_size, (row - top) * tile_size, BLOCK, BLOCK)
                    file.write(read_block(store, row, col, tile_size), window=window)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def build_raster(
    output,
    template=URL,
    zoom=8,
    box=WHOLE_EARTH,
    tile_size=256,
    rate=10.0,
    concurrency=8,
    retries=5,
    timeout=30.0,
    blank_status=(),
    quality=90,
):
    """-> requests made, tiles of the raster; (0, 0) where it is there. A second run goes on with what is missing.

    box: (south, west, north, east) degrees, extended to whole blocks. blank_status: HTTP statuses that stand for a tile
    without ground, black. Raises ValueError naming what could not be had; then no raster is written, and nothing that
    was fetched is lost.
    """
    output = Path(output)
    if output.exists():
        return 0, 0
    tiles = tile_range(box, zoom, BLOCK // tile_size)
    top, left, bottom, right = tiles
    output.parent.mkdir(parents=True, exist_ok=True)
    about = {"url": template, "zoom": str(zoom), "tile_size": str(tile_size), "name": output.stem}
    stored = output.with_name(output.name + ".mbtiles")
    server = TileServer(template, tile_size, rate, concurrency, retries, timeout, blank_status=blank_status)
    with closing(TileStore(stored, zoom, about)) as store, closing(server):
        there = store.rows()
        places = [(row, col) for row in range(top, bottom) for col in range(left, right)]
        problems = fetch_tiles(server, store, [each for each in places if each not in there], zoom, concurrency)
        if problems:
            kinds = "; ".join(f"{count:,} {problem}" for problem, count in Counter(problems.values()).most_common(3))
            row, col = next(iter(problems))
            raise ValueError(
                f"{template}: {len(problems):,} of {len(places):,} tiles could not be had ({kinds}; the first: "
                f"{zoom}/{row}/{col}); run again to try them again, or count the status as black with --blank_status"
            )
        write_raster(output, store, tiles, zoom, tile_size, quality)
    stored.unlink()
    return server.requests, len(places)


def add_command(commands, formatter):
    parser = commands.add_parser(
        "earth_raster", help="the raster that earth needs, from a tile server", formatter_class=formatter
    )
    parser.add_argument("output", type=Path, help="GeoTIFF to write; a second run continues")
    parser.add_argument("--url", default=URL, metavar="TEMPLATE", help="with {z} {x} {y} (or {-y})")
    parser.add_argument("--zoom", type=int, default=8, help="8: 0.6 km a pixel at the equator")
    parser.add_argument(
        "--bbox",
        type=float,
        nargs=4,
        default=list(WHOLE_EARTH),
        metavar=("SOUTH", "WEST", "NORTH", "EAST"),
        help="degrees, extended to whole blocks of 512 pixels",
    )
    parser.add_argument("--tile_size", type=int, default=256, help="side of the server's tiles, pixels")
    parser.add_argument("--rate", type=float, default=10, help="requests a second at most: ask what the server allows")
    parser.add_argument("--concurrency", type=int, default=8, help="requests under way at a time")
    parser.add_argument("--retries", type=int, default=5, help="of a tile, after errors that may pass")
    parser.add_argument("--timeout", type=float, default=30, help="seconds without an answer")
    parser.add_argument(
        "--blank_status",
        type=int,
        nargs="*",
        default=[],
        metavar="STATUS",
        help="HTTP statuses that count as a black tile, not as a missing one: 404 for servers without tiles at sea",
    )
    parser.add_argument("--quality", type=int, default=90, help="of the JPEG blocks")
    parser.set_defaults(command_main=main)


def main(args):
    template = check_template(args.url, [0])
    check_box(args.bbox)
    if args.bbox[1] > args.bbox[3]:
        raise ValueError(f"--bbox {' '.join(map(str, args.bbox))}: a raster cannot span the antimeridian; make two")
    for name in ("rate", "concurrency", "timeout"):
        if not getattr(args, name) > 0:
            raise ValueError(f"--{name} {getattr(args, name)}: expected more than 0")
    if args.tile_size < 16 or BLOCK % args.tile_size:
        raise ValueError(f"--tile_size {args.tile_size}: expected a divisor of {BLOCK}, at least 16")
    finest = int(np.log2(2**31 / args.tile_size))
    if 2**args.zoom * args.tile_size < BLOCK or args.zoom > finest:
        raise ValueError(f"--zoom {args.zoom}: expected {int(np.log2(BLOCK / args.tile_size))} to {finest}")
    if args.retries < 0 or not 1 <= args.quality <= 100:
        raise ValueError(f"--retries {args.retries} --quality {args.quality}: expected 0 or more, and 1 to 100")
    requests, tiles = build_raster(
        args.output,
        template,
        args.zoom,
        args.bbox,
        args.tile_size,
        args.rate,
        args.concurrency,
        args.retries,
        args.timeout,
        args.blank_status,
        args.quality,
    )
    return f"{args.output}: {tiles:,} tiles, {requests:,} requests" if tiles else f"{args.output}: is there already"
