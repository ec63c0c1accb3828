"""GeoCLIP, EarthLoc's best match and the nadir side by side on the demo world: shares within 2500 … 25 km and R@1.

python -m experiments.geoclip_demo --geoclip logs/geoclip_demo/…/last.pt --earthloc logs/demo/…/best.pt
--dataset_path data/demo_world

Every method picks one of the database's images of 2021 and answers with its centre. Weights between two sources are
chosen on the validation queries (Texas), the table is over all other queries.
"""

import json
import logging

import numpy as np

from datasets.gps import photos_of_dataset
from datasets.sets import VALIDATION, load_evaluation_data
from models.earthloc import load_model
from models.geoclip_weights import load_geoclip
from retrieval import describe as retrieval
from retrieval.geolocation import accuracy, embed_gallery, embed_photos, mean_point
from utils import geo
from utils.arguments import make_parser, run
from utils.logs import make_log_dir, setup_logging

SHOWN_KM = (2500, 750, 200, 25)
NADIR_KM = 2500  # what astronauts see (paper of EarthLoc, eq. 1)
SCALES_KM = (100, 200, 300, 500, 1000)  # of the prior around the nadir, exp(-distance / scale)
WEIGHTS = (0.0, 0.003, 0.01, 0.03, 0.1, 0.3)  # of GeoCLIP's log-probability beside EarthLoc's cosine


def parse_arguments(argv=None):
    parser = make_parser(__doc__)
    parser.add_argument("--geoclip", required=True, help="checkpoint of train_geoclip.py")
    parser.add_argument("--earthloc", required=True, help="checkpoint of train.py")
    parser.add_argument("--dataset_path", default="data/demo_world")
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--num_workers", type=int, default=1)
    parser.add_argument("--log_dir", default="geoclip_demo_table")
    parser.add_argument("--traceback", action="store_true", help="show the traceback of an error")
    return parser.parse_args(argv)


def earthloc_scores(checkpoint, queries, database, args):
    """-> (Q, M): the cosine of each query and each database image, in the best of its four rotations."""
    model = load_model(checkpoint)
    described = []
    for catalogue, rotations in ((queries, (0,)), (database, retrieval.ROTATIONS)):
        files = [catalogue.root / path for path in catalogue.paths]
        descriptors, failures = retrieval.describe(
            model, files, model.config.image_size, args.batch_size, args.num_workers, rotations=rotations
        )
        if failures:
            raise ValueError(failures[0][1])
        described.append(descriptors)
    return np.max([described[0][0] @ layer.T for layer in described[1]], axis=0)


def geoclip_log_probabilities(checkpoint, files, points, args):
    """-> (Q, M): log-softmax over the points, the four turns of each photo averaged."""
    model, _ = load_geoclip(checkpoint)
    embeddings, failures = embed_photos(model, files, args.batch_size, args.num_workers, crops="turns")
    if failures:
        raise ValueError(failures[0][1])
    logits = model.scale.item() * embeddings @ embed_gallery(model.location_encoder, points).T
    logits -= logits.max(axis=1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))


def median_km(scores, truth, centers):
    """(Q, M) scores, (Q, 2), (M, 2) -> the median distance of the best places."""
    return float(np.median(geo.distance_km(centers[scores.argmax(axis=1)], truth)))


def table_row(km, first_right=None):
    """Distances (Q,) and R@1, for methods that pick an image -> dict."""
    return {"accuracy": accuracy(km, SHOWN_KM), "median_km": float(np.median(km)), "recall_at_1": first_right}


def methods(geoclip, earthloc, nadirs, centers, truth, validation):
    """-> {name: scores (Q, M)}, and what was chosen on the validation rows (Q,) bool."""
    km = geo.distance_km(nadirs[:, None], centers[None])
    far = np.where(km > NADIR_KM, -1e6, 0)

    def best(candidates, combine):
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


def main(args):
    folder = make_log_dir(args.log_dir)
    setup_logging(folder, args)
    data = load_evaluation_data(args.dataset_path)
    queries, database = data.queries, data.database
    centers, truth, nadirs = database.centers, queries.centers, queries.nadirs
    validation = np.isin(np.arange(len(queries)), data.only(VALIDATION).query_rows)
    test = ~validation
    earthloc = earthloc_scores(args.earthloc, queries, database, args)
    geoclip = geoclip_log_probabilities(args.geoclip, [queries.root / path for path in queries.paths], centers, args)
    right = np.zeros(earthloc.shape, dtype=bool)
    right[tuple(data.pairs.T)] = True
    findable = test & right.any(axis=1)

    training = photos_of_dataset(args.dataset_path).points
    rows = {
        "mean of the training GPS": table_row(geo.distance_km(mean_point(training), truth[test])),
        "nadir": table_row(geo.distance_km(nadirs, truth)[test]),
    }
    named, chosen = methods(geoclip, earthloc, nadirs, centers, truth, validation)
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
    (folder / "results.json").write_text(json.dumps({"rows": rows, "chosen": chosen}, indent=2) + "\n")
    logging.info(f"The table is in {folder / 'results.json'}")
    return rows


if __name__ == "__main__":
    arguments = parse_arguments()
    run(main, arguments)
