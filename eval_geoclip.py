"""Where GeoCLIP puts photos, and how far off: python eval_geoclip.py --resume CHECKPOINT --csv FILE --images FOLDER
or, on an EarthLoc data set's queries:  python eval_geoclip.py --resume CHECKPOINT --dataset_path FOLDER

Without --resume the published weights of the installed PyPI package are evaluated (pip install --no-deps geoclip).
"""

import csv
import json
import logging
from argparse import ArgumentParser, Namespace

import numpy as np
import torch

from datasets.gps import Photos, check_points, gallery_points, photos_of_dataset, read_photos
from datasets.sets import VALIDATION, in_validation
from models.geoclip import GeoCLIP
from models.geoclip_weights import load_geoclip
from retrieval.geolocation import (
    CROPS,
    accuracy,
    accuracy_lines,
    cached_gallery,
    embed_photos,
    locate,
    mean_point,
    nadir_bias,
)
from retrieval.predictions import readable_rows
from utils import figures, geo
from utils.arguments import add_shared, make_parser, run
from utils.files import GALLERY_PACKAGE, replacing_text
from utils.logs import make_log_dir, setup_logging
from utils.precision import chosen_precision, require_device
from utils.world_map import errors_map

CSV_FIELDS = ("image", "latitude", "longitude", "predicted_latitude", "predicted_longitude", "probability", "km")


def parse_arguments(argv: list[str] | None = None) -> Namespace:
    parser = make_parser(__doc__)
    add_model_flags(parser)
    add = parser.add_argument
    add("--csv", help="IMG_ID,LAT,LON of the photos")
    add("--images", help="folder of the CSV's images; default: the CSV's own")
    add("--dataset_path", help="EarthLoc's layout: its queries, without the validation set's")
    near = "only places within so many km of the photo's nadir, where names tell it; astronauts see 2500 km"
    add("--nadir_km", type=float, help=near)
    add("--log_dir", default="eval_geoclip", help="results go to logs/LOG_DIR/date_time")
    return parser.parse_args(argv)


def add_model_flags(parser: ArgumentParser) -> None:
    """What eval_geoclip.py and predict_geoclip.py share."""
    add = parser.add_argument
    weights = "checkpoint of train_geoclip.py, a folder of published weights, or geoclip: those of the installed PyPI "
    add("--resume", default=GALLERY_PACKAGE, help=weights + "package")
    add("--clip", help="replaces the CLIP of the weights: a Hugging Face id or a folder")
    places = "where a photo can be: train (the coordinates trained on), package (100,000 points of the PyPI package), "
    places += "grid:KM or land:KM (a point every so many km), or a CSV with LAT,LON; default: train, or package for "
    add("--gallery", help=places + "published weights")
    add("--cache_dir", default="logs/galleries", help="gallery embeddings are kept here, or none")
    views = "views that are averaged: one, ten crops, or four turns (photos from orbit)"
    add("--crops", choices=CROPS, default="one", help=views)
    add_shared(parser, "batch_size", "num_workers", "device", "precision")


def load_model_and_gallery(
    args: Namespace, device: torch.device
) -> tuple[GeoCLIP, np.ndarray, np.ndarray, np.ndarray | None]:
    """Flags -> model on the device, gallery points (N, 2), their embeddings (N, 512), and training GPS or None."""
    model, training = load_geoclip(args.resume, args.clip)
    model = model.to(device)
    training = None if training is None else training.numpy().astype(np.float64)
    points = gallery_points(args.gallery or ("package" if training is None else "train"), training)
    cache = None if args.cache_dir == "none" else args.cache_dir
    return model, points, cached_gallery(model.location_encoder, points, cache, device), training


def photos_of_flags(args: Namespace) -> Photos:
    """Flags -> Photos. ValueError names the flag that is missing."""
    if bool(args.csv) == bool(args.dataset_path):
        raise ValueError(
            "give the photos by --csv FILE (with --images FOLDER), or by --dataset_path FOLDER; one of the two"
        )
    return read_photos(args.csv, args.images) if args.csv else queries_of(args.dataset_path)


