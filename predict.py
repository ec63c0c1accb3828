"""Where were these photos taken? python predict.py IMAGE_OR_FOLDER … --resume CHECKPOINT --dataset_path FOLDER

Each photo is compared with the database images of 2021, in four rotations; those that look most alike say where it is.
Leaves predictions.json, .csv and .geojson (their footprints), a picture of photos and finds, and world maps.
"""

import logging

import numpy as np
import torch

from datasets.gps import check_points, find_images
from datasets.images import read_image
from datasets.sets import read_database
from models.earthloc import load_model
from retrieval.describe import ROTATIONS, describe, describe_kept, first_of_each, rotate, take
from retrieval.predictions import distances_to_footprints, readable_rows, write_predictions
from retrieval.search import search
from retrieval.store import model_fingerprint, tidy
from utils import figures, geo
from utils.arguments import make_parser, positive, run, whole
from utils.files import printable
from utils.logs import make_log_dir, setup_logging
from utils.precision import PRECISIONS, default_precision, require_device
from utils.world_map import candidates_map


def parse_arguments(argv=None):
    parser = make_parser(__doc__)
    parser.add_argument("inputs", nargs="+", metavar="IMAGE_OR_FOLDER", help="folders are searched through")
    parser.add_argument("--resume", required=True, help="checkpoint of train.py, or released weights")
    parser.add_argument("--dataset_path", required=True, help="folder with database/; queries are not needed")
    parser.add_argument(
        "--near",
        type=float,
        nargs=2,
        metavar=("LAT", "LON"),
        help="only images that show ground near this place, the point below the station; degrees",
    )
    parser.add_argument("--near_km", type=float, default=2500, help="how near; astronauts see 2500 km (paper, eq. 1)")
    parser.add_argument("--top_k", type=positive, default=3, help="places for each photo")
    parser.add_argument(
        "--descriptors",
        default="logs/descriptors",
        help="folder where the database's descriptors are kept, so that none is made twice",
    )
    parser.add_argument(
        "--forget_descriptors", action="store_true", help="remove what was kept there for other models than this one"
    )
    parser.add_argument("--shown", type=whole, default=50, help="photos in the picture, and world maps")
    parser.add_argument("--log_dir", default="predict", help="results go to logs/LOG_DIR/date_time")
    parser.add_argument("--batch_size", type=positive, default=32, help="images described at a time")
    parser.add_argument("--num_workers", type=whole, default=2)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--precision",
        choices=("auto", *PRECISIONS),
        default="auto",
        help="of the network; auto: bf16 where the hardware multiplies in it",
    )
    parser.add_argument("--traceback", action="store_true", help="show the traceback of an error")
    return parser.parse_args(argv)


def main(args):
    """-> the predictions, a list of dicts."""
    device = require_device(args.device)
    precision = default_precision(device) if args.precision == "auto" else args.precision
    paths = find_images(args.inputs)
    database = read_database(args.dataset_path)
    rows = candidate_rows(database, args)
    folder = make_log_dir(args.log_dir)
    setup_logging(folder, args)
    model = load_model(args.resume).to(device).eval()

    common = (model.config.image_size, args.batch_size, args.num_workers, device, precision)
    photos, failures = describe(model, paths, *common, label="describing photos", upright=True)
    readable = readable_rows(paths, failures)
    photos, paths = photos[0, readable], [paths[row] for row in readable]
    tidy(args.descriptors, model_fingerprint(model, model.config.image_size, precision), args.forget_descriptors)
    images, failures = describe_kept(
        args.descriptors, model, database.root, database.paths, *common, ROTATIONS, "world", wanted=rows
    )
    rows = np.setdiff1d(rows, [row for row, _ in failures])
    for _, error in failures:
        logging.info(f"left out: {error}")
    if len(rows) < args.top_k:
        raise ValueError(f"{args.dataset_path}: only {len(rows)} images could be read; see above, or lower --top_k")

    scores, found, rotations = locate(photos, images, rows, args.top_k)
    predictions = as_predictions(paths, database, scores, found, rotations)
    write_predictions(folder, predictions, database.footprints[found.ravel()])
    for k, path in enumerate(paths):
        own = predictions[k * args.top_k : (k + 1) * args.top_k]
        logging.info(
            f"{path}: " + ", ".join("{latitude:.3f} {longitude:.3f} ({score:.3f})".format(**each) for each in own)
        )
        if k < args.shown:
            places = [(each["latitude"], each["longitude"]) for each in own]
            labels = [f"{each['score']:.3f}" for each in own]
            figures.save(candidates_map(places, labels, printable(path.name)), folder / f"map_{k:04d}.jpg")
    if args.shown:
        save_picture(folder / "predictions.jpg", paths[: args.shown], database, scores, found, rotations)
    logging.info(f"{len(paths)} photos, {len(rows)} database images; predictions, picture and maps are in {folder}")
    return predictions


