"""Train GeoCLIP: python train_geoclip.py @presets/geoclip.args --train_csv mp16.csv --images mp16/
or, on an EarthLoc data set:  python train_geoclip.py @presets/geoclip_demo.args

Several GPUs: torchrun --nproc_per_node 4 train_geoclip.py …; --batch_size is that of all processes together, the queue
is the same in all of them, and CLIP's training is that of one process. A backbone's BatchNorm sees its process's share.
Outputs go to logs/LOG_DIR/date_time; python eval_geoclip.py --resume …/best.pt evaluates a checkpoint.
"""

import logging
import math
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader

from datasets.gps import Photos, add_noise, distinct_points, photos_of_dataset, read_photos
from datasets.sets import VALIDATION, load_evaluation_data
from losses.gps_contrastive import advance_queue, gps_cross_entropy, initial_queue, neutral_mask
from models.geoclip import GeoCLIP, GeoClipConfig, build_geoclip
from models.geoclip_weights import checkpoint_of
from models.image_encoder import CLIP
from models.location_encoder import SIGMAS
from retrieval.geolocation import PhotoFiles, accuracy, embed_gallery, embed_photos, locate
from utils import distributed, figures, geo
from utils.arguments import add_augmentation_arguments, augmentation_of, make_parser, positive, run, whole
from utils.checkpoint import load_checkpoint, save_checkpoint
from utils.logs import Meter, make_log_dir, setup_logging
from utils.precision import PRECISIONS, autocast, default_precision, require_device


def parse_arguments(argv=None):
    parser = make_parser(__doc__)
    data = parser.add_argument_group("data: a CSV, or an EarthLoc data set")
    data.add_argument("--train_csv", help="IMG_ID,LAT,LON of the training images")
    data.add_argument("--images", help="folder of the CSV's images; default: the CSV's own")
    data.add_argument("--dataset_path", help="EarthLoc's layout: its database images at their footprints' centres")
    data.add_argument("--val_csv", help="IMG_ID,LAT,LON to validate on; an EarthLoc data set brings its validation set")
    data.add_argument("--val_images", help="folder of --val_csv's images; default: the CSV's own")
    data.add_argument("--source_size", type=positive, help="pixels a side at which images are loaded, before the crop; "
                                                      "default: 1.15 × the encoder's size")
    data.add_argument("--num_workers", type=whole, default=4)
    model = parser.add_argument_group("model")
    model.add_argument("--image_encoder", default="clip", help="clip, or a --backbone of train.py")
    model.add_argument("--clip", default=CLIP, help="Hugging Face id, or a folder with its config and weights")
    model.add_argument("--weights", default="imagenet", help="of a backbone: imagenet, none, or a file (a classifier's "
                                                             "or EarthLoc's state dict); CLIP brings its own")
    model.add_argument("--cut_after", help="last kept stage of a backbone; default: all of it")
    model.add_argument("--freeze_until", help="last frozen stage of a backbone, or none; default: as in train.py")
    model.add_argument("--image_size", type=positive, help="pixels a side, of a backbone; default: 128")
    model.add_argument("--gem_grid", type=positive, default=1,
                       help="a backbone's features are pooled over so many cells a side")
    model.add_argument("--sigmas", type=float, nargs="+", default=list(SIGMAS), help="of the location encoder's "
                                                                                     "capsules, coarse to fine")
    loss = parser.add_argument_group("loss (paper, sec. 3.3)")
    loss.add_argument("--queue_size", type=whole, default=4096)
    loss.add_argument("--noise_batch", type=float, default=150.0, help="metres, sigma of the noise on the batch's GPS")
    loss.add_argument("--noise_queue", type=float, default=1000.0, help="metres, on the queue's GPS")
    loss.add_argument("--neutral_km", type=float, default=0.0, help="coordinates nearer than this to a photo's own are "
                                                                    "no negatives of it; 0: the paper's loss")
    augmentation = parser.add_argument_group("augmentation; turns, flips and weather are of each image")
    add_augmentation_arguments(augmentation, ("image", "batch", "none"), augmentation="image", rotation=0.0,
                               perspective=0.0, min_crop=0.5, aspect=1.3, brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1)
    augmentation.add_argument("--turns", choices=("on", "off"), default="off",
                              help="on: also turn by 0, 90, 180 or 270 degrees, for photos from orbit")
    augmentation.add_argument("--flip", choices=("on", "off"), default="on", help="mirror half of the images; off for "
                                                                                  "photos from orbit")
    steps = parser.add_argument_group("optimisation (paper, sec. 4)")
    steps.add_argument("--batch_size", type=positive, default=512, help="images, over all processes")
    steps.add_argument("--iterations", type=positive, default=50_000)
    steps.add_argument("--lr", type=float, default=3e-5)
    steps.add_argument("--weight_decay", type=float, default=1e-6)
    steps.add_argument("--lr_schedule", choices=("step", "cosine"), default="step")
    steps.add_argument("--lr_gamma", type=float, default=0.87, help="factor of each step of the schedule")
    steps.add_argument("--lr_step", type=positive, help="iterations between these; default: an epoch")
    system = parser.add_argument_group("run")
    system.add_argument("--log_dir", default="geoclip", help="outputs go to logs/LOG_DIR/date_time")
    system.add_argument("--resume", help="a last.pt of a run to go on with; flags are those of the command line")
    system.add_argument("--validate_every", type=positive, default=1000,
                        help="iterations; checkpoints are saved as often")
    system.add_argument("--log_every", type=positive, default=50, help="iterations between scalars")
    system.add_argument("--process_timeout", type=float, default=1800,
                        help="seconds that processes wait for one that does not answer")
    system.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    system.add_argument("--precision", choices=("auto", *PRECISIONS), default="auto",
                        help="of the image encoder; the location encoder and the loss are always float32")
    system.add_argument("--seed", type=whole, default=0)
    system.add_argument("--traceback", action="store_true", help="show the traceback of an error")
    return parser.parse_args(argv)


