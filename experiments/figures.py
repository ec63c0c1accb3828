"""Pictures of what eval.py found: python -m experiments.figures FOLDER …

FOLDER is an evaluation's, logs/LOG_DIR/DATE_TIME. Several are the same recipe with other seeds: recalls are then their
mean, bars and ± the standard deviation over them; of one folder they are that of drawing so many photos. All six sets
are taken together, each photo as often as it is in one; validation is left out. What is drawn, see --only:

conditions: R@1 by the distance from the nadir (paper, Fig. 8: drops beyond 400 km), by area (Fig. 9: drops as the area
grows; of both it prints no numbers) and, where conditions.csv knows them, by the camera's tilt and by clouds. Each
point stands for as many photos as the others. The numbers are printed.
map: R@1 where the photos are, in cells of 5 degrees; larger dots are more photos.
tsne: descriptors of some photos and database images, north up, in two dimensions (Fig. 10).
queries, database: some of them, drawn by chance (Figs. 11 and 12).
examples: photos that were found on the left, others on the right, drawn by chance (Figs. 7 and 13).

Figs. 14 and 15 are clusters.jpg and batch.jpg, which train.py leaves in its folder.
"""

import csv
import json
from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Annotated, TypeVar

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter
from PIL import Image

from datasets.conditions import CONDITIONS_FILE, read_conditions
from datasets.images import read_image
from datasets.names import Catalogue
from datasets.sets import VALIDATION, read_database
from experiments.runs import mean_and_deviation
from models.earthloc import EarthLoc, load_model
from retrieval.describe import Describer, rotate
from utils import figures as pictures
from utils import geo, world_map
from utils.arguments import positive, whole
from utils.flags import DEVICE, Device, command
from utils.precision import default_precision, require_device

T = TypeVar("T")
Predictions = dict[tuple[str, str], list[tuple[str, int, bool]]]  # as read_predictions says

AREA = "area, km²"
BINS, PHOTOS_A_BIN = 10, 20  # at most, at least
CELL = 5  # degrees, of the map
FIGURES = ("conditions", "map", "tsne", "queries", "database", "examples")
SIZE = 128  # pixels of a picture among others
FOUND, LOST = "tab:blue", "tab:red"


# ---- what eval.py left ----


def read_predictions(folder: str | Path) -> Predictions:
    """An evaluation's folder -> {(set, query): [(database image, rotation, correct), …]}, best first, no validation.

    FileNotFoundError where it holds no predictions.csv.
    """
    path, found = Path(folder) / "predictions.csv", {}
    if not path.exists():
        raise FileNotFoundError(
            f"{path}: no such file; give the folder of an evaluation, as eval.py names it at its end"
        )
    with open(path, newline="") as file:
        for row in csv.DictReader(file):
            if row["set"] != VALIDATION:
                entry = row["database_image"], int(row["rotation"]), row["correct"] == "1"
                found.setdefault((row["set"], row["query"]), []).append(entry)
    if not found:
        raise ValueError(f"{path}: holds no photo of the six sets")
    return found


def read_seeds(folders: Sequence[str | Path]) -> tuple[dict, Predictions, np.ndarray]:
    """-> what results.json of the first holds, its predictions, and (seeds, N) bool: whether each photo was found.

    ValueError where the folders are not of the same photos.
    """
    results = [json.loads((Path(folder) / "results.json").read_text()) for folder in folders]
    all_found = [read_predictions(folder) for folder in folders]
    for folder, found in zip(folders, all_found):
        if found.keys() != all_found[0].keys():
            raise ValueError(f"{folder}: evaluated on other photos than {folders[0]}; seeds share one data set")
    right = np.array([[found[key][0][2] for key in all_found[0]] for found in all_found])
    return results[0], all_found[0], right


def photo_conditions(photos: Catalogue) -> dict[str, np.ndarray]:
    """Catalogue of queries -> {axis title: (N,) values, NaN where unknown}; conditions that nothing is known of are
    left out."""
    known = read_conditions(photos.root)
    values = {
        "distance from nadir, km": geo.distance_km(photos.nadirs, photos.centers),
        AREA: photos.areas.astype(float),
    }
    for name, title in (("tilt", "tilt, degrees"), ("clouds", "under clouds, %")):
        column = np.array([known[name].get(photo, np.nan) for photo in photos.ids])
        if np.isfinite(column).any():
            values[title] = column
    return values


# ---- recall by a condition ----


