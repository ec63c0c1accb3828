"""Train EarthLoc: python train.py --dataset_path FOLDER, or python train.py @presets/demo.args

The recipe is the paper's (sec. 4 and 5.1) unless a flag says otherwise; presets/ holds whole recipes. Checkpoints,
logs and pictures go to logs/LOG_DIR/date_time; python eval.py --resume …/best.pt evaluates one.
"""

import logging
import math
from dataclasses import asdict, dataclass

import numpy as np
import torch
from tqdm import tqdm

from augmentations.year_wise import GROUPS
from datasets.cache import cache_note
from datasets.evaluation import VALIDATION, load_evaluation_data
from datasets.images import read_image
from datasets.metadata import DATABASE_YEAR
from datasets.overlap import share_ground
from datasets.regions import BatchLoader, RegionDataset, Regions, random_clusters, schedule
from losses.contrastive import ContrastiveLoss
from losses.multi_similarity import MultiSimilarityLoss
from models.earthloc import EarthLoc, ModelConfig, build_model
from utils import figures
from utils.arguments import (add_augmentation_arguments, add_model_arguments, augmentation_of, make_parser,
                             model_config, run as run_script)
from utils.checkpoint import load_checkpoint, save_checkpoint
from utils.clustering import cluster
from utils.evaluation import evaluate
from utils.finite import finite_later
from utils.logs import Meter, make_log_dir, setup_logging
from utils.precision import PRECISIONS, autocast, default_precision, require_device
from utils.retrieval import describe


def parse_arguments(argv=None):
    parser = make_parser(__doc__)
    data = parser.add_argument_group("data")
    data.add_argument("--dataset_path", default="data", help="folder with database/, queries/ and the intersections")
    data.add_argument("--positives", choices=("years", "views"), default="years",
                      help="positives of an image: its region's other years, or augmented views of itself (Table 3)")
    data.add_argument("--source_size", type=int, help="pixels a side at which images are loaded, before the crop; "
                                                      "default: 1.6 × image_size")
    data.add_argument("--num_workers", type=int, default=4)
    batches = parser.add_argument_group("batches (paper, sec. 4.2)")
    batches.add_argument("--batch_size", type=int, default=32, help="regions a batch; each brings its four years")
    batches.add_argument("--batches", choices=("clustered", "random"), default="clustered")
    batches.add_argument("--num_clusters", type=int, default=200)
    batches.add_argument("--recluster_every", type=int, default=5000, help="iterations")
    augmentation = parser.add_argument_group("augmentation (paper, sec. 4.3)")
    add_augmentation_arguments(augmentation, GROUPS)
    loss = parser.add_argument_group("loss (paper, sec. 4.4)")
    loss.add_argument("--loss", choices=("multi_similarity", "contrastive"), default="multi_similarity")
    loss.add_argument("--neutral", choices=("on", "off"), default="on",
                      help="on: regions that share ground are no negatives; off: they are")
    loss.add_argument("--alpha", type=float, default=1.0)
    loss.add_argument("--beta", type=float, default=50.0)
    loss.add_argument("--base", type=float, default=0.0, help="lambda in the paper; margin of the contrastive loss")
    loss.add_argument("--epsilon", type=float, default=0.1, help="of the mining")
    steps = parser.add_argument_group("optimisation (paper, sec. 5.1)")
    steps.add_argument("--iterations", type=int, default=50_000)
    steps.add_argument("--lr", type=float, default=1e-4)
    steps.add_argument("--lr_schedule", choices=("constant", "cosine"), default="constant")
    steps.add_argument("--warmup", type=int, default=0, help="iterations over which lr rises from 0")
    steps.add_argument("--fc_init", choices=("random", "whitening"), default="random",
                       help="whitening: the last layer starts as a PCA whitening of what it gets (README, 'Plateau')")
    steps.add_argument("--fc_std", type=float, default=1.0, help="scale of the whitening: larger moves slower")
    steps.add_argument("--fc_regulariser", type=float, default=0.1, help="of the whitening, times the mean variance")
    system = parser.add_argument_group("run")
    system.add_argument("--log_dir", default="default", help="outputs go to logs/LOG_DIR/date_time")
    system.add_argument("--resume", help="a last.pt of a run to go on with; flags are those of the command line")
    system.add_argument("--validate_every", type=int, help="iterations; default: recluster_every")
    system.add_argument("--keep_every", type=int, help="iterations between weights that are kept, for a curve "
                                                       "(python -m experiments.curve)")
    system.add_argument("--log_every", type=int, default=50, help="iterations between scalars")
    system.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    system.add_argument("--precision", choices=("auto", *PRECISIONS), default="auto",
                        help="of the network; auto: bf16 where the hardware multiplies in it")
    system.add_argument("--compile", action="store_true",
                        help="torch.compile the network: minutes before the first step (experiments/speed_step.py)")
    system.add_argument("--seed", type=int, default=0)
    system.add_argument("--traceback", action="store_true", help="show the traceback of an error")
    add_model_arguments(parser)
    return parser.parse_args(argv)