def queries_of(dataset_path: str) -> Photos:
    """An EarthLoc data set's queries but those of the validation set, which train_geoclip.py picks its best by."""
    photos = photos_of_dataset(dataset_path, "queries")
    kept = photos.select(~in_validation(photos.nadirs))
    note = f"{len(photos) - len(kept)} queries of {VALIDATION} are left out"
    return Photos(kept.paths, kept.points, kept.nadirs, [note])


def main(args: Namespace) -> dict:
    """-> what results.json holds."""
    device = require_device(args.device)
    photos = photos_of_flags(args)
    if args.nadir_km is not None and photos.nadirs is None:
        raise ValueError("--nadir_km: the photos of a CSV have no known nadir; leave it out")
    folder = make_log_dir(args.log_dir)
    setup_logging(folder, args)
    for note in photos.notes:
        logging.info(note)
    model, points, gallery, training = load_model_and_gallery(args, device)
    how = args.batch_size, args.num_workers, device, chosen_precision(args.precision, device)
    embeddings, failures = embed_photos(model, photos.paths, *how, args.crops)
    readable = readable_rows(photos.paths, failures)
    photos, embeddings = photos.select(readable), embeddings[readable]
    bias = None if args.nadir_km is None else nadir_bias(photos.nadirs, points, args.nadir_km)
    rows, probabilities = locate(embeddings, gallery, model.scale.item(), bias=bias)
    predicted = points[rows[:, 0]]
    distances = geo.distance_km(predicted, photos.points)

    logging.info(f"{len(photos)} photos, a gallery of {len(points)} points")
    naive = naive_distances(photos, training)
    lines = [f"{name}: {line}" for name, each in naive.items() for line in accuracy_lines(each)]
    for line in accuracy_lines(distances) + lines:
        logging.info(line)
    if len(points) <= 5000:
        best = geo.distance_km(photos.points[:, None], points[None]).min(axis=1)
        logging.info(f"Nearest point of the gallery: median {np.median(best):.1f} km, nothing can be nearer")
    results = {
        "weights": str(args.resume),
        "photos": len(photos),
        "left_out": len(failures),
        "gallery": len(points),
        **scores(distances),
        "naive": {name: scores(each) for name, each in naive.items()},
    }
    with replacing_text(folder / "results.json") as file:
        file.write(json.dumps(results, indent=2) + "\n")
    with replacing_text(folder / "predictions.csv") as file:
        writer = csv.writer(file)
        writer.writerow(CSV_FIELDS)
        places = np.column_stack([photos.points, predicted])
        for path, place, probability, km in zip(photos.paths, places, probabilities[:, 0], distances):
            writer.writerow((path, *(f"{value:.5f}" for value in place), f"{probability:.6f}", f"{km:.2f}"))
    shown = np.random.default_rng(0).permutation(len(photos))[:100]
    figures.save(errors_map(photos.points[shown], predicted[shown]), folder / "predictions.jpg")
    logging.info(f"Results, predictions and a map of up to 100 of them are in {folder}")
    return results


def scores(distances: np.ndarray) -> dict:
    """(Q,) km -> what results.json says of them."""
    return {"accuracy": accuracy(distances), "median_km": float(np.median(distances))}


def naive_distances(photos: Photos, training: np.ndarray | None) -> dict[str, np.ndarray]:
    """{name: km (Q,)} of what needs no image: the nadir, and the mean of the training coordinates, where known."""
    naive = {}
    if photos.nadirs is not None:
        naive["Nadir"] = geo.distance_km(photos.nadirs, photos.points)
    if training is not None:
        naive["Mean of training GPS"] = geo.distance_km(mean_point(check_points(training, "training")), photos.points)
    return naive


if __name__ == "__main__":
    run(main, parse_arguments())