def candidate_rows(database, args):
    """Rows of the database that may be found. Raises ValueError where these are fewer than --top_k."""
    rows, where = np.arange(len(database)), ""
    if args.near is not None:
        near = check_points([args.near], "--near")[0]
        rows = rows_near(database, near, args.near_km)
        where = f" within {args.near_km:g} km of {args.near[0]:g}, {args.near[1]:g} (--near, --near_km)"
    if len(rows) < args.top_k:
        raise ValueError(f"--top_k {args.top_k}: the database has {len(rows)} images{where}")
    return rows


def rows_near(database, point, km):
    """Rows of the images whose footprint reaches into the circle of so many km around a point (lat, lon)."""
    away = geo.distance_km(database.centers, point)
    reach = geo.distance_km(database.footprints, database.centers[:, None]).max(axis=1)
    rim = np.flatnonzero((away > km) & (away <= km + reach))  # few: the outlines of these only are looked at
    near = away <= km
    near[rim] = distances_to_footprints(database.footprints[rim], point) <= km
    return np.flatnonzero(near)


def locate(photos, images, rows, top_k):
    """photos (Q, D), images (R, N, D) in the rotations of ROTATIONS -> scores, rows and rotations of each photo's
    top_k different images among `rows`, best first, each (Q, top_k). An image counts in its best rotation."""
    turns, count, dim = images.shape
    entries = (np.arange(turns)[:, None] * count + rows).ravel()
    # An image may take a place for each rotation.
    scores, entry = search(images.reshape(-1, dim), photos, min(turns * top_k, len(entries)), entries)
    turn, row = np.divmod(entries[entry], count)
    first = first_of_each(row, top_k)
    return take(scores, first, 0), take(row, first, -1), np.array(ROTATIONS)[take(turn, first, 0)]


def as_predictions(paths, database, scores, found, rotations):
    """-> a list of dicts, one a place, best first. score: cosine similarity. rotation: degrees counter-clockwise that
    the image was turned to look like the photo, as a viewer shows it: the compass azimuth of the photo's up."""
    return [
        {
            "image": str(path),
            "rank": rank + 1,
            "latitude": round(float(lat), 6),
            "longitude": round(float(lon), 6),
            "score": round(float(scores[k, rank]), 6),
            "rotation": int(rotations[k, rank]),
            "database_image": database.paths[found[k, rank]],
            "area_km2": int(database.areas[found[k, rank]]),
        }
        for k, path in enumerate(paths)
        for rank, (lat, lon) in enumerate(database.centers[found[k]])
    ]


def save_picture(file, paths, database, scores, found, rotations, size=160):
    """A row a photo: the photo, and the images that it was found to look like, turned as they matched."""
    cells, captions = [], []
    for k, path in enumerate(paths):
        images = [
            rotate(read_image(database.root / database.paths[row], size), int(degrees))
            for row, degrees in zip(found[k], rotations[k])
        ]
        cells.append([read_image(path, size, upright=True), *images])
        captions.append(
            [
                printable(path.name)[:22],
                *(
                    f"{lat:.1f} {lon:.1f} ({score:.2f})"
                    for (lat, lon), score in zip(database.centers[found[k]], scores[k])
                ),
            ]
        )
    titles = ["photo", *(f"prediction {rank + 1}" for rank in range(found.shape[1]))]
    figures.save(figures.mosaic(cells, size, captions=captions, column_titles=titles), file)


if __name__ == "__main__":
    arguments = parse_arguments()
    run(main, arguments)
