"""Pictures: a batch after augmentation, clusters, queries with their predictions, recall over iterations."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from datasets.images import read_image
from utils.retrieval import rotate

WHITE, BLACK, GREY = (255, 255, 255), (0, 0, 0), (120, 120, 120)
GREEN, RED, BLUE = (30, 160, 60), (210, 40, 40), (40, 90, 200)


def save(image, path):
    """PIL image -> file, in a folder that is made if it is missing. The suffix picks the format."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    image.save(path, quality=90)


def to_picture(image, size):
    """(3, H, W) uint8, or float in [0, 1] -> PIL image, size × size."""
    image = torch.as_tensor(image)
    if image.is_floating_point():
        image = (image.float().clamp(0, 1) * 255).round()
    pixels = image.to(torch.uint8).permute(1, 2, 0).cpu().numpy()
    return Image.fromarray(pixels).resize((size, size), Image.Resampling.BILINEAR)


def mosaic(cells, size=128, gap=4, column_titles=(), row_titles=(), captions=None, frames=None, wide_gap_after=()):
    """Rows of (3, H, W) images (None: an empty cell) -> PIL image.

    For each cell: captions, a text over its lower edge, and frames, a colour drawn in the gap around it; or None.
    wide_gap_after: columns that are followed by more space.
    """
    columns = max((len(row) for row in cells), default=0)
    lines = [str(title).split("\n") for title in row_titles]
    left = gap + (max((_width(text) for title in lines for text in title), default=0) + 2 * gap if lines else 0)
    top = gap + (22 if column_titles else 0)
    starts = [left + column * (size + gap) + sum(4 * gap for wide in wide_gap_after if wide < column)
              for column in range(columns)]
    sheet = Image.new("RGB", ((starts[-1] if starts else left) + size + gap, top + len(cells) * (size + gap)), WHITE)
    draw = ImageDraw.Draw(sheet)
    for x, title in zip(starts, column_titles):
        draw.text((x + size / 2, top - gap - 2), str(title), fill=BLACK, font=_font(), anchor="ms")
    for i, row in enumerate(cells):
        y = top + i * (size + gap)
        if lines:
            draw.multiline_text((gap, y + size / 2), "\n".join(lines[i]), fill=BLACK, font=_font(), anchor="lm")
        for j, cell in enumerate(row):
            if cell is None:
                continue
            frame = frames[i][j] if frames else None
            if frame:
                edge = gap // 2 - 1
                draw.rectangle((starts[j] - edge, y - edge, starts[j] + size + edge - 1, y + size + edge - 1),
                               fill=frame)
            sheet.paste(to_picture(cell, size), (starts[j], y))
            text = captions[i][j] if captions else None
            if text:
                draw.rectangle((starts[j], y + size - 18, starts[j] + _width(text) + 8, y + size - 1), fill=WHITE)
                draw.text((starts[j] + 4, y + size - 9), str(text), fill=BLACK, font=_font(), anchor="lm")
    return sheet


def batch_figure(views, years=(), size=128):
    """A batch as the model sees it (paper, Fig. 15): views (R, Y, 3, H, W) -> PIL image, two regions a row.

    Each half row is one region's quadruplet, each column one year with its shared augmentation.
    """
    views = torch.as_tensor(views)
    regions, count = views.shape[:2]
    halves = [list(region) for region in views]
    if regions % 2:
        halves.append([None] * count)
    rows = [halves[i] + halves[i + 1] for i in range(0, len(halves), 2)]
    return mosaic(rows, size, column_titles=list(years) * 2, wide_gap_after=(count - 1,))


def clusters_figure(clusters, titles=(), size=128):
    """One cluster a row (paper, Fig. 14): a list of lists of (3, H, W) images -> PIL image."""
    return mosaic([list(cluster) for cluster in clusters], size, row_titles=titles)


def predictions_figure(rows, size=160, groups=2):
    """Queries and what was found (paper, Figs. 7 and 13) -> PIL image.

    rows: a list of (query image, [(image, correct), …], title), images (3, H, W) and already turned as they matched;
    green frames are right, red ones wrong. groups: examples side by side.
    """
    if not rows:
        raise ValueError("predictions_figure: no queries to draw")
    depth = max(len(found) for _, found, _ in rows)
    cells, frames, captions = [], [], []
    for start in range(0, len(rows), groups):
        line, colours, texts = [], [], []
        for query, found, title in rows[start:start + groups]:
            empty = [None] * (depth - len(found))
            line += [query, *(image for image, _ in found), *empty]
            colours += [None, *(GREEN if correct else RED for _, correct in found), *empty]
            texts += [title] + [None] * depth
        cells.append(line)
        frames.append(colours)
        captions.append(texts)
    titles = (["query", *(f"prediction {rank + 1}" for rank in range(depth))]) * min(groups, len(rows))
    wide = [group * (depth + 1) - 1 for group in range(1, groups)]
    return mosaic(cells, size, gap=10, column_titles=titles, captions=captions, frames=frames, wide_gap_after=wide)


