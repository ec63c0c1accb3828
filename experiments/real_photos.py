"""What weights do on real photos: python -m experiments.real_photos --dataset_path FOLDER --resume WEIGHTS …

Two tables, a row for each of the weights. Photos that some image of the database shares ground with, among all its
images in four rotations: recalls. With --index, photos larger than --min_km2 against the whole Earth: the rank of the
first region that shares ground with the photo, among those within --near_km of its nadir, by score and as predict.py
orders them (retrieval/prior.py), and among all.
"""

from typing import Annotated

import numpy as np

from datasets.names import Catalogue
from datasets.overlap import intersections, share_ground
from datasets.sets import QUERY_RADIUS_KM, read_database
from models.earthloc import load_model
from models.weights import weights_fingerprint
from retrieval.database import best_rotations
from retrieval.describe import ROTATIONS, Describer
from retrieval.earth_index import TURNS, EarthIndex
from retrieval.prior import log_prior, weigh
from retrieval.recall import recall_at
from utils import geo
from utils.flags import BatchSize, Precision, command
from utils.precision import chosen_precision

RANKS = (1, 5, 10, 20)


def main(
    *,
    dataset_path: Annotated[str, "folder with real photos in queries/, and database/"],
    resume: Annotated[list[str], "weights", {"metavar": "WEIGHTS"}],
    index: Annotated[list[str] | None, "of the whole Earth, one for each of the weights", {"metavar": "FILE"}] = None,
    min_km2: Annotated[float, "smallest photo that is looked for on Earth"] = 2000,
    near_km: Annotated[float, "around a photo's nadir"] = QUERY_RADIUS_KM,
    batch_size: BatchSize = 32,
    precision: Precision = "fp32",
) -> None:
    """Prints the tables. Raises ValueError where indexes and weights do not go together."""
    if index and len(index) != len(resume):
        raise ValueError(f"--index: {len(index)} for {len(resume)} weights; give one for each --resume, in their order")
    photos, database = Catalogue.read(dataset_path, "queries"), read_database(dataset_path)
    pairs, _ = intersections(photos.footprints, database.footprints)
    positives = [pairs[pairs[:, 0] == row, 1] for row in range(len(photos))]
    with_one = [row for row, each in enumerate(positives) if len(each)]
    print(f"{len(with_one)} of {len(photos)} photos have a right image among {len(database)}")
    print("| weights | " + " | ".join(f"R@{k}" for k in RANKS) + " |")
    described = []
    for weights in resume:
        model = load_model(weights).eval()
        files = lambda catalogue: [catalogue.root / path for path in catalogue.paths]
        how = model.config.image_size, batch_size, 0, "cpu", chosen_precision(precision, "cpu")
        turned, _ = Describer(model, *how, TURNS, upright=True)(files(photos))
        described.append((weights, weights_fingerprint(model), turned))
        images, _ = Describer(model, *how, ROTATIONS)(files(database))
        _, found, _ = best_rotations(turned[0], images, np.arange(len(database)), len(database))
        recalls = recall_at(found[with_one], [positives[row] for row in with_one], RANKS)
        print(f"| {weights} | " + " | ".join(f"{recalls[k]:.1f}" for k in RANKS) + " |", flush=True)
    if index:
        against_earth(photos, described, index, min_km2, near_km)


def against_earth(
    photos: Catalogue, described: list[tuple[str, str, np.ndarray]], indexes: list[str], min_km2: float, near_km: float
) -> None:
    """described: weights, their fingerprint, (4, N, D); indexes: a file for each of them. Prints the second table.

    Raises ValueError where other weights made an index.
    """
    large = np.flatnonzero(photos.areas >= min_km2)
    print(f"{len(large)} photos of {min_km2:g} km² and more against the whole Earth")
    ways = {"near the nadir": (near_km, 0), "near, with the prior": (near_km, 1), "in the whole world": (np.inf, 0)}
    print("| weights, index | " + " | ".join(f"ranks {way} | within ten" for way in ways) + " |")
    for (weights, fingerprint, turned), file in zip(described, indexes):
        index = EarthIndex.load(file)
        if index.fingerprint != fingerprint:
            raise ValueError(f"--index {file}: was not made with {weights}; give one for each --resume, in their order")
        right = share_ground(photos.footprints[large], index.footprints)
        away = geo.distance_km(photos.nadirs[large][:, None], index.footprints.mean(axis=1)[None])
        cells = []
        for reach, weight in ways.values():
            ranks = []
            for k, row in enumerate(large):
                rows = np.flatnonzero((away[k] <= reach) | right[k])
                found = index.search(turned[:, [row]], rows, len(rows))
                _, found, _ = weigh(*found, weight * log_prior(away[k]), len(rows))
                ranks.append(1 + int(np.argmax(right[k][found[0]])))
            cells += [" ".join(map(str, sorted(ranks))), f"{(np.array(ranks) <= 10).sum()} of {len(ranks)}"]
        print(f"| {weights}, {file} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    command(main)