def make_loss(args):
    if args.loss == "contrastive":
        return ContrastiveLoss(args.base or 0.5)
    return MultiSimilarityLoss(args.alpha, args.beta, args.base, args.epsilon)


@dataclass
class Run:
    """What a run is between two iterations, and all that a checkpoint has to hold.

    clusters: arrays of region rows, None before the first ones. best: highest validation R@1, -1 before the first one.
    What happens in an iteration depends on these, the seed and the iteration's number alone.
    """

    model: EarthLoc
    optimizer: torch.optim.Optimizer
    iteration: int = 0
    clusters: list | None = None
    best: float = -1.0

    def save_weights(self, path):
        save_checkpoint(path, {"model": self.model.state_dict(), "model_config": asdict(self.model.config)})

    def save(self, path, args):
        save_checkpoint(path, {
            "model": self.model.state_dict(), "model_config": asdict(self.model.config),
            "optimizer": self.optimizer.state_dict(), "iteration": self.iteration, "best": self.best,
            "clusters": [torch.as_tensor(each) for each in self.clusters],
            "args": {key: str(value) for key, value in vars(args).items()}})


def make_optimizer(model, lr):
    return torch.optim.Adam([each for each in model.parameters() if each.requires_grad], lr=lr, fused=True)


def fresh_run(args, device):
    """-> Run at iteration 0."""
    model = build_model(model_config(args), args.weights).to(device, memory_format=torch.channels_last)
    return Run(model, make_optimizer(model, args.lr))


def resume_run(path, lr, device):
    """Checkpoint -> the Run it was saved from. Raises ValueError where it holds weights only."""
    checkpoint = load_checkpoint(path)
    if "optimizer" not in checkpoint:
        raise ValueError(f"{path}: holds weights only; --resume wants a last.pt of train.py, --weights takes this file")
    model = EarthLoc(ModelConfig(**checkpoint["model_config"]))
    model.load_state_dict(checkpoint["model"])
    model = model.to(device, memory_format=torch.channels_last)
    optimizer = make_optimizer(model, lr)
    optimizer.load_state_dict(checkpoint["optimizer"])
    return Run(model, optimizer, checkpoint["iteration"], [each.numpy() for each in checkpoint["clusters"]],
               checkpoint["best"])


def read_regions(dataset_path, batch_size):
    """-> Regions with all years; those without are logged. Raises ValueError where a batch cannot be filled."""
    regions, incomplete = Regions.read(dataset_path)
    logging.info(f"{len(regions)} regions with all years")
    if incomplete:
        logging.info(f"{len(incomplete)} regions lack a year and are left out: {', '.join(incomplete[:10])} …")
        logging.debug(f"Regions that lack a year: {incomplete}")
    if len(regions) < batch_size:
        raise ValueError(f"{dataset_path}: {len(regions)} regions do not fill a batch; --batch_size {len(regions)} "
                         f"or smaller would")
    return regions


def year_files(regions, year):
    """Each region's image of one year."""
    column = regions.years.index(year)
    return [regions.root / paths[column] for paths in regions.paths]


def iteration_seed(seed, iteration):
    """The seed of all that is random in one iteration, whatever came before it."""
    return int(np.random.SeedSequence([seed, 3, iteration]).generate_state(1)[0])


def learning_rate(iteration, args):
    """Warm-up, then constant (the paper) or a cosine to zero."""
    warm = min(1.0, (iteration + 1) / args.warmup) if args.warmup else 1.0
    cosine = 0.5 * (1 + math.cos(math.pi * iteration / args.iterations)) if args.lr_schedule == "cosine" else 1.0
    return args.lr * warm * cosine


