"""Pictures: a batch after augmentation, clusters, queries with their predictions, recall over iterations."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

WHITE, BLACK = (255, 255, 255), (0, 0, 0)
GREEN, RED = (30, 160, 60), (210, 40, 40)


def save(image: Image.Image, path: str | Path) -> None:
    """PIL image -> file, in a folder that is made if it is missing. The suffix picks the format."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    image.save(path, quality=90)


def to_picture(image: Tensor | np.ndarray, size: int) -> Image.Image:
    """(3, H, W) uint8, or float in [0, 1] -> PIL image, size × size."""
    image = torch.as_tensor(image)
    if image.is_floating_point():
        image = (image.float().clamp(0, 1) * 255).round()
    pixels = image.to(torch.uint8).permute(1, 2, 0).cpu().numpy()
    return Image.fromarray(pixels).resize((size, size), Image.Resampling.BILINEAR)


def mosaic(
    cells: list[list],
    size: int = 128,
    gap: int = 4,
    column_titles: Sequence = (),
    row_titles: Sequence = (),
    captions: list[list] | None = None,
    frames: list[list] | None = None,
    wide_gap_after: Sequence[int] = (),
) -> Image.Image:
    """Rows of (3, H, W) images (None: an empty cell) -> PIL image.

    For each cell: captions, a text over its lower edge, and frames, a colour drawn in the gap around it; or None.
    wide_gap_after: columns that are followed by more space.
    """
    columns = max((len(row) for row in cells), default=0)
    lines = [str(title).split("\n") for title in row_titles]
    left = gap + (max((_width(text) for title in lines for text in title), default=0) + 2 * gap if lines else 0)
    top = gap + (22 if column_titles else 0)
    starts = [
        left + column * (size + gap) + sum(4 * gap for wide in wide_gap_after if wide < column)
        for column in range(columns)
    ]
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
                draw.rectangle(
                    (starts[j] - edge, y - edge, starts[j] + size + edge - 1, y + size + edge - 1), fill=frame
                )
            sheet.paste(to_picture(cell, size), (starts[j], y))
            text = captions[i][j] if captions else None
            if text:
                draw.rectangle((starts[j], y + size - 18, starts[j] + _width(text) + 8, y + size - 1), fill=WHITE)
                draw.text((starts[j] + 4, y + size - 9), str(text), fill=BLACK, font=_font(), anchor="lm")
    return sheet


def batch_figure(views: Tensor | np.ndarray, years: Sequence = (), size: int = 128) -> Image.Image:
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


def clusters_figure(clusters: Sequence[Sequence], titles: Sequence = (), size: int = 128) -> Image.Image:
    """One cluster a row (paper, Fig. 14): a list of lists of (3, H, W) images -> PIL image."""
    return mosaic([list(cluster) for cluster in clusters], size, row_titles=titles)


def predictions_figure(rows: Sequence[tuple], size: int = 160, groups: int = 2) -> Image.Image:
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
        for query, found, title in rows[start : start + groups]:
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


def curve_figure(curves: dict[str, list[tuple]], x_title: str = "iteration", y_title: str = "R@1") -> Figure:
    """{name: [(x, y), …]} -> matplotlib Figure of lines over axes from 0. Raises ValueError without a point."""
    if not any(np.isfinite(point).all() for curve in curves.values() for point in curve):
        raise ValueError("curve_figure: no points to draw")
    figure = Figure(figsize=(7.2, 4.4), layout="constrained")
    axes = figure.subplots()
    for name, curve in curves.items():
        axes.plot(*zip(*sorted(curve)), marker="o", markersize=4, label=name)
    axes.set(xlabel=x_title, ylabel=y_title, xlim=(0, None), ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False)
    return figure


def _font(size: int = 14):
    return ImageFont.load_default(size)


def _width(text: object):
    return int(_font().getlength(str(text)))
