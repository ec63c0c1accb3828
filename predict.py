"""Where were these photos taken? python predict.py PHOTO --near LAT LON

Each photo is compared with the index of the whole Earth that ships, or with the images of 2021 of --dataset_path, in
four rotations; those that look most alike say where it is, and --register lays the photo on them.
Leaves predictions.json, .csv and .geojson (their footprints), a picture of photos and finds, and world maps.

An archive: --output FOLDER keeps what is done there, the same command goes on after a stop, and --shard i/n does a part
of it, which --merge FOLDER puts together.
"""

import hashlib
import logging
import os
import sys
import time
from collections import Counter
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from datasets.gps import check_points, each_image
from datasets.images import read_image
from datasets.nadirs import read_nadirs
from retrieval.archive import Archive, merge, parse_shard, read_places, shard_folder, shard_rows
from retrieval.describe import Describer, rotate
from retrieval.locator import COLUMNS, EARTH_WEIGHTS, Locator, Place, own_columns  # noqa: F401  (Place for others)
from retrieval.store import model_fingerprint, tidy
from utils import figures
from utils.arguments import make_parser, positive, run, whole
from utils.files import printable
from utils.logs import make_log_dir, setup_logging
from utils.precision import PRECISIONS
from utils.signals import EXIT_CODE, Stop, Stopped
from utils.tables import Strings
from utils.world_map import candidates_map

# Flags that the locator takes as they are, and those that decide what is found: an archive goes on with the same ones.
LOCATOR = "dataset_path index register matcher_weights ground candidates near_km descriptors".split()
LOCATOR += "device precision batch_size num_workers".split()
DECIDING = "dataset_path index top_k near near_km register ground candidates".split()
TELL_EVERY = 60  # seconds between lines in the log


def parse_arguments(argv=None):
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("inputs", nargs="*", metavar="IMAGE_OR_FOLDER", help="folders are searched through")
    add("--resume", default=str(EARTH_WEIGHTS), help="checkpoint of train.py, or released weights")
    add("--dataset_path", help="folder with database/; queries are not needed")
    add("--index", help="file of python -m retrieval.earth_index; default: without --dataset_path, the shipped one")
    add("--top_k", type=positive, default=3, help="places for each photo")

    add = parser.add_argument_group("the point below the camera; the first that is known counts").add_argument
    add(
        "--nadirs",
        metavar="FILE.csv",
        help="table with path, nadir_lat, nadir_lon, or time (ISO 8601, UTC) with --tle; other columns are kept",
    )
    add("--near", type=float, nargs=2, metavar=("LAT", "LON"), help="one point for all photos; degrees")
    add("--tle", metavar="FILE", help="two-line elements of the station, for photos with a time (table or EXIF)")
    add("--near_km", type=float, default=2500, help="how far a photo reaches; astronauts see 2500 km (paper, eq. 1)")

    add = parser.add_argument_group("registration").add_argument
    add("--register", choices=("xfeat", "aliked", "disk", "sift", "none"), default="none", help="of the best places")
    add("--matcher_weights", metavar="FILE", help="of --register, if not those of the installed package")
    add("--ground", metavar="FILE", help="Web Mercator raster to register on; default: the images of --dataset_path")
    add("--candidates", type=positive, default=10, help="places that are registered; the best --top_k stay")

    add = parser.add_argument_group("archives").add_argument
    add("--output", metavar="FOLDER", help="results go there, not to logs/; the same command again goes on")
    add("--shard", metavar="i/n", help="part i, from 0, of n; default: SLURM's job array, or RANK and WORLD_SIZE")
    add("--merge", metavar="FOLDER", help="put the shards in an --output folder together; nothing else is needed")
    add("--keep_photos", action="store_true", help="keep the photos' descriptors in --descriptors, too")

    add = parser.add_argument_group("run").add_argument
    add(
        "--descriptors",
        default="logs/descriptors",
        help="folder where descriptors are kept, so that none is made twice",
    )
    add("--forget_descriptors", action="store_true", help="remove what was kept there for other models than this one")
    add("--shown", type=whole, help="photos in the picture, and world maps; default: 50, with --output 0")
    add("--log_dir", default="predict", help="results go to logs/LOG_DIR/date_time")
    add("--batch_size", type=positive, default=32, help="images described at a time")
    add("--num_workers", type=whole, default=2)
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--precision", choices=("auto", *PRECISIONS), default="auto", help="of the network; auto: bf16 if it is fast")
    add("--traceback", action="store_true", help="show the traceback of an error")
    args = parser.parse_args(argv)
    if args.merge is None and not args.inputs:
        parser.error("photos are needed (or --merge FOLDER)")
    if args.shard is not None and args.output is None:
        parser.error("--shard needs --output FOLDER, where all shards' results go")
    return args


