"""GeoCLIP, EarthLoc's best match and the nadir side by side on the demo world: shares within 2500 … 25 km and R@1.

python -m experiments.geoclip_demo --geoclip logs/geoclip_demo/…/last.pt --earthloc logs/demo/…/best.pt
--dataset_path data/demo_world

Every method picks one of the database's images of 2021 and answers with its centre. Weights between two sources are
chosen on the validation queries (Texas), the table is over all other queries.
"""

import json
import logging
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import numpy as np
from scipy.special import log_softmax

from datasets.gps import photos_of_dataset
from datasets.names import Catalogue
from datasets.sets import VALIDATION, load_evaluation_data
from models.earthloc import load_model
from models.geoclip_weights import load_geoclip
from retrieval.describe import ROTATIONS, Describer, Failures
from retrieval.geolocation import accuracy, embed_gallery, embed_photos, mean_point
from utils import geo
from utils.files import replacing_text
from utils.flags import BatchSize, DatasetPath, Workers, command
from utils.logs import make_log_dir, setup_logging

SHOWN_KM = (2500, 750, 200, 25)
NADIR_KM = 2500  # what astronauts see (paper of EarthLoc, eq. 1)
SCALES_KM = (100, 200, 300, 500, 1000)  # of the prior around the nadir, exp(-distance / scale)
WEIGHTS = (0.0, 0.003, 0.01, 0.03, 0.1, 0.3)  # of GeoCLIP's log-probability beside EarthLoc's cosine


def of_all(descriptors: np.ndarray, failures: Failures) -> np.ndarray:
    """The descriptors. Raises ValueError where an image could not be read."""
    if failures:
        raise ValueError(failures[0][1])
    return descriptors


def earthloc_scores(
    checkpoint: str, queries: Catalogue, database: Catalogue, batch_size: int, num_workers: int
) -> np.ndarray:
    """-> (Q, M): the cosine of each query and each database image, in the best of its four rotations."""
    model = load_model(checkpoint)
    describer = Describer(model, model.config.image_size, batch_size, num_workers)
    (photos,) = of_all(*describer(files_of(queries)))
    images = of_all(*replace(describer, rotations=ROTATIONS)(files_of(database)))
    return np.max([photos @ layer.T for layer in images], axis=0)


def files_of(catalogue: Catalogue) -> list[Path]:
    """Paths of all images."""
    return [catalogue.root / path for path in catalogue.paths]


def geoclip_log_probabilities(
    checkpoint: str, files: list[Path], points: np.ndarray, batch_size: int, num_workers: int
) -> np.ndarray:
    """-> (Q, M): log-softmax over the points, the four turns of each photo averaged."""
    model, _ = load_geoclip(checkpoint)
    embeddings = of_all(*embed_photos(model, files, batch_size, num_workers, crops="turns"))
    return log_softmax(model.scale.item() * embeddings @ embed_gallery(model.location_encoder, points).T, axis=1)


def median_km(scores: np.ndarray, truth: np.ndarray, centers: np.ndarray) -> float:
    """(Q, M) scores, (Q, 2), (M, 2) -> the median distance of the best places."""
    return float(np.median(geo.distance_km(centers[scores.argmax(axis=1)], truth)))


def table_row(km: np.ndarray, first_right: float | None = None) -> dict:
    """Distances (Q,) and R@1, for methods that pick an image -> dict."""
    return {"accuracy": accuracy(km, SHOWN_KM), "median_km": float(np.median(km)), "recall_at_1": first_right}


