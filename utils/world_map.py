"""World maps with places on them: equirectangular, the Blue Marble as background."""

from pathlib import Path

from PIL import Image, ImageDraw, ImageEnhance, ImageFont

from utils import figures

BACKGROUND = Path(__file__).resolve().parent.parent / "datasets" / "build" / "blue_marble" / "bmng_august_2048.jpg"
YELLOW = (255, 215, 60)


def to_pixel(point, width):
    """(lat, lon) degrees -> (x, y) on a map of width × width / 2 pixels, 180 W to 180 E and 90 N to 90 S."""
    lat, lon = point
    return (lon + 180) / 360 * width, (90 - lat) / 180 * width / 2


def candidates_map(candidates, labels=(), title="", width=1440):
    """Places (K, 2) degrees, best first, and a text for each -> PIL image. The first is red, the others yellow."""
    sheet = _background(width)
    for rank in reversed(range(len(candidates))):  # the best one on top
        _place(sheet, candidates[rank], YELLOW if rank else figures.RED, labels[rank] if rank < len(labels) else "")
    if title:
        _text(sheet, (10, 20), title, "lm")
    return sheet


def errors_map(truth, predicted, width=1440):
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


def short_lines(start, end, width):
    """Two pixels -> the lines between them, the short way round: two where that way crosses the map's edge."""
    (x0, y0), (x1, y1) = start, end
    turn = -width if x1 - x0 > width / 2 else width if x0 - x1 > width / 2 else 0
    shifts = (0, -turn) if turn else (0,)
    return [[(x0 + shift, y0), (x1 + turn + shift, y1)] for shift in shifts]


def _background(width):
    with Image.open(BACKGROUND) as image:
        return ImageEnhance.Brightness(image.convert("RGB").resize((width, width // 2))).enhance(0.8)


def _place(sheet, point, colour, label="", radius=6):
    x, y = to_pixel(point, sheet.width)
    ImageDraw.Draw(sheet).ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour, outline=figures.WHITE)
    if label:
        fits = x + 10 + ImageFont.load_default(14).getlength(label) < sheet.width
        _text(sheet, (x + 10 if fits else x - 10, y), label, "lm" if fits else "rm")


def _text(sheet, place, text, anchor):
    ImageDraw.Draw(sheet).text(
        place,
        text,
        fill=figures.WHITE,
        font=ImageFont.load_default(14),
        anchor=anchor,
        stroke_width=2,
        stroke_fill=figures.BLACK,
    )
