"""What it is worth to know how far photos look.

python -m experiments.nadir_prior --resume WEIGHTS --dataset_path FOLDER

A data set's photos among the images near their nadir, ordered by score and, more and more, by distance from the nadir
(retrieval/prior.py). A row for each weight of the prior: recalls, and the surprise at the right images, -log of the
share of probability on them, which is least where the weight is right: SPREADS there.
"""

from typing import Annotated

import numpy as np

from datasets.names import Catalogue
from datasets.sets import QUERY_RADIUS_KM, read_database
from experiments.index_size import RANKS, around_nadirs
from models.earthloc import load_model
from retrieval.describe import Describer
from retrieval.earth_index import TURNS
from retrieval.prior import SPREADS, log_prior, weigh
from retrieval.recall import recall_at
from utils import geo
from utils.flags import DESCRIPTORS, DEVICE, WORKERS, BatchSize, Device, Precision, Workers, command
from utils.precision import chosen_precision


def main(
    *,
    dataset_path: Annotated[str, "folder with database/ and queries/, named as the public ones"],
    resume: Annotated[str, "the model", {"metavar": "WEIGHTS"}],
    weights: Annotated[list[float], "of the prior, in spreads of the scores"] = (0, 0.2, 0.3, SPREADS, 0.6, 0.8),
    near_km: Annotated[float, "around a photo's nadir"] = QUERY_RADIUS_KM,
    descriptors: Annotated[str, "folder where descriptors are kept"] = DESCRIPTORS,
    batch_size: BatchSize = 32,
    num_workers: Workers = WORKERS,
    device: Device = DEVICE,
    precision: Precision = "fp32",
) -> None:
    """Prints a row for each weight."""
    photos, database = Catalogue.read(dataset_path, "queries"), read_database(dataset_path)
    positives, near, asked = around_nadirs(photos, database, near_km)
    model = load_model(resume).eval()
    how = model.config.image_size, batch_size, num_workers, device, chosen_precision(precision, device)
    kept = lambda catalogue, turns: Describer(model, *how, turns).kept(
        descriptors, catalogue.root, catalogue.paths, catalogue.root.name
    )[0]
    turned, images = np.asarray(kept(photos, TURNS), np.float32), np.asarray(kept(database, (0,))[0], np.float32)

    found, surprise = {weight: [] for weight in weights}, {weight: [] for weight in weights}
    for row in asked:
        places = near[row]
        scores = (turned[:, row] @ images[places].T).max(axis=0)[None]
        logs = log_prior(geo.distance_km(database.centers, photos.nadirs[row]))
        right = np.isin(places, positives[row])
        for weight in weights:
            found[weight].append(weigh(scores, places[None], places[None], logs, max(RANKS), weight)[1][0])
            if weight > 0:
                surprise[weight].append(surprise_at(right, scores[0], logs[places], weight))
    print("| weight | " + " | ".join(f"R@{k}" for k in RANKS) + " | surprise |")
    for weight in weights:
        recalls = recall_at(np.stack(found[weight]), [positives[row] for row in asked], RANKS)
        told = f"{np.mean(surprise[weight]):.3f}" if weight > 0 else ""
        print(f"| {weight:g} | " + " | ".join(f"{recalls[k]:.1f}" for k in RANKS) + f" | {told} |")


def surprise_at(right: np.ndarray, scores: np.ndarray, log_priors: np.ndarray, weight: float) -> float:
    """(N,) bool, scores, log priors -> -log of the probability that is on the right ones, in nats."""
    logs = scores / (weight * scores.std()) + log_priors
    return float(np.logaddexp.reduce(logs) - np.logaddexp.reduce(logs[right]))


if __name__ == "__main__":
    command(main)
