"""Train EarthLoc: python train.py --dataset_path FOLDER, or python train.py @presets/demo.args

The recipe is the paper's (sec. 4 and 5.1) unless a flag says otherwise; presets/ holds whole recipes. Checkpoints,
logs and pictures go to logs/LOG_DIR/date_time; python eval.py --resume …/best.pt evaluates one.

A signal (SIGTERM, SIGINT, SIGUSR1) stops it at the next iteration with exit code 75; --resume goes on with the same
bits. Several GPUs or machines: torchrun --nproc_per_node N train.py …
"""

import logging
from argparse import Namespace
from contextlib import closing, nullcontext
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter

from augmentations.year_wise import GROUPS, Augmentation
from datasets.batches import DRAWS, BatchLoader
from datasets.build.cache import cache_note
from datasets.kinds import PhotoPairs, Quadruplets, join, paths_of
from datasets.names import DATABASE_YEAR
from datasets.pairs import PairDataset, read_pairs
from datasets.regions import RegionDataset, Regions, source_size
from datasets.sets import EvaluationData, load_validation_data
from datasets.training import iteration_seed, neutral_pairs, read_regions, serve_sample
from losses import LOSSES, JointLoss, scalars
from models.config import ModelConfig, add_model_arguments, model_config
from models.earthloc import EarthLoc, build_model
from models.whitening import whiten
from retrieval.describe import ROTATIONS, Describer
from retrieval.reclustering import make_clusters, save_clusters_figure, sizes_of
from retrieval.validation import validate
from utils import distributed
from utils.arguments import WORKERS, add_run_arguments, make_parser, positive, whole
from utils.arguments import run as run_script
from utils.logs import Meter, own_folder
from utils.loop import LOOP_FLAGS, Outcome, guarded_update, launch, run_loop
from utils.precision import autocast, chosen_precision
from utils.runs import Run, find_checkpoint, go_on, make_optimizer
from utils.schedules import learning_rate
from utils.settings import add_settings, chosen_settings, make
from utils.signals import Stop
from utils.transfer import to_device


def parse_arguments(argv: list[str] | None = None) -> Namespace:
    parser = make_parser(__doc__)
    add = parser.add_argument_group("data").add_argument
    add("--dataset_path", default="data", help="folder with database/, queries/ and the intersections")
    positives = "of an image: other years, views of itself, or photos of its ground (docs/training.md)"
    add("--positives", choices=("years", "views", "photos", "years+photos"), default="years", help=positives)
    add("--pair_iou", type=float, default=0.2, help="least overlap of a photo and an image that are a pair")
    add("--source_size", type=positive, help="pixels a side as loaded; default: 1.6 × image_size, to a power of two")
    add("--num_workers", **WORKERS)
    add("--max_unreadable", type=float, default=0.05, help="share of regions with unreadable images that stops the run")
    add = parser.add_argument_group("batches (paper, sec. 4.2)").add_argument
    add("--batch_size", type=positive, default=32, help="regions of four years, or pairs, or each; of all processes")
    add("--batches", choices=("clustered", "random"), default="clustered")
    add("--num_clusters", type=positive, default=200)
    add("--cluster_draw", choices=DRAWS, default="size", help="by size, uniform (released), by share of photos")
    add("--recluster_every", type=positive, default=5000, help="iterations")
    group = parser.add_argument_group("augmentation (paper, sec. 4.3)")
    group.add_argument("--augmentation", choices=GROUPS, default="year", help="what shares one random draw")
    add_settings(group, {"augmentation": Augmentation})
    group = parser.add_argument_group("loss (paper, sec. 4.4)")
    group.add_argument("--loss", choices=LOSSES, default="multi_similarity")
    group.add_argument("--pair_loss", choices=LOSSES, default="pairwise", help="of pairs with photos")
    group.add_argument("--neutral", choices=("on", "off"), default="on", help="off: shared ground makes no exception")
    add_settings(group, LOSSES)
    add = parser.add_argument_group("optimisation (paper, sec. 5.1)").add_argument
    add("--iterations", type=positive, default=50_000)
    add("--lr", type=float, default=1e-4)
    add("--lr_schedule", choices=("constant", "cosine"), default="constant")
    add("--warmup", type=whole, default=0, help="iterations over which lr rises from 0")
    whitened = "of the last layer (docs/decisions.md), and of netvlad's centres"
    add("--fc_init", choices=("random", "whitening"), default="random", help=whitened)
    add("--fc_std", type=float, default=1.0, help="scale of the whitening: larger moves slower")
    add("--fc_regulariser", type=float, default=0.1, help="of the whitening, times the mean variance")
    add = add_run_arguments(parser, "default", validate_every="recluster_every").add_argument
    add("--compile", action="store_true", help="torch.compile the network: minutes before the first step")
    add_model_arguments(parser)
    args = parser.parse_args(argv)
    args.source_size = args.source_size or source_size(args.image_size)
    args.validate_every = args.validate_every or args.recluster_every
    args.save_every = args.save_every or args.validate_every
    return args


