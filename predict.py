"""Where were these photos taken? python predict.py PHOTO --near LAT LON

Each photo is compared with the index of the whole Earth that ships, or with the images of 2021 of --dataset_path, in
four rotations; those that look most alike say where it is, and --register lays the photo on them.
Leaves predictions.json, .csv and .geojson (their footprints), a picture of photos and finds, and world maps.

An archive: --output FOLDER keeps what is done there, the same command goes on after a stop, and --shard i/n does a part
of it, which --merge FOLDER puts together.
"""

import argparse
import logging
import os
import sys
from collections import Counter
from collections.abc import Iterable
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch

from datasets.gps import check_points, each_image
from datasets.nadirs import Nadirs, read_nadirs
from retrieval.archive import Archive, make_folder, merge, parse_shard, read_places, shard_folder, shard_rows
from retrieval.database import require_enough
from retrieval.describe import Describer
from retrieval.exports import EXPORTS, export_answer
from retrieval.locator import COLUMNS, RESUME_HELP, Locator, Place, default_weights, own_columns  # noqa: F401
from retrieval.matching import matcher_flag
from retrieval.prior import PRIOR_HELP, PRIORS
from retrieval.store import DescriptorFile, tidy
from retrieval.summary import save_map, save_sheet, tell
from utils.arguments import add_shared, make_parser, positive, run, whole
from utils.logs import Bar, make_log_dir, setup_logging
from utils.signals import EXIT_CODE, Stop, Stopped, interruptible
from utils.tables import Strings

# Flags that the locator takes as they are, and those that decide what is found: an archive goes on with the same ones.
LOCATOR = "dataset_path index milvus register matcher_weights ground candidates near_km prior descriptors".split()
LOCATOR += "device precision batch_size num_workers".split()
DECIDING = "dataset_path index milvus top_k near near_km prior register ground candidates".split()


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("inputs", nargs="*", metavar="IMAGE_OR_FOLDER", help="folders are searched through")
    add("--resume", help=RESUME_HELP)
    add("--dataset_path", help="folder with database/; queries are not needed")
    add("--index", help="file of python -m retrieval.earth_index; default: without --dataset_path, the shipped one")
    told = "search the index in Milvus: a file ending in .db, or http://HOST:PORT ($MILVUS_TOKEN: USER:PASSWORD); "
    add("--milvus", metavar="URI", help=told + "filled at the first time (docs/hub.md)")
    add("--top_k", type=positive, default=3, help="places for each photo")

    own = "files for each photo, in exports/, beside predictions.geojson, which has all"
    add("--export", nargs="+", choices=tuple(EXPORTS), default=[], metavar="KIND", help=f"{own}: {', '.join(EXPORTS)}")

    add = parser.add_argument_group("the point below the camera; the first that is known counts").add_argument
    add(
        "--nadirs",
        metavar="FILE.csv",
        help="table with path, nadir_lat, nadir_lon, or time (ISO 8601, UTC) with --tle; other columns are kept",
    )
    add("--near", type=float, nargs=2, metavar=("LAT", "LON"), help="one point for all photos; degrees")
    add("--tle", metavar="FILE", help="two-line elements of the station, for photos with a time (table or EXIF)")
    add("--near_km", type=float, default=2500, help="how far a photo reaches; astronauts see 2500 km (paper, eq. 1)")
    add("--prior", choices=PRIORS, default="archive", help=PRIOR_HELP)

    add = parser.add_argument_group("registration").add_argument
    add(
        "--register",
        **matcher_flag("auto", "none"),
        default="auto",
        help="lays the photo on the best places, seconds a photo; auto: xfeat, or sift where its weights are missing, "
        "on the images of --dataset_path or on --ground; none on the shipped index alone, whose map is too coarse",
    )
    add("--matcher_weights", metavar="FILE", help="of --register, if not those of the installed package")
    add("--ground", metavar="FILE", help="Web Mercator raster to register on; default: the images of --dataset_path")
    add("--candidates", type=positive, default=10, help="places that are registered; the best --top_k stay")

    add = parser.add_argument_group("archives").add_argument
    add("--output", metavar="FOLDER", help="results go there, not to logs/; the same command again goes on")
    add("--shard", metavar="i/n", help="part i, from 0, of n; default: SLURM's job array, or RANK and WORLD_SIZE")
    add("--merge", metavar="FOLDER", help="put the shards in an --output folder together; nothing else is needed")
    add("--keep_photos", action="store_true", help="keep the photos' descriptors in --descriptors, too")

    group = parser.add_argument_group("run")
    add = group.add_argument
    add("--descriptors", default="logs/descriptors", help="folder where they are kept, so that none is made twice")
    add("--forget_descriptors", action="store_true", help="remove what was kept there for other models than this one")
    add("--shown", type=whole, help="photos in the picture, and world maps; default: 50, with --output 0")
    add_shared(group, "batch_size", "num_workers", "device", "precision", log_dir="predict")
    args = parser.parse_args(argv)
    args.resume = args.resume or str(default_weights(args.dataset_path))
    if args.merge is None and not args.inputs:
        parser.error("photos are needed (or --merge FOLDER)")
    if args.shard is not None and args.output is None:
        parser.error("--shard needs --output FOLDER, where all shards' results go")
    return args


