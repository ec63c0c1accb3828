"""What it is worth to know how far photos look.

python -m experiments.nadir_prior --resume WEIGHTS --dataset_path FOLDER

A data set's photos among the images near their nadir, ordered by score and, more and more, by distance from the nadir
(retrieval/prior.py). A row for each weight of the prior: recalls, and the surprise at the right images, -log of the
share of probability on them, which is least where the weight is right: SPREADS there. Then recalls of photos that look
more and more far, by score alone and with that weight. --index takes the images' descriptors from an index of them, as
predict.py does. --nadir_error moves each nadir, in a direction drawn by chance.
"""

from typing import Annotated

import numpy as np

from datasets import grid
from datasets.build.camera import great_circle
from datasets.names import Catalogue
from datasets.sets import QUERY_RADIUS_KM, read_database
from experiments.index_size import RANKS, around_nadirs
from models.earthloc import load_model
from models.weights import weights_fingerprint
from retrieval.describe import describe_catalogue
from retrieval.earth_index import TURNS, EarthIndex
from retrieval.prior import SPREADS, log_prior, weigh
from utils import geo
from utils.flags import command

FAR_KM = (0, 150, 323, 600, 800, QUERY_RADIUS_KM)


def main(
    *,
    dataset_path: Annotated[str, "folder with database/ and queries/, named as the public ones"],
    resume: Annotated[str, "the model", {"metavar": "WEIGHTS"}],
    weights: Annotated[list[float], "of the prior, in spreads of the scores"] = (0, 0.2, 0.3, SPREADS, 0.6, 0.8),
    near_km: Annotated[float, "around a photo's nadir"] = QUERY_RADIUS_KM,
    index: Annotated[str | None, "file of python -m retrieval.earth_index, made of this data set"] = None,
    nadir_error: Annotated[float, "km by which nadirs are wrong"] = 0.0,
    **describing: Annotated[object, describe_catalogue],
) -> None:
    """Prints both tables."""
    photos, database = Catalogue.read(dataset_path, "queries"), read_database(dataset_path)
    positives, near, asked = around_nadirs(photos, database, near_km)
    model = load_model(resume).eval()
    turned = np.asarray(describe_catalogue(model, photos, TURNS, **describing)[0], np.float32)
    if index is None:
        images = np.asarray(describe_catalogue(model, database, **describing)[0][0], np.float32)
    else:
        earth, regions = EarthIndex.load(index), grid.regions_of(database.ids)
        if earth.fingerprint != weights_fingerprint(model) or not np.array_equal(earth.regions, regions):
            raise ValueError(f"--index {index}: was not made with {resume} of the images of {dataset_path}")
        turned, images = earth.project(turned), earth.vectors

    tried, rng = sorted({0, SPREADS, *weights}), np.random.default_rng(0)
    ranks, surprise = {weight: [] for weight in tried}, {weight: [] for weight in tried}
    for row in asked:
        places = near[row][None]
        nadir = great_circle(tuple(photos.nadirs[row]), rng.uniform(0, 2 * np.pi), nadir_error / geo.EARTH_RADIUS_KM)
        logs = log_prior(geo.distance_km(database.centers, nadir))
        scores, right = (turned[:, row] @ images[places[0]].T).max(axis=0)[None], np.isin(places[0], positives[row])
        for weight in tried:
            _, found, _ = weigh(scores, places, places, logs, places.size, weight)
            ranks[weight].append(1 + np.argmax(np.isin(found[0], positives[row])))
            if weight > 0:
                surprise[weight].append(surprise_at(right, scores[0], logs[places[0]], weight))
    recalls = lambda ranks: " | ".join(f"{100 * np.mean(np.array(ranks) <= k):.1f}" for k in RANKS)
    titles = " | ".join(f"R@{k}" for k in RANKS)
    print(f"| weight | {titles} | surprise |")
    for weight in weights:
        print(f"| {weight:g} | {recalls(ranks[weight])} | {np.mean(surprise[weight]) if weight > 0 else np.nan:.3f} |")
    far = geo.distance_km(photos.nadirs, photos.centers)[asked]
    print(f"| km from the nadir | photos | {titles} | {titles} with the prior |")
    for low, high in zip(FAR_KM, FAR_KM[1:]):
        inside = (far >= low) & (far < high)
        if inside.any():
            both = " | ".join(recalls(np.array(ranks[weight])[inside]) for weight in (0, SPREADS))
            print(f"| {low:g} to {high:g} | {inside.sum()} | {both} |")


def surprise_at(right: np.ndarray, scores: np.ndarray, log_priors: np.ndarray, weight: float) -> float:
    """(N,) bool, scores, log priors -> -log of the probability that is on the right ones, in nats."""
    logs = scores / (weight * scores.std()) + log_priors
    return float(np.logaddexp.reduce(logs) - np.logaddexp.reduce(logs[right]))


if __name__ == "__main__":
    command(main)