def make_loss(args: Namespace, num_regions: int) -> nn.Module:
    """Of the kinds of groups that a batch holds; their labels are regions."""
    names = {"years": args.loss} if args.positives != "photos" else {}
    names |= {"photos": args.pair_loss} if "photos" in args.positives else {}
    known = {"num_regions": num_regions, "descriptor_dim": args.descriptor_dim}
    losses = {kind: make(LOSSES[name], chosen_settings(args, LOSSES[name]), **known) for kind, name in names.items()}
    return JointLoss(losses, (4 * args.batch_size, 2 * args.batch_size)) if len(losses) > 1 else losses.popitem()[1]


def prepare(args: Namespace) -> tuple[Regions, BatchLoader, Augmentation, EvaluationData | None]:
    """-> regions, loader, augmentation and validation data, as the flags have them."""
    if note := cache_note(args.dataset_path, args.source_size):
        logging.info(note)
    regions = read_regions(args.dataset_path, args.batch_size)
    shown = regions.views_of(DATABASE_YEAR) if args.positives == "views" else regions
    loader = BatchLoader(RegionDataset(shown, args.source_size), args.num_workers, args.device)
    validation = load_validation_data(args.dataset_path)
    if validation is None:
        logging.info(f"{args.dataset_path} has no photos, so no validation: best.pt is the newest")
    augment = Augmentation(args.image_size, args.augmentation, **chosen_settings(args, Augmentation))
    return regions, loader, augment, validation


def prepare_photos(args: Namespace, regions: Regions) -> PhotoPairs | None:
    """-> pairs with photos and their loader; None where the flags want none."""
    if "photos" not in (args.cluster_draw, *args.positives.split("+")):
        return None
    pairs = read_pairs(args.dataset_path, regions, args.pair_iou, args.batch_size)
    loader = BatchLoader(PairDataset(pairs, args.source_size), args.num_workers, args.device)
    return PhotoPairs(pairs, loader, args.max_unreadable)


def start(
    args: Namespace, regions: Regions, loader: BatchLoader, augment: Augmentation, folder: Path, device: torch.device
) -> Run:
    """-> The Run to go on with, or a fresh one."""
    path, checkpoint = find_checkpoint(args.resume, args.log_dir, "model_config", "train.py")
    if checkpoint:
        model = EarthLoc(ModelConfig.from_dict(checkpoint["model_config"]))
        model.load_state_dict(checkpoint["model"])
    else:
        model = build_model(model_config(args), args.weights)
    model = model.to(device, memory_format=torch.channels_last)
    loss_fn = make_loss(args, len(regions)).to(device)
    run = Run(model, make_optimizer(model, args.lr, loss_fn), loss_fn, {"clusters": None, "shares": None})
    if checkpoint:
        go_on(run, path, checkpoint, folder, vars(args))
    else:
        run.save_weights(folder / "initial.pt")  # what the trained model is compared with
        if args.fc_init == "whitening":
            batches = lambda: serve_sample(loader, len(regions), args.batch_size, args.seed)
            how = args.fc_std, args.fc_regulariser, device, chosen_precision(args.precision, device)
            whiten(model, batches, augment, args.seed, *how)
    run.network = distributed.wrap(model)
    if args.compile:
        model.compile()
    return run


def update(
    run: Run, views: Tensor, labels: Tensor, neutral: Tensor | None, loss_fn: nn.Module, lr: float, precision: str
) -> tuple[Tensor, Tensor, Tensor]:
    """One step on views (N, 3, S, S) with labels (N,) and neutral (N, N) or None -> loss, norm of the gradient, both
    0-d, and descriptors (N, D) float32.

    Low precision only around the network, the loss in float32. Of several processes each has its part of the views, and
    labels, neutral and what is returned are those of all.
    """

    def forward():
        with autocast(views.device, precision):
            descriptors = run.network(views.contiguous(memory_format=torch.channels_last))
        descriptors = descriptors.to(torch.promote_types(descriptors.dtype, torch.float32))
        own = loss_fn.own_sizes(distributed.world()) if isinstance(loss_fn, JointLoss) else len(descriptors)
        whole = distributed.gather(descriptors).unflatten(0, (-1, len(descriptors)))
        descriptors = torch.cat([each.flatten(0, 1) for each in whole.split(own, dim=1)])
        # Mining drops nan similarities: the loss would be a harmless 0.
        loss = torch.where(torch.isfinite(descriptors).all(), loss_fn(descriptors, labels, neutral), torch.nan)
        return loss, descriptors.detach()

    return guarded_update(run, lr, forward)