def whiten(model, loader, regions, augment, args, device, precision):
    """Sets the model's fc to the whitening of augmented views of up to 512 regions, in the mode that training uses."""
    rows = np.random.default_rng([args.seed, 1]).permutation(regions)[:512]
    batches = rows[:len(rows) // args.batch_size * args.batch_size].reshape(-1, args.batch_size)
    generator = torch.Generator().manual_seed(args.seed)
    features = []
    state = {key: value.clone() for key, value in model.state_dict().items()}
    model.train()
    with torch.no_grad(), autocast(device, precision):
        for _, images in tqdm(loader.serve(batches), total=len(batches), desc="whitening", leave=False):
            views = augment(images.to(device), generator).flatten(0, 1)
            features.append(model.aggregate(views.contiguous(memory_format=torch.channels_last)).float())
    model.load_state_dict(state)  # the passes moved BatchNorm's running statistics
    model.whiten_(torch.cat(features), std=args.fc_std, regulariser=args.fc_regulariser, generator=generator)


def make_clusters(model, regions, period, args, device, precision):
    """Clusters for one period: random ones first, then k-means of one year's descriptors (paper, sec. 4.2)."""
    if args.batches == "random":
        return [np.arange(len(regions))]
    if period == 0:
        return random_clusters(len(regions), args.num_clusters, args.batch_size, [args.seed, 4])
    descriptors, failures = describe(model, year_files(regions, DATABASE_YEAR), args.image_size, 4 * args.batch_size,
                                     args.num_workers, device, precision, label="describing regions")
    if failures:
        raise ValueError(failures[0][1])
    return cluster(descriptors[0], args.num_clusters, args.batch_size, args.seed + period, device)


def neutral_pairs(footprints, labels):
    """footprints (B, 4, 2) of the batch's regions, labels (N,) into them -> (N, N) bool: other regions, same ground."""
    shared = torch.from_numpy(share_ground(footprints, footprints)).to(labels.device)
    return shared[labels][:, labels] & (labels[:, None] != labels)


def update(run, views, labels, neutral, loss_fn, lr, device, precision):
    """One step on views (N, 3, S, S) with labels (N,) and neutral (N, N) or None -> loss, descriptors (N, D) float32.

    Low precision only around the network, the loss in float32. Raises RuntimeError before the update at a nan loss.
    """
    run.model.train()
    with autocast(device, precision):
        descriptors = run.model(views.contiguous(memory_format=torch.channels_last))
    descriptors = descriptors.float()
    # Mining drops nan similarities: the loss would be a harmless 0.
    loss = torch.where(torch.isfinite(descriptors).all(), loss_fn(descriptors, labels, neutral), torch.nan)
    is_finite = finite_later(loss)
    for group in run.optimizer.param_groups:
        group["lr"] = lr
    run.optimizer.zero_grad(set_to_none=True)
    loss.backward()
    if not is_finite():  # a GPU is busy with the backward pass while this waits for the forward pass
        raise RuntimeError(f"iteration {run.iteration}: the loss is {loss.item()}; nothing was updated, the last good "
                           f"checkpoints stay. A smaller --lr or --precision fp32 may help")
    run.optimizer.step()
    run.iteration += 1
    return loss.detach(), descriptors.detach()


def save_clusters_figure(folder, regions, clusters, shown=8, images=12):
    """Fig. 14: a row a cluster."""
    files = year_files(regions, DATABASE_YEAR)
    pictures = [[read_image(files[row], 128) for row in rows[:images]] for rows in clusters[:shown]]
    figures.save(figures.clusters_figure(pictures), folder / "clusters.jpg")


def validate(run, validation, writer, args, device, precision):
    """R@1 of the validation set, logged and written; None without one."""
    if not validation.sets:
        return None
    result = evaluate(run.model, validation, args.image_size, 4 * args.batch_size, args.num_workers, device, precision,
                      progress=False)
    logging.info(f"Iteration {run.iteration}: {result.lines()[0]}")
    score = result[VALIDATION].recalls[1]
    writer.add_scalar("validation/R@1", score, run.iteration)
    return score


def train(run, regions, loader, augment, validation, folder, args, device, precision):
    """From where the run stands to the last iteration: checkpoints, scalars and pictures go to the folder."""
    loss_fn = make_loss(args)
    meter = Meter(folder, run.iteration, args.iterations)
    served = None
    if run.iteration == 0:
        validate(run, validation, meter.writer, args, device, precision)
    while run.iteration < args.iterations:
        # New clusters from one year's descriptors, and the schedule up to the next ones.
        period, step = divmod(run.iteration, args.recluster_every)
        if step == 0:
            run.clusters = make_clusters(run.model, regions, period, args, device, precision)
            logging.info(f"Iteration {run.iteration}: {len(run.clusters)} clusters of {min(map(len, run.clusters))} "
                         f"to {max(map(len, run.clusters))} regions")
            if period == 1 and args.batches == "clustered":
                save_clusters_figure(folder, regions, run.clusters)
        if step == 0 or served is None:
            count = min(args.recluster_every, args.iterations - period * args.recluster_every)
            batches = schedule(run.clusters, args.batch_size, count, [args.seed, 2, period])
            served = loader.serve(batches[step:])
            meter.restart()

        with meter.waiting():
            rows, images = next(served)
        seed = iteration_seed(args.seed, run.iteration)
        torch.manual_seed(seed)
        views = augment(images.to(device, non_blocking=True), torch.Generator().manual_seed(seed))
        if run.iteration == 0:
            figures.save(figures.batch_figure(views[:20], regions.years), folder / "batch.jpg")
        labels = torch.arange(len(rows), device=device).repeat_interleave(len(regions.years))
        neutral = neutral_pairs(regions.footprints[rows.numpy()], labels) if args.neutral == "on" else None
        lr = learning_rate(run.iteration, args)
        loss, descriptors = update(run, views.flatten(0, 1), labels, neutral, loss_fn, lr, device, precision)

        last = run.iteration == args.iterations
        meter.count(len(labels))
        if run.iteration % args.log_every == 0 or last:
            anchors, pairs = loss_fn.mined_shares(descriptors, labels, neutral)
            meter.log(run.iteration, {"loss": loss, "mined/anchors": anchors, "mined/pairs": pairs, "lr": lr})
        if run.iteration % args.validate_every == 0 or last:
            score = validate(run, validation, meter.writer, args, device, precision)
            if score is None or score > run.best:
                run.best = run.best if score is None else score
                run.save(folder / "best.pt", args)
            run.save(folder / "last.pt", args)
            meter.restart()
        if args.keep_every and run.iteration % args.keep_every == 0:
            run.save_weights(folder / f"iteration_{run.iteration:06d}.pt")
    meter.close()


def main(args):
    device = require_device(args.device)
    precision = default_precision(device) if args.precision == "auto" else args.precision
    args.source_size = args.source_size or round(1.6 * args.image_size)
    args.validate_every = args.validate_every or args.recluster_every
    folder = make_log_dir(args.log_dir)
    setup_logging(folder, args)
    torch.manual_seed(args.seed)
    note = cache_note(args.dataset_path, args.source_size)
    if note:
        logging.info(note)

    regions = read_regions(args.dataset_path, args.batch_size)
    shown = regions.views_of(DATABASE_YEAR) if args.positives == "views" else regions
    loader = BatchLoader(RegionDataset(shown, args.source_size), args.num_workers)
    validation = load_evaluation_data(args.dataset_path).only(VALIDATION)
    augment = augmentation_of(args, args.image_size)

    if args.resume:
        run = resume_run(args.resume, args.lr, device)
        logging.info(f"Resumed {args.resume} at iteration {run.iteration}, best validation R@1 {run.best:.1f}")
    else:
        run = fresh_run(args, device)
        run.save_weights(folder / "initial.pt")  # what the trained model is compared with
        if args.fc_init == "whitening":
            whiten(run.model, loader, len(regions), augment, args, device, precision)
    if args.compile:
        run.model.compile()
    train(run, regions, loader, augment, validation, folder, args, device, precision)
    logging.info(f"Done: {args.iterations} iterations, best validation R@1 {run.best:.1f}. Evaluate with: "
                 f"python eval.py --resume {folder / 'best.pt'} --dataset_path {args.dataset_path}")
    (folder / "done").touch()
    return folder


if __name__ == "__main__":
    arguments = parse_arguments()
    run_script(main, arguments)
