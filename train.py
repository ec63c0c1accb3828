"""Train EarthLoc: python train.py --dataset_path FOLDER, or python train.py @presets/demo.args

The recipe is the paper's (sec. 4 and 5.1) unless a flag says otherwise; presets/ holds whole recipes. Checkpoints,
logs and pictures go to logs/LOG_DIR/date_time; python eval.py --resume …/best.pt evaluates one.
"""

import logging
import math
import time
from dataclasses import asdict

import numpy as np
import torch
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from augmentations.year_wise import GROUPS, Augmentation
from datasets.evaluation import VALIDATION, load_evaluation_data
from datasets.metadata import DATABASE_YEAR
from datasets.overlap import share_ground
from datasets.regions import BatchLoader, RegionDataset, Regions, random_clusters, schedule
from losses.contrastive import ContrastiveLoss
from losses.multi_similarity import MultiSimilarityLoss
from models.earthloc import EarthLoc, ModelConfig, build_model
from utils import figures
from utils.arguments import add_model_arguments, make_parser, model_config, run
from utils.checkpoint import load_checkpoint, save_checkpoint
from utils.clustering import cluster
from utils.evaluation import evaluate
from utils.logs import make_log_dir, setup_logging
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
    augmentation.add_argument("--augmentation", choices=GROUPS, default="year", help="what shares one random draw")
    augmentation.add_argument("--rotation", type=float, default=45.0, help="degrees")
    augmentation.add_argument("--perspective", type=float, default=0.5, help="distortion scale")
    augmentation.add_argument("--min_crop", type=float, default=0.7, help="smallest crop, as a share of the largest")
    augmentation.add_argument("--aspect", type=float, default=1.0, help="largest stretch of one side against the other")
    augmentation.add_argument("--brightness", type=float, default=0.9)
    augmentation.add_argument("--contrast", type=float, default=0.9)
    augmentation.add_argument("--saturation", type=float, default=0.9)
    augmentation.add_argument("--hue", type=float, default=0.0)
    augmentation.add_argument("--clouds", type=float, default=0.0, help="largest share of an image under clouds")
    augmentation.add_argument("--haze", type=float, default=0.0, help="largest opacity of the air")
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
    system.add_argument("--log_every", type=int, default=50, help="iterations between scalars")
    system.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    system.add_argument("--precision", choices=("auto", *PRECISIONS), default="auto",
                        help="of the network; auto: bf16 where the hardware multiplies in it")
    system.add_argument("--seed", type=int, default=0)
    system.add_argument("--traceback", action="store_true", help="show the traceback of an error")
    add_model_arguments(parser)
    return parser.parse_args(argv)


def learning_rate(iteration, args):
    """Warm-up, then constant (the paper) or a cosine to zero."""
    warm = min(1.0, (iteration + 1) / args.warmup) if args.warmup else 1.0
    cosine = 0.5 * (1 + math.cos(math.pi * iteration / args.iterations)) if args.lr_schedule == "cosine" else 1.0
    return args.lr * warm * cosine


def draws_of(seed, iteration):
    """The generator of one iteration's augmentation, whatever came before it."""
    return torch.Generator().manual_seed(int(np.random.SeedSequence([seed, 3, iteration]).generate_state(1)[0]))


def make_loss(args):
    if args.loss == "contrastive":
        return ContrastiveLoss(args.base or 0.5)
    return MultiSimilarityLoss(args.alpha, args.beta, args.base, args.epsilon)


def year_files(regions, year):
    """Each region's image of one year."""
    column = regions.years.index(year)
    return [regions.root / paths[column] for paths in regions.paths]


