"""A checkpoint -> recalls of the six evaluation sets: python eval.py --resume CHECKPOINT --dataset_path FOLDER

Without --resume a fresh model is evaluated, made by the same flags as in train.py.
"""

import logging

import torch

from datasets.build.cache import cache_note
from datasets.sets import load_evaluation_data
from models.config import add_model_arguments, model_config
from models.earthloc import build_model, load_model
from retrieval.describe import ROTATIONS, SEARCHES
from retrieval.evaluation import describe_sets, evaluation_figure, score_sets, write_predictions, write_results
from retrieval.store import model_fingerprint, tidy
from utils import distributed, figures
from utils.arguments import make_parser, positive, run, whole
from utils.logs import make_log_dir, setup_logging
from utils.precision import PRECISION_HELP, PRECISIONS, default_precision, require_device


def parse_arguments(argv=None):
    parser = make_parser(__doc__)
    parser.add_argument("--resume", help="checkpoint, or a bare state dict; its shape goes before the model flags")
    parser.add_argument("--dataset_path", required=True, help="folder with database/, queries/ and the intersections")
    parser.add_argument("--log_dir", default="eval", help="results go to logs/LOG_DIR/date_time")
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
    """-> Evaluation; None in all but the first of several processes, which only help to describe the images."""
    with distributed.processes(require_device(args.device), args.process_timeout) as device:
        precision = default_precision(device) if args.precision == "auto" else args.precision
        folder = distributed.from_first(lambda: make_log_dir(args.log_dir))
        own = folder / f"rank{distributed.rank()}" if distributed.rank() else folder
        own.mkdir(parents=True, exist_ok=True)
        setup_logging(own, args)
        torch.manual_seed(args.seed)
        data = load_evaluation_data(args.dataset_path)
        # A checkpoint says its own shape; the model flags are for a fresh model.
        model = load_model(args.resume) if args.resume else build_model(model_config(args), args.weights)
        model = model.to(device, memory_format=torch.channels_last).eval()
        note = cache_note(args.dataset_path, model.config.image_size)
        if note:
            logging.info(note)
        kept = None if args.descriptors == "none" or distributed.world() > 1 else args.descriptors
        if kept:
            tidy(kept, model_fingerprint(model, model.config.image_size, precision), args.forget_descriptors)
        descriptors, data = describe_sets(
            model,
            data,
            model.config.image_size,
            args.batch_size,
            args.num_workers,
            device,
            precision,
            ROTATIONS if args.tta == "4x90" else (0,),
            rotate=args.rotate,
            keep=kept,
        )
        first = distributed.rank() == 0
    return score(data, descriptors, folder, device, args) if first else None


def score(data, descriptors, folder, device, args):
    """-> Evaluation, after its lines, files and picture."""
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
    arguments = parse_arguments()
    run(main, arguments)
