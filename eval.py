"""A checkpoint -> recalls of the six evaluation sets: python eval.py --resume CHECKPOINT --dataset_path FOLDER

Without --resume a fresh model is evaluated, made by the same flags as in train.py.
"""

import logging
from argparse import Namespace

import torch

from datasets.build.cache import cache_note
from datasets.sets import load_evaluation_data
from models.config import add_model_arguments, model_config
from models.earthloc import build_model, load_model
from retrieval.describe import ROTATIONS, Describer
from retrieval.evaluation import (
    Evaluation,
    describe_sets,
    evaluation_figure,
    score_sets,
    write_predictions,
    write_results,
)
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
    add_shared(
        parser,
        "dataset_path",
        "batch_size",
        "num_workers",
        "device",
        "precision",
        "process_timeout",
        "seed",
        log_dir="eval",
    )
    add_model_arguments(parser)
    return parser.parse_args(argv)


def main(args: Namespace) -> Evaluation | None:
    """None in all but the first of several processes, which only help to describe the images."""
    with distributed.processes(require_device(args.device), args.process_timeout) as device:
        folder = distributed.from_first(lambda: make_log_dir(args.log_dir))
        own_folder(folder).mkdir(exist_ok=True)
        setup_logging(own_folder(folder), args)
        torch.manual_seed(args.seed)
        data = load_evaluation_data(args.dataset_path)
        # A checkpoint says its own shape; the model flags are for a fresh model.
        model = load_model(args.resume) if args.resume else build_model(model_config(args), args.weights)
        model = model.to(device, memory_format=torch.channels_last).eval()
        if note := cache_note(args.dataset_path, model.config.image_size):
            logging.info(note)
        how = args.batch_size, args.num_workers, device, chosen_precision(args.precision, device)
        describer = Describer(model, model.config.image_size, *how, ROTATIONS if args.tta == "4x90" else (0,))
        kept = None if args.descriptors == "none" or distributed.world() > 1 else args.descriptors
        if kept:
            tidy(kept, describer.fingerprint, args.forget_descriptors)
        descriptors, data = describe_sets(describer, data, args.rotate, kept)
        first = distributed.rank() == 0
    if not first:
        return None
    result = score_sets(data, descriptors, search=args.search, device=device)
    for line in result.notes + result.lines():
        logging.info(line)
    write_results(folder / "results.json", result, checkpoint=args.resume, dataset=args.dataset_path)
    write_predictions(folder / "predictions.csv", result)
    picture = evaluation_figure(result, seed=args.seed)
    if picture:
        figures.save(picture, folder / "predictions.jpg")
    logging.info(f"Results, predictions and a picture of some are in {folder}")
    return result


if __name__ == "__main__":
    run(main, parse_arguments())
