"""A checkpoint -> the small file to share: python -m experiments.export logs/…/last.pt model.safetensors

Half precision, shape and preprocessing inside; eval.py --resume and train.py --weights read it as it is.
"""

from argparse import Namespace
from pathlib import Path

from models.earthloc import load_model
from models.weights import save_safetensors
from utils.arguments import add_shared, make_parser, run


def main(args: Namespace) -> None:
    save_safetensors(load_model(args.checkpoint), args.output)
    print(f"{args.output}: {Path(args.output).stat().st_size / 1e6:.1f} MB")


def parse_arguments(argv: list[str] | None = None) -> Namespace:
    parser = make_parser(__doc__)
    parser.add_argument("checkpoint")
    parser.add_argument("output", help="file to write, .safetensors")
    add_shared(parser)
    return parser.parse_args(argv)


if __name__ == "__main__":
    run(main, parse_arguments())
