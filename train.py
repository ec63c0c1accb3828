"""Train EarthLoc: python train.py --dataset_path FOLDER, or python train.py @presets/demo.args

The recipe is the paper's (sec. 4 and 5.1) unless a flag says otherwise; presets/ holds whole recipes. Checkpoints,
logs and pictures go to logs/LOG_DIR/date_time; python eval.py --resume …/best.pt evaluates one.

A signal (SIGTERM, SIGINT, SIGUSR1) stops it at the next iteration with exit code 75; --resume goes on with the same
bits. Several GPUs or machines: torchrun --nproc_per_node N train.py …
"""

import logging
import math
import sys
from contextlib import closing

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from augmentations.year_wise import GROUPS
from datasets.batches import DRAWS, BatchLoader, random_clusters, schedule, spares
from datasets.build.cache import cache_note
from datasets.images import read_image
from datasets.names import DATABASE_YEAR
from datasets.overlap import share_ground
from datasets.regions import RegionDataset, Regions, source_size
from datasets.sets import VALIDATION, load_evaluation_data
from losses import LOSSES
from retrieval.clustering import cluster
from retrieval.describe import describe
from retrieval.evaluation import describe_sets, score_sets
from utils import distributed, figures
from utils.arguments import (
    add_augmentation_arguments,
    add_model_arguments,
    augmentation_of,
    make_parser,
    positive,
    whole,
)
from utils.arguments import run as run_script
from utils.checkpoint import LAST, save_checkpoint
from utils.logs import Meter, make_log_dir, setup_logging
from utils.precision import PRECISIONS, autocast, default_precision, require_device
from utils.runs import find_run, fresh_run, how_to_go_on
from utils.settings import add_settings, chosen_settings, make
from utils.signals import EXIT_CODE, Stop, Stopped


def parse_arguments(argv=None):
    parser = make_parser(__doc__)
    data = parser.add_argument_group("data")
    data.add_argument("--dataset_path", default="data", help="folder with database/, queries/ and the intersections")
    data.add_argument("--positives", choices=("years", "views"), default="years",
                      help="positives of an image: its region's other years, or augmented views of itself (Table 3)")
    data.add_argument("--source_size", type=positive, help="pixels a side at which images are loaded, before the crop; "
                                                      "default: 1.6 × image_size, up to the next power of two")
    data.add_argument("--num_workers", type=whole, default=4)
    data.add_argument("--max_unreadable", type=float, default=0.05,
                      help="share of regions with an unreadable image above which the run stops")
    batches = parser.add_argument_group("batches (paper, sec. 4.2)")
    batches.add_argument("--batch_size", type=positive, default=32,
                         help="regions a batch, over all processes; each brings its four years")
    batches.add_argument("--batches", choices=("clustered", "random"), default="clustered")
    batches.add_argument("--num_clusters", type=positive, default=200)
    batches.add_argument("--cluster_draw", choices=DRAWS, default="size",
                         help="a batch's cluster: in proportion to its size, or any, equally likely (released code)")
    batches.add_argument("--recluster_every", type=positive, default=5000, help="iterations")
    augmentation = parser.add_argument_group("augmentation (paper, sec. 4.3)")
    add_augmentation_arguments(augmentation, GROUPS)
    loss = parser.add_argument_group("loss (paper, sec. 4.4)")
    loss.add_argument("--loss", choices=LOSSES, default="multi_similarity")
    loss.add_argument("--neutral", choices=("on", "off"), default="on",
                      help="on: regions that share ground are no negatives; off: they are")
    add_settings(loss, LOSSES)
    steps = parser.add_argument_group("optimisation (paper, sec. 5.1)")
    steps.add_argument("--iterations", type=positive, default=50_000)
    steps.add_argument("--lr", type=float, default=1e-4)
    steps.add_argument("--lr_schedule", choices=("constant", "cosine"), default="constant")
    steps.add_argument("--warmup", type=whole, default=0, help="iterations over which lr rises from 0")
    steps.add_argument("--fc_init", choices=("random", "whitening"), default="random",
                       help="whitening: the last layer starts as a PCA whitening of what it gets (README, 'Plateau')")
    steps.add_argument("--fc_std", type=float, default=1.0, help="scale of the whitening: larger moves slower")
    steps.add_argument("--fc_regulariser", type=float, default=0.1, help="of the whitening, times the mean variance")
    system = parser.add_argument_group("run")
    system.add_argument("--log_dir", default="default", help="outputs go to logs/LOG_DIR/date_time")
    system.add_argument("--resume", help="what to go on with: a last.pt, a run's folder (its newest whole checkpoint), "
                                         "a folder of runs, or auto: logs/LOG_DIR, from the start if it has none yet. "
                                         "Flags are those of the command line")
    system.add_argument("--save_every", type=positive, help="iterations between last.pt; default: validate_every")
    system.add_argument("--max_skips", type=whole, default=0,
                        help="updates with a nan or infinite loss or gradient that are left out before the run stops")
    system.add_argument("--process_timeout", type=float, default=1800,
                        help="seconds that processes wait for one that does not answer")
    system.add_argument("--validate_every", type=positive, help="iterations; default: recluster_every")
    system.add_argument("--keep_every", type=positive, help="iterations between weights that are kept, for a curve "
                                                       "(python -m experiments.curve)")
    system.add_argument("--log_every", type=positive, default=50, help="iterations between scalars")
    system.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    system.add_argument("--precision", choices=("auto", *PRECISIONS), default="auto",
                        help="of the network; auto: bf16 where the hardware multiplies in it")
    system.add_argument("--compile", action="store_true",
                        help="torch.compile the network: minutes before the first step (benchmarks/speed_step.py)")
    system.add_argument("--seed", type=whole, default=0)
    system.add_argument("--traceback", action="store_true", help="show the traceback of an error")
    add_model_arguments(parser)
    return parser.parse_args(argv)