def evaluation_figure(evaluation, queries_per_set=4, depth=3, size=160, seed=0):
    """An Evaluation -> predictions_figure of a few queries of each test set, drawn by seed, not chosen.

    None where there is no set to draw from.
    """
    data, generator, rows = evaluation.data, np.random.default_rng(seed), []
    for result in evaluation.test_results:
        images, count = result.database_images, len(result.set.query_rows)
        for q in sorted(generator.choice(count, min(queries_per_set, count), replace=False)):
            found = [(rotate(read_image(data.database.root / data.database.paths[image], size),
                             int(result.rotations[q, rank])), bool(result.correct[q, rank]))
                     for rank, image in enumerate(images[q, :depth]) if image >= 0]
            query = read_image(data.queries.root / data.queries.paths[result.set.query_rows[q]], size)
            rows.append((query, found, result.set.name))
    return predictions_figure(rows, size) if rows else None


def curve_figure(curves, x_title="iteration", y_title="R@1", size=(720, 440)):
    """{name: [(x, y), …]} -> PIL image of lines over round axes; y starts at 0."""
    colours = (BLUE, RED, GREEN, (200, 130, 20), (130, 60, 160), (20, 150, 160), GREY)
    points = [point for curve in curves.values() for point in curve if np.isfinite(point).all()]
    if not points:
        raise ValueError("curve_figure: no points to draw")
    x_ticks = _ticks(0, max(x for x, _ in points))
    y_ticks = _ticks(min(0, min(y for _, y in points)), max(y for _, y in points))
    width, height = size
    legend = 44 + max(_width(name) for name in curves)
    left, right, top, bottom = 64, width - 24 - legend, 24, height - 48

    def place(x, y):
        return (left + (right - left) * (x - x_ticks[0]) / (x_ticks[-1] - x_ticks[0]),
                bottom - (bottom - top) * (y - y_ticks[0]) / (y_ticks[-1] - y_ticks[0]))

    scale = 2  # drawn at twice the size and reduced: PIL's lines are not antialiased
    sheet = Image.new("RGB", (width * scale, height * scale), WHITE)
    draw = ImageDraw.Draw(sheet)

    def scaled(*pairs):
        return [(x * scale, y * scale) for x, y in pairs]

    for y in y_ticks:
        draw.line(scaled(place(x_ticks[0], y), place(x_ticks[-1], y)), fill=(225, 225, 225), width=scale)
        draw.text(scaled((left - 8, place(0, y)[1]))[0], f"{y:g}", fill=BLACK, font=_font(13 * scale), anchor="rm")
    for x in x_ticks:
        draw.text(scaled((place(x, 0)[0], bottom + 8))[0], f"{x:g}", fill=BLACK, font=_font(13 * scale), anchor="ma")
    draw.line(scaled((left, top), (left, bottom), (right, bottom)), fill=BLACK, width=scale)
    draw.text(scaled(((left + right) / 2, height - 22))[0], x_title, fill=BLACK, font=_font(13 * scale), anchor="ma")
    draw.text(scaled((8, 4))[0], y_title, fill=BLACK, font=_font(13 * scale))
    for i, (name, curve) in enumerate(curves.items()):
        colour = colours[i % len(colours)]
        finite = [place(x, y) for x, y in sorted(curve) if np.isfinite([x, y]).all()]
        if len(finite) > 1:
            draw.line(scaled(*finite), fill=colour, width=2 * scale, joint="curve")
        for x, y in scaled(*finite):
            draw.ellipse((x - 3 * scale, y - 3 * scale, x + 3 * scale, y + 3 * scale), fill=colour)
        y = top + 10 + 20 * i
        draw.line(scaled((right + 24, y), (right + 44, y)), fill=colour, width=3 * scale)
        draw.text(scaled((right + 50, y))[0], str(name), fill=BLACK, font=_font(13 * scale), anchor="lm")
    return sheet.resize(size, Image.Resampling.LANCZOS)


def _ticks(low, high, count=5):
    """Round steps (1, 2 or 5 times a power of ten) that cover low … high."""
    span = max(high - low, 1e-9)
    step = 10 ** np.floor(np.log10(span / count))
    step *= next(factor for factor in (1, 2, 5, 10) if span / (step * factor) <= count)
    return step * np.arange(np.floor(low / step), np.ceil(high / step - 1e-9) + 1)


def _font(size=14):
    return ImageFont.load_default(size)


def _width(text):
    return int(_font().getlength(str(text)))
