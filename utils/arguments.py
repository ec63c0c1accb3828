"""What the scripts' command lines share: flags files (@presets/paper.args), flags of the model and the augmentation."""

import argparse
import shlex
import sys

import torch

from augmentations.year_wise import Augmentation
from models.aggregators import AGGREGATORS
from models.backbone import FROZEN_BATCHNORM
from models.config import ModelConfig
from utils.memory import keep_freed_blocks
from utils.precision import PRECISIONS
from utils.settings import add_settings, chosen_settings


class Parser(argparse.ArgumentParser):
    """argparse with flags files: one or more flags a line, # starts a comment, later flags win over earlier ones."""

    def convert_arg_line_to_args(self, line):
        return shlex.split(line, comments=True)


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows defaults, but for None, which says nothing."""

    def _get_help_string(self, action):
        return action.help if action.default is None else super()._get_help_string(action)


def whole(text):
    """Type of a flag: an integer of at least 0."""
    return _at_least(0, text)


def positive(text):
    """Type of a flag: an integer of at least 1."""
    return _at_least(1, text)


def _at_least(low, text):
    try:
        value = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no integer") from None
    if value < low:
        raise argparse.ArgumentTypeError(f"{value} is less than {low}")
    return value


def make_parser(description):
    """-> a parser that shows defaults and reads @FILE."""
    return Parser(description=description, fromfile_prefix_chars="@", allow_abbrev=False, formatter_class=HelpFormatter)


def add_model_arguments(parser):
    """One flag for each field of ModelConfig and each setting of an aggregator, and --weights."""
    group = parser.add_argument_group("model (paper, sec. 5.1)")
    group.add_argument(
        "--backbone", default="resnet50", help="any of timm's ResNets, EfficientNets, ConvNeXts, ViTs … by name"
    )
    group.add_argument(
        "--weights",
        default="imagenet",
        help="imagenet (the backbone's own pre-trained weights), none "
        "(from scratch, nothing frozen), or a state dict's file",
    )
    group.add_argument(
        "--cut_after",
        help="last kept stage; default: the deepest of stride 16 or less, as layer3 of a "
        "ResNet, blocks4 of efficientnet_lite0, stages2 of a ConvNeXt, a ViT's last",
    )
    group.add_argument(
        "--freeze_until",
        help="last frozen stage, or none; default: the deepest of stride 8, layer2, "
        "blocks2, stages1, of a ViT all but four; nothing with --weights none",
    )
    group.add_argument(
        "--frozen_batchnorm",
        choices=FROZEN_BATCHNORM,
        default="fixed",
        help="of frozen stages; adapt: weights alone are frozen, as in the released code",
    )
    group.add_argument("--aggregator", choices=list(AGGREGATORS), default="mixvpr")
    group.add_argument("--descriptor_dim", type=positive, default=4096)
    group.add_argument("--image_size", type=positive, default=320, help="pixels a side, in training and in evaluation")
    add_settings(group, AGGREGATORS)


def add_augmentation_arguments(group, groups, **defaults):
    """Flags of augmentations.year_wise.Augmentation, with other defaults where given."""
    group.add_argument(
        "--augmentation",
        choices=groups,
        default=defaults.get("augmentation", "year"),
        help="what shares one random draw",
    )
    for name, default, text in (
        ("rotation", 45.0, "degrees"),
        ("perspective", 0.5, "distortion scale"),
        ("min_crop", 1.0, "smallest crop, as a share of the largest; below 1 it zooms in at random"),
        ("aspect", 1.0, "largest stretch of one side against the other"),
        ("brightness", 0.9, "of the colour jitter"),
        ("contrast", 0.9, "of the colour jitter"),
        ("saturation", 0.9, "of the colour jitter"),
        ("hue", 0.0, "of the colour jitter"),
        (
            "clouds",
            0.0,
            "largest share of an image under clouds; with any of clouds, haze and exposure, half of the "
            "images become photos of that kind",
        ),
        ("haze", 0.0, "largest opacity of the air"),
        ("exposure", 0.0, "largest strength of a camera's automatic exposure"),
    ):
        group.add_argument(f"--{name}", type=float, default=defaults.get(name, default), help=text)


def augmentation_of(args, size):
    """Parsed flags -> Augmentation to images of size × size."""
    names = (
        "rotation",
        "perspective",
        "min_crop",
        "aspect",
        "brightness",
        "contrast",
        "saturation",
        "hue",
        "clouds",
        "haze",
        "exposure",
    )
    return Augmentation(size, args.augmentation, **{name: getattr(args, name) for name in names})


def add_run_arguments(parser, log_dir, validate_every):
    """-> the group of flags that both trainers have. validate_every: iterations, or the flag that is its default."""
    group = parser.add_argument_group("run")
    group.add_argument("--log_dir", default=log_dir, help="outputs go to logs/LOG_DIR/date_time")
    group.add_argument(
        "--resume",
        help="what to go on with: a last.pt, a run's folder (its newest whole checkpoint), "
        "a folder of runs, or auto: logs/LOG_DIR, from the start if it has none yet. "
        "Flags are those of the command line",
    )
    group.add_argument("--save_every", type=positive, help="iterations between last.pt; default: validate_every")
    group.add_argument(
        "--max_skips",
        type=whole,
        default=0,
        help="updates with a nan or infinite loss or gradient that are left out before the run stops",
    )
    group.add_argument(
        "--process_timeout", type=float, default=1800, help="seconds that processes wait for one that does not answer"
    )
    if isinstance(validate_every, int):
        group.add_argument("--validate_every", type=positive, default=validate_every, help="iterations")
    else:
        group.add_argument("--validate_every", type=positive, help=f"iterations; default: {validate_every}")
    group.add_argument(
        "--keep_every",
        type=positive,
        help="iterations between weights that are kept, for a curve (python -m experiments.curve)",
    )
    group.add_argument("--log_every", type=positive, default=50, help="iterations between scalars")
    group.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    group.add_argument(
        "--precision",
        choices=("auto", *PRECISIONS),
        default="auto",
        help="of the network, not of the loss; auto: bf16 where the hardware multiplies in it",
    )
    group.add_argument("--seed", type=whole, default=0)
    group.add_argument("--traceback", action="store_true", help="show the traceback of an error")
    return group


def model_config(args):
    """Parsed flags -> ModelConfig. Raises ValueError naming the flag that does not fit."""
    return ModelConfig(
        args.backbone,
        args.cut_after,
        args.freeze_until,
        args.aggregator,
        args.descriptor_dim,
        args.image_size,
        chosen_settings(args, AGGREGATORS[args.aggregator]),
        args.frozen_batchnorm,
    )


def run(main, args):
    """main(args), with expected errors (bad data, files or flags) as one line on stderr and exit code 2."""
    keep_freed_blocks()
    try:
        return main(args)
    except (ValueError, OSError, RuntimeError) as error:
        if args.traceback:
            raise
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