def learning_rate(iteration, args):
    """Warm-up, then constant (the paper) or a cosine to zero."""
    warm = min(1.0, (iteration + 1) / args.warmup) if args.warmup else 1.0
    cosine = 0.5 * (1 + math.cos(math.pi * iteration / args.iterations)) if args.lr_schedule == "cosine" else 1.0
    return args.lr * warm * cosine


def make_loss(args):
    return make(LOSSES[args.loss], chosen_settings(args, LOSSES[args.loss]))


def read_regions(dataset_path, batch_size):
    """-> Regions with all years; those without are logged. Raises ValueError where a batch cannot be filled."""
    if batch_size < 1:
        raise ValueError(f"--batch_size {batch_size}: a batch has at least one region")
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


def whiten(model, loader, regions, augment, args, device, precision):
    """Sets the model's fc to the whitening of augmented views of up to 512 regions, in the mode that training uses."""
    rows = np.random.default_rng([args.seed, 1]).permutation(regions)[:512]
    batches = rows[:len(rows) // args.batch_size * args.batch_size].reshape(-1, args.batch_size)
    generator = torch.Generator().manual_seed(args.seed)
    features = []
    state = {key: value.clone() for key, value in model.state_dict().items()}
    model.train()
    with torch.no_grad(), autocast(device, precision):
        substitutes = [spares(each, [np.arange(regions)], [args.seed, 6, k]) for k, each in enumerate(batches)]
        served = loader.serve(batches, substitutes.__getitem__)
        for _, images, _ in tqdm(served, total=len(batches), desc="whitening", leave=False):
            views = augment(images.to(device), generator).flatten(0, 1)
            features.append(model.aggregate(views.contiguous(memory_format=torch.channels_last)).float())
    model.load_state_dict(state)  # the passes moved BatchNorm's running statistics
    model.whiten_(torch.cat(features), std=args.fc_std, regulariser=args.fc_regulariser, generator=generator)


def make_clusters(model, regions, period, unreadable, args, device, precision):
    """Clusters for one period: random ones first, then k-means of one year's descriptors (paper, sec. 4.2).

    Regions whose image cannot be read are noted in `unreadable` and in no cluster.
    """
    if args.batches == "random":
        return [np.arange(len(regions))]
    if period == 0:
        return random_clusters(len(regions), args.num_clusters, args.batch_size, [args.seed, 4])
    descriptors, failures = describe(model, year_files(regions, DATABASE_YEAR), args.image_size, 4 * args.batch_size,
                                     args.num_workers, device, precision, label="describing regions")
    note_unreadable(failures, unreadable, len(regions), args.max_unreadable)
    rows = np.setdiff1d(np.arange(len(regions)), [row for row, _ in failures])
    return distributed.from_first(lambda: [rows[each] for each in cluster(
        descriptors[0][rows], args.num_clusters, args.batch_size, args.seed + period, device)])


def note_unreadable(errors, unreadable, regions, share):
    """errors [(row, what went wrong)] are logged and added to the dict `unreadable`, each region once.

    Raises ValueError where a region had no substitute, or where more than this share of all `regions` is unreadable.
    """
    for row, text in errors:
        if row not in unreadable:
            unreadable[row] = text
            logging.warning(f"Left out, another region takes its place: {text}")
    if len(unreadable) > share * regions:
        raise ValueError(f"{len(unreadable)} of {regions} regions have an image that cannot be read, more than "
                         f"--max_unreadable {share:g} allows; the last one: {list(unreadable.values())[-1]}")


def neutral_pairs(footprints, labels):
    """footprints (B, 4, 2) of the batch's regions, labels (N,) into them -> (N, N) bool: other regions, same ground."""
    shared = torch.from_numpy(share_ground(footprints, footprints)).to(labels.device, non_blocking=True)
    return shared[labels][:, labels] & (labels[:, None] != labels)


class Outcome:
    """What an iteration came to, on its way to the host: a look at it waits for that iteration, not for later ones.

    loss, norm of the gradient: 0-d tensors. rows, views: the batch, in case it is to be saved.
    """

    def __init__(self, iteration, loss, norm, rows, views):
        self.iteration, self.rows, self.views = iteration, rows, views
        self.values = torch.stack([loss, norm]).to("cpu", non_blocking=True)
        self.copied = torch.cuda.Event() if loss.is_cuda else None
        if self.copied:
            self.copied.record()

    def problem(self):
        """-> what was not finite, so that nothing was updated; None if all is well."""
        if self.copied:
            self.copied.synchronize()
        if torch.isfinite(self.values.sum()):
            return None
        loss, norm = self.values.tolist()
        what = f"the gradient's norm is {norm}" if math.isfinite(loss) else f"the loss is {loss}"
        return f"iteration {self.iteration}: {what}"


def update(run, views, labels, neutral, loss_fn, lr, device, precision):
    """One step on views (N, 3, S, S) with labels (N,) and neutral (N, N) or None -> loss, norm of the gradient, both
    0-d, and descriptors (N, D) float32.

    Low precision only around the network, the loss in float32. Of several processes each has its part of the views, and
    labels, neutral and what is returned are those of all. At a loss or norm that is not finite the step changes nothing
    but the iteration's number: neither weights, nor Adam's averages, nor BatchNorm's. The device decides that, so the
    host need not wait for it.
    """
    run.model.train()
    averages = [each for module in run.model.modules() if isinstance(module, nn.BatchNorm2d) and module.training
                for each in module.buffers()]
    before = [each.clone() for each in averages]
    with autocast(device, precision):
        descriptors = run.network(views.contiguous(memory_format=torch.channels_last))
    descriptors = distributed.gather(descriptors.to(torch.promote_types(descriptors.dtype, torch.float32)))
    # Mining drops nan similarities: the loss would be a harmless 0.
    loss = torch.where(torch.isfinite(descriptors).all(), loss_fn(descriptors, labels, neutral), torch.nan)
    for group in run.optimizer.param_groups:
        group["lr"] = lr
    run.optimizer.zero_grad(set_to_none=True)
    loss.backward()
    norm = torch.nn.utils.get_total_norm([each.grad for each in run.model.parameters() if each.grad is not None])
    finite = torch.isfinite(loss.detach() + norm)
    run.optimizer.found_inf = (~finite).float()  # as GradScaler tells a fused optimizer to do nothing
    run.optimizer.step()
    for now, then in zip(averages, before):
        torch.where(finite, now, then, out=now)
    run.iteration += 1
    return loss.detach(), norm, descriptors.detach()


def settle(run, outcome, regions, folder, max_skips):
    """Looks at an iteration's outcome. Of one without an update, the batch goes to a file.

    Raises RuntimeError where this is more often than max_skips.
    """
    problem = outcome.problem()
    if problem is None:
        return
    file = folder / f"bad_batch_{outcome.iteration}.pt"
    save_checkpoint(file, {"reason": problem, "iteration": outcome.iteration, "views": outcome.views.cpu(),
                           "paths": [regions.paths[row] for row in outcome.rows.tolist()]})
    logging.warning(f"{problem}; its regions and views are in {file}")
    if run.skipped >= max_skips:
        raise RuntimeError(f"{problem}; it updated nothing, the last good checkpoints stay, the batch is in {file}. "
                           f"A smaller --lr or --precision fp32 may help, --max_skips leaves out a few updates")
    run.skipped += 1


def save_clusters_figure(folder, regions, clusters, shown=8, images=12):
    """Fig. 14: a row a cluster."""
    files = year_files(regions, DATABASE_YEAR)
    try:
        pictures = [[read_image(files[row], 128) for row in rows[:images]] for rows in clusters[:shown]]
    except (ValueError, OSError) as error:  # described a moment ago, gone now
        logging.warning(f"No picture of the clusters: {error}")
        return
    figures.save(figures.clusters_figure(pictures), folder / "clusters.jpg")


def validate(run, validation, writer, args, device, precision):
    """R@1 of the validation set, logged and written; None without one."""
    if not validation.sets:
        return None
    descriptors, data = describe_sets(run.model, validation, args.image_size, 4 * args.batch_size, args.num_workers,
                                      device, precision, progress=False)

    def score():
        result = score_sets(data, descriptors)
        logging.info(f"Iteration {run.iteration}: {result.lines()[0]}")
        return result[VALIDATION].recalls[1]
    score = distributed.from_first(score)
    writer.add_scalar("validation/R@1", score, run.iteration)
    return score


def validate_and_save(run, validation, meter, folder, args, device, precision, stop):
    """What is due before an iteration: weights to keep, validation with best.pt and last.pt, or last.pt alone."""
    if args.keep_every and run.iteration and run.iteration % args.keep_every == 0:
        run.save_weights(folder / f"iteration_{run.iteration:06d}.pt")
    if run.iteration % args.validate_every == 0 or run.iteration == args.iterations:
        if run.validated == run.iteration:  # resumed right after it
            return
        with stop.at_once():
            score = validate(run, validation, meter.writer, args, device, precision)
        run.validated = run.iteration
        if run.iteration:
            if score is None or score > run.best:
                run.best = run.best if score is None else score
                run.save(folder / "best.pt", args)
            run.save(folder / LAST, args)
        meter.restart()
    elif run.iteration % args.save_every == 0:
        run.save(folder / LAST, args)


def is_break(iteration, args):
    """Whether something other than a step comes before this iteration: a checkpoint, validation, clusters, the end."""
    every = (args.validate_every, args.save_every, args.keep_every, args.recluster_every)
    return iteration == args.iterations or any(each and iteration % each == 0 for each in every)


def train(run, regions, loader, augment, validation, folder, args, device, precision, stop):
    """From where the run stands to the last iteration: checkpoints, scalars and pictures go to the folder.

    The host is one iteration ahead of the device. Raises Stopped after a signal, with the run as it is between two
    iterations.
    """
    loss_fn = make_loss(args)
    own = folder / f"rank{distributed.rank()}" if distributed.rank() else folder
    mine = distributed.part(args.batch_size)
    served, unreadable, outcomes = None, {}, []

    def settle_all_but(count):
        while len(outcomes) > count:
            settle(run, outcomes.pop(0), regions, own, args.max_skips)

    with closing(Meter(own, run.iteration, args.iterations)) as meter:
        while True:
            if is_break(run.iteration, args):
                settle_all_but(0)
            validate_and_save(run, validation, meter, folder, args, device, precision, stop)
            if run.iteration == args.iterations:
                break
            try:
                stop.check()
                # New clusters from one year's descriptors, and the schedule up to the next ones.
                period, step = divmod(run.iteration, args.recluster_every)
                if step == 0:
                    with stop.at_once():
                        run.clusters = make_clusters(run.model, regions, period, unreadable, args, device, precision)
                    logging.info(f"Iteration {run.iteration}: {len(run.clusters)} clusters of "
                                 f"{min(map(len, run.clusters))} to {max(map(len, run.clusters))} regions")
                    if period == 1 and args.batches == "clustered" and distributed.rank() == 0:
                        save_clusters_figure(folder, regions, run.clusters)
                if step == 0 or served is None:
                    with stop.at_once():
                        served = serve(run, loader, args, mine)
                    meter.restart()
                with meter.waiting(), stop.at_once():
                    rows, images, errors = next(served)
            except Stopped:
                settle_all_but(0)
                raise
            rows, errors = distributed.gather(rows), sum(distributed.gather_objects_if(errors), [])
            if errors:
                note_unreadable(errors, unreadable, len(regions), args.max_unreadable)
            if (rows < 0).any():
                raise ValueError(f"{errors[0][1]}. No other region of {len(regions)} can take its place in the batch")
            seed = iteration_seed(args.seed, run.iteration)
            torch.manual_seed(seed)
            views = augment(images.to(device, non_blocking=True), torch.Generator().manual_seed(seed), mine, len(rows))
            if run.iteration == 0:
                figures.save(figures.batch_figure(views[:20], regions.years), own / "batch.jpg")
            labels = torch.arange(len(rows), device=device).repeat_interleave(len(regions.years))
            neutral = neutral_pairs(regions.footprints[rows.numpy()], labels) if args.neutral == "on" else None
            lr = learning_rate(run.iteration, args)
            loss, norm, descriptors = update(run, views.flatten(0, 1), labels, neutral, loss_fn, lr, device, precision)
            outcomes.append(Outcome(run.iteration - 1, loss, norm, rows, views))
            meter.count(len(labels))
            due = run.iteration % args.log_every == 0 or run.iteration == args.iterations
            if due and torch.isfinite(loss + norm):
                anchors, pairs = loss_fn.mined_shares(descriptors, labels, neutral)
                meter.log(run.iteration, {"loss": loss, "mined/anchors": anchors, "mined/pairs": pairs, "lr": lr})
            settle_all_but(1)  # also bounds how far ahead the host is, so that the loader's slots hold long enough


def serve(run, loader, args, mine):
    """-> The loader's batches from where the run stands to its next clusters; of each, the rows `mine`."""
    period, step = divmod(run.iteration, args.recluster_every)
    count = min(args.recluster_every, args.iterations - period * args.recluster_every)
    batches = schedule(run.clusters, args.batch_size, count, [args.seed, 2, period], args.cluster_draw)[step:]
    first = run.iteration
    return loader.serve(batches[:, mine], lambda number: spares(
        batches[number], run.clusters, [args.seed, 5, first + number])[mine])


def prepare(args):
    """-> regions, loader, augmentation and validation data, as the flags have them."""
    regions = read_regions(args.dataset_path, args.batch_size)
    shown = regions.views_of(DATABASE_YEAR) if args.positives == "views" else regions
    loader = BatchLoader(RegionDataset(shown, args.source_size), args.num_workers)
    validation = load_evaluation_data(args.dataset_path).only(VALIDATION)
    augment = augmentation_of(args, args.image_size)
    return regions, loader, augment, validation


def start(args, regions, loader, augment, folder, device, precision):
    """-> The Run to go on with, or a fresh one."""
    run = find_run(args, folder, device) if args.resume else None
    if run is None:
        run = fresh_run(args, device)
        run.save_weights(folder / "initial.pt")  # what the trained model is compared with
        if args.fc_init == "whitening":
            whiten(run.model, loader, len(regions), augment, args, device, precision)
    run.network = distributed.wrap(run.model)
    return run


def main(args):
    """-> the run's folder. Leaves with exit code 75 after a signal."""
    with Stop() as stop, distributed.processes(require_device(args.device), args.process_timeout) as device:
        precision = default_precision(device) if args.precision == "auto" else args.precision
        args.source_size = args.source_size or source_size(args.image_size)
        args.validate_every = args.validate_every or args.recluster_every
        args.save_every = args.save_every or args.validate_every
        args.processes = distributed.world()
        folder = distributed.from_first(lambda: make_log_dir(args.log_dir))
        own = folder / f"rank{distributed.rank()}" if distributed.rank() else folder
        own.mkdir(exist_ok=True)
        setup_logging(own, args)
        distributed.part(args.batch_size)
        torch.manual_seed(args.seed)
        note = cache_note(args.dataset_path, args.source_size)
        if note:
            logging.info(note)
        run, loader, stopped = None, None, False
        try:
            with stop.at_once():
                regions, loader, augment, validation = prepare(args)
                run = start(args, regions, loader, augment, folder, device, precision)
            if args.compile:
                run.model.compile()
            train(run, regions, loader, augment, validation, folder, args, device, precision, stop)
        except Stopped as signal:
            stopped = True
            if run is None:
                logging.info(f"{signal}: stopped before the first iteration, start it again")
            else:
                run.save(folder / LAST, args)
                logging.info(f"{signal}: stopped before iteration {run.iteration + 1} of {args.iterations}, all is "
                             f"saved. Go on with: {how_to_go_on(folder)}")
        finally:
            if loader is not None:
                loader.close()
    if stopped:
        sys.exit(EXIT_CODE)
    logging.info(f"Done: {args.iterations} iterations, best validation R@1 {run.best:.1f}. Evaluate with: "
                 f"python eval.py --resume {folder / 'best.pt'} --dataset_path {args.dataset_path}")
    (folder / "done").touch()
    return folder


if __name__ == "__main__":
    arguments = parse_arguments()
    run_script(main, arguments)