class Schedule:
    """Rows of every global batch: a permutation an epoch, cut into batches, whatever is left over waits for the next.

    batch(i) depends on seed and i only, so every process knows all coordinates of every batch without a message.
    Iterating it gives one process's share from iteration `start` on: a batch_sampler.
    """

    def __init__(self, count, batch_size, iterations, seed, rank=0, processes=1, start=0):
        self.count, self.batch_size, self.iterations, self.seed = count, batch_size, iterations, seed
        self.rank, self.share, self.start = rank, batch_size // processes, start
        self.per_epoch = count // batch_size
        self.order = (None, None)

    def batch(self, iteration):
        epoch, step = divmod(iteration, self.per_epoch)
        if self.order[0] != epoch:
            self.order = (epoch, np.random.default_rng([self.seed, 5, epoch]).permutation(self.count))
        return self.order[1][step * self.batch_size:(step + 1) * self.batch_size]

    def own(self):
        return slice(self.rank * self.share, (self.rank + 1) * self.share)

    def __iter__(self):
        for iteration in range(self.start, self.iterations):
            yield self.batch(iteration)[self.own()].tolist()

    def __len__(self):
        return self.iterations - self.start


def candidates_of(points, queue, args, iteration):
    """The batch's points (B, 2) and the queue (Q, 2) -> (B + Q, 2) degrees, each moved by its noise (sec. 3.3).

    Drawn from the seed and the iteration: the same in every process and after a resume.
    """
    rng = np.random.default_rng([args.seed, 6, iteration])
    return np.concatenate([add_noise(points, args.noise_batch, rng), add_noise(queue, args.noise_queue, rng)])