def main(args):
    """-> the predictions, dicts, in the order of the photos; with --output an iterator: memory does not grow."""
    if args.merge is not None:
        return merge_shards(Path(args.merge))
    near = None if args.near is None else tuple(check_points([args.near], "--near")[0].tolist())
    shard = parse_shard(args.shard) if args.output is not None else (0, 1)
    photos = Strings(each_image(args.inputs))
    nadirs = read_nadirs(args.nadirs, near, args.tle, [each for each in args.inputs if Path(each).is_dir()])
    notes = nadirs.check(photos)
    rows = shard_rows(len(photos), shard)
    photos = photos[rows.start : rows.stop]

    folder = make_log_dir(args.log_dir) if args.output is None else shard_folder(args.output, shard)
    folder.mkdir(parents=True, exist_ok=True)
    setup_logging(folder, args)
    for note in notes:
        logging.info(note)
    if args.output is not None and args.device == "cuda" and "LOCAL_RANK" in os.environ:  # torchrun: a GPU each
        args.device = f"cuda:{int(os.environ['LOCAL_RANK']) % max(1, torch.cuda.device_count())}"
    locator = Locator.from_files(args.resume, **{name: getattr(args, name) for name in LOCATOR})
    require_enough(locator.places, near, args.near_km, args.top_k)
    precision, size = locator.settings["precision"], locator.settings["image_size"]
    fingerprint = model_fingerprint(locator.model, size, precision)
    tidy(args.descriptors, fingerprint, args.forget_descriptors)

    columns = COLUMNS | dict.fromkeys(own_columns(dict.fromkeys(nadirs.columns)), str)
    settings = {"model": fingerprint, "columns": list(columns)}
    settings |= {name: getattr(args, name) for name in DECIDING}
    with Archive.open(folder, settings, columns) as archive:
        rows = np.flatnonzero([not archive.is_done(photo) for photo in photos])
        if len(rows) < len(photos):
            logging.info(f"{folder}: {len(photos) - len(rows)} of {len(photos)} photos are done, {len(rows)} are left")
        count = locate_all(locator, photos[rows], nadirs, archive, args)
        if not count and args.output is None:
            raise ValueError(f"none of the {len(photos)} images could be read or placed, see above")
        archive.finish()
    left_out = f"; {archive.failed} photos are left out, failures.csv says why" if archive.failed else ""
    logging.info(f"{count} photos, {len(locator.places)} database images; predictions are in {folder}{left_out}")
    predictions = (properties for properties, _ in read_places(folder))
    return predictions if args.output else list(predictions)


def require_enough(places, near, near_km, top_k):
    """Raises ValueError where fewer than top_k places can be found, before anything is described."""
    count, where = len(places.near(near, near_km)), ""
    if near is not None:
        where = f" within {near_km:g} km of {near[0]:g}, {near[1]:g} (--near, --near_km)"
    if count < top_k:
        raise ValueError(f"--top_k {top_k}: the database has {count} images{where}")


