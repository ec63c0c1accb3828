"""Where GeoCLIP puts photos, and how far off: python eval_geoclip.py --resume CHECKPOINT --csv FILE --images FOLDER
or, on an EarthLoc data set's queries:  python eval_geoclip.py --resume CHECKPOINT --dataset_path FOLDER

Without --resume the published weights of the installed PyPI package are evaluated (pip install --no-deps geoclip).
"""

import csv
import json
import logging
import os

import numpy as np
import torch

from datasets.gps import Photos, check_points, gallery_points, photos_of_dataset, read_photos
from datasets.sets import VALIDATION, load_evaluation_data
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
from utils import figures, geo
from utils.arguments import make_parser, positive, run, whole
from utils.files import GALLERY_PACKAGE
from utils.logs import make_log_dir, setup_logging
from utils.precision import PRECISIONS, default_precision, require_device
from utils.world_map import errors_map

CSV_FIELDS = ("image", "latitude", "longitude", "predicted_latitude", "predicted_longitude", "probability", "km")


def parse_arguments(argv=None):
    parser = make_parser(__doc__)
    add_model_flags(parser)
    parser.add_argument("--csv", help="IMG_ID,LAT,LON of the photos")
    parser.add_argument("--images", help="folder of the CSV's images; default: the CSV's own")
    parser.add_argument("--dataset_path", help="EarthLoc's layout: its queries, without the validation set's")
    parser.add_argument(
        "--nadir_km",
        type=float,
        help="only places within so many km of the photo's nadir, where names tell it; astronauts see 2500 km",
    )
    parser.add_argument("--log_dir", default="eval_geoclip", help="results go to logs/LOG_DIR/date_time")
    return parser.parse_args(argv)


def add_model_flags(parser):
    """What eval_geoclip.py and predict_geoclip.py share."""
    parser.add_argument(
        "--resume",
        default=GALLERY_PACKAGE,
        help="checkpoint of train_geoclip.py, a folder of "
        "published weights, or geoclip: those of the installed PyPI package",
    )
    parser.add_argument("--clip", help="replaces the CLIP of the weights: a Hugging Face id or a folder")
    parser.add_argument(
        "--gallery",
        help="where a photo can be: train (the coordinates trained on), package (100,000 "
        "points of the PyPI package), grid:KM or land:KM (a point every so many km), or a CSV with "
        "LAT,LON; default: train, or package for published weights",
    )
    parser.add_argument("--cache_dir", default="logs/galleries", help="gallery embeddings are kept here, or none")
    parser.add_argument(
        "--crops",
        choices=CROPS,
        default="one",
        help="views that are averaged: one, ten crops, or four turns (photos from orbit)",
    )
    parser.add_argument("--batch_size", type=positive, default=32, help="photos embedded at a time")
    parser.add_argument("--num_workers", type=whole, default=2)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--precision",
        choices=("auto", *PRECISIONS),
        default="auto",
        help="of the image encoder; auto: bf16 where the hardware multiplies in it",
    )
    parser.add_argument("--traceback", action="store_true", help="show the traceback of an error")


def load_model_and_gallery(args, device):
    """Flags -> model on the device, gallery points (N, 2), their embeddings (N, 512), and training GPS or None."""
    model, training = load_geoclip(args.resume, args.clip)
    model = model.to(device)
    training = None if training is None else training.numpy().astype(np.float64)
    points = gallery_points(args.gallery or ("package" if training is None else "train"), training)
    cache = None if args.cache_dir == "none" else args.cache_dir
    return model, points, cached_gallery(model.location_encoder, points, cache, device), training


def photos_of_flags(args):
    """Flags -> Photos. ValueError names the flag that is missing."""
    if bool(args.csv) == bool(args.dataset_path):
        raise ValueError(
            "give the photos by --csv FILE (with --images FOLDER), or by --dataset_path FOLDER; one of the two"
        )
    if args.csv:
        return read_photos(args.csv, args.images)
    return queries_of(args.dataset_path)


