"""What weights do on real photos: python -m experiments.real_photos --dataset_path FOLDER --resume WEIGHTS …

Two tables, a row for each of the weights. Photos that some image of the database shares ground with, among all its
images in four rotations: recalls. With --index, photos larger than --min_km2 against the whole Earth: the rank of the
first region that shares ground with the photo, among those within --near_km of its nadir, and among all.
"""

from argparse import Namespace

import numpy as np

from datasets.names import Catalogue
from datasets.overlap import intersections, share_ground
from datasets.sets import QUERY_RADIUS_KM, read_database
from models.earthloc import load_model
from retrieval.describe import ROTATIONS, Describer
from retrieval.earth_index import TURNS, EarthIndex
from retrieval.recall import first_of_each, recall_at, take
from retrieval.search import search
from utils import geo
from utils.arguments import make_parser, positive, run
from utils.precision import PRECISIONS

RANKS = (1, 5, 10, 20)


def main(args: Namespace) -> None:
    photos, database = Catalogue.read(args.dataset_path, "queries"), read_database(args.dataset_path)
    pairs, _ = intersections(photos.footprints, database.footprints)
    positives = [pairs[pairs[:, 0] == row, 1] for row in range(len(photos))]
    with_one = [row for row, each in enumerate(positives) if len(each)]
    print(f"{len(with_one)} of {len(photos)} photos have a right image among {len(database)}")
    print("| weights | " + " | ".join(f"R@{k}" for k in RANKS) + " |")
    described = {}
    for weights in args.resume:
        model = load_model(weights).eval()
        files = lambda catalogue: [catalogue.root / path for path in catalogue.paths]
        how = model.config.image_size, args.batch_size, 0, "cpu", args.precision
        described[weights], _ = Describer(model, *how, TURNS, upright=True)(files(photos))
        images, _ = Describer(model, *how, ROTATIONS)(files(database))
        found = ranked(described[weights][0], images)
        recalls = recall_at(found[with_one], [positives[row] for row in with_one], RANKS)
        print(f"| {weights} | " + " | ".join(f"{recalls[k]:.1f}" for k in RANKS) + " |", flush=True)
    if args.index:
        against_earth(args, photos, described)


def ranked(photos: np.ndarray, images: np.ndarray) -> np.ndarray:
    """photos (Q, D), images (R, N, D) -> (Q, N) rows of the images, each in its best rotation, best first."""
    turns, count, dim = images.shape
    _, found = search(images.reshape(-1, dim), photos, turns * count)
    return take(found % count, first_of_each(found % count, count), -1)


def against_earth(args: Namespace, photos: Catalogue, described: dict[str, np.ndarray]) -> None:
    large = np.flatnonzero(photos.areas >= args.min_km2)
    print(f"{len(large)} photos of {args.min_km2:g} km² and more against the whole Earth")
    print("| weights, index | ranks near the nadir | within ten | ranks in the whole world | within ten |")
    for weights, file in zip(args.resume, args.index, strict=True):
        index = EarthIndex.load(file)
        right = share_ground(photos.footprints[large], index.footprints)
        near = geo.distance_km(photos.nadirs[large][:, None], index.footprints.mean(axis=1)[None]) <= args.near_km
        cells = []
        for rows_of in (near, np.ones_like(near)):
            ranks = []
            for k, row in enumerate(large):
                rows = np.flatnonzero(rows_of[k] | right[k])
                _, found, _ = index.search(described[weights][:, [row]], rows, len(rows))
                ranks.append(1 + int(np.argmax(right[k][found[0]])))
            ranks = np.array(ranks)
            cells += [" ".join(map(str, sorted(ranks))), f"{(ranks <= 10).sum()} of {len(ranks)}"]
        print(f"| {weights}, {file} | " + " | ".join(cells) + " |", flush=True)


def parse_arguments(argv: list[str] | None = None) -> Namespace:
    parser = make_parser(__doc__)
    parser.add_argument("--dataset_path", required=True, help="folder with real photos in queries/, and database/")
    parser.add_argument("--resume", nargs="+", required=True, metavar="WEIGHTS")
    parser.add_argument("--index", nargs="+", metavar="FILE", help="of the whole Earth, one for each of the weights")
    parser.add_argument("--min_km2", type=float, default=2000, help="smallest photo that is looked for on Earth")
    parser.add_argument("--near_km", type=float, default=QUERY_RADIUS_KM)
    parser.add_argument("--batch_size", type=positive, default=32)
    parser.add_argument("--precision", choices=PRECISIONS, default="fp32")
    parser.add_argument("--traceback", action="store_true", help="show the traceback of an error")
    return parser.parse_args(argv)


if __name__ == "__main__":
    run(main, parse_arguments())
