"""The demo world, rendered from mosaics of Earth that ship: python -m datasets.build demo OUTPUT

database/{year}_{zoom}/…, queries/@…@.jpg, the intersections file, and figures/demo_world.jpg to look at. world.json
holds what the world was made from: a second run continues where the first one stopped, never with other parameters.
"""

import argparse
import dataclasses
import multiprocessing
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from tqdm import tqdm

from datasets import grid
from datasets.build import demo_world
from datasets.build.camera import Camera
from datasets.build.plan import fingerprint, read_plan, write_plan
from datasets.images import read_image, read_pixels, save_jpeg
from datasets.names import DATABASE_YEAR, YEARS, Catalogue
from utils import geo

VERSION = 1  # raise when the same parameters begin to give other pictures
BLUE_MARBLE = Path(__file__).parent / "blue_marble"
MOSAICS = {
    2018: BLUE_MARBLE / "bmng_january_2048.jpg",
    2019: BLUE_MARBLE / "bmng_may_2048.jpg",
    2020: BLUE_MARBLE / "bmng_august_2048.jpg",
    2021: BLUE_MARBLE / "bmng_5400.jpg",
}
QUERY_MOSAIC = BLUE_MARBLE / "bmng_other_month_4096.jpg"
MIN_LAND = 0.1
FIGURE = Path("figures") / "demo_world.jpg"