def whiten(model, loader, regions, augment, args, device, precision):
    """Sets the model's fc to the whitening of augmented views of up to 512 regions, in the mode that training uses."""
    rows = np.random.default_rng([args.seed, 1]).permutation(regions)[:512]
    batches = rows[:len(rows) // args.batch_size * args.batch_size].reshape(-1, args.batch_size)
    generator = torch.Generator().manual_seed(args.seed)
    features = []
    state = {key: value.clone() for key, value in model.state_dict().items()}
    with torch.no_grad(), autocast(device, precision):
        for _, images in tqdm(loader.serve(batches), total=len(batches), desc="whitening", leave=False):
            views = augment(images.to(device), generator).flatten(0, 1)
            features.append(model.aggregate(views.contiguous(memory_format=torch.channels_last)).float())
    model.load_state_dict(state)  # the passes moved BatchNorm's running statistics
    model.whiten_(torch.cat(features), std=args.fc_std, regulariser=args.fc_regulariser, generator=generator)


def main(args):
    device = require_device(args.device)
    precision = default_precision(device) if args.precision == "auto" else args.precision
    args.source_size = args.source_size or round(1.6 * args.image_size)
    args.validate_every = args.validate_every or args.recluster_every
    folder = make_log_dir(args.log_dir)
    setup_logging(folder, args)
    torch.manual_seed(args.seed)

    # Data: quadruplets to train on, and the Texas validation set.
    regions, incomplete = Regions.read(args.dataset_path)
    logging.info(f"{len(regions)} regions with all years")
    if incomplete:
        logging.info(f"{len(incomplete)} regions lack a year and are left out: {', '.join(incomplete[:10])} …")
        logging.debug(f"Regions that lack a year: {incomplete}")
    if len(regions) < args.batch_size:
        raise ValueError(f"{args.dataset_path}: {len(regions)} regions do not fill a batch; --batch_size "
                         f"{len(regions)} or smaller would")
    views = regions.views_of(DATABASE_YEAR) if args.positives == "views" else regions
    loader = BatchLoader(RegionDataset(views, args.source_size), args.num_workers)
    validation = load_evaluation_data(args.dataset_path).only(VALIDATION)
    augment = Augmentation(args.image_size, args.augmentation, args.rotation, args.perspective, args.min_crop,
                           args.aspect, args.brightness, args.contrast, args.saturation, args.hue,
                           args.clouds, args.haze)

    # Model, optimiser, and where a resumed run stood.
    checkpoint = load_checkpoint(args.resume) if args.resume else None
    if checkpoint and "optimizer" not in checkpoint:
        raise ValueError(f"{args.resume}: holds weights only; --resume wants a last.pt of train.py, "
                         f"--weights takes this file")
    if checkpoint:
        model = EarthLoc(ModelConfig(**checkpoint["model_config"]))
        model.load_state_dict(checkpoint["model"])
    else:
        model = build_model(model_config(args), args.weights)
    model = model.to(device, memory_format=torch.channels_last).train()
    if not checkpoint:  # what the trained model is compared with
        save_checkpoint(folder / "initial.pt", {"model": model.state_dict(), "model_config": asdict(model.config)})
    if args.fc_init == "whitening" and not checkpoint:
        whiten(model, loader, len(views), augment, args, device, precision)
    loss_fn = make_loss(args)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=args.lr)
    start, clusters, best = 0, None, -1.0
    if checkpoint:
        optimizer.load_state_dict(checkpoint["optimizer"])
        start, best = checkpoint["iteration"], checkpoint["best"]
        clusters = [each.numpy() for each in checkpoint["clusters"]]
        torch.set_rng_state(checkpoint["rng"])
        logging.info(f"Resumed {args.resume} at iteration {start}, best validation R@1 {best:.1f}")

    def save(name):
        save_checkpoint(folder / name, {
            "model": model.state_dict(), "model_config": asdict(model.config), "optimizer": optimizer.state_dict(),
            "iteration": iteration, "best": best, "clusters": [torch.as_tensor(each) for each in clusters],
            "rng": torch.get_rng_state(), "args": {key: str(value) for key, value in vars(args).items()}})

    def validate():
        if not validation.sets:
            return None
        model.eval()
        result = evaluate(model, validation, args.image_size, 4 * args.batch_size, args.num_workers, device, precision,
                          progress=False)
        model.train()
        for line in result.lines()[:1]:
            logging.info(f"Iteration {iteration}: {line}")
        return result[VALIDATION].recalls[1]

    writer = SummaryWriter(folder)
    bar = tqdm(total=args.iterations, initial=start, desc="training", unit="it")
    served, iteration, waited, clock = iter(()), start, 0.0, time.perf_counter()
    if not checkpoint:
        best_before = validate()
        if best_before is not None:
            writer.add_scalar("validation/R@1", best_before, 0)
    while iteration < args.iterations:
        # New clusters from one year's descriptors, and the schedule up to the next ones.
        period, step = divmod(iteration, args.recluster_every)
        if step == 0:
            clusters = make_clusters(model, regions, period, args, device, precision)
            logging.info(f"Iteration {iteration}: {len(clusters)} clusters of {min(map(len, clusters))} to "
                         f"{max(map(len, clusters))} regions")
            if period == 1 and args.batches == "clustered":
                save_clusters_figure(folder, regions, clusters)
        if step == 0 or iteration == start:
            batches = schedule(clusters, args.batch_size, args.recluster_every, [args.seed, 2, period])
            served = loader.serve(batches[step:args.iterations - iteration + step])

        began = time.perf_counter()
        rows, images = next(served)
        waited += time.perf_counter() - began
        augmented = augment(images.to(device, non_blocking=True), draws_of(args.seed, iteration))
        if iteration == 0:
            figures.save(figures.batch_figure(augmented[:20], regions.years), folder / "batch.jpg")

        # One step: low precision only around the network, the loss in float32 (design: pixels and gradients suffer).
        years = len(regions.years)
        with autocast(device, precision):
            descriptors = model(augmented.flatten(0, 1).contiguous(memory_format=torch.channels_last))
        labels = torch.arange(len(rows), device=device).repeat_interleave(years)
        neutral = None
        if args.neutral == "on":
            footprints = regions.footprints[rows.numpy()]
            shared = torch.from_numpy(share_ground(footprints, footprints)).to(device)
            neutral = shared.repeat_interleave(years, 0).repeat_interleave(years, 1) & (labels[:, None] != labels)
        loss = loss_fn(descriptors.float(), labels, neutral)
        if not torch.isfinite(descriptors).all():  # mining drops nan similarities: the loss would be a harmless 0
            loss = loss * torch.nan
        if not torch.isfinite(loss):
            raise RuntimeError(f"iteration {iteration}: the loss is {loss.item()}; nothing was updated, the last good "
                               f"checkpoints are in {folder}. A smaller --lr or --precision fp32 may help")
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(iteration, args)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        iteration += 1
        bar.update()

        if iteration % args.log_every == 0 or iteration == args.iterations:
            anchors, pairs = loss_fn.mined_shares(descriptors.detach().float(), labels, neutral)
            seconds, clock = time.perf_counter() - clock, time.perf_counter()
            rate = args.log_every * len(rows) * years / seconds
            bar.set_postfix(loss=f"{loss.item():.3f}", images_s=f"{rate:.0f}")
            for name, value in (("loss", loss.item()), ("mined/anchors", anchors.item()), ("mined/pairs", pairs.item()),
                                ("lr", optimizer.param_groups[0]["lr"]), ("images_per_second", rate),
                                ("waiting_for_data", waited / seconds)):
                writer.add_scalar(name, value, iteration)
            logging.debug(f"Iteration {iteration}: loss {loss.item():.4f}, mined anchors {anchors.item():.2f}, "
                          f"mined pairs {pairs.item():.3f}, {rate:.0f} images/s, waiting {waited / seconds:.2f}")
            waited = 0.0
        if iteration % args.validate_every == 0 or iteration == args.iterations:
            score = validate()
            if score is not None:
                writer.add_scalar("validation/R@1", score, iteration)
            if score is None or score > best:
                best = -1.0 if score is None else score
                save("best.pt")
            save("last.pt")
            clock = time.perf_counter()
    bar.close()
    writer.close()
    logging.info(f"Done: {args.iterations} iterations, best validation R@1 {best:.1f}. Evaluate with: "
                 f"python eval.py --resume {folder / 'best.pt'} --dataset_path {args.dataset_path}")
    (folder / "done").touch()
    return folder


def make_clusters(model, regions, period, args, device, precision):
    """Clusters for one period: random ones first, then k-means of one year's descriptors (paper, sec. 4.2)."""
    if args.batches == "random":
        return [np.arange(len(regions))]
    if period == 0:
        return random_clusters(len(regions), args.num_clusters, args.batch_size, [args.seed, 4])
    model.eval()
    descriptors, failures = describe(model, year_files(regions, DATABASE_YEAR), args.image_size, 4 * args.batch_size,
                                     args.num_workers, device, precision, label="describing regions")
    model.train()
    if failures:
        raise ValueError(failures[0][1])
    return cluster(descriptors[0], args.num_clusters, args.batch_size, args.seed + period, device)


def save_clusters_figure(folder, regions, clusters, shown=8, images=12):
    """Fig. 14: a row a cluster."""
    from datasets.images import read_image

    files = year_files(regions, DATABASE_YEAR)
    pictures = [[read_image(files[row], 128) for row in rows[:images]] for rows in clusters[:shown]]
    figures.save(figures.clusters_figure(pictures), folder / "clusters.jpg")


if __name__ == "__main__":
    arguments = parse_arguments()
    run(main, arguments)