def learning_rate(iteration, args):
    """Steps of lr_gamma (the paper), or a cosine to zero."""
    if args.lr_schedule == "cosine":
        return args.lr * 0.5 * (1 + math.cos(math.pi * iteration / args.iterations))
    return args.lr * args.lr_gamma ** (iteration // args.lr_step)


def turn_and_flip(images, generator, turns, flip):
    """uint8 (B, 3, S, S): each image turned by a random multiple of 90 degrees and mirrored, where that is on."""
    images = images.clone()
    quarters = torch.randint(4, (len(images),), generator=generator) if turns else torch.zeros(len(images))
    mirrored = torch.rand(len(images), generator=generator) < 0.5 if flip else torch.zeros(len(images))
    for i in range(len(images)):
        image = torch.rot90(images[i], int(quarters[i]), dims=(-2, -1))
        images[i] = image.flip(-1) if mirrored[i] else image
    return images


def load_photos(args):
    """Flags -> training Photos and validation Photos or None. ValueError names the flag that is missing."""
    if bool(args.train_csv) == bool(args.dataset_path):
        raise ValueError("give the training images by --train_csv FILE (with --images FOLDER), or by --dataset_path "
                         "FOLDER; one of the two")
    if args.train_csv:
        training = read_photos(args.train_csv, args.images)
    else:
        training = photos_of_dataset(args.dataset_path, "database")
    if args.val_csv:
        return training, read_photos(args.val_csv, args.val_images)
    if args.dataset_path and (Path(args.dataset_path) / "queries").is_dir():
        data = load_evaluation_data(args.dataset_path).only(VALIDATION)
        if data.sets:
            chosen = data.queries.select(data.query_rows)
            return training, Photos([chosen.root / path for path in chosen.paths], chosen.centers, chosen.nadirs)
    return training, None


def validate(model, photos, gallery, args, device, precision, writer, iteration):
    """Logs how far off one view of each photo is put, over the training gallery -> percent within 750 km; -1 without
    photos."""
    if not photos:
        return -1.0
    embeddings, failures = embed_photos(model, photos.paths, args.batch_size, args.num_workers, device, precision,
                                        progress=False)
    readable = np.setdiff1d(np.arange(len(photos)), [row for row, _ in failures])
    points = embed_gallery(model.location_encoder, gallery, device, progress=False)
    rows, _ = locate(embeddings[readable], points, model.scale.item())
    distances = geo.distance_km(gallery[rows[:, 0]], photos.points[readable])
    shares, median = accuracy(distances), float(np.median(distances))
    writer.add_scalar("validation/accuracy_750_km", shares[750], iteration)
    writer.add_scalar("validation/median_km", median, iteration)
    logging.info(f"Iteration {iteration}: validation within 2500 / 750 / 200 km {shares[2500]:.1f} / "
                 f"{shares[750]:.1f} / {shares[200]:.1f}, median {median:.0f} km")
    return shares[750]


def start_or_resume(args, training, device):
    """-> model, optimiser, queue (Q, 2), iteration and best score: fresh, or as the run --resume left them."""
    checkpoint = load_checkpoint(args.resume) if args.resume else None
    if checkpoint and ("optimizer" not in checkpoint or "geoclip_config" not in checkpoint):
        raise ValueError(f"{args.resume}: --resume wants a last.pt of train_geoclip.py")
    if checkpoint:
        model = GeoCLIP(GeoClipConfig(**checkpoint["geoclip_config"]))
        model.load_own_state(checkpoint["model"], args.resume)
    else:
        model = build_geoclip(GeoClipConfig(args.image_encoder, args.clip, args.cut_after, args.freeze_until,
                                            args.image_size, args.gem_grid, tuple(args.sigmas)), args.weights)
    model = model.to(device, memory_format=torch.channels_last).train()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=args.lr,
                                 weight_decay=args.weight_decay)
    queue = initial_queue(training.points, args.queue_size, np.random.default_rng([args.seed, 7]))
    if not checkpoint:
        return model, optimizer, queue, 0, -1.0
    optimizer.load_state_dict(checkpoint["optimizer"])
    logging.info(f"Resumed {args.resume} at iteration {checkpoint['iteration']}")
    return model, optimizer, checkpoint["queue"].numpy(), checkpoint["iteration"], checkpoint["best"]


def loss_of(model, views, points, candidates, own, readable, args, precision):
    """One process's photos against all candidates -> loss, and the share of them whose own coordinate is the nearest.

    views (b, 3, S, S); points (B, 2) of the whole batch, candidates (B + Q, 2) degrees; own (b,): this process's rows
    of the batch; readable (b,) bool.
    """
    device = views.device
    neutral = None
    if args.neutral_km:
        neutral = torch.from_numpy(neutral_mask(points[own], candidates, args.neutral_km)).to(device)
    with autocast(device, precision):  # the location encoder and the logits stay in float32 by themselves
        logits = model(views, torch.as_tensor(candidates, dtype=torch.float32, device=device))
    targets = torch.as_tensor(own, device=device)
    hits = (logits.argmax(dim=1) == targets).float().mean()
    return gps_cross_entropy(logits, targets, neutral, readable), hits


def main(args):
    """-> the run's folder, None in all but the first of several processes (torchrun)."""
    with distributed.processes(require_device(args.device), args.process_timeout) as device:
        folder, unreadable = train(args, device)
        distributed.gather_objects(None)  # nobody leaves before all are done
    if folder:
        if unreadable:
            logging.info(f"{len(unreadable)} training images could not be read and took no part, listed above")
        logging.info(f"Done: {args.iterations} iterations. Evaluate with: python eval_geoclip.py --resume "
                     f"{folder / 'best.pt'} "
                     + (f"--dataset_path {args.dataset_path}" if args.dataset_path else "--csv FILE --images FOLDER"))
        (folder / "done").touch()
    return folder


