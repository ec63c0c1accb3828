"""From photos to footprints: what registration finds on a data set whose photos have footprints.

python -m experiments.registration DATASET_PATH --resume weights/demo_world.safetensors --register xfeat sift

Candidates of a photo are the --top_k images that look most alike, of those within 2,500 km of its nadir, as predict.py
finds them. A photo has a true image where one of its candidates shares ground with it. Labels whose sides are longer
than 2.2:1 are faulty (3.5 % of the public names), and are left out where IoU is measured.
"""

import time

import numpy as np
import torch

from datasets.images import read_image
from datasets.names import Catalogue
from datasets.overlap import polygons, share_ground
from datasets.sets import read_database
from models.earthloc import load_model
from retrieval.confidence import VERIFIED, probability
from retrieval.describe import ROTATIONS, Describer
from retrieval.ground import DatabaseGround
from retrieval.matching import MATCHERS, make_matcher
from retrieval.registration import FARTHEST_KM, register
from utils import geo
from utils.arguments import make_parser, positive, run

PLAUSIBLE = 2.2  # of a label's sides


def iou(a, b):
    """Two footprints (4, 2) -> their intersection over union, as datasets.overlap measures it."""
    b = geo.unwrap_footprints(b)
    b[:, 1] += geo.wrap_longitude(b[0, 1] - a[0, 1]) - (b[0, 1] - a[0, 1])
    a, b = (polygons(each[None])[0] for each in (a, b))
    shared = a.intersection(b).area
    return shared / (a.area + b.area - shared)


def sides_ratio(footprint):
    """(4, 2) degrees -> the longest side over the shortest, km."""
    sides = geo.distance_km(footprint, np.roll(footprint, -1, axis=0))
    return sides.max() / sides.min()


def candidates_of(photos, images, near):
    """photos (Q, D), images (R, N, D), near (Q, N) bool -> for each photo (rows, rotations), the best first."""
    found = []
    for photo, allowed in zip(photos, near):
        scores = images @ photo
        best = scores.max(axis=0)
        rows = [row for row in np.argsort(-best, kind="stable") if allowed[row]]
        found.append([(row, ROTATIONS[scores[:, row].argmax()]) for row in rows])
    return found


def measure(queries, database, found, matcher, name, top_k, rounds):
    """-> a list of dicts, one a photo."""
    ground, results = DatabaseGround(database.root, database.paths, database.footprints), []
    for k, ranked in enumerate(found):
        ranked, label = ranked[:top_k], queries.footprints[k]
        true = share_ground(label[None], database.footprints[[row for row, _ in ranked]])[0]
        photo = read_image(queries.root / queries.paths[k])
        began = time.perf_counter()
        registered = register(
            photo,
            [(database.footprints[row], rotation) for row, rotation in ranked],
            ground,
            matcher,
            rounds,
            tuple(queries.nadirs[k]),
        )
        seconds = time.perf_counter() - began
        order = sorted(range(len(ranked)), key=lambda k: -registered[k].inliers if registered[k] else 0)
        best = registered[order[0]]
        results.append(
            {
                "photo": queries.ids[k],
                "true": bool(true.any()),
                "before": bool(true[0]),
                "after": bool(true[order[0]]) and best is not None,
                "best": best,
                "probability": probability(best) if best else 0.0,
                "iou": iou(label, best.footprint) if best else 0.0,
                "plausible": bool(sides_ratio(label) < PLAUSIBLE),
                "seconds": seconds,
                "pairs": len(ranked),
                "false": max((r.inliers for r, t in zip(registered, true) if r and not t), default=0),
            }
        )
    return results


def table(name, results):
    """-> lines of the table: a row a photo, and the counts."""
    lines = [f"{name}: photo            true  first  then  inliers/matches  rounds  moved  spread  p      IoU    label"]
    for r in results:
        best = r["best"]
        told = (
            f"{best.inliers:7d}/{best.matches:<7d} {best.rounds:6d} {best.moved:7.3f} {best.spread:7.2f}"
            if best
            else f"{'-':>7}/{'-':<7} {'-':>6} {'-':>7} {'-':>7}"
        )
        lines.append(
            f"  {r['photo']:<22} {'yes' if r['true'] else 'no':<5} {'x' if r['before'] else '-':<6} "
            f"{'x' if r['after'] else '-':<5} {told}  {r['probability']:.3f}  {r['iou']:.3f}  "
            f"{'' if r['plausible'] else 'faulty'} (false: {r['false']})"
        )
    there = [r for r in results if r["true"]]
    verified = [r for r in results if r["probability"] >= VERIFIED]
    good = [r["iou"] for r in verified if r["plausible"] and r["true"]]
    pairs = sum(r["pairs"] for r in results)
    lines += [
        f"  {len(there)} of {len(results)} photos have a true image; it is first for {sum(r['before'] for r in there)} "
        f"before, {sum(r['after'] for r in there)} after",
        f"  verified: {sum(r['true'] for r in verified)} of {len(there)} with a true image, "
        f"{sum(not r['true'] for r in verified)} of {len(results) - len(there)} without",
        f"  IoU of the verified ones with plausible labels: median {np.median(good) if good else np.nan:.3f}, "
        f"least {min(good, default=np.nan):.3f} of {len(good)}",
        f"  {sum(r['seconds'] for r in results) / max(pairs, 1):.2f} s a candidate, "
        f"{np.mean([r['seconds'] for r in results]):.1f} s a photo",
    ]
    return lines


def main(args):
    queries, database = Catalogue.read(args.dataset_path, "queries"), read_database(args.dataset_path)
    model = load_model(args.resume).eval()
    described = [
        Describer(model, model.config.image_size, rotations=turns)([each.root / path for path in each.paths])[0]
        for each, turns in ((queries, (0,)), (database, ROTATIONS))
    ]
    near = geo.distance_km(queries.nadirs[:, None], database.centers[None]) <= FARTHEST_KM
    found = candidates_of(described[0][0], described[1], near)
    for name in args.register:
        matcher = make_matcher(name, args.matcher_weights, args.device)
        print("\n".join(table(name, measure(queries, database, found, matcher, name, args.top_k, args.rounds))))


def parse_arguments(argv=None):
    parser = make_parser(__doc__)
    parser.add_argument("dataset_path", help="folder with queries/ and database/")
    parser.add_argument("--resume", default="weights/demo_world.safetensors", help="the model that finds candidates")
    parser.add_argument("--register", nargs="+", choices=tuple(MATCHERS), default=["xfeat"], help="matchers")
    parser.add_argument("--matcher_weights", help="folder with the matcher's published files")
    parser.add_argument("--top_k", type=positive, default=10, help="candidates a photo")
    parser.add_argument("--rounds", type=int, default=4, help="of refinement, at most")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--traceback", action="store_true", help="show the traceback of an error")
    return parser.parse_args(argv)


if __name__ == "__main__":
    arguments = parse_arguments()
    run(main, arguments)
