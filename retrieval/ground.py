"""Where the pixels around a place come from: a mosaic of the database's images, or a raster of the whole Earth.

A ground is a function: ground(box, size) -> uint8 (3, size, size), north up, or None where it knows nothing. box:
(west, south, east, north) in metres of Web Mercator (EPSG:3857), as wide as high; it may reach beyond the map's edge
at ±180 degrees, what lies there is taken from the other side. Unknown ground is black.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path

import cv2
import numpy as np
import shapely
import torch

from datasets.images import read_image
from utils import geo

Box = tuple[float, float, float, float]
Ground = Callable[[Box, int], torch.Tensor | None]

AROUND = 2 * geo.MERCATOR_HALF
IMAGE_SIDE = 1024  # pixels of a database image that are kept, at most: the public ones have so many
IMAGES_KEPT = 48  # of 3 MB each at most
COARSE = 64  # cells a side in which is counted what is covered
ENOUGH = 0.995  # share of a box, beyond which no further image is read
MOST_IMAGES = 12  # in a mosaic


class DatabaseGround:
    """Images with footprints, such as a data set's database.

    paths: of N images under root. footprints (N, 4, 2) degrees, of which the box in Web Mercator counts: database
    images are north up. Of those that meet a box, the ones about as wide as it come first, finer before coarser, and
    the others fill in what is left. An image that cannot be read is left out.
    """

    def __init__(self, root: str | Path, paths: Sequence, footprints: np.ndarray) -> None:
        self.root, self.paths = Path(root), paths
        corners = geo.to_mercator(geo.unwrap_footprints(footprints))
        self.boxes = np.concatenate([corners.min(axis=1), corners.max(axis=1)], axis=1)  # (N, 4)
        self.tree = shapely.STRtree(shapely.box(*self.boxes.T))
        self.read = lru_cache(IMAGES_KEPT)(self._read)

    def __call__(self, box: Box, size: int = 512) -> torch.Tensor | None:
        rows, shifts = self.meeting(box)
        if not len(rows):
            return None
        boxes = self.boxes[rows] + np.stack([shifts, 0 * shifts] * 2, axis=1)
        out, covered = np.zeros((size, size, 3), dtype=np.uint8), np.zeros((size, size), dtype=bool)
        for chosen in cover(box, boxes):
            pixels = self.read(int(rows[chosen]), wanted_side(box, boxes[chosen], size))
            if pixels is not None:
                paste(out, covered, pixels, boxes[chosen], box)
        return torch.from_numpy(out).permute(2, 0, 1).contiguous() if covered.any() else None

    def meeting(self, box: Box) -> tuple[np.ndarray, np.ndarray]:
        """-> rows (M,) of the images that share ground with the box, and by how many metres each is to be moved east:
        whole turns around the Earth."""
        found = [
            (self.tree.query(shapely.box(box[0] - turn, box[1], box[2] - turn, box[3])), turn)
            for turn in (-AROUND, 0.0, AROUND)
        ]
        rows = np.concatenate([rows for rows, _ in found]).astype(np.int64)
        shifts = np.concatenate([np.full(len(rows), turn) for rows, turn in found])
        order = np.lexsort((shifts, rows))  # a tree's order is its own
        return rows[order], shifts[order]

    def _read(self, row: int, side: int):
        try:
            return read_image(self.root / self.paths[row], side).permute(1, 2, 0).numpy()
        except (ValueError, OSError):
            return None


def wanted_side(box: Box, own: Box, size: int) -> int:
    """Pixels a side that an image with the box `own` needs to fill a mosaic of size × size: a power of two."""
    pixels = size * (own[2] - own[0]) / (box[2] - box[0])
    return int(np.clip(2 ** np.ceil(np.log2(max(pixels, 1) / 1.2)), 32, IMAGE_SIDE))


def cover(box: Box, boxes: np.ndarray, cells: int = COARSE) -> list[int]:
    """box (4,), boxes (N, 4) -> rows of the boxes that together cover what can be, the best first.

    Each time, the one that adds the largest share, times how well it fits: 1 for an image as wide as the box, less by
    half for each octave that it is finer, by two thirds for each that it is coarser.
    """
    west, south, east, north = box
    octaves = np.log2((boxes[:, 2] - boxes[:, 0]) / (east - west))
    fit = np.where(octaves > 0, 3.0 ** -np.abs(octaves), 2.0 ** -np.abs(octaves))
    middles = (np.arange(cells) + 0.5) / cells
    x, y = west + middles * (east - west), north - middles * (north - south)
    across = (boxes[:, :1] <= x) & (x < boxes[:, 2:3])
    down = (boxes[:, 1:2] < y) & (y <= boxes[:, 3:4])
    left, chosen = np.ones((cells, cells), dtype=np.float32), []
    while left.mean() > 1 - ENOUGH and len(chosen) < MOST_IMAGES:
        gain = ((down.astype(np.float32) @ left) * across).sum(axis=1) * fit
        best = int(gain.argmax())
        if gain[best] <= 0:
            break
        chosen.append(best)
        left[np.ix_(down[best], across[best])] = 0
    return chosen


def paste(out: np.ndarray, covered: np.ndarray, pixels: np.ndarray, own: Box, box: Box) -> None:
    """Draws an image (h, w, 3) with the box `own` into a mosaic (size, size, 3) of `box`, where nothing is yet."""
    size = len(out)
    scale = size / (box[2] - box[0])
    left, right = ((own[k] - box[0]) * scale for k in (0, 2))
    top, bottom = ((box[3] - own[k]) * scale for k in (3, 1))
    first, last = np.clip([np.ceil(left - 0.5), np.ceil(right - 0.5)], 0, size).astype(int)
    upper, lower = np.clip([np.ceil(top - 0.5), np.ceil(bottom - 0.5)], 0, size).astype(int)
    if first >= last or upper >= lower:
        return
    height, width = pixels.shape[:2]
    x = (np.arange(first, last) + 0.5 - left) * (width / (right - left)) - 0.5
    y = (np.arange(upper, lower) + 0.5 - top) * (height / (bottom - top)) - 0.5
    maps = np.meshgrid(x.astype(np.float32), y.astype(np.float32))
    drawn = cv2.remap(pixels, *maps, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
    place = (slice(upper, lower), slice(first, last))
    new = ~covered[place]
    out[place][new] = drawn[new]
    covered[place] = True


class RasterGround:
    """A raster in Web Mercator (EPSG:3857), three bands of uint8, such as NASA's Blue Marble; read by windows.

    Where it ends, the ground is black; where it goes around the Earth, a box over the antimeridian is in one piece.
    Raises ValueError or FileNotFoundError where the file is none.
    """

    def __init__(self, path: str | Path) -> None:
        from datasets.build.earth import open_raster

        self.source, self.around = open_raster(path)

    def __call__(self, box: Box, size: int = 512) -> torch.Tensor | None:
        pixel, corner = self.source.transform.a, self.source.transform
        west, east = (box[0] - corner.c) / pixel, (box[2] - corner.c) / pixel
        north, south = (corner.f - box[3]) / pixel, (corner.f - box[1]) / pixel
        # What the file is read at: about the mosaic's own resolution, so that nothing aliases and little is read.
        step = 2 ** int(np.log2(max(1, (east - west) / size)))
        while self.around % step:  # the pieces on either side of the antimeridian have to meet
            step //= 2
        left, top = int(np.floor(west / step)) * step, int(np.floor(north / step)) * step
        columns, rows = int(np.ceil((east - left) / step)) + 1, int(np.ceil((south - top) / step)) + 1
        pixels = self.window(left, top, columns, rows, step)
        if not pixels.any():
            return None
        scale = (east - west) / size / step  # pixels read for one of the mosaic
        steps = (np.arange(size) + 0.5) * scale - 0.5
        maps = np.meshgrid(
            (steps + (west - left) / step).astype(np.float32), (steps + (north - top) / step).astype(np.float32)
        )
        drawn = cv2.remap(pixels, *maps, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
        return torch.from_numpy(drawn).permute(2, 0, 1).contiguous()

    def window(self, left: int, top: int, columns: int, rows: int, step: int) -> np.ndarray:
        """-> uint8 (rows, columns, 3), each pixel the mean of step × step of the file's from (left, top) on."""
        out = np.zeros((rows, columns, 3), dtype=np.uint8)
        upper, lower = max(0, -(top // step)), min(rows, (self.source.height - top) // step)
        if lower <= upper:
            return out
        done = 0
        while done < columns:  # piece by piece around the Earth
            begin = (left + done * step) % self.around
            count = min(columns - done, (self.around - begin) // step)
            known = min(count, (self.source.width - begin) // step)
            if known > 0:
                window = ((top + upper * step, top + lower * step), (begin, begin + known * step))
                out[upper:lower, done : done + known] = self.mean(window, (lower - upper, known))
            done += count
        return out

    def mean(self, window: tuple, shape: tuple[int, int]) -> np.ndarray:
        from rasterio.enums import Resampling
        from rasterio.windows import Window

        return self.source.read(
            [1, 2, 3], window=Window.from_slices(*window), out_shape=(3, *shape), resampling=Resampling.average
        ).transpose(1, 2, 0)
