"""The demo world, rendered from mosaics of Earth that ship: python -m datasets.build demo OUTPUT

database/{year}_{zoom}/…, queries/@…@.jpg, the intersections file, conditions.csv (each photo's tilt and clouds), and
figures/demo_world.jpg to look at. world.json holds what the world was made from: a second run continues where the first
one stopped, never with other parameters.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
from PIL import Image, ImageDraw
from tqdm import tqdm

from datasets import grid
from datasets.build import demo_world, flags, jobs
from datasets.build.plan import fingerprint, kept_plan
from datasets.conditions import CONDITIONS_FILE, write_conditions
from datasets.images import read_image, read_pixels, save_jpeg
from datasets.names import DATABASE_YEAR, YEARS, Catalogue
from datasets.overlap import INTERSECTIONS_FILE, write_positives
from utils import geo
from utils.arguments import whole

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


def read_mosaic(path: str | Path) -> torch.Tensor:
    """File -> uint8 (3, H, 2H). Raises FileNotFoundError or ValueError that names the file and what to do."""
    mosaic = read_image(path)
    height, width = mosaic.shape[1:]
    if width != 2 * height:
        raise ValueError(
            f"{path}: {width} × {height} pixels; a mosaic is equirectangular, 180 W to 180 E and 90 N to "
            f"90 S, so exactly twice as wide as high: crop or resize it to {width} × {width // 2}"
        )
    return mosaic


def main(
    output: flags.Output,
    seed: flags.Seed = 0,
    num_queries: Annotated[int, "how many photos", {"type": whole}] = 2400,
    zooms: flags.Zooms = (7, 8),
    image_size: flags.Side = 256,
    num_workers: flags.Workers = 2,
    mosaics: Annotated[
        list[tuple[int, Path]],
        "equirectangular pictures of Earth in place of blue_marble/'s",
        {"type": flags.year_and_file, "metavar": "YEAR=FILE"},
    ] = (),
    query_mosaic: Annotated[Path, "what the queries show", {"metavar": "FILE"}] = QUERY_MOSAIC,
    photos: Annotated[
        demo_world.Photos,
        "full: queries as an astronaut would take them; hazy: without clouds; clear: without air, camera and clouds, "
        "for telling what makes them hard",
    ] = "full",
) -> str:
    """Renders the demo world into folder `output` -> how many images were made now.

    Every image depends on the seed and its index alone, whatever num_workers. Raises ValueError where the folder holds
    a world of other parameters.
    """
    mosaics = {**MOSAICS, **dict(mosaics)}
    if set(mosaics) != set(YEARS):
        raise ValueError(f"--mosaics: years {sorted(set(mosaics) - set(YEARS))}; only {YEARS} are years of a data set")
    if not zooms or min(zooms) < 2 or max(zooms) > 15:
        raise ValueError(f"--zooms {list(zooms)}: expected numbers from 2 to 15")
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

    def make() -> dict:
        for path in {*mosaics.values(), query_mosaic}:
            read_mosaic(path)  # an unusable file says so now, not halfway
        return plan_world(seed, num_queries, parameters["zooms"])

    plan = kept_plan(output, parameters, make)
    queries = [demo_world.planned(fields) for fields in plan["queries"]]
    # Long jobs first, so that no worker is left with them at the end.
    images = [(f"queries/{demo_world.query_name(query, seed)}", query_mosaic, query) for query in queries]
    images += [(grid.image_path(*region, year), mosaics[year], region) for year in YEARS for region in plan["regions"]]
    missing = [image for image in images if not (output / image[0]).exists()]
    render = Renderer(output, image_size, seed, photos)
    made = sum(1 for _ in jobs.run(missing, render, num_workers, "demo world"))
    if made or not (output / CONDITIONS_FILE).exists():
        write_conditions(output, conditions(seed, queries, photos))
    if made or not (output / INTERSECTIONS_FILE).exists() or not (output / FIGURE).exists():
        paths = [path for path, *_ in images]
        names = Catalogue.from_paths(output, sorted(path for path in paths if path.startswith("queries/")))
        searched = sorted(path for path in paths if path.startswith(f"database/{DATABASE_YEAR}_"))
        table = write_positives(output / INTERSECTIONS_FILE, names, Catalogue.from_paths(output, searched))
        save_jpeg(output / FIGURE, contact_sheet(output, names, table, [query.group for query in queries]), 88)
    return f"{output}: {made:,} images made now; look at {output / FIGURE}"


def plan_world(seed: int, num_queries: int, zooms: Sequence[int]) -> dict:
    """-> "regions" and "queries" of a world, as JSON holds them."""
    regions = grid.land_regions(zooms, min_land=MIN_LAND)
    corners = grid.footprints(regions)
    centers = geo.centers(corners)
    circles = centers, geo.distance_km(centers[:, None], corners).max(axis=1)
    queries = [
        demo_world.plan_query(seed, index, circles, grid.is_land)
        for index in tqdm(range(num_queries), desc="cameras", unit="query", mininterval=0.5)
    ]
    return {"regions": regions.tolist(), "queries": [list(dataclasses.asdict(query).values()) for query in queries]}


def _draws(seed: int, query: demo_world.Query) -> tuple[np.random.Generator, int]:
    rng = np.random.default_rng([seed, query.index, 2])
    return rng, int(rng.integers(80, 96))


def conditions(seed: int, queries: Sequence[demo_world.Query], photos: demo_world.Photos) -> dict:
    """-> {photo's id: (tilt in degrees, share under clouds in percent)}, by the draws that it is rendered with."""
    return {
        demo_world.query_name(query, seed).image_id: (
            query.camera.tilt,
            100 * demo_world.draw_clouds(_draws(seed, query)[0], max(demo_world.QUERY_SIZE))[2]
            if photos == "full"
            else 0.0,
        )
        for query in queries
    }


@dataclasses.dataclass
class Renderer:
    """(path, file of the mosaic, region or Query) -> the image's file. Keeps the mosaics that it has read."""

    output: Path
    image_size: int
    seed: int
    photos: str
    mosaics: dict = dataclasses.field(default_factory=dict)

    def __call__(self, image: tuple) -> None:
        path, file, item = image
        if file not in self.mosaics:
            self.mosaics[file] = read_mosaic(file)
        if isinstance(item, demo_world.Query):
            rng, quality = _draws(self.seed, item)
            pixels = demo_world.render_query(self.mosaics[file], item.camera, rng, photos=self.photos)
        else:
            pixels, quality = demo_world.render_region(self.mosaics[file], *item, self.image_size), 90
        save_jpeg(self.output / path, Image.fromarray(pixels.permute(1, 2, 0).numpy()), quality)


def contact_sheet(
    root: Path, queries: Catalogue, table: dict, groups: Sequence[str], rows: int = 10, blocks: int = 2, cell: int = 150
) -> Image.Image:
    """Queries, each beside the best positive's four years (latest first). groups: of the queries by their index."""
    group_of = {row: groups[int(image_id.rsplit("-", 1)[1])] for row, image_id in enumerate(queries.ids)}
    in_order = sorted(group_of, key=lambda row: queries.ids[row])
    # One of every group, so that all kinds show, then the first ones as they come.
    firsts = list({group_of[row]: row for row in reversed(in_order)}.values())
    firsts.sort(key=in_order.index)
    shown = (firsts + [row for row in in_order if row not in firsts])[: rows * blocks]
    width, years = round(cell * 1.5), tuple(reversed(YEARS))
    lefts = [0, *(width + 4 + k * (cell + 2) for k in range(len(years)))]
    block, height = width + 4 * cell + 24, cell + 18
    sheet = Image.new("RGB", (blocks * block, 20 + height * rows), "white")
    draw = ImageDraw.Draw(sheet)
    for b in range(blocks):
        for left, title in zip(lefts, ("query", *(f"positive, {year}" for year in years))):
            draw.text((b * block + left + 2, 4), title, fill="black")
    for turn, row in enumerate(shown):
        left, top = turn // rows * block, 20 + turn % rows * height
        _paste(sheet, root / queries.paths[row], (left, top), (width, cell))
        label = f"{queries.ids[row]}  {group_of[row]}  {queries.areas[row]:,.0f} km2  "
        if positives := table[queries.names[row]]:
            path, iou = max(positives, key=lambda positive: positive[1])
            region = tuple(int(part) for part in path.split("@")[9].split("_"))
            for across, year in zip(lefts[1:], years):
                _paste(sheet, root / grid.image_path(*region, year), (left + across, top), (cell, cell))
            label += (
                f"north {queries.orientations[row]:+.0f} deg clockwise of up; {len(positives)} positives, "
                f"best IoU {iou:.2f}"
            )
        else:
            label += "no positive"
        draw.text((left + 2, top + cell + 2), label, fill="black")
    return sheet


def _paste(sheet: Image.Image, path: Path, place: tuple[int, int], size: tuple[int, int]) -> None:
    image = Image.fromarray(read_pixels(path).numpy())
    sheet.paste(image.resize(size, Image.Resampling.LANCZOS), place)