def methods(
    geoclip: np.ndarray,
    earthloc: np.ndarray,
    nadirs: np.ndarray,
    centers: np.ndarray,
    truth: np.ndarray,
    validation: np.ndarray,
) -> tuple[dict[str, np.ndarray], dict[str, float]]:
    """-> {name: scores (Q, M)}, and what was chosen on the validation rows (Q,) bool."""
    km = geo.distance_km(nadirs[:, None], centers[None])
    far = np.where(km > NADIR_KM, -1e6, 0)

    def best(candidates: Sequence[float], combine: Callable[[float], np.ndarray]):
        return min(candidates, key=lambda value: median_km(combine(value)[validation], truth[validation], centers))

    scale = best(SCALES_KM, lambda value: geoclip - km / value)
    weight = best(WEIGHTS, lambda value: earthloc + value * geoclip)
    near_weight = best(WEIGHTS, lambda value: earthloc + value * geoclip + far)
    earthloc_scale = best(SCALES_KM, lambda value: earthloc / 0.05 - km / value)
    return {
        "GeoCLIP": geoclip,
        f"GeoCLIP, within {NADIR_KM} km of the nadir": geoclip + far,
        "GeoCLIP + nadir prior": geoclip - km / scale,
        "EarthLoc": earthloc,
        f"EarthLoc, within {NADIR_KM} km of the nadir": earthloc + far,
        "EarthLoc + nadir prior": earthloc / 0.05 - km / earthloc_scale,
        "EarthLoc + GeoCLIP": earthloc + weight * geoclip,
        f"EarthLoc + GeoCLIP, within {NADIR_KM} km of the nadir": earthloc + near_weight * geoclip + far,
        "database image nearest to the nadir": -km,
    }, {
        "nadir prior, km": scale,
        "nadir prior of EarthLoc, km": earthloc_scale,
        "weight of GeoCLIP": weight,
        "weight of GeoCLIP near the nadir": near_weight,
    }


def main(
    *,
    geoclip: Annotated[str, "checkpoint of train_geoclip.py"],
    earthloc: Annotated[str, "checkpoint of train.py"],
    dataset_path: DatasetPath = "data/demo_world",
    batch_size: BatchSize = 64,
    num_workers: Workers = 1,
    log_dir: Annotated[str, "outputs go to logs/LOG_DIR/date_time"] = "geoclip_demo_table",
) -> dict:
    """-> {method: its row}."""
    flags, folder = Namespace(**locals()), make_log_dir(log_dir)
    setup_logging(folder, flags)
    data = load_evaluation_data(dataset_path)
    queries, database = data.queries, data.database
    centers, truth, nadirs = database.centers, queries.centers, queries.nadirs
    validation = np.isin(np.arange(len(queries)), data.only(VALIDATION).query_rows)
    test = ~validation
    how = batch_size, num_workers
    cosines = earthloc_scores(earthloc, queries, database, *how)
    chances = geoclip_log_probabilities(geoclip, files_of(queries), centers, *how)
    right = np.zeros(cosines.shape, dtype=bool)
    right[tuple(data.pairs.T)] = True
    findable = test & right.any(axis=1)

    training = photos_of_dataset(dataset_path).points
    rows = {
        "mean of the training GPS": table_row(geo.distance_km(mean_point(training), truth[test])),
        "nadir": table_row(geo.distance_km(nadirs, truth)[test]),
    }
    named, chosen = methods(chances, cosines, nadirs, centers, truth, validation)
    for name, scores in named.items():
        picked = scores.argmax(axis=1)
        hits = right[np.arange(len(picked)), picked]
        rows[name] = table_row(geo.distance_km(centers[picked], truth)[test], 100 * float(hits[findable].mean()))
    nearest = geo.distance_km(truth[:, None], centers[None]).min(axis=1)
    rows["limit: the nearest centre"] = table_row(nearest[test])

    logging.info(
        f"{test.sum()} queries, R@1 over the {findable.sum()} with a positive; chosen on {validation.sum()} "
        f"validation queries: {chosen}"
    )
    logging.info("| | " + " | ".join(f"{km} km" for km in SHOWN_KM) + " | median km | R@1 |")
    for name, row in rows.items():
        recall = "" if row["recall_at_1"] is None else f"{row['recall_at_1']:.1f}"
        shares = " | ".join(f"{share:.1f}" for share in row["accuracy"].values())
        logging.info(f"| {name} | {shares} | {row['median_km']:.0f} | {recall} |")
    with replacing_text(folder / "results.json") as file:
        file.write(json.dumps({"rows": rows, "chosen": chosen}, indent=2) + "\n")
    logging.info(f"The table is in {folder / 'results.json'}")
    return rows


if __name__ == "__main__":
    command(main)
