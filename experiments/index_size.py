"""What the Earth's index loses by being small: python -m experiments.index_size --resume WEIGHTS --dataset_path FOLDER

Recalls of a data set's photos among the images near their nadir: with whole descriptors in float16, and with indexes of
fewer and fewer values a region, of 8 and of 4 bits. Every line turns the photo; the first turns the images, as eval.py
does by default.
"""

from collections.abc import Sequence
from itertools import product
from typing import Annotated

import numpy as np

from datasets import grid
from datasets.names import Catalogue
from datasets.overlap import intersections
from datasets.sets import QUERY_RADIUS_KM, read_database
from models.earthloc import load_model
from models.weights import weights_fingerprint
from retrieval.describe import ROTATIONS, describe_catalogue
from retrieval.earth_index import CLIPPED, TURNS, compress
from retrieval.recall import first_of_each, recall_at, take
from retrieval.search import search
from utils import geo
from utils.arguments import positive
from utils.flags import command

RANKS = (1, 10, 50)
CANDIDATES = 4 * max(RANKS)  # a region can be there in each of its turns


def main(
    *,
    dataset_path: Annotated[str, "folder with database/, named by the grid, and queries/"],
    resume: Annotated[str, "the model", {"metavar": "WEIGHTS"}],
    dims: Annotated[list[int], "values a region", {"type": positive}] = (512, 256, 128),
    bits: Annotated[list[int], "of a value", {"choices": tuple(CLIPPED)}] = (8, 4),
    near_km: Annotated[float, "around a photo's nadir"] = QUERY_RADIUS_KM,
    turned_photos_only: Annotated[bool, "leave the first line out: half of the time"] = False,
    **describing: Annotated[object, describe_catalogue],
) -> None:
    """Prints a row for each size."""
    photos, database = Catalogue.read(dataset_path, "queries"), read_database(dataset_path)
    positives, near, asked = around_nadirs(photos, database, near_km)
    model = load_model(resume).eval()
    kept = lambda catalogue, turns: describe_catalogue(model, catalogue, turns, **describing)[0]
    turned = np.asarray(kept(photos, TURNS), np.float32)

    print("| descriptors | bytes a region | " + " | ".join(f"R@{k}" for k in RANKS) + " |")
    if not turned_photos_only:
        images = np.concatenate([np.asarray(each, np.float32) for each in kept(database, ROTATIONS)])
        found = {row: nearest(images, turned[:1, row], near[row], len(database)) for row in asked}
        show("float16, images turned", 2 * images.shape[1] * len(ROTATIONS), found, positives)
    vectors = np.asarray(kept(database, (0,))[0], np.float32)
    found = {row: nearest(vectors, turned[:, row], near[row], len(database)) for row in asked}
    show("float16", 2 * vectors.shape[1], found, positives)
    regions = grid.regions_of(database.ids)
    for each, dim in product(bits, dims):
        index = compress(regions, vectors, dim, weights_fingerprint(model), each)
        found = {row: index.search(turned[:, [row]], near[row], max(RANKS))[1][0] for row in asked}
        show(f"{dim} values of {each} bits", index.codes.shape[1], found, positives)


def around_nadirs(
    photos: Catalogue, database: Catalogue, near_km: float
) -> tuple[list[np.ndarray], list[np.ndarray], list[int]]:
    """-> for each photo the rows of the images that show some of its ground, and of those near its nadir; the photos
    that have one that is both. Prints how many."""
    pairs, _ = intersections(photos.footprints, database.footprints)
    positives = np.split(pairs[:, 1], np.searchsorted(pairs[:, 0], np.arange(1, len(photos))))
    near = geo.distance_km(photos.nadirs[:, None], database.footprints.mean(axis=1)[None]) <= near_km
    near = [np.flatnonzero(each) for each in near]
    asked = [row for row, right in enumerate(positives) if np.isin(right, near[row]).any()]
    print(f"{len(asked)} photos, {len(database):,} images, {np.mean([len(near[row]) for row in asked]):,.0f} near each")
    return positives, near, asked


def nearest(vectors: np.ndarray, photo: np.ndarray, rows: np.ndarray, count: int) -> np.ndarray:
    """vectors (turns * count, D), photo (turns, D), rows (m,) of the images -> (max(RANKS),) rows, best first, each
    image once, in its best turn."""
    turns = len(vectors) // count
    rows = (rows + count * np.arange(turns)[:, None]).ravel()
    scores, found = search(vectors, photo, min(CANDIDATES, len(rows)), rows)
    best = np.argsort(-scores.ravel(), kind="stable")
    images = (rows[found.ravel()[best]] % count)[None]
    return take(images, first_of_each(images, max(RANKS)), -1)[0]


def show(name: str, size: int, found: dict[int, np.ndarray], positives: Sequence[np.ndarray]) -> None:
    """A row of the table; found: {photo: rows of images, best first}."""
    recalls = recall_at(np.stack(list(found.values())), [positives[row] for row in found], RANKS)
    print(f"| {name} | {size:,} | " + " | ".join(f"{recalls[k]:.1f}" for k in RANKS) + " |", flush=True)


if __name__ == "__main__":
    command(main)
