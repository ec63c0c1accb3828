"""A checkpoint -> recalls of the six evaluation sets: python eval.py --resume CHECKPOINT --dataset_path FOLDER

Without --resume a fresh model is evaluated, made by the same flags as in train.py. With --method it is a published one
(docs/models.md): python eval.py --method cosplace megaloc --dataset_path FOLDER --results results.csv
"""

import logging
import shlex
import sys
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from datasets.build.cache import cache_note
from datasets.sets import EvaluationData, load_evaluation_data
from methods import METHODS, load_method
from models.config import add_model_arguments, model_config
from models.earthloc import build_model, load_model
from models.weights import weights_fingerprint
from retrieval.describe import ROTATIONS, Describer, ImageFiles, batches_of, image_loader
from retrieval.evaluation import (
    Evaluation,
    describe_sets,
    evaluation_figure,
    score_sets,
    write_predictions,
    write_results,
)
from retrieval.leaderboard import append_line, result_line
from retrieval.search import SEARCHES
from retrieval.store import tidy
from utils import distributed, figures
from utils.arguments import add_shared, make_parser, run
from utils.logs import make_log_dir, own_folder, setup_logging
from utils.precision import chosen_precision, require_device


def parse_arguments(argv: list[str] | None = None) -> Namespace:
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--resume", help="checkpoint, or a bare state dict; its shape goes before the model flags")
    told = (
        f"methods of others instead: {', '.join(METHODS)}, or a .py file with one of yours; --weights is then a file "
    )
    told += "or folder with the published weights, where they can't be fetched"
    add("--method", nargs="+", metavar="NAME", help=told)
    add("--results", help="a CSV file that gets a line; python -m experiments.leaderboard FILE shows it")
    add("--tta", choices=("4x90", "none"), default="4x90", help="four rotations, or one")
    turned = "what is turned; queries: a quarter of the descriptors to make, keep and search"
    add("--rotate", choices=("database", "queries"), default="database", help=turned)
    ways = "flat: exact too, in plain float32; compressed: little memory, may miss neighbours"
    add("--search", choices=SEARCHES, default="exact", help=ways)
    kept = (
        "folder where descriptors are kept, so that none is made twice; none: in memory only, as always with several "
    )
    add("--descriptors", default="logs/descriptors", help=kept + "processes")
    add("--forget_descriptors", action="store_true", help="remove what was kept there for other models than this one")
    shared = "dataset_path", "batch_size", "num_workers", "device", "precision", "process_timeout", "seed"
    add_shared(parser, *shared, log_dir="eval")
    add_model_arguments(parser)
    return parser.parse_args(argv)


def main(args: Namespace) -> Evaluation | list[Evaluation] | None:
    """Of several methods a list; None in all but the first of several processes, which only help to describe the
    images."""
    if args.method and args.resume:
        raise ValueError("--method and --resume are two models: give one of them")
    if args.method and args.weights not in ("imagenet", "none") and len(args.method) > 1:
        raise ValueError(f"--weights {args.weights}: fits one --method, and there are {len(args.method)}")
    with distributed.processes(require_device(args.device), args.process_timeout) as device:
        folder = distributed.from_first(lambda: make_log_dir(args.log_dir))
        own_folder(folder).mkdir(parents=True, exist_ok=True)
        setup_logging(own_folder(folder), args)
        torch.manual_seed(args.seed)
        data = load_evaluation_data(args.dataset_path)
        if args.method:
            return evaluate_methods(args, data, folder, device)
        # A checkpoint says its own shape; the model flags are for a fresh model.
        model = load_model(args.resume) if args.resume else build_model(model_config(args), args.weights)
        shape = model.config
        return evaluate(model, shape.image_size, data, folder, device, args, shape.name, args.resume or args.weights)


def evaluate_methods(
    args: Namespace, data: EvaluationData, folder: Path, device: torch.device
) -> Evaluation | list[Evaluation] | None:
    """Evaluation of the one --method, a list of several, each in a folder of its own. One whose weights can't be had is
    told and left out; RuntimeError says so when the others are done."""
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
        results.append(evaluate(model, model.image_size, data, place, device, args, name, told))
        logging.info(f"That was {name}")
    if lacking:
        raise RuntimeError(f"{len(lacking)} of {len(args.method)} methods are left out: {', '.join(lacking)}")
    return results if len(results) > 1 else results[0]


def database_sample(
    data: EvaluationData, image_size: int, batch_size: int, num_workers: int, device: torch.device, count: int = 512
) -> Iterator[Tensor]:
    """Yields some of the database's images, always the same, in batches (B, 3, S, S) float RGB in [0, 1]."""
    rows = data.database_rows
    rows = np.random.default_rng(0).permutation(rows)[:count]
    files = ImageFiles([data.database.root / data.database.paths[row] for row in rows], image_size)
    batches = batches_of(np.arange(len(files)), batch_size)
    for _, images, errors in image_loader(files, batches, batch_size, num_workers, device):
        readable = [not error for error in errors]
        if any(readable):
            yield images[readable].to(device).float() / 255


def evaluate(
    model: nn.Module,
    image_size: int,
    data: EvaluationData,
    folder: Path,
    device: torch.device,
    args: Namespace,
    name: str,
    weights: str,
) -> Evaluation | None:
    """None in all but the first of several processes. name, weights: for the lines of --results."""
    model = model.to(device, memory_format=torch.channels_last).eval()
    if note := cache_note(args.dataset_path, image_size):
        logging.info(note)
    how = args.batch_size, args.num_workers, device, chosen_precision(args.precision, device)
    describer = Describer(model, image_size, *how, ROTATIONS if args.tta == "4x90" else (0,))
    kept = None if args.descriptors == "none" or distributed.world() > 1 else args.descriptors
    if kept:
        tidy(kept, describer.fingerprint, args.forget_descriptors)
    descriptors, data = describe_sets(describer, data, args.rotate, kept)
    if distributed.rank():
        return None
    result = score_sets(data, descriptors, search=args.search, device=device)
    for line in result.notes + result.lines():
        logging.info(line)
    # The path may hold other weights tomorrow.
    resumed = {"checkpoint": args.resume, "fingerprint": weights_fingerprint(model) if args.resume else None}
    write_results(folder / "results.json", result, **resumed, model=name, dataset=args.dataset_path)
    write_predictions(folder / "predictions.csv", result)
    picture = evaluation_figure(result, seed=args.seed)
    if picture:
        figures.save(picture, folder / "predictions.jpg")
    logging.info(f"Results, predictions and a picture of some are in {folder}")
    if args.results:
        told = {"method": name, "weights": weights, "dataset": args.dataset_path, "tta": args.tta}
        append_line(args.results, result_line(result, **told, command=shlex.join(["python", *sys.argv])))
        logging.info(f"A line is added to {args.results}: python -m experiments.leaderboard {args.results}")
    return result


if __name__ == "__main__":
    run(main, parse_arguments())