def locate_all(locator, photos, nadirs, archive, args):
    """Photos (Strings) -> their places in the archive, a picture and maps; returns how many have one."""
    shown = args.shown if args.shown is not None else 0 if args.output else 50
    sources, unknown, sheet, count, told = Counter(), [], [], 0, time.monotonic()
    keep = archive_descriptors(locator, photos, args)
    with Stop() as stop, keep as kept, tqdm(total=len(photos), desc="locating", unit=" photos", leave=False) as bar:
        nadir_of = lambda number: nadirs.of(photos[number])
        try:
            for answers in interruptible(locator.stream(photos, nadir_of, args.top_k, kept), stop):
                placed = [place for answer in answers for place in answer.places]
                failures = [(answer.image, answer.why) for answer in answers if answer.why]
                archive.add(((place.as_dict(), place.footprint) for place in placed), failures)
                count += len(answers) - len(failures)
                sources.update(answer.nadir.source for answer in answers)
                unknown += [answer for answer in answers if answer.nadir.why][: 5 - len(unknown)]
                sheet += tell(answers, archive.folder, args.output is None, shown - len(sheet), len(sheet))
                bar.update(len(answers))
                if time.monotonic() - told > TELL_EVERY:
                    told, rate = time.monotonic(), bar.format_dict["rate"] or bar.n / bar.format_dict["elapsed"]
                    left = timedelta(seconds=round((bar.total - bar.n) / rate))
                    logging.info(f"{bar.n} of {bar.total} photos, {rate:.3g} photos/s, {left} left")
        except Stopped as signal:
            again = "the same command goes on" if args.output else "with --output FOLDER it could go on"
            logging.info(f"stopped by {signal} after {bar.n} photos, {archive.folder} has their places; {again}")
            sys.exit(EXIT_CODE)
    told = ", ".join(f"{number} {source}" for source, number in sources.most_common())
    logging.info(f"where the nadirs come from: {told} (none: the whole Earth is searched)")
    for answer in unknown:
        logging.info(f"without a nadir, for example {answer.image}: {answer.nadir.why}")
    if sheet:
        save_picture(archive.folder / "predictions.jpg", locator.places, sheet)
    return count


def interruptible(batches, stop):
    """The same batches; a signal ends the wait for one, which may be that for all of the database's descriptors."""
    while True:
        with stop.at_once():
            batch = next(batches, None)
        if batch is None:
            return
        yield batch


def archive_descriptors(locator, photos, args):
    """With --keep_photos, the context of the file in which the photos' descriptors are; each shard has its own."""
    if not args.keep_photos:
        return nullcontext()
    place = "\0".join(map(os.path.abspath, [args.output or "", *args.inputs]))
    shard = "-of-".join(map(str, parse_shard(args.shard) if args.output else (0, 1)))
    name = f"photos_{hashlib.sha256(os.fsencode(place)).hexdigest()[:8]}_{shard}"
    settings = {name: locator.settings[name] for name in ("image_size", "device", "precision")}
    describer = Describer(locator.model, rotations=locator.places.turns, **settings)
    return describer.file(args.descriptors, name, Strings(map(os.path.abspath, photos)))


def tell(answers, folder, each_photo, room, first):
    """Failures, and with each_photo the places, into the log; maps of up to `room` photos -> their answers."""
    placed = [answer for answer in answers if answer.places]
    for answer in answers:
        if answer.why:
            logging.info(f"left out: {answer.why}")
        elif each_photo:
            found = (f"{place.latitude:.3f} {place.longitude:.3f} ({label(place)})" for place in answer.places)
            logging.info(f"{answer.image}: {', '.join(found)}")
    for number, answer in enumerate(placed[: max(room, 0)], first):
        points = [(place.latitude, place.longitude) for place in answer.places]
        title = printable(Path(answer.image).name)
        figures.save(candidates_map(points, list(map(label, answer.places)), title), folder / f"map_{number:04d}.jpg")
    return placed[: max(room, 0)]


def label(place):
    return f"{place.score:.3f}" + (f", {place.inliers} inliers, p {place.probability:.2f}" if place.inliers else "")


def save_picture(file, places, answers, size=160):
    """A row a photo: the photo, and the images that it was found to look like, turned as they matched."""
    cells, captions = [], []
    for answer in answers:
        pictures = [places.picture(place.row, size) for place in answer.places]
        turned = [
            None if each is None else rotate(each, 90 * round(place.rotation / 90))
            for each, place in zip(pictures, answer.places)
        ]
        cells.append([read_image(answer.image, size, upright=True), *turned])
        found = (f"{place.latitude:.1f} {place.longitude:.1f} ({place.score:.2f})" for place in answer.places)
        captions.append([printable(Path(answer.image).name)[:22], *found])
    titles = ["photo", *(f"prediction {rank + 1}" for rank in range(max(map(len, cells)) - 1))]
    figures.save(figures.mosaic(cells, size, captions=captions, column_titles=titles), file)


def merge_shards(folder):
    counts = merge(folder, lambda properties: {name: COLUMNS.get(name, str) for name in properties or COLUMNS})
    print(f"{folder}: {counts['photos']} photos, {counts['places']} places, {counts['failures']} failures")
    return (properties for properties, _ in read_places(folder))


if __name__ == "__main__":
    arguments = parse_arguments()
    run(main, arguments)