def read_mosaic(path):
    """File -> uint8 (3, H, 2H). Raises FileNotFoundError or ValueError that names the file and what to do."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such mosaic; give an equirectangular picture of the whole Earth")
    mosaic = read_image(path)
    height, width = mosaic.shape[1:]
    if width != 2 * height:
        raise ValueError(
            f"{path}: {width} × {height} pixels; a mosaic is equirectangular, 180 W to 180 E and 90 N to "
            f"90 S, so exactly twice as wide as high: crop or resize it to {width} × {width // 2}"
        )
    return mosaic


def build_demo(
    output,
    seed=0,
    num_queries=2400,
    zooms=(7, 8),
    image_size=256,
    num_workers=2,
    mosaics=None,
    query_mosaic=None,
    photos="full",
):
    """Renders the demo world into folder `output` -> number of images made now (0 when all were there).

    mosaics: {year: file} for any of the four years, the others from blue_marble/. Every image depends on the seed and
    its index alone, whatever num_workers. photos: one of demo_world.PHOTOS, what the queries go through. Raises
    ValueError where the folder holds a world of other parameters.
    """
    output = Path(output)
    mosaics = {**MOSAICS, **(mosaics or {})}
    query_mosaic = query_mosaic or QUERY_MOSAIC
    if seed < 0 or num_queries < 0 or image_size < 1 or num_workers < 0:
        raise ValueError(
            f"seed {seed}, num_queries {num_queries}, image_size {image_size}, num_workers {num_workers}: "
            f"none can be negative, and image_size is at least 1"
        )
    if set(mosaics) != set(YEARS):
        raise ValueError(f"--mosaics: years {sorted(set(mosaics) - set(YEARS))}; only {YEARS} are years of a data set")
    if not zooms or min(zooms) < 2 or max(zooms) > 15:
        raise ValueError(f"--zooms {list(zooms)}: expected numbers from 2 to 15")
    if output.exists() and not output.is_dir():
        raise ValueError(f"{output}: is a file; name a folder for the data set")
    parameters = {
        "version": VERSION,
        "seed": seed,
        "num_queries": num_queries,
        "zooms": sorted(set(zooms)),
        "image_size": image_size,
        "mosaics": {str(year): fingerprint(mosaics[year]) for year in YEARS},
        "query_mosaic": fingerprint(query_mosaic),
        "photos": photos,
    }
    plan = read_plan(output, parameters)
    if plan is None:
        for path in {*mosaics.values(), query_mosaic}:
            read_mosaic(path)  # an unusable file says so now, not halfway
        plan = _make_plan(parameters)
        write_plan(output, plan)

    queries = [
        demo_world.Query(
            index,
            group,
            Camera(**{**camera, "nadir": tuple(camera["nadir"]), "sensor_mm": tuple(camera["sensor_mm"])}),
            date,
        )
        for index, group, camera, date in plan["queries"]
    ]
    jobs = [(grid.image_path(*region, year), ("region", year, region)) for year in YEARS for region in plan["regions"]]
    jobs += [(f"queries/{demo_world.query_name(query, seed)}", ("query", None, query)) for query in queries]
    missing = [job for job in jobs if not (output / job[0]).exists()]
    # Long jobs first, so that no worker is left with them at the end.
    missing.sort(key=lambda job: job[1][0])
    setup = (output, {**mosaics, None: query_mosaic}, image_size, seed, photos)
    for _ in tqdm(
        _run(missing, setup, num_workers),
        total=len(missing),
        desc="demo world",
        unit="image",
        disable=not missing,
        mininterval=0.5,
    ):
        pass

    _finish(output, jobs, changed=bool(missing))
    return len(missing)


def _make_plan(parameters):
    regions = grid.land_regions(parameters["zooms"], min_land=MIN_LAND)
    corners = grid.footprints(regions)
    centers = geo.centers(corners)
    radii = geo.distance_km(centers[:, None], corners).max(axis=1)
    queries = [
        demo_world.plan_query(parameters["seed"], index, (centers, radii), grid.is_land)
        for index in tqdm(range(parameters["num_queries"]), desc="cameras", unit="query", mininterval=0.5)
    ]
    return {
        "parameters": parameters,
        "regions": regions.tolist(),
        "queries": [(query.index, query.group, dataclasses.asdict(query.camera), query.date) for query in queries],
    }


class _Renderer:
    """Makes one image file after another; holds the mosaics it has needed so far."""

    def __init__(self, output, mosaics, image_size, seed, photos):
        self.output, self.mosaics, self.image_size, self.seed, self.photos = output, mosaics, image_size, seed, photos
        self.loaded = {}

    def __call__(self, job):
        path, (kind, year, item) = job
        if year not in self.loaded:
            self.loaded[year] = read_mosaic(self.mosaics[year])
        mosaic = self.loaded[year]
        if kind == "region":
            pixels, quality = demo_world.render_region(mosaic, *item, self.image_size), 90
        else:
            rng = np.random.default_rng([self.seed, item.index, 2])
            quality = int(rng.integers(80, 96))
            pixels = demo_world.render_query(mosaic, item.camera, rng, photos=self.photos)
        save_jpeg(self.output / path, Image.fromarray(pixels.permute(1, 2, 0).numpy()), quality)


_renderer = None  # of a worker process: set once by its initializer


def _start_worker(*setup):
    global _renderer
    torch.set_num_threads(1)
    _renderer = _Renderer(*setup)


def _work(job):
    _renderer(job)


def _run(jobs, setup, num_workers):
    """Does the jobs, yields after each. One thread a process: sums come out the same whatever the number of workers."""
    num_workers = min(num_workers, len(jobs) // 16)  # a process takes seconds to start
    if num_workers == 0:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            yield from map(_Renderer(*setup), jobs)
        finally:
            torch.set_num_threads(threads)
        return
    with multiprocessing.get_context("spawn").Pool(num_workers, _start_worker, setup) as pool:
        yield from pool.imap_unordered(_work, jobs, chunksize=16)


def _finish(output, jobs, changed):
    """Writes the intersections file and the contact sheet where they are missing or older than the images."""
    from datasets.overlap import INTERSECTIONS_FILE, intersections_table, save_intersections

    table_path = output / INTERSECTIONS_FILE
    if not changed and table_path.exists() and (output / FIGURE).exists():
        return
    paths = [path for path, _ in jobs]
    queries = Catalogue.from_paths(output, sorted(path for path in paths if path.startswith("queries/")))
    searched = sorted(path for path in paths if path.startswith(f"database/{DATABASE_YEAR}_"))
    database = Catalogue.from_paths(output, searched)
    table = intersections_table(queries, database)
    save_intersections(table_path, table)
    groups = {item[2].index: item[2].group for _, item in jobs if item[0] == "query"}
    save_jpeg(output / FIGURE, contact_sheet(output, queries, table, groups), 88)


def contact_sheet(root, queries, table, groups, rows=10, blocks=2, cell=150):
    """Queries, each beside the best positive's four years (latest first) -> PIL image. groups: query index -> name."""
    in_order = sorted(range(len(queries)), key=lambda i: queries.ids[i])
    kinds = [groups[int(queries.ids[i].rsplit("-", 1)[1])] for i in in_order]
    # One of every group, so that all kinds show, then the first ones as they come.
    firsts = [in_order[kinds.index(kind)] for kind in dict.fromkeys(kinds)]
    turns = (firsts + [i for i in in_order if i not in firsts])[: rows * blocks]
    width = round(cell * 1.5)
    block, height = width + 4 * cell + 24, cell + 18
    sheet = Image.new("RGB", (blocks * block, 20 + height * rows), "white")
    draw = ImageDraw.Draw(sheet)
    for b in range(blocks):
        for k, title in enumerate(["query", *(f"positive, {year}" for year in reversed(YEARS))]):
            draw.text((b * block + (0 if k == 0 else width + 4 + (k - 1) * (cell + 2)) + 2, 4), title, fill="black")
    for turn, i in enumerate(turns):
        left, top = turn // rows * block, 20 + turn % rows * height
        _paste(sheet, Path(root) / queries.paths[i], (left, top), (width, cell))
        positives = table[queries.names[i]]
        label = f"{queries.ids[i]}  {groups[int(queries.ids[i].rsplit('-', 1)[1])]}  {queries.areas[i]:,.0f} km2  "
        if positives:
            path, iou = max(positives, key=lambda positive: positive[1])
            region = tuple(int(part) for part in path.split("@")[9].split("_"))
            for k, year in enumerate(reversed(YEARS)):
                place = (left + width + 4 + k * (cell + 2), top)
                _paste(sheet, Path(root) / grid.image_path(*region, year), place, (cell, cell))
            label += (
                f"north {queries.orientations[i]:+.0f} deg clockwise of up; {len(positives)} positives, "
                f"best IoU {iou:.2f}"
            )
        else:
            label += "no positive"
        draw.text((left + 2, top + cell + 2), label, fill="black")
    return sheet