def recall_by(
    values: np.ndarray, right: np.ndarray, bins: int = BINS
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """values (N,), NaN for unknown; right (S, N) bool of S seeds -> edges (B + 1,), counts (B,), medians (B,), recalls
    (S, B) percent. Bins hold equally many photos, as far as equal values let them."""
    known = np.isfinite(values)
    values, right = values[known], right[:, known]
    count = max(1, min(bins, len(values) // PHOTOS_A_BIN))
    edges = np.unique(np.quantile(values, np.linspace(0, 1, count + 1)))
    edges = edges if len(edges) > 1 else np.repeat(edges, 2)
    which = np.clip(np.searchsorted(edges, values, side="right") - 1, 0, len(edges) - 2)
    members = [which == each for each in range(len(edges) - 1)]
    medians = np.array([np.median(values[each]) for each in members])
    recalls = 100 * np.stack([right[:, each].mean(axis=1) for each in members], axis=1)
    return edges, np.array([each.sum() for each in members]), medians, recalls


def deviations(recalls: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """(S, B) percent, (B,) -> (B,): over the seeds, or of one seed that of drawing so many photos."""
    return recalls.std(axis=0, ddof=1) if len(recalls) > 1 else np.sqrt(recalls[0] * (100 - recalls[0]) / counts)


def conditions_table(title: str, edges: np.ndarray, counts: np.ndarray, recalls: np.ndarray) -> list[str]:
    """recall_by's -> lines of markdown."""
    spread = deviations(recalls, counts)
    return [f"| {title} | photos | R@1 |", "| --- | --- | --- |"] + [
        f"| {low:,.0f} to {high:,.0f} | {count} | {mean:.1f} ± {deviation:.1f} |"
        for low, high, count, mean, deviation in zip(edges, edges[1:], counts, recalls.mean(axis=0), spread)
    ]


def conditions_figure(values: dict[str, np.ndarray], right: np.ndarray) -> tuple[Figure, list[str]]:
    """{axis title: (N,)}, (S, N) bool -> matplotlib figure, a panel each, and the lines of their tables."""
    figure, lines = Figure(figsize=(3.1 * len(values), 2.8), layout="constrained"), []
    panels = np.atleast_1d(figure.subplots(1, len(values), sharey=True))
    for axes, (title, column) in zip(panels, values.items()):
        edges, counts, medians, recalls = recall_by(column, right)
        lines += ["", *conditions_table(title, edges, counts, recalls)]
        spread = deviations(recalls, counts)
        axes.errorbar(medians, recalls.mean(axis=0), spread, marker="o", markersize=4, capsize=2)
        axes.axhline(100 * right.mean(), color="grey", linewidth=1, linestyle=":")
        axes.set(xlabel=title, ylim=(0, None))
        if title == AREA:
            axes.set_xscale("log")
            axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.xaxis.set_major_formatter("{x:,.0f}")
            axes.xaxis.set_minor_formatter(NullFormatter())
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("R@1, %")
    return figure, lines


def map_figure(centers: np.ndarray, right: np.ndarray) -> Figure:
    """(N, 2) degrees, (S, N) bool -> matplotlib figure: R@1 in cells of CELL degrees on a map of the world."""
    cells, which, counts = np.unique(np.floor(centers / CELL), axis=0, return_inverse=True, return_counts=True)
    recalls = 100 * np.bincount(which.ravel(), right.mean(axis=0)) / counts
    lat, lon = ((cells + 0.5) * CELL).T
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    axes = figure.subplots()
    axes.imshow(np.asarray(world_map.candidates_map([], width=1024)), extent=(-180, 180, -90, 90), alpha=0.7)
    dots = axes.scatter(
        lon,
        lat,
        np.minimum(4 + 3 * counts, 80),
        recalls,
        cmap="RdYlBu",
        vmin=0,
        vmax=100,
        edgecolors="black",
        linewidths=0.3,
    )
    axes.set(xlim=(-180, 180), ylim=(-65, 65), xticks=(), yticks=())
    figure.colorbar(dots, label="R@1, %", pad=0.01, aspect=30)
    return figure


# ---- pictures of pictures ----


def tsne_figure(
    model: EarthLoc,
    photos: Sequence[Path],
    right: np.ndarray,
    images: Sequence[Path],
    points: int,
    batch_size: int,
    device: str | torch.device,
    seed: int,
) -> Figure:
    """photos, images: lists of files; right (N,) bool of the photos. -> matplotlib figure of `points` of each."""
    from sklearn.manifold import TSNE

    rng = np.random.default_rng(seed)
    drawn = [np.sort(rng.choice(len(each), min(points, len(each)), replace=False)) for each in (photos, images)]
    files = [photos[row] for row in drawn[0]] + [images[row] for row in drawn[1]]
    how = {"batch_size": batch_size, "device": device, "precision": default_precision(device)}
    (described,), failures = Describer(model.to(device).eval(), model.config.image_size, **how)(files)
    if failures:
        raise ValueError(failures[0][1])
    perplexity = min(30, (len(files) - 1) / 3)
    places = TSNE(init="pca", perplexity=perplexity, random_state=seed).fit_transform(described)
    ours, theirs = np.split(places, [len(drawn[0])])
    right = np.asarray(right)[drawn[0]]
    figure = Figure(figsize=(5, 4.4), layout="constrained")
    axes = figure.subplots()
    for place, colour, label in (
        (theirs, "0.75", "database images"),
        (ours[right], FOUND, "photos, found"),
        (ours[~right], LOST, "photos, not found"),
    ):
        axes.scatter(*place.T, s=6, color=colour, label=label)
    axes.set(xticks=(), yticks=())
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, 0), ncols=3, frameon=False, fontsize=8, markerscale=2)
    return figure


def draw(rng: np.random.Generator, items: Sequence[T], count: int) -> list[T]:
    """-> up to `count` of a list, drawn by rng, in order."""
    return [items[row] for row in sorted(rng.choice(len(items), min(count, len(items)), replace=False))]


def queries_picture(root: Path, keys: Sequence[tuple[str, str]], count: int, seed: int) -> Image.Image:
    """keys: (set, path) of the photos -> PIL image, a row each set."""
    rng, sets = np.random.default_rng(seed), list(dict.fromkeys(name for name, _ in keys))
    rows = [draw(rng, [path for name, path in keys if name == each], count) for each in sets]
    cells = [[read_image(root / path, SIZE) for path in row] for row in rows]
    return pictures.mosaic(cells, SIZE, row_titles=[name.replace(" ", "\n") for name in sets])


def database_picture(root: Path, paths: Sequence[str], count: int, seed: int, rows: int = 6) -> Image.Image:
    """-> PIL image of rows of `count` images each."""
    drawn = [read_image(root / path, SIZE) for path in draw(np.random.default_rng(seed), paths, rows * count)]
    return pictures.mosaic([drawn[start : start + count] for start in range(0, len(drawn), count)], SIZE)


def examples_picture(root: Path, found: Predictions, count: int, seed: int, depth: int = 3) -> Image.Image:
    """read_predictions' -> PIL image: `count` photos whose first prediction is right, beside as many others."""
    rng, rows = np.random.default_rng(seed), []
    sides = [[key for key in found if found[key][0][2] == right] for right in (True, False)]
    for key in (key for pair in zip_longest(*(draw(rng, side, count) for side in sides)) for key in pair if key):
        entries = [
            (rotate(read_image(root / image, SIZE), rotation), correct)
            for image, rotation, correct in found[key][:depth]
        ]
        rows.append((read_image(root / key[1], SIZE), entries, key[0]))
    return pictures.predictions_figure(rows, SIZE)


# ---- the command ----


def main(
    folders: Annotated[list[Path], "of evaluations, one for each seed", {"metavar": "FOLDER"}],
    only: Annotated[list[str], "these figures", {"choices": FIGURES}] = FIGURES,
    output: Annotated[Path | None, "folder of the pictures; default: figures in the first FOLDER"] = None,
    dataset_path: Annotated[str | None, "default: as results.json has it"] = None,
    resume: Annotated[str | None, "weights for tsne; default: as results.json has them"] = None,
    examples: Annotated[int, "pictures a row; photos found, and not found", {"type": positive}] = 8,
    points: Annotated[int, "photos, and database images, in tsne", {"type": positive}] = 500,
    batch_size: Annotated[int, "images described at a time", {"type": positive}] = 32,
    device: Device = DEVICE,
    seed: Annotated[int, "of what is drawn by chance", {"type": whole}] = 0,
) -> dict[str, Path]:
    """-> {figure: its file}."""
    results, found, right = read_seeds(folders)
    root, output = Path(dataset_path or results["dataset"]), output or folders[0] / "figures"
    output.mkdir(parents=True, exist_ok=True)
    keys = list(found)
    photos = Catalogue.from_paths(root, [path for _, path in keys])
    seeds = f"{len(right)} seed{'s' if len(right) > 1 else ''}"
    print(f"{len(keys)} photos of {root}, {seeds}: R@1 {mean_and_deviation(100 * right.mean(axis=1))}")
    made = {}
    for name in only:
        path = output / f"{name}.{'png' if name in ('conditions', 'tsne') else 'jpg'}"
        if name == "conditions":
            values = photo_conditions(photos)
            figure, lines = conditions_figure(values, right)
            print("\n".join(lines), end="\n\n")
            if len(values) < 4:
                print(f"Tilt or clouds are not known: {root} has no {CONDITIONS_FILE} that names these photos")
        elif name == "map":
            figure = map_figure(photos.centers, right)
        elif name == "tsne":
            checkpoint = resume or results["checkpoint"]
            if not checkpoint:
                print("tsne is not drawn: it was no checkpoint that was evaluated; --resume names one")
                continue
            first = {path: row for row, (_, path) in reversed(list(enumerate(keys)))}  # each photo once
            images = [root / each for each in read_database(root).paths]
            figure = tsne_figure(
                load_model(checkpoint),
                [root / each for each in first],
                right[0, list(first.values())],
                images,
                points,
                batch_size,
                require_device(device),
                seed,
            )
        elif name == "queries":
            figure = queries_picture(root, keys, examples, seed)
        elif name == "database":
            figure = database_picture(root, read_database(root).paths, examples, seed)
        else:
            figure = examples_picture(root, found, examples, seed)
        if isinstance(figure, Figure):
            figure.savefig(path, dpi=100)
        else:
            pictures.save(figure, path)
        made[name] = path
        print(f"{name}: {path}")
    return made


if __name__ == "__main__":
    command(main)
