"""A checkpoint -> recalls of the six evaluation sets: python eval.py --resume CHECKPOINT --dataset_path FOLDER

Without --resume a fresh model is evaluated, made by the same flags as in train.py.
"""

import logging
from dataclasses import fields, replace

import torch

from datasets.evaluation import load_evaluation_data
from models.earthloc import EarthLoc, ModelConfig, build_model
from models.weights import fit_model_, infer_config, our_names
from utils import figures
from utils.arguments import add_model_arguments, make_parser
from utils.checkpoint import load_checkpoint
from utils.evaluation import evaluate, write_predictions, write_results
from utils.logs import make_log_dir, setup_logging
from utils.retrieval import ROTATIONS


def parse_arguments():
    parser = make_parser(__doc__)
    parser.add_argument("--resume", help="checkpoint, or a bare state dict; its shape goes before the model flags")
    parser.add_argument("--dataset_path", required=True, help="folder with database/, queries/ and the intersections")
    parser.add_argument("--log_dir", default="eval", help="results go to logs/LOG_DIR/date_time")
    parser.add_argument("--tta", choices=("4x90", "none"), default="4x90", help="rotations of the database images")
    parser.add_argument("--batch_size", type=int, default=32, help="images described at a time")
    parser.add_argument("--num_workers", type=int, default=2)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="bf16", help="of the network")
    parser.add_argument("--seed", type=int, default=0, help="of a fresh model, and of the queries in the picture")
    add_model_arguments(parser)
    return parser.parse_args()


def load_model(path, image_size):
    """A checkpoint of train.py, or a bare state dict, whose shape is read from its names and sizes -> EarthLoc.

    image_size is used only where neither says it: a bare state dict with the aggregator "gem".
    """
    checkpoint = load_checkpoint(path)
    state, config = our_names(checkpoint["model"], str(path)), checkpoint.get("config")
    config = ModelConfig(**config) if config else infer_config(state)
    if config.aggregator == "gem" and not checkpoint.get("config"):
        config = replace(config, image_size=image_size)
    model = EarthLoc(config)
    fit_model_(model, state, str(path))
    return model


def make_model(args):
    """A fresh model from the model flags."""
    config = ModelConfig(**{each.name: getattr(args, each.name) for each in fields(ModelConfig)})
    return build_model(config, args.weights)


def main(args):
    folder = make_log_dir(args.log_dir)
    setup_logging(folder, args)
    torch.manual_seed(args.seed)
    data = load_evaluation_data(args.dataset_path)
    model = load_model(args.resume, args.image_size) if args.resume else make_model(args)
    result = evaluate(model.to(args.device), data, model.config.image_size, args.batch_size, args.num_workers,
                      args.device, args.precision, ROTATIONS if args.tta == "4x90" else (0,))
    for line in result.notes + result.lines():
        logging.info(line)
    write_results(folder / "results.json", result, checkpoint=args.resume, dataset=args.dataset_path)
    write_predictions(folder / "predictions.csv", result)
    picture = figures.evaluation_figure(result, seed=args.seed)
    if picture:
        figures.save(picture, folder / "predictions.jpg")
    logging.info(f"Results, predictions and a picture of some are in {folder}")
    return result


if __name__ == "__main__":
    main(parse_arguments())
