"""World maps with places on them, the Blue Marble as background: equirectangular, or any box of Web Mercator."""

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from threading import Lock

import numpy as np
from PIL import Image, ImageDraw, ImageEnhance, ImageFont

from utils import figures
from utils.geo import from_mercator

BLUE_MARBLE = Path(__file__).resolve().parent.parent / "datasets" / "build" / "blue_marble"
BACKGROUND, FINE = BLUE_MARBLE / "bmng_august_2048.jpg", BLUE_MARBLE / "bmng_5400.jpg"
READING = Lock()
YELLOW = (255, 215, 60)


def to_pixel(point: Sequence[float], width: int) -> tuple[float, float]:
    """(lat, lon) degrees -> (x, y) on a map of width × width / 2 pixels, 180 W to 180 E and 90 N to 90 S."""
    lat, lon = point
    return (lon + 180) / 360 * width, (90 - lat) / 180 * width / 2


def candidates_map(candidates: Sequence, labels: Sequence[str] = (), title: str = "", width: int = 1440) -> Image.Image:
    """Places (K, 2) degrees, best first, and a text for each -> PIL image. The first is red, the others yellow."""
    sheet = _background(width)
    for rank in reversed(range(len(candidates))):  # the best one on top
        _place(sheet, candidates[rank], YELLOW if rank else figures.RED, labels[rank] if rank < len(labels) else "")
    if title:
        _text(sheet, (10, 20), title, "lm")
    return sheet


def errors_map(truth: np.ndarray, predicted: np.ndarray, width: int = 1440) -> Image.Image:
    """(N, 2), (N, 2) degrees -> PIL image: each photo's true place (green), joined to where it was put (red)."""
    sheet = _background(width)
    draw = ImageDraw.Draw(sheet)
    for start, end in zip(truth, predicted):
        for line in short_lines(to_pixel(start, width), to_pixel(end, width), width):
            draw.line(line, fill=figures.WHITE, width=1)
    for points, colour in ((predicted, figures.RED), (truth, figures.GREEN)):
        for point in points:
            _place(sheet, point, colour, radius=3)
    return sheet


def short_lines(start: tuple, end: tuple, width: int) -> list[list[tuple]]:
    """Two pixels -> the lines between them, the short way round: two where that way crosses the map's edge."""
    (x0, y0), (x1, y1) = start, end
    turn = -width if x1 - x0 > width / 2 else width if x0 - x1 > width / 2 else 0
    shifts = (0, -turn) if turn else (0,)
    return [[(x0 + shift, y0), (x1 + turn + shift, y1)] for shift in shifts]


def mercator_view(box: tuple, columns: int, rows: int) -> np.ndarray:
    """Box (west, south, east, north) of Web Mercator, metres -> uint8 (rows, columns, 3) of the Blue Marble, bilinear.

    It has 7.4 km a pixel: what is finer than that comes out blurred. Longitudes may pass ±180.
    """
    west, south, east, north = box
    x = west + (np.arange(columns) + 0.5) / columns * (east - west)
    y = north - (np.arange(rows) + 0.5) / rows * (north - south)
    longitude = from_mercator(np.stack([x, np.zeros_like(x)], axis=1))[:, 1]
    latitude = from_mercator(np.stack([np.zeros_like(y), y], axis=1))[:, 0]
    step = (longitude[-1] - longitude[0]) / max(columns - 1, 1)
    world = _world(next((factor for factor in (16, 8, 4, 2) if step * 15 >= factor), 1))  # 15 pixels a degree
    height, width = world.shape[:2]
    place = (90 - latitude) / 180 * height - 0.5
    above = np.floor(place).astype(int)
    share = (place - above)[:, None, None]
    lines = world[above.clip(0, height - 1)] * (1 - share) + world[(above + 1).clip(0, height - 1)] * share
    place = (longitude + 180) / 360 * width - 0.5
    left = np.floor(place).astype(int)
    share = (place - left)[:, None]
    return np.rint(lines[:, left % width] * (1 - share) + lines[:, (left + 1) % width] * share).astype(np.uint8)


def _world(factor: int) -> np.ndarray:
    """The Blue Marble, averaged over factor × factor pixels -> uint8 (H, W, 3)."""
    with READING:  # of threads that draw at once, one reads it
        return _read_world(factor)


@lru_cache(maxsize=5)
def _read_world(factor: int) -> np.ndarray:
    with Image.open(FINE) as image:
        return np.asarray(image.convert("RGB").reduce(factor))


def _background(width: int):
    with Image.open(BACKGROUND) as image:
        return ImageEnhance.Brightness(image.convert("RGB").resize((width, width // 2))).enhance(0.8)


def _place(sheet: Image.Image, point: Sequence[float], colour: tuple, label: str = "", radius: int = 6):
    x, y = to_pixel(point, sheet.width)
    ImageDraw.Draw(sheet).ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour, outline=figures.WHITE)
    if label:
        fits = x + 10 + ImageFont.load_default(14).getlength(label) < sheet.width
        _text(sheet, (x + 10 if fits else x - 10, y), label, "lm" if fits else "rm")


def _text(sheet: Image.Image, place: tuple, text: str, anchor: str):
    ImageDraw.Draw(sheet).text(
        place,
        text,
        fill=figures.WHITE,
        font=ImageFont.load_default(14),
        anchor=anchor,
        stroke_width=2,
        stroke_fill=figures.BLACK,
    )