def _paste(sheet, path, place, size):
    image = Image.fromarray(read_pixels(path).numpy())
    sheet.paste(image.resize(size, Image.Resampling.LANCZOS), place)


def _year_and_file(text):
    year, _, file = text.partition("=")
    if not (year.isdigit() and file):
        raise argparse.ArgumentTypeError(f"{text!r}: expected YEAR=FILE")
    return int(year), file


def add_command(commands, formatter):
    parser = commands.add_parser(
        "demo", help="the demo world, rendered from mosaics of Earth", formatter_class=formatter
    )
    parser.add_argument("output", help="folder of the data set")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--num_queries", type=int, default=2400)
    parser.add_argument("--zooms", type=int, nargs="+", default=[7, 8], help="Web Mercator zooms of the database")
    parser.add_argument("--image_size", type=int, default=256, help="side of a database image, pixels")
    parser.add_argument("--num_workers", type=int, default=2)
    parser.add_argument(
        "--mosaics",
        type=_year_and_file,
        nargs="+",
        default=[],
        metavar="YEAR=FILE",
        help="equirectangular pictures of Earth in place of blue_marble/'s",
    )
    parser.add_argument("--query_mosaic", default=str(QUERY_MOSAIC), metavar="FILE", help="what the queries show")
    parser.add_argument(
        "--photos",
        choices=demo_world.PHOTOS,
        default="full",
        help="full: queries as an astronaut would take them; hazy: without clouds; clear: without air, "
        "camera and clouds, for telling what makes them hard",
    )
    parser.set_defaults(command_main=main)


def main(args):
    made = build_demo(
        args.output,
        args.seed,
        args.num_queries,
        args.zooms,
        args.image_size,
        args.num_workers,
        dict(args.mosaics),
        args.query_mosaic,
        args.photos,
    )
    return f"{args.output}: {made:,} images made now; look at {Path(args.output) / FIGURE}"
