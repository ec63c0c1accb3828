"""The raster of `earth` from a tile server: python -m datasets.build earth_raster OUTPUT.tif

Tiles of one zoom (default: NASA's Blue Marble of August) become one Web Mercator GeoTIFF of JPEG blocks. They are kept
as they came in the folder OUTPUT.tif.tiles until all are there, so that a second run fetches only what is missing; then
the raster is written block by block, and they go.
"""

import shutil
from collections import Counter
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Annotated

import numpy as np
from tqdm import tqdm

from datasets.build import flags
from datasets.build.area import check_box
from datasets.build.plan import kept_plan
from datasets.build.tile_server import TileError, TileServer, check_template, open_tile
from utils.files import replacing
from utils.geo import MERCATOR_HALF

URL = (
    "https://gibs.earthdata.nasa.gov/wmts/epsg3857/best/BlueMarble_ShadedRelief_Bathymetry/default/"
    "GoogleMapsCompatible_Level8/{z}/{y}/{x}.jpeg"
)
WHOLE_EARTH = (-62.9, -180, 62.9, 180)  # holds all regions with their centres within ±60 degrees
BLOCK = 512  # pixels of a side of the raster's blocks


def tile_range(box: Sequence[float], zoom: int, step: int) -> tuple[int, int, int, int]:
    """(south, west, north, east) degrees -> rows and columns (top, left, bottom, right) of tiles, multiples of step."""
    south, west, north, east = box
    count = 2**zoom
    y = [(0.5 - np.arcsinh(np.tan(np.radians(lat))) / (2 * np.pi)) * count for lat in (north, south)]
    x = [(lon + 180) / 360 * count for lon in (west, east)]
    # An edge that is a tile's, but for rounding, takes no further tile.
    top, left = (int(np.floor(edge / step + 1e-6)) * step for edge in (y[0], x[0]))
    bottom, right = (int(np.ceil(edge / step - 1e-6)) * step for edge in (y[1], x[1]))
    return max(top, 0), max(left, 0), min(bottom, count), min(right, count)


def fetch_tiles(server: TileServer, folder: Path, zoom: int, places: list[tuple[int, int]]) -> dict:
    """places: (row, col) -> {(row, col): what is wrong} of those not to be had; the others are in the folder."""
    wanted = [place for place in places if not file_of(folder, *place).exists()]
    problems = {}
    bar = tqdm(total=len(places), initial=len(places) - len(wanted), desc="tiles", unit="tile", mininterval=0.5)
    with bar:
        for place, results in server.fetch_all([(place, [(0, zoom, *place)]) for place in wanted]):
            (data,) = results.values()
            if isinstance(data, TileError):
                problems[place] = str(data)
            else:
                file_of(folder, *place).parent.mkdir(parents=True, exist_ok=True)
                with replacing(file_of(folder, *place), sync=False) as file:
                    file.write(data)
            bar.update()
    return problems


def file_of(folder: Path, row: int, col: int) -> Path:
    """Where a tile is kept."""
    return folder / str(col) / str(row)


def read_block(folder: Path, row: int, col: int, tile_size: int) -> np.ndarray:
    """The block whose first tile is (row, col) -> uint8 (3, BLOCK, BLOCK)."""
    steps = range(BLOCK // tile_size)
    tiles = [[open_tile(file_of(folder, row + i, col + j).read_bytes(), tile_size) for j in steps] for i in steps]
    return np.block([[[np.asarray(tile)] for tile in line] for line in tiles]).transpose(2, 0, 1)


def write_raster(
    path: Path, folder: Path, tiles: tuple[int, int, int, int], zoom: int, tile_size: int, quality: int
) -> None:
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
    with replacing(path) as temporary, rasterio.open(temporary.name, "w", **profile) as file:
        for row in tqdm(range(top, bottom, step), desc="raster", unit="row", mininterval=0.5):
            for col in range(left, right, step):
                window = Window((col - left) * tile_size, (row - top) * tile_size, BLOCK, BLOCK)
                file.write(read_block(folder, row, col, tile_size), window=window)


def build_raster(
    output: str | Path, server: TileServer, zoom: int = 8, box: Sequence[float] = WHOLE_EARTH, quality: int = 90
) -> int:
    """-> tiles of the raster; 0 where it is there. A second run goes on with what is missing.

    box: (south, west, north, east) degrees, extended to whole blocks. Raises ValueError naming what could not be had;
    then no raster is written, and nothing that was fetched is lost.
    """
    output = Path(output)
    if output.exists():
        return 0
    top, left, bottom, right = tiles = tile_range(box, zoom, BLOCK // server.tile_size)
    stored = output.with_name(output.name + ".tiles")
    kept_plan(stored, {"url": server.template, "zoom": zoom, "tile_size": server.tile_size}, folders=())
    places = [(row, col) for row in range(top, bottom) for col in range(left, right)]
    problems = fetch_tiles(server, stored, zoom, places)
    if problems:
        kinds = "; ".join(f"{count:,} {problem}" for problem, count in Counter(problems.values()).most_common(3))
        row, col = next(iter(problems))
        raise ValueError(
            f"{server.template}: {len(problems):,} of {len(places):,} tiles could not be had ({kinds}; the first: "
            f"{zoom}/{row}/{col}); run again to try them again, or count the status as black with --blank_status"
        )
    write_raster(output, stored, tiles, zoom, server.tile_size, quality)
    shutil.rmtree(stored)
    return len(places)


def main(
    output: Annotated[Path, "GeoTIFF to write; a second run continues"],
    url: Annotated[str, "with {z} {x} {y} (or {-y})", {"metavar": "TEMPLATE"}] = URL,
    zoom: Annotated[int, "8: 0.6 km a pixel at the equator"] = 8,
    bbox: Annotated[
        list[float],
        "degrees, extended to whole blocks of 512 pixels",
        {"nargs": 4, "metavar": ("SOUTH", "WEST", "NORTH", "EAST")},
    ] = WHOLE_EARTH,
    quality: flags.Quality = 90,
    **server: Annotated[object, TileServer.__init__],
) -> str:
    """-> How many tiles the raster has, and took."""
    check_box(bbox)
    if bbox[1] > bbox[3]:
        raise ValueError(f"--bbox {' '.join(map(str, bbox))}: a raster cannot span the antimeridian; make two")
    size = server["tile_size"]
    if size < 16 or BLOCK % size:
        raise ValueError(f"--tile_size {size}: expected a divisor of {BLOCK}, at least 16")
    coarsest, finest = int(np.log2(BLOCK / size)), int(np.log2(2**31 / size))
    if not coarsest <= zoom <= finest:
        raise ValueError(f"--zoom {zoom}: expected {coarsest} to {finest}")
    with closing(TileServer(check_template(url, [0]), **server)) as client:
        tiles = build_raster(output, client, zoom, bbox, quality)
    return f"{output}: {tiles:,} tiles, {client.requests:,} requests" if tiles else f"{output}: is there already"
