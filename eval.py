"""A checkpoint -> recalls of the six evaluation sets: python eval.py --resume CHECKPOINT --dataset_path FOLDER

Without --resume a fresh model is evaluated, made by the same flags as in train.py. With --method it is a published one
(docs/models.md): python eval.py --method cosplace megaloc --dataset_path FOLDER --results results.csv
"""

import logging
import shlex
import sys

import numpy as np
import torch
from torch.utils.data import DataLoader

from datasets.build.cache import cache_note
from datasets.sets import load_evaluation_data
from methods import METHODS, load_method
from models.config import add_model_arguments, model_config
from models.earthloc import build_model, load_model
from retrieval.describe import ROTATIONS, SEARCHES, ImageFiles
from retrieval.evaluation import describe_sets, evaluation_figure, score_sets, write_predictions, write_results
from retrieval.leaderboard import append_line, result_line
from retrieval.store import model_fingerprint, tidy
from utils import distributed, figures
from utils.arguments import make_parser, positive, run, whole
from utils.logs import make_log_dir, setup_logging
from utils.precision import PRECISION_HELP, PRECISIONS, default_precision, require_device


def parse_arguments(argv=None):
    parser = make_parser(__doc__)
    parser.add_argument("--resume", help="checkpoint, or a bare state dict; its shape goes before the model flags")
    parser.add_argument(
        "--method",
        nargs="+",
        metavar="NAME",
        help=f"methods of others instead: {', '.join(METHODS)}, or a .py file with one of yours; --weights is then a "
        "file or folder with the published weights, where they can't be fetched",
    )
    parser.add_argument("--dataset_path", required=True, help="folder with database/, queries/ and the intersections")
    parser.add_argument("--log_dir", default="eval", help="results go to logs/LOG_DIR/date_time")
    parser.add_argument(
        "--results", help="a CSV file that gets a line; python -m experiments.leaderboard FILE shows it"
    )
    parser.add_argument("--tta", choices=("4x90", "none"), default="4x90", help="four rotations, or one")
    parser.add_argument(
        "--rotate",
        choices=("database", "queries"),
        default="database",
        help="what is turned; queries: a quarter of the descriptors to make, keep and search",
    )
    parser.add_argument(
        "--search",
        choices=SEARCHES,
        default="exact",
        help="flat: exact too, in plain float32; compressed: little memory, may miss neighbours",
    )
    parser.add_argument(
        "--descriptors",
        default="logs/descriptors",
        help="folder where descriptors are kept, so that none is made twice; none: in memory only, "
        "as always with several processes",
    )
    parser.add_argument(
        "--forget_descriptors", action="store_true", help="remove what was kept there for other models than this one"
    )
    parser.add_argument("--batch_size", type=positive, default=32, help="images described at a time")
    parser.add_argument("--num_workers", type=whole, default=2)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--precision", choices=("auto", *PRECISIONS), default="auto", help=PRECISION_HELP)
    parser.add_argument("--seed", type=whole, default=0, help="of a fresh model, and of the queries in the picture")
    parser.add_argument(
        "--process_timeout", type=float, default=1800, help="seconds that processes wait for one that does not answer"
    )
    parser.add_argument("--traceback", action="store_true", help="show the traceback of an error")
    add_model_arguments(parser)
    return parser.parse_args(argv)


def main(args):
    """-> Evaluation; of several methods a list; None in all but the first of several processes, which only help to
    describe the images."""
    if args.method and args.resume:
        raise ValueError("--method and --resume are two models: give one of them")
    if args.method and args.weights not in ("imagenet", "none") and len(args.method) > 1:
        raise ValueError(f"--weights {args.weights}: fits one --method, and there are {len(args.method)}")
    with distributed.processes(require_device(args.device), args.process_timeout) as device:
        precision = default_precision(device) if args.precision == "auto" else args.precision
        folder = distributed.from_first(lambda: make_log_dir(args.log_dir))
        own = folder / f"rank{distributed.rank()}" if distributed.rank() else folder
        own.mkdir(parents=True, exist_ok=True)
        setup_logging(own, args)
        torch.manual_seed(args.seed)
        data = load_evaluation_data(args.dataset_path)
        if args.method:
            return evaluate_methods(args, data, folder, device, precision)
        # A checkpoint says its own shape; the model flags are for a fresh model.
        model = load_model(args.resume) if args.resume else build_model(model_config(args), args.weights)
        shape = model.config
        name = f"{shape.backbone} {shape.aggregator} {shape.descriptor_dim}"
        return evaluate(
            model, shape.image_size, data, folder, device, precision, args, name, args.resume or args.weights
        )