def main(args: argparse.Namespace) -> Iterable[dict]:
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

    folder = make_log_dir(args.log_dir) if args.output is None else make_folder(shard_folder(args.output, shard))
    setup_logging(folder, args)
    for note in notes:
        logging.info(note)
    if args.output is not None and args.device == "cuda" and "LOCAL_RANK" in os.environ:  # torchrun: a GPU each
        args.device = f"cuda:{int(os.environ['LOCAL_RANK']) % max(1, torch.cuda.device_count())}"
    locator = Locator.from_files(args.resume, **{name: getattr(args, name) for name in LOCATOR})
    require_enough(locator.places, near, args.near_km, args.top_k)
    described = {name: locator.settings[name] for name in ("image_size", "device", "precision")}
    describer = Describer(locator.model, rotations=locator.places.turns, **described)
    tidy(args.descriptors, describer.fingerprint, args.forget_descriptors)

    columns = COLUMNS | dict.fromkeys(own_columns(dict.fromkeys(nadirs.columns)), str)
    settings = {"model": describer.fingerprint, "columns": list(columns)}
    settings |= {name: getattr(args, name) for name in DECIDING} | {"register": locator.register}
    with Archive.open(folder, settings, columns) as archive:
        rows = np.flatnonzero([not archive.is_done(photo) for photo in photos])
        if len(rows) < len(photos):
            logging.info(f"{folder}: {len(photos) - len(rows)} of {len(photos)} photos are done, {len(rows)} are left")
        left, keep = photos[rows], nullcontext()
        if args.keep_photos:
            keep = describer.photos_file(args.descriptors, [args.output or "", *args.inputs], shard, left)
        with keep as kept:
            count = locate_all(locator, left, nadirs, archive, kept, args)
        if not count and args.output is None:
            raise ValueError(f"none of the {len(photos)} images could be read or placed, see above")
        archive.finish()
    left_out = f"; {archive.failed} photos are left out, failures.csv says why" if archive.failed else ""
    logging.info(f"{count} photos, {len(locator.places)} database images; predictions are in {folder}{left_out}")
    predictions = (properties for properties, _ in read_places(folder))
    return predictions if args.output else list(predictions)


def locate_all(
    locator: Locator,
    photos: Strings,
    nadirs: Nadirs,
    archive: Archive,
    kept: DescriptorFile | None,
    args: argparse.Namespace,
) -> int:
    """Photos (Strings) -> their places in the archive, exports, a picture and maps; returns how many have one."""
    room = args.shown if args.shown is not None else 0 if args.output else 50
    sources, unknown, shown, count = Counter(), [], [], 0
    with Stop() as stop, Bar(total=len(photos), desc="locating", unit=" photos", leave=False) as bar:
        answered = locator.stream(photos, lambda number: nadirs.of(photos[number]), args.top_k, kept)
        try:
            for answers in interruptible(answered, stop):
                placed = [answer for answer in answers if answer.places]
                for answer in placed:  # before the archive has them: after a kill they are made again
                    export_answer(archive.folder / "exports", args.export, answer, locator.places)
                    if len(shown) < room:
                        save_map(archive.folder / f"map_{len(shown):04d}.jpg", answer)
                        shown.append(answer)
                places = [(place.as_dict(), place.footprint) for answer in placed for place in answer.places]
                archive.add(places, [(answer.image, answer.why) for answer in answers if answer.why])
                tell(answers, each_photo=args.output is None)
                count += len(placed)
                sources.update(answer.nadir.source for answer in answers)
                unknown += [answer for answer in answers if answer.nadir.why][: 5 - len(unknown)]
                bar.update(len(answers))
        except Stopped as signal:
            again = "the same command goes on" if args.output else "with --output FOLDER it could go on"
            logging.info(f"stopped by {signal} after {bar.n} photos, {archive.folder} has their places; {again}")
            sys.exit(EXIT_CODE)
    told = ", ".join(f"{number} {source}" for source, number in sources.most_common())
    logging.info(f"where the nadirs come from: {told} (none: the whole Earth is searched)")
    if locator.matcher is None:
        logging.info("a score says what looks alike, be it sea or night; --register tells whether it is right")
    for answer in unknown:
        logging.info(f"without a nadir, for example {answer.image}: {answer.nadir.why}")
    if shown:
        save_sheet(archive.folder / "predictions.jpg", locator.places, shown)
    return count


def merge_shards(folder: Path) -> Iterable[dict]:
    counts = merge(folder, lambda properties: {name: COLUMNS.get(name, str) for name in properties or COLUMNS})
    print(f"{folder}: {counts['photos']} photos, {counts['places']} places, {counts['failures']} failures")
    return (properties for properties, _ in read_places(folder))


if __name__ == "__main__":
    arguments = parse_arguments()
    run(main, arguments)
