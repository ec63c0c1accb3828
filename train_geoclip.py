"""Train GeoCLIP: python train_geoclip.py @presets/geoclip.args --train_csv mp16.csv --images mp16/
or, on an EarthLoc data set:  python train_geoclip.py @presets/geoclip_demo.args

A signal (SIGTERM, SIGINT, SIGUSR1) stops it at the next iteration with exit code 75; --resume goes on with the same
bits. Several GPUs: torchrun --nproc_per_node 4 train_geoclip.py …; --batch_size is that of all processes together, the
queue is the same in all of them; the augmentation's draws and the BatchNorm before a backbone's MLP are each one's own.
Outputs go to logs/LOG_DIR/date_time; python eval_geoclip.py --resume …/best.pt evaluates a checkpoint.
"""

import logging
from argparse import Namespace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter

from augmentations.year_wise import Augmentation
from datasets.gps import Photos, distinct_points, photos_of_dataset, read_photos
from datasets.photo_batches import Schedule, candidates_of, draws_of, note_unreadable
from datasets.sets import in_validation
from losses.gps_contrastive import advance_queue, gps_cross_entropy, initial_queue, neutral_mask
from models.geoclip import GeoCLIP, GeoClipConfig, build_geoclip
from models.geoclip_weights import checkpoint_of
from models.image_encoder import CLIP
from models.location_encoder import SIGMAS
from retrieval.describe import image_loader
from retrieval.geolocation import PhotoFiles, accuracy, embed_gallery, embed_photos, locate
from utils import distributed, figures, geo
from utils.arguments import WORKERS, add_run_arguments, make_parser, positive, whole
from utils.arguments import run as run_script
from utils.logs import Meter
from utils.loop import LOOP_FLAGS, Outcome, guarded_update, launch, run_loop
from utils.precision import autocast, chosen_precision
from utils.runs import Run, find_checkpoint, go_on, make_optimizer
from utils.schedules import learning_rate
from utils.settings import add_settings, chosen_settings
from utils.signals import Stop, iterate
from utils.transfer import to_device