def train(args, device):
    """-> the run's folder, None in all but the first process, and the rows of images that could not be read."""
    rank, processes = distributed.rank(), distributed.world()
    precision = default_precision(device) if args.precision == "auto" else args.precision
    training, validation = load_photos(args)
    if args.batch_size % processes or not 0 < args.batch_size <= len(training):
        raise ValueError(f"--batch_size {args.batch_size}: must be a multiple of the {processes} processes and at most "
                         f"the {len(training)} training images")
    args.lr_step = args.lr_step or max(1, len(training) // args.batch_size)
    folder = make_log_dir(args.log_dir) if rank == 0 else None
    if rank == 0:
        setup_logging(folder, args)
    torch.manual_seed(args.seed)
    logging.info(f"{len(training)} training images, {len(validation) if validation else 'no'} validation images")
    for note in training.notes + (validation.notes if validation else []):
        logging.info(note)
    model, optimizer, queue, iteration, best = start_or_resume(args, training, device)
    parameters = [p for p in model.parameters() if p.requires_grad]
    gallery = distinct_points(training.points, 100_000, args.seed)
    encoder, size = model.image_encoder, model.image_encoder.image_size
    augment = augmentation_of(args, size)
    source_size = size if args.augmentation == "none" else args.source_size or round(1.15 * size)
    schedule = Schedule(len(training), args.batch_size, args.iterations, args.seed, rank, processes, iteration)
    own = np.arange(args.batch_size)[schedule.own()]
    loader = DataLoader(PhotoFiles(training.paths, source_size, encoder.fit), batch_sampler=schedule,
                        num_workers=args.num_workers, pin_memory=device.type == "cuda")

    meter, unreadable, served = Meter(folder, iteration, args.iterations) if rank == 0 else None, set(), iter(loader)
    while iteration < args.iterations:
        with meter.waiting() if meter else nullcontext():
            rows, images, errors = next(served)
        note_unreadable(rows, errors, unreadable, len(training))
        views = augmented(images.to(device, non_blocking=True), augment, draws_of(args.seed, iteration, rank), args)
        if rank == 0 and iteration == 0:
            figures.save(figures.mosaic([list(views[i:i + 8]) for i in range(0, min(len(views), 40), 8)]),
                         folder / "batch.jpg")
        # All processes' coordinates, so that each photo meets the same candidates on one GPU and on eight.
        points = training.points[schedule.batch(iteration)]
        candidates = candidates_of(points, queue, args, iteration)
        readable = torch.tensor([not error for error in errors], device=device)
        loss, hits = loss_of(model, views, points, candidates, own, readable, args, precision)
        if not torch.isfinite(loss):
            raise RuntimeError(f"iteration {iteration}: the loss is {loss.item()}; nothing was updated, the last good "
                               f"checkpoints are in {folder}. A smaller --lr or --precision fp32 may help")
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(iteration, args)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        distributed.average_gradients(parameters)
        optimizer.step()
        model.clamp_scale_()
        queue = advance_queue(queue, points)
        iteration += 1

        if rank > 0:  # the first process keeps the books
            continue
        meter.count(args.batch_size)
        if iteration % args.log_every == 0 or iteration == args.iterations:
            meter.log(iteration, {"loss": loss.detach(), "hits": hits, "scale": model.scale.detach(),
                                  "lr": group["lr"]})
        if iteration % args.validate_every == 0 or iteration == args.iterations:
            score = validate(model, validation, gallery, args, device, precision, meter.writer, iteration)
            state = checkpoint_of(model, gallery, optimizer=optimizer.state_dict(), iteration=iteration,
                                  best=max(best, score), queue=torch.as_tensor(queue),
                                  args={key: str(value) for key, value in vars(args).items()})
            if score > best or not validation:
                best = score
                save_checkpoint(folder / "best.pt", state)
            save_checkpoint(folder / "last.pt", state)
            meter.restart()
    if meter:
        meter.close()
    return folder, unreadable


def note_unreadable(rows, errors, unreadable, count):
    """Logs each image that could not be read once, and adds its row to the set `unreadable`. ValueError beyond half."""
    for row, error in zip(rows.tolist(), errors):
        if error and row not in unreadable:
            unreadable.add(row)
            logging.warning(f"left out: {error} ({len(unreadable)} so far)")
    if len(unreadable) > count / 2:
        raise ValueError(f"{len(unreadable)} of {count} training images cannot be read, see above")


def augmented(images, augment, generator, args):
    """uint8 (b, 3, s, s) -> float32 (b, 3, S, S) in [0, 1], each turned and mirrored on its own, then augmented."""
    if args.augmentation != "none":
        images = turn_and_flip(images, generator, args.turns == "on", args.flip == "on")
    return augment(images[:, None], generator)[:, 0]


def draws_of(seed, iteration, rank):
    """The generator of one iteration's augmentation in one process, whatever came before it."""
    return torch.Generator().manual_seed(int(np.random.SeedSequence([seed, 8, iteration, rank]).generate_state(1)[0]))


if __name__ == "__main__":
    arguments = parse_arguments()
    run(main, arguments)
