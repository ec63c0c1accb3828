"""Where were these photos taken? python predict_geoclip.py IMAGE_OR_FOLDER … --top_k 3

Leaves predictions.json, .csv and .geojson and world maps. Without --resume the published weights of the installed
PyPI package are used (pip install --no-deps geoclip), with its gallery of 100,000 places.
"""

import argparse
import logging
from collections.abc import Sequence

import numpy as np

from datasets.gps import check_points, find_images
from eval_geoclip import add_model_flags, load_model_and_gallery
from retrieval.geolocation import check_top_k, embed_photos, locate, nadir_bias
from retrieval.predictions import readable_rows, write_predictions
from utils import figures
from utils.arguments import make_parser, positive, run, whole
from utils.files import printable
from utils.logs import make_log_dir, setup_logging
from utils.precision import default_precision, require_device
from utils.world_map import candidates_map


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument("inputs", nargs="+", metavar="IMAGE_OR_FOLDER", help="folders are searched through")
    add_model_flags(parser)
    parser.add_argument("--top_k", type=positive, default=3, help="places for each photo")
    parser.add_argument(
        "--near",
        type=float,
        nargs=2,
        metavar=("LAT", "LON"),
        help="only places near this one, for example the nadir of the photos; degrees",
    )
    parser.add_argument("--near_km", type=float, default=2500, help="how near; astronauts see 2500 km")
    parser.add_argument("--maps", type=whole, default=50, help="world maps to draw, one a photo")
    parser.add_argument("--log_dir", default="predict_geoclip", help="results go to logs/LOG_DIR/date_time")
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> list[dict]:
    """-> the predictions, a place each, in the order of the photos."""
    device = require_device(args.device)
    precision = default_precision(device) if args.precision == "auto" else args.precision
    paths = find_images(args.inputs)
    near = None if args.near is None else check_points([args.near], "--near")
    folder = make_log_dir(args.log_dir)
    setup_logging(folder, args)
    model, points, gallery, _ = load_model_and_gallery(args, device)
    check_top_k(args.top_k, len(points))
    embeddings, failures = embed_photos(
        model, paths, args.batch_size, args.num_workers, device, precision, args.crops, upright=True
    )
    readable = readable_rows(paths, failures)
    paths = [paths[row] for row in readable]
    bias = None if near is None else nadir_bias(np.repeat(near, len(paths), axis=0), points, args.near_km)
    rows, probabilities = locate(embeddings[readable], gallery, model.scale.item(), args.top_k, bias)
    predictions = as_predictions(paths, points[rows], probabilities)
    write_predictions(folder, lambda: ((each, None) for each in predictions))
    for number, (path, found, shares) in enumerate(zip(paths, points[rows], probabilities)):
        described = ", ".join(f"{lat:.4f} {lon:.4f} ({100 * share:.2f} %)" for (lat, lon), share in zip(found, shares))
        logging.info(f"{path}: {described}")
        if number < args.maps:
            labels = [f"{100 * share:.2f} %" for share in shares]
            figures.save(candidates_map(found, labels, printable(path.name)), folder / f"map_{number:04d}.jpg")
    logging.info(f"{len(paths)} photos, a gallery of {len(points)} places; predictions and maps are in {folder}")
    return predictions


def as_predictions(paths: Sequence, found: np.ndarray, probabilities: np.ndarray) -> list[dict]:
    """Paths (N), points (N, k, 2) degrees, probabilities (N, k) -> a list of dicts, one a place, best first."""
    return [
        {
            "image": str(path),
            "rank": rank + 1,
            "latitude": round(float(lat), 6),
            "longitude": round(float(lon), 6),
            "probability": float(share),
        }
        for path, places, shares in zip(paths, found, probabilities)
        for rank, ((lat, lon), share) in enumerate(zip(places, shares))
    ]


if __name__ == "__main__":
    arguments = parse_arguments()
    run(main, arguments)
