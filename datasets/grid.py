"""The Web Mercator grid of regions: zoom/row/col <-> footprint <-> name, and which regions hold land.

A region is TILES × TILES map tiles; rows and columns step by STEP tiles, so neighbours overlap by half (paper,
sec. 3.2).
"""

import numpy as np

from datasets.names import ImageName
from utils import geo

TILES = 4
STEP = 2
AREA_RADIUS_KM = 6378.137  # the equatorial radius: the one with which the public names' areas were computed


def tile_latitude(zoom, row):
    """Latitude in degrees of the upper edge of a row of tiles; broadcasts."""
    return np.degrees(np.arctan(np.sinh(np.pi * (1 - 2 * np.asarray(row) / 2.0 ** np.asarray(zoom)))))


def tile_longitude(zoom, col):
    """Longitude in degrees of the left edge of a column of tiles; broadcasts."""
    return np.asarray(col) / 2.0 ** np.asarray(zoom) * 360 - 180


def footprints(regions):
    """(N, 3) int rows of zoom, row, col -> (N, 4, 2) corners BL, TL, TR, BR, rounded to the names' five decimals."""
    zoom, row, col = np.asarray(regions).reshape(-1, 3).T
    top, bottom = tile_latitude(zoom, row), tile_latitude(zoom, row + TILES)
    left, right = tile_longitude(zoom, col), tile_longitude(zoom, col + TILES)
    corners = [(bottom, left), (top, left), (top, right), (bottom, right)]
    return np.round(np.stack([np.stack(corner, axis=-1) for corner in corners], axis=1), 5)


def quadrilateral_area(footprint):
    """(..., 4, 2) degrees -> (...) km², on a sphere of the equatorial radius, edges straight in (lon, sin lat).

    Exact for map-aligned rectangles; this is the area that the public names hold.
    """
    lat, lon = np.radians(np.moveaxis(np.asarray(footprint, dtype=np.float64), -1, 0))
    span = np.roll(lon, -1, axis=-1) - np.roll(lon, 1, axis=-1)
    return np.abs((span * np.sin(lat)).sum(axis=-1)) * AREA_RADIUS_KM**2 / 2


def name_area(footprints):
    """(..., 4, 2) corners as the names write them -> (...) int km², the area that the public names hold.

    Those were computed from corners in single precision and cut, not rounded: with it all 4,238 known names come out,
    in double precision 98 of them are off by one.
    """
    return np.trunc(quadrilateral_area(np.asarray(footprints, dtype=np.float32))).astype(np.int64)


def image_name(zoom, row, col, year):
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


def image_path(zoom, row, col, year):
    """Region and year -> path relative to the data set: database/{year}_{zoom}/{lat10}_{lon10}/@…@.jpg."""
    name = image_name(zoom, row, col, year)
    lat10, lon10 = (round(value / 10) * 10 for value in name.nadir)
    return f"database/{year:04d}_{zoom:02d}/{lat10}_{lon10}/{name}"


def is_land(lat, lon):
    """Degrees, broadcast -> bool: the one land rule (global-land-mask, a grid of 1 km; lakes count as land).

    Any longitude will do. It knows no islands smaller than its cells, so some atolls of the public data set are sea.
    """
    from global_land_mask import globe  # loads a mask of 1 GB, so only where it is used

    lat, lon = np.broadcast_arrays(np.asarray(lat, dtype=np.float64), np.asarray(lon, dtype=np.float64))
    return globe.is_land(lat, np.where(np.abs(lon) > 180, geo.wrap_longitude(lon), lon))


def land_regions(zooms, max_latitude=60.0, min_land=0.0, samples=16):
    """All regions of the zooms that hold land and whose centre is within ±max_latitude -> (N, 3) int, sorted.

    A region counts when more than min_land of samples × samples points spread over it are land. Zooms 9, 10, 11 give
    179,985 regions (paper: "roughly 175k"); all but 4 of the 4,238 known ones are among them. Of the 4, three show
    atolls.
    """
    found = []
    for zoom in zooms:
        count = 2**zoom
        rows = np.arange(0, count - TILES + 1, STEP)
        center = (tile_latitude(zoom, rows) + tile_latitude(zoom, rows + TILES)) / 2
        rows = rows[np.abs(center) <= max_latitude]
        cols = np.arange(0, count - TILES + 1, STEP)
        offsets = (np.arange(samples) + 0.5) / samples * TILES
        lons = tile_longitude(zoom, cols[:, None] + offsets).ravel()
        for row in rows:
            lats = tile_latitude(zoom, row + offsets)
            land = is_land(lats[:, None], lons[None]).reshape(samples, len(cols), samples)
            found += [(zoom, row, col) for col in cols[land.mean(axis=(0, 2)) > min_land]]
    return np.array(sorted(found), dtype=np.int64).reshape(-1, 3)
