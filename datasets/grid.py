"""The Web Mercator grid of regions: zoom/row/col <-> footprint <-> name, and which regions hold land.

A region is TILES × TILES map tiles; rows and columns step by STEP tiles, so neighbours overlap by half (paper,
sec. 3.2).
"""

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import ArrayLike

from datasets.names import ImageName
from utils import geo

TILES = 4
STEP = 2
AREA_RADIUS_KM = 6378.137  # the equatorial radius: the one with which the public names' areas were computed


def tile_latitude(zoom: ArrayLike, row: ArrayLike) -> np.ndarray:
    """Latitude in degrees of the upper edge of a row of tiles; broadcasts."""
    return np.degrees(np.arctan(np.sinh(np.pi * (1 - 2 * np.asarray(row) / 2.0 ** np.asarray(zoom)))))


def tile_longitude(zoom: ArrayLike, col: ArrayLike) -> np.ndarray:
    """Longitude in degrees of the left edge of a column of tiles; broadcasts."""
    return np.asarray(col) / 2.0 ** np.asarray(zoom) * 360 - 180


def footprints(regions: ArrayLike) -> np.ndarray:
    """(N, 3) int rows of zoom, row, col -> (N, 4, 2) corners BL, TL, TR, BR, rounded to the names' five decimals."""
    zoom, row, col = np.asarray(regions).reshape(-1, 3).T
    top, bottom = tile_latitude(zoom, row), tile_latitude(zoom, row + TILES)
    left, right = tile_longitude(zoom, col), tile_longitude(zoom, col + TILES)
    corners = [(bottom, left), (top, left), (top, right), (bottom, right)]
    return np.round(np.stack([np.stack(corner, axis=-1) for corner in corners], axis=1), 5)


def quadrilateral_area(footprint: ArrayLike) -> np.ndarray:
    """(..., 4, 2) degrees -> (...) km², on a sphere of the equatorial radius, edges straight in (lon, sin lat).

    Exact for map-aligned rectangles; this is the area that the public names hold.
    """
    lat, lon = np.radians(np.moveaxis(np.asarray(footprint, dtype=np.float64), -1, 0))
    span = np.roll(lon, -1, axis=-1) - np.roll(lon, 1, axis=-1)
    return np.abs((span * np.sin(lat)).sum(axis=-1)) * AREA_RADIUS_KM**2 / 2


def name_area(footprints: ArrayLike) -> np.ndarray:
    """(..., 4, 2) corners as the names write them -> (...) int km², the area that the public names hold.

    Those were computed from corners in single precision and cut, not rounded: with it all 4,238 known names come out,
    in double precision 98 of them are off by one.
    """
    return np.trunc(quadrilateral_area(np.asarray(footprints, dtype=np.float32))).astype(np.int64)


def image_name(zoom: int, row: int, col: int, year: int) -> ImageName:
    """Region and year -> ImageName, as the public data set names it."""
    footprint = footprints([(zoom, row, col)])[0]
    center = (
        float(tile_latitude(zoom, row) + tile_latitude(zoom, row + TILES)) / 2,
        float(tile_longitude(zoom, col) + tile_longitude(zoom, col + TILES)) / 2,
    )
    return ImageName(
        footprint=tuple(map(tuple, footprint.tolist())),
        image_id=f"{zoom:02d}_{row:04d}_{col:04d}",
        timestamp=f"{year:04d}",
        nadir=center,
        area=int(name_area(footprint)),
        orientation=0.0,
    )


def regions_of(ids: Iterable[str]) -> np.ndarray:
    """N image ids of the grid, zoom_row_col -> (N, 3) int."""
    return np.array([[int(part) for part in each.split("_")] for each in ids], dtype=np.int64).reshape(-1, 3)


def image_paths(region: Sequence[int], years: Sequence[int]) -> list[str]:
    """(zoom, row, col) -> each year's path in the data set: database/{year}_{zoom}/{lat10}_{lon10}/@…@.jpg."""
    name = image_name(*region, years[0])
    lat10, lon10 = (round(value / 10) * 10 for value in name.nadir)
    # Written once, which counts at 175,000 regions. The first match is the year: an area of 2021 comes later.
    before, after = str(name).split(f"@{name.timestamp}@", 1)
    return [f"database/{year:04d}_{region[0]:02d}/{lat10}_{lon10}/{before}@{year:04d}@{after}" for year in years]


def image_path(zoom: int, row: int, col: int, year: int) -> str:
    """As image_paths, of one year."""
    return image_paths((zoom, row, col), [year])[0]


def is_land(lat: ArrayLike, lon: ArrayLike) -> np.ndarray:
    """Degrees, broadcast -> bool: the one land rule (global-land-mask, a grid of 1 km; lakes count as land).

    Any longitude will do. It knows no islands smaller than its cells, so some atolls of the public data set are sea.
    """
    from global_land_mask import globe  # loads a mask of 1 GB, so only where it is used

    lat, lon = np.broadcast_arrays(np.asarray(lat, dtype=np.float64), np.asarray(lon, dtype=np.float64))
    return globe.is_land(lat, np.where(np.abs(lon) > 180, geo.wrap_longitude(lon), lon))


def all_regions(zooms: Sequence[int], max_latitude: float = 60.0) -> np.ndarray:
    """Every region of the zooms with its centre within ±max_latitude, land or sea -> (N, 3) int, sorted."""
    found = [np.zeros((0, 3), dtype=np.int64)]
    for zoom in sorted(set(zooms)):
        start = np.arange(0, 2**zoom - TILES + 1, STEP)
        center = (tile_latitude(zoom, start) + tile_latitude(zoom, start + TILES)) / 2
        rows, cols = np.meshgrid(start[np.abs(center) <= max_latitude], start, indexing="ij")
        found.append(np.stack([np.full(rows.size, zoom), rows.ravel(), cols.ravel()], axis=1))
    return np.concatenate(found)


def land_regions(
    zooms: Sequence[int], max_latitude: float = 60.0, min_land: float = 0.0, samples: int = 16
) -> np.ndarray:
    """Those of all_regions that hold land -> (N, 3) int, sorted.

    A region counts when more than min_land of samples × samples points spread over it are land. Zooms 9, 10, 11 give
    179,985 regions (paper: "roughly 175k"); all but 4 of the 4,238 known ones are among them. Of the 4, three show
    atolls.
    """
    regions = all_regions(zooms, max_latitude)
    offsets = (np.arange(samples) + 0.5) / samples * TILES
    share = np.zeros(len(regions))
    # A row of the grid at a time: its points share their latitudes.
    _, starts = np.unique(regions[:, :2], axis=0, return_index=True)
    for start, end in zip(starts, [*starts[1:], len(regions)]):
        zoom, row, _ = regions[start]
        lats = tile_latitude(zoom, row + offsets)
        lons = tile_longitude(zoom, regions[start:end, 2, None] + offsets).ravel()
        share[start:end] = is_land(lats[:, None], lons[None]).reshape(samples, -1, samples).mean(axis=(0, 2))
    return regions[share > min_land]