def parse_arguments(argv: list[str] | None = None) -> Namespace:
    parser = make_parser(__doc__)
    add = parser.add_argument_group("data: a CSV, or an EarthLoc data set").add_argument
    add("--train_csv", help="IMG_ID,LAT,LON of the training images")
    add("--images", help="folder of the CSV's images; default: the CSV's own")
    add("--dataset_path", help="EarthLoc's layout: its database images at their footprints' centres")
    add("--val_csv", help="IMG_ID,LAT,LON to validate on; an EarthLoc data set brings its validation set")
    add("--val_images", help="folder of --val_csv's images; default: the CSV's own")
    add("--source_size", type=positive, help="pixels a side as loaded; default: 1.15 × the encoder's size")
    add("--num_workers", **WORKERS)
    add = parser.add_argument_group("model").add_argument
    add("--image_encoder", default="clip", help="clip, or a --backbone of train.py")
    add("--clip", default=CLIP, help="Hugging Face id, or a folder with its config and weights")
    add("--weights", default="imagenet", help="of a backbone: imagenet, none, or a state dict's file; CLIP has its own")
    add("--cut_after", help="last kept stage of a backbone; default: all of it")
    add("--freeze_until", help="last frozen stage of a backbone, or none; default: as in train.py")
    add("--image_size", type=positive, help="pixels a side, of a backbone; default: 128")
    add("--gem_grid", type=positive, default=1, help="a backbone's features are pooled over so many cells a side")
    add("--sigmas", type=float, nargs="+", default=list(SIGMAS), help="of the location encoder, coarse to fine")
    add = parser.add_argument_group("loss (paper, sec. 3.3)").add_argument
    add("--queue_size", type=whole, default=4096)
    add("--noise_batch", type=float, default=150.0, help="metres, sigma of the noise on the batch's GPS")
    add("--noise_queue", type=float, default=1000.0, help="metres, on the queue's GPS")
    add("--neutral_km", type=float, default=0.0, help="nearer coordinates are no negatives; 0: the paper's loss")
    group = parser.add_argument_group("augmentation; turns, flips and weather are of each image")
    group.add_argument("--augmentation", choices=("image", "batch", "none"), default="image")
    jitter = {"brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "hue": 0.1}
    geometry = {"rotation": 0.0, "perspective": 0.0, "min_crop": 0.5, "aspect": 1.3}
    add_settings(group, {"augmentation": Augmentation}, **geometry, **jitter)
    group.add_argument("--turns", choices=("on", "off"), default="off", help="0 to 270 degrees, for photos from orbit")
    group.add_argument("--flip", choices=("on", "off"), default="on", help="half of the images; off for orbit")
    add = parser.add_argument_group("optimisation (paper, sec. 4)").add_argument
    add("--batch_size", type=positive, default=512, help="images, over all processes")
    add("--iterations", type=positive, default=50_000)
    add("--lr", type=float, default=3e-5)
    add("--weight_decay", type=float, default=1e-6)
    add("--lr_schedule", choices=("step", "cosine"), default="step")
    add("--lr_gamma", type=float, default=0.87, help="factor of each step of the schedule")
    add("--lr_step", type=positive, help="iterations between these; default: an epoch")
    add_run_arguments(parser, "geoclip", validate_every=1000)
    return parser.parse_args(argv)


def load_photos(args: Namespace) -> tuple[Photos, Photos | None]:
    """Flags -> training Photos and validation Photos or None. ValueError names the flag that is missing."""
    if bool(args.train_csv) == bool(args.dataset_path):
        raise ValueError("give the training images by --train_csv FILE or --dataset_path FOLDER, one of the two")
    if args.train_csv:
        training = read_photos(args.train_csv, args.images)
    else:
        training = photos_of_dataset(args.dataset_path, "database")
    if args.val_csv:
        return training, read_photos(args.val_csv, args.val_images)
    if args.dataset_path and (Path(args.dataset_path) / "queries").is_dir():
        queries = photos_of_dataset(args.dataset_path, "queries")
        validation = queries.select(in_validation(queries.nadirs))
        return training, validation if len(validation) else None
    return training, None


def start(args: Namespace, training: Photos, gallery: np.ndarray, folder: Path, device: torch.device) -> Run:
    """-> The Run to go on with, or a fresh one. Its memory is the queue (Q, 2) of coordinates, degrees."""
    path, checkpoint = find_checkpoint(args.resume, args.log_dir, "geoclip_config", "train_geoclip.py")
    if checkpoint:
        model = GeoCLIP(GeoClipConfig(**checkpoint["geoclip_config"]))
        model.load_own_state(checkpoint["model"], path)
    else:
        backbone = args.cut_after, args.freeze_until, args.image_size, args.gem_grid
        config = GeoClipConfig(args.image_encoder, args.clip, *backbone, tuple(args.sigmas))
        model = build_geoclip(config, args.weights)
    model = model.to(device, memory_format=torch.channels_last)
    queue = initial_queue(training.points, args.queue_size, np.random.default_rng([args.seed, 7]))
    run = Run(
        model,
        make_optimizer(model, args.lr, weight_decay=args.weight_decay),
        memory={"queue": queue},
        content=partial(checkpoint_of, gallery=gallery),
    )
    if checkpoint:
        go_on(run, path, checkpoint, folder, vars(args))
    run.network = distributed.wrap(model)
    return run


def make_augmentation(args: Namespace, size: int) -> Augmentation:
    """Of images to size × size, each turned and mirrored on its own."""
    settings = chosen_settings(args, Augmentation)
    return Augmentation(size, args.augmentation, turns=args.turns == "on", flip=args.flip == "on", **settings)


def loss_of(
    model: nn.Module,
    views: Tensor,
    points: np.ndarray,
    candidates: np.ndarray,
    own: np.ndarray,
    readable: Tensor,
    neutral_km: float,
    precision: str,
) -> tuple[Tensor, Tensor]:
    """One process's photos against all candidates -> loss, and the share of them whose own coordinate is the nearest.

    views (b, 3, S, S); points (B, 2) of the whole batch, candidates (B + Q, 2) degrees; own (b,): this process's rows
    of the batch; readable (b,) bool, on the CPU.
    """
    told = [torch.from_numpy(candidates).float(), torch.from_numpy(own), readable]
    if neutral_km:
        told.append(torch.from_numpy(neutral_mask(points[own], candidates, neutral_km)))
    candidates, targets, readable, neutral = (*to_device(told, views.device), None)[:4]
    with autocast(views.device, precision):  # the location encoder and the logits stay in float32 by themselves
        logits = model(views, candidates)
    hits = (logits.argmax(dim=1) == targets).float().mean()
    return gps_cross_entropy(logits, targets, neutral, readable), hits


def update(run: Run, lr: float, *batch: object) -> tuple[Tensor, Tensor, Tensor]:
    """One step on what `loss_of` takes after the model -> loss, norm of the gradient and share of hits of all
    processes, 0-d."""

    def forward():
        loss, hits = loss_of(run.network, *batch)
        return distributed.gather(torch.stack([loss, hits])[None]).mean(dim=0).unbind()

    loss, norm, hits = guarded_update(run, lr, forward)
    run.model.clamp_scale_()
    return loss, norm, hits


def validate(
    run: Run, photos: Photos | None, gallery: np.ndarray, writer: SummaryWriter, *describing: object
) -> float | None:
    """Logs how far off photos are put, over the training gallery -> percent within 750 km; None without photos."""
    if not photos:
        return None
    device = describing[2]

    def score():
        embeddings, failures = embed_photos(run.model, photos.paths, *describing, progress=False)
        readable = np.setdiff1d(np.arange(len(photos)), [row for row, _ in failures])
        points = embed_gallery(run.model.location_encoder, gallery, device, progress=False)
        rows, _ = locate(embeddings[readable], points, run.model.scale.item())
        distances = geo.distance_km(gallery[rows[:, 0]], photos.points[readable])
        shares, median = accuracy(distances), float(np.median(distances))
        logging.info(
            f"Iteration {run.iteration}: validation within 2500 / 750 / 200 km {shares[2500]:.1f} / "
            f"{shares[750]:.1f} / {shares[200]:.1f}, median {median:.0f} km"
        )
        return shares[750], median

    share, median = distributed.from_first(score)
    writer.add_scalar("validation/accuracy_750_km", share, run.iteration)
    writer.add_scalar("validation/median_km", median, run.iteration)
    return share


def train(args: Namespace, folder: Path, device: torch.device, stop: Stop) -> bool:
    """The paper's method, from where the run stands -> whether it came to the last iteration: see utils.loop."""
    precision = chosen_precision(args.precision, device)
    with stop.at_once():
        training, validation = load_photos(args)
    if args.batch_size % distributed.world() or not 0 < args.batch_size <= len(training):
        raise ValueError(
            f"--batch_size {args.batch_size}: must be a multiple of the {distributed.world()} processes "
            f"and at most the {len(training)} training images"
        )
    args.lr_step = args.lr_step or max(1, len(training) // args.batch_size)
    logging.info(f"{len(training)} training images, {len(validation) if validation else 'no'} validation images")
    for note in training.notes + (validation.notes if validation else []):
        logging.info(note)
    gallery = distinct_points(training.points, 100_000, args.seed)
    with stop.at_once():
        run = start(args, training, gallery, folder, device)
    encoder, size = run.model.image_encoder, run.model.image_encoder.image_size
    augment = make_augmentation(args, size)
    source_size = size if args.augmentation == "none" else args.source_size or round(1.15 * size)
    rank = distributed.rank()
    own_part = rank, distributed.world(), run.iteration
    schedule = Schedule(len(training), args.batch_size, args.iterations, args.seed, *own_part)
    own = np.arange(args.batch_size)[schedule.own()]
    photos = PhotoFiles(training.paths, source_size, encoder.fit)
    served = iterate(image_loader(photos, schedule, len(own), args.num_workers, device))
    unreadable = set()

    def step(meter: Meter):
        with meter.waiting(), stop.at_once():
            rows, images, errors = next(served)
        note_unreadable(rows, errors, unreadable, len(training))
        images, draws = images.to(device, non_blocking=True), draws_of(args.seed, run.iteration, rank)
        views = augment(images[:, None], draws)[:, 0]
        if rank == 0 and run.iteration == 0:
            rows_of_8 = [list(views[i : i + 8]) for i in range(0, min(len(views), 40), 8)]
            figures.save(figures.mosaic(rows_of_8), folder / "batch.jpg")
        # All processes' coordinates, so that each photo meets the same candidates on one GPU and on eight (sec. 3.3).
        points = training.points[schedule.batch(run.iteration)]
        queue = run.memory["queue"]
        candidates = candidates_of(points, queue, args.noise_batch, args.noise_queue, args.seed, run.iteration)
        readable = torch.tensor([not error for error in errors])
        decay = {"gamma": args.lr_gamma, "step": args.lr_step}
        lr = learning_rate(run.iteration, args.lr, args.lr_schedule, args.iterations, **decay)
        loss, norm, hits = update(run, lr, views, points, candidates, own, readable, args.neutral_km, precision)
        run.memory["queue"] = advance_queue(queue, points)
        logged = lambda: {"hits": hits, "scale": run.model.scale.detach(), "lr": lr}
        batch = lambda: {"views": views, "paths": [str(training.paths[row]) for row in rows.tolist()]}
        return Outcome(run.iteration - 1, loss, norm, args.batch_size, logged, batch)

    def validating(writer: SummaryWriter):
        sizes = args.batch_size, args.num_workers
        return validate(run, validation, gallery, writer, *sizes, device, precision)

    due = {name: getattr(args, name) for name in LOOP_FLAGS}
    finished = run_loop(run, step, validating, folder, stop, vars(args), **due)
    if unreadable:
        logging.info(f"{len(unreadable)} training images could not be read and took no part, listed above")
    if finished:
        logging.info(
            f"Done: {args.iterations} iterations. Evaluate with: python eval_geoclip.py --resume "
            f"{folder / 'best.pt'} "
            + (f"--dataset_path {args.dataset_path}" if args.dataset_path else "--csv FILE --images FOLDER")
        )
    return finished


def main(args: Namespace) -> Path:
    """-> the run's folder. Leaves with exit code 75 after a signal."""
    return launch(train, args)


if __name__ == "__main__":
    run_script(main, parse_arguments())