def train(args: Namespace, folder: Path, device: torch.device, stop: Stop) -> bool:
    """The paper's method, from where the run stands -> whether it came to the last iteration: see utils.loop."""
    precision, mine = chosen_precision(args.precision, device), distributed.part(args.batch_size)
    with stop.at_once():
        regions, loader, augment, validation = prepare(args)
        photos = prepare_photos(args, regions)
    quadruplets = Quadruplets(regions, loader, args.max_unreadable)
    kinds = [quadruplets] * (args.positives != "photos") + [photos] * ("photos" in args.positives)
    groups = [kind.groups for kind in kinds]
    describing = args.image_size, 4 * args.batch_size, args.num_workers, device, precision

    def cluster(period: int):
        """Clusters of look-alike regions, random ones first: each batch comes from one of them (sec. 4.2)."""
        drawn_by = photos if args.cluster_draw == "photos" else None
        clustering = args.batches, args.num_clusters, args.batch_size, args.seed, quadruplets.note, drawn_by
        clusters, shares = make_clusters(Describer(run.model, *describing), regions, period, *clustering)
        run.memory |= {"clusters": clusters, "shares": shares}
        logging.info(f"Iteration {run.iteration}: {sizes_of(clusters)}")
        if period == 1 and args.batches == "clustered" and distributed.rank() == 0:
            save_clusters_figure(folder, regions, clusters)

    def step(meter: Meter):
        period, since = divmod(run.iteration, args.recluster_every)
        if since == 0 or kinds[0].served is None:
            with stop.at_once():
                if since == 0 and quadruplets in kinds:
                    cluster(period)
                when = args.batch_size, run.iteration, args.recluster_every, args.iterations, args.seed, mine
                for kind in kinds:
                    kind.serve(run.memory, args.cluster_draw, *when)
            meter.restart()
        with meter.waiting(), stop.at_once():
            loaded = [next(kind.served) for kind in kinds]
        rows = [kind.receive(own, errors) for kind, (own, _, errors) in zip(kinds, loaded)]

        # One augmentation a column: a year (sec. 4.3), photos, their images.
        torch.manual_seed(seed := iteration_seed(args.seed, run.iteration))
        draws, views = torch.Generator().manual_seed(seed), []
        for kind, (_, images, _) in zip(kinds, loaded):
            views.append(augment(images.to(device, non_blocking=True), draws, mine, args.batch_size))
            if run.iteration == 0:
                kind.save_picture(views[-1], own_folder(folder))

        # The same region is positive, shared ground is neutral, the rest is negative (sec. 4.4).
        footprints, places, labels = join(groups, rows)
        told = [labels] if args.neutral == "off" else [labels, neutral_pairs(footprints, places)]
        labels, neutral = (*to_device(told, device), None)[:2]
        lr = learning_rate(run.iteration, args.lr, args.lr_schedule, args.iterations, args.warmup)
        views = torch.cat([each.flatten(0, 1) for each in views])
        loss, norm, descriptors = update(run, views, labels, neutral, run.loss_fn, lr, precision)
        logged = lambda: {**scalars(run.loss_fn, descriptors, labels, neutral), "lr": lr}
        kept = lambda: {"views": views, "paths": paths_of(groups, rows)}
        return Outcome(run.iteration - 1, loss, norm, len(labels), logged, kept)

    def validating(writer: SummaryWriter):
        return validate(validation, writer, Describer(run.model, *describing, ROTATIONS, progress=False), run.iteration)

    with closing(loader), closing(photos.loader) if photos else nullcontext():
        with stop.at_once():
            run = start(args, regions, loader, augment, folder, device)
        due = {name: getattr(args, name) for name in LOOP_FLAGS}
        finished = run_loop(run, step, validating, folder, stop, vars(args), pause_every=args.recluster_every, **due)
    if finished:
        best = f"best validation R@1 {run.best:.1f}" if run.best >= 0 else "without validation"
        how = f"python eval.py --resume {folder / 'best.pt'} --dataset_path {args.dataset_path}"
        logging.info(f"Done: {args.iterations} iterations, {best}. Evaluate with: {how}")
    return finished


def main(args: Namespace) -> Path:
    """-> the run's folder. Leaves with exit code 75 after a signal."""
    return launch(train, args)


if __name__ == "__main__":
    run_script(main, parse_arguments())