def evaluate_methods(args, data, folder, device, precision):
    """-> Evaluation of the one --method, a list of several, each in a folder of its own. One whose weights can't be
    had is told and left out; RuntimeError says so when the others are done."""
    weights = "published" if args.weights == "imagenet" else args.weights
    results, lacking = [], []
    for name in args.method:
        try:
            model = load_method(name, weights)
        except RuntimeError as error:
            if len(args.method) == 1:
                raise
            logging.warning(f"left out: {error}")
            lacking.append(name)
            continue
        model.to(device)
        model.prepare(database_sample(data, model.image_size, args.batch_size, args.num_workers, device))
        place = folder / name.removesuffix(".py").replace("/", "_") if len(args.method) > 1 else folder
        place.mkdir(exist_ok=True)
        told = getattr(model.method, "source", "own") if weights == "published" else weights
        results.append(evaluate(model, model.image_size, data, place, device, precision, args, name, told))
        logging.info(f"That was {name}")
    if lacking:
        raise RuntimeError(f"{len(lacking)} of {len(args.method)} methods are left out: {', '.join(lacking)}")
    return results if len(results) > 1 else results[0]


def database_sample(data, image_size, batch_size, num_workers, device, count=512):
    """Yields some of the database's images, always the same, in batches (B, 3, S, S) float RGB in [0, 1]."""
    rows = data.database_rows
    rows = np.random.default_rng(0).permutation(rows)[:count]
    files = ImageFiles([data.database.root / data.database.paths[row] for row in rows], image_size)
    for _, images, errors in DataLoader(files, batch_size, num_workers=num_workers):
        readable = [not error for error in errors]
        if any(readable):
            yield images[readable].to(device).float() / 255


def evaluate(model, image_size, data, folder, device, precision, args, name, weights):
    """-> Evaluation, None in all but the first of several processes. name, weights: for the lines of --results."""
    model = model.to(device, memory_format=torch.channels_last).eval()
    note = cache_note(args.dataset_path, image_size)
    if note:
        logging.info(note)
    kept = None if args.descriptors == "none" or distributed.world() > 1 else args.descriptors
    if kept:
        tidy(kept, model_fingerprint(model, image_size, precision), args.forget_descriptors)
    descriptors, data = describe_sets(
        model,
        data,
        image_size,
        args.batch_size,
        args.num_workers,
        device,
        precision,
        ROTATIONS if args.tta == "4x90" else (0,),
        rotate=args.rotate,
        keep=kept,
    )
    if distributed.rank():
        return None
    result = score(data, descriptors, folder, device, args, name)
    if args.results:
        told = {"method": name, "weights": weights, "dataset": args.dataset_path, "tta": args.tta}
        append_line(args.results, result_line(result, **told, command=shlex.join(["python", *sys.argv])))
        logging.info(f"A line is added to {args.results}: python -m experiments.leaderboard {args.results}")
    return result


def score(data, descriptors, folder, device, args, name):
    """-> Evaluation, after its lines, files and picture."""
    result = score_sets(data, descriptors, search=args.search, device=device)
    for line in result.notes + result.lines():
        logging.info(line)
    write_results(folder / "results.json", result, checkpoint=args.resume, model=name, dataset=args.dataset_path)
    write_predictions(folder / "predictions.csv", result)
    picture = evaluation_figure(result, seed=args.seed)
    if picture:
        figures.save(picture, folder / "predictions.jpg")
    logging.info(f"Results, predictions and a picture of some are in {folder}")
    return result


if __name__ == "__main__":
    arguments = parse_arguments()
    run(main, arguments)