def queries_of(dataset_path):
    """An EarthLoc data set's queries but those of the validation set, which train_geoclip.py picks its best by."""
    photos = photos_of_dataset(dataset_path, "queries")
    validation = load_evaluation_data(dataset_path).only(VALIDATION)
    rows = np.setdiff1d(np.arange(len(photos)), validation.query_rows)
    kept = photos.select(rows)
    return Photos(
        kept.paths, kept.points, kept.nadirs, [f"{len(photos) - len(rows)} queries of {VALIDATION} are left out"]
    )


def main(args):
    device = require_device(args.device)
    precision = default_precision(device) if args.precision == "auto" else args.precision
    photos = photos_of_flags(args)
    if args.nadir_km is not None and photos.nadirs is None:
        raise ValueError("--nadir_km: the photos of a CSV have no known nadir; leave it out")
    folder = make_log_dir(args.log_dir)
    setup_logging(folder, args)
    for note in photos.notes:
        logging.info(note)
    model, points, gallery, training = load_model_and_gallery(args, device)
    embeddings, failures = embed_photos(
        model, photos.paths, args.batch_size, args.num_workers, device, precision, args.crops
    )
    for _, error in failures:
        logging.info(f"left out: {error}")
    if failures:
        logging.info(f"{len(failures)} of {len(photos)} photos could not be read and are left out")
    readable = np.setdiff1d(np.arange(len(photos)), [row for row, _ in failures])
    photos, embeddings = photos.select(readable), embeddings[readable]
    bias = None if args.nadir_km is None else nadir_bias(photos.nadirs, points, args.nadir_km)
    rows, probabilities = locate(embeddings, gallery, model.scale.item(), bias=bias)
    predicted = points[rows[:, 0]]
    distances = geo.distance_km(predicted, photos.points)

    logging.info(f"{len(photos)} photos, a gallery of {len(points)} points")
    for line in accuracy_lines(distances):
        logging.info(line)
    naive = naive_distances(photos, training)
    for name, naive_km in naive.items():
        for line in accuracy_lines(naive_km):
            logging.info(f"{name}: {line}")
    best = geo.distance_km(photos.points[:, None], points[None]).min(axis=1) if len(points) <= 5000 else None
    if best is not None:
        logging.info(f"Nearest point of the gallery: median {np.median(best):.1f} km, nothing can be nearer")
    results = {
        "weights": str(args.resume),
        "photos": len(photos),
        "left_out": len(failures),
        "gallery": len(points),
        "accuracy": accuracy(distances),
        "median_km": float(np.median(distances)),
        "naive": {
            name: {"accuracy": accuracy(each), "median_km": float(np.median(each))} for name, each in naive.items()
        },
    }
    temporary = folder / "results.json.tmp"
    temporary.write_text(json.dumps(results, indent=2) + "\n")
    os.replace(temporary, folder / "results.json")
    with open(folder / "predictions.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(CSV_FIELDS)
        for path, truth, found, probability, km in zip(
            photos.paths, photos.points, predicted, probabilities[:, 0], distances
        ):
            writer.writerow((path, *(f"{value:.5f}" for value in (*truth, *found)), f"{probability:.6f}", f"{km:.2f}"))
    shown = np.random.default_rng(0).permutation(len(photos))[:100]
    figures.save(errors_map(photos.points[shown], predicted[shown]), folder / "predictions.jpg")
    logging.info(f"Results, predictions and a map of up to 100 of them are in {folder}")
    return results


def naive_distances(photos, training):
    """{name: km (Q,)} of what needs no image: the nadir, and the mean of the training coordinates, where known."""
    naive = {}
    if photos.nadirs is not None:
        naive["Nadir"] = geo.distance_km(photos.nadirs, photos.points)
    if training is not None:
        naive["Mean of training GPS"] = geo.distance_km(mean_point(check_points(training, "training")), photos.points)
    return naive


if __name__ == "__main__":
    arguments = parse_arguments()
    run(main, arguments)
