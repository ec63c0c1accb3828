"""Astronaut-like photos at the real archive's scale: python -m datasets.build earth_photos OUTPUT --raster … --months …

A pinhole camera at the station's altitude, with areas and nadir distances drawn as in the public names, looks at the
same Web Mercator raster that `earth` cuts its regions from, in the colours of another month than any database image,
under the demo's weather. Footprints and orientations are exact, as README says of the names; conditions.csv holds each
photo's tilt and clouds.

The names' smallest photos, 5,000 km², are 94 pixels high of a raster of 0.6 km (at the equator), a fifth of what 512
pixels could hold; 577 km² is the least that is accepted, MIN_SIDE pixels high.

The photos share August's fine detail with the database: what is measured on them is the task's geometry and scale (how
much ground a photo shows, how far from the nadir, among how many images), not whether a model finds real photos.
"""

import dataclasses
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
from torch.nn import functional as F
from tqdm import tqdm

from datasets import grid
from datasets.build import earth, flags, jobs
from datasets.build.camera import Camera, footprint, great_circle, ground_points
from datasets.build.demo_world import (
    ALTITUDES_KM,
    GAMMA,
    MAX_DISTANCE_KM,
    Photos,
    Query,
    draw_clouds,
    draw_nadir,
    ground_plane,
    group_of,
    photograph,
    planned,
    query_name,
)
from datasets.build.plan import fingerprint, kept_plan
from datasets.conditions import CONDITIONS_FILE, write_conditions
from datasets.images import encode_jpeg
from datasets.nadirs import DISTANCE_SHARES, DISTANCES_KM
from datasets.names import Catalogue
from datasets.overlap import INTERSECTIONS_FILE, write_positives
from datasets.sets import (
    DATABASE_YEAR,
    POINTS_OF_INTEREST,
    QUERY_RADIUS_KM,
    VALIDATION,
    VALIDATION_QUERY_RADIUS_KM,
    in_a_set,
)
from utils import geo
from utils.arguments import positive
from utils.files import replacing
from utils.geo import MERCATOR_HALF

VERSION = 1  # raise when the same parameters begin to give other pictures
FILE = "photos.json"
MISSION = "EARTH"  # first part of the photos' ids
MONTHS = (1, 4, 6, 10)  # none of them a year of `earth`
SENSOR_MM = (36.0, 23.9)
FOCAL_MM = (24, 1150)  # the archive's lenses (paper, sec. 3.1); zooms fill what lies between
# Areas of the 17,752 public query names' footprints, at DISTANCE_SHARES.
AREAS_KM2 = (
    (5001, 5050, 5271, 5563, 6284, 7279, 8666, 10832, 13839, 18829, 23370, 30496, 40296, 56995, 71692)
    + (86218, 92493, 98422, 99994)
)  # fmt: skip
LAND_SHARE = 0.88  # of the names' centres; the others show some land
UPRIGHT_SHARE, UPRIGHT_DEGREES = 0.3, 25  # so many hold the camera up, away from the nadir, give or take
CLOUD_KM = (8, 80)  # the demo's photos are ten times as wide
TRIES = 200  # of places for one photo's area and distance
NODES = 16  # a side, at which the camera's rays are followed; in between polynomials, to 0.01 pixels
RATIO_STEPS = 65  # points a side at which a month's colours are read: 10 km in the largest common photo, smoothed by 15
SETS = {name: (1.0, center, QUERY_RADIUS_KM) for name, center in POINTS_OF_INTEREST.items()}
SETS[VALIDATION] = (0.5, POINTS_OF_INTEREST["Texas"], VALIDATION_QUERY_RADIUS_KM)
WHOLE_EARTH = {"world": (1.0, None, None)}
_LINEAR = (torch.arange(256) / 255.0) ** GAMMA


# ---- planning: which photos are taken ----


def smallest_area(around: int) -> float:
    """Pixels around the Earth -> km² of the smallest photo: MIN_SIDE of a raster's pixels high at the equator, 3:2."""
    return (earth.MIN_SIDE * 2 * np.pi * grid.AREA_RADIUS_KM / around) ** 2 * SENSOR_MM[0] / SENSOR_MM[1]


def draw_size(rng: np.random.Generator, areas: Sequence[float] | None = None) -> tuple[float, float]:
    """-> area km², distance of the centre from the nadir km. areas: (low, high), log-uniform; None: as in the names.

    The two are independent: in the names their rank correlation is 0.1.
    """
    chance, far = rng.uniform(size=2)
    bounds, known = (areas, (0, 1)) if areas else (AREAS_KM2, DISTANCE_SHARES)
    return float(np.exp(np.interp(chance, known, np.log(bounds)))), float(np.interp(far, DISTANCE_SHARES, DISTANCES_KM))


def aim(
    nadir: Sequence[float], altitude_km: float, azimuth: float, roll: float, area_km2: float, distance_km: float
) -> Camera | None:
    """-> the Camera whose footprint has that area and its centre at that distance from the nadir; None if none has.

    A few steps of a fixed point: each lens and tilt are corrected by what the last ones gave.
    """
    angle, scale = distance_km / geo.EARTH_RADIUS_KM, 1.0
    for _ in range(16):
        # Triangle of the Earth's centre, the camera and what it looks at.
        down = 1 + altitude_km / geo.EARTH_RADIUS_KM - np.cos(angle)
        slant = geo.EARTH_RADIUS_KM * np.hypot(np.sin(angle), down)
        tilt = np.arctan2(np.sin(angle), down)
        slope = np.cos(tilt + angle)
        if slope <= 0.02:
            return None
        focal = scale * np.sqrt(SENSOR_MM[0] * SENSOR_MM[1] * slant**2 / (area_km2 * slope))
        camera = Camera(nadir, altitude_km, float(np.degrees(tilt)), azimuth, roll, float(focal), SENSOR_MM)
        corners = footprint(camera)
        if np.isnan(corners).any():
            angle *= 0.85  # corners spread away from the nadir: their centre is beyond what the camera looks at
            continue
        area = grid.quadrilateral_area(geo.unwrap_footprints(corners)) / area_km2
        miss = distance_km - geo.distance_km(geo.centers(corners), nadir)
        if abs(area - 1) < 0.005 and abs(miss) < 1:
            fits = FOCAL_MM[0] <= focal <= FOCAL_MM[1] and geo.distance_km(corners, nadir).max() <= MAX_DISTANCE_KM
            return camera if fits else None
        scale *= np.sqrt(area)
        angle = max(angle + miss / geo.EARTH_RADIUS_KM, 0.0)
    return None


def plan_photo(
    seed: int,
    index: int,
    covers: Callable[[Camera], bool],
    groups: dict,
    months: Sequence[int],
    areas: Sequence[float] | None = None,
) -> Query:
    """Photo number `index` -> Query. covers: function of a camera -> bool, whether all that it sees can be rendered.

    Where an area and distance find no place in TRIES, others are drawn. ValueError where none do.
    """
    rng = np.random.default_rng([seed, index, 3])
    group = group_of(index, groups)
    _, center, radius_km = groups[group]
    wants_land = rng.uniform() < LAND_SHARE
    u, v = np.meshgrid(np.linspace(0.05, 0.95, 10), np.linspace(0.05, 0.95, 10))
    for _ in range(50):
        (area, distance), refused = draw_size(rng, areas), 0
        for _ in range(TRIES):
            nadir, azimuth = draw_nadir(rng, center, radius_km), float(rng.uniform(0, 360))
            upright = rng.uniform() < UPRIGHT_SHARE
            roll = float(rng.normal(0, UPRIGHT_DEGREES) if upright else rng.uniform(-180, 180))
            altitude = float(rng.uniform(*ALTITUDES_KM))
            if grid.is_land(*great_circle(nadir, np.radians(azimuth), distance / geo.EARTH_RADIUS_KM)) != wants_land:
                continue
            camera = aim(nadir, altitude, azimuth, roll, area, distance)
            if camera is None:
                refused += 1
                if refused == 10:  # so large and so far away, most would see the horizon
                    break
                continue
            if not covers(camera):
                continue
            if wants_land or grid.is_land(*np.moveaxis(ground_points(camera, u, v), -1, 0)).any():
                date = f"{rng.integers(2012, 2023)}{rng.choice(months):02d}{rng.integers(1, 29):02d}"
                return Query(index, group, camera, date)
    raise ValueError(
        f"photo {index} ({group}): no place found; does the raster cover its land, --areas fit its lenses?"
    )


# ---- rendering ----


@lru_cache(maxsize=64)
def _interpolation(count: int) -> torch.Tensor:
    """-> (count, NODES) float64: values at _nodes() -> values at the centres of `count` pixels, by a polynomial."""
    vander = np.polynomial.chebyshev.chebvander
    pixels = (np.arange(count) + 0.5) / count
    return torch.from_numpy(vander(2 * pixels - 1, NODES - 1) @ np.linalg.inv(vander(2 * _nodes() - 1, NODES - 1)))


def _nodes() -> np.ndarray:
    """-> (NODES,) Chebyshev's in (0, 1)."""
    return 0.5 - 0.5 * np.cos(np.pi * (np.arange(NODES) + 0.5) / NODES)


def spread(at_nodes: np.ndarray, height: int, width: int) -> torch.Tensor:
    """(NODES, NODES) of something smooth at the nodes -> (height, width) float64 tensor, at the pixels' centres."""
    return _interpolation(height) @ torch.from_numpy(at_nodes) @ _interpolation(width).T


def raster_places(latlon: np.ndarray, raster: earth.MercatorRaster) -> tuple[np.ndarray, np.ndarray]:
    """(..., 2) degrees of one photo -> x (...), y (...) in the raster's pixels, of which the first covers 0 to 1.

    x goes on beyond the antimeridian.
    """
    source, around = raster
    lat, lon = np.radians(latlon[..., 0]), latlon[..., 1]
    first = lon.reshape(-1)[0]
    x = (first + geo.wrap_longitude(lon - first) + 180) / 360 * around
    y = (0.5 - np.arcsinh(np.tan(lat)) / (2 * np.pi)) * around
    pixel = source.transform.a
    return x - (source.transform.c + MERCATOR_HALF) / pixel, y - (MERCATOR_HALF - source.transform.f) / pixel


def covers(camera: Camera, raster: earth.MercatorRaster, margin: int = 8) -> bool:
    """Whether the raster holds all that the camera sees, and `margin` pixels more."""
    edge = np.linspace(0, 1, 9)
    u, v = np.concatenate([edge, edge, 0 * edge, 0 * edge + 1]), np.concatenate([0 * edge, 0 * edge + 1, edge, edge])
    latlon = ground_points(camera, u, v)
    if np.isnan(latlon).any():
        return False
    (x, y), (source, around) = raster_places(latlon, raster), raster
    return bool(
        y.min() >= margin
        and y.max() <= source.height - margin
        and (source.width == around or x.min() >= margin and x.max() <= source.width - margin)
    )


def render_ground(
    raster: earth.MercatorRaster, ratio: np.ndarray | None, camera: Camera, size: int
) -> tuple[torch.Tensor, np.ndarray]:
    """-> float32 (3, size, size) in 0…1, linear light, and latlon (NODES, NODES, 2): the ground in clear air.

    ratio: (H, W, 3), the month's colours; None: the raster's own.
    """
    latlon = ground_points(camera, *np.meshgrid(_nodes(), _nodes()))
    x, y = raster_places(latlon, raster)
    # The raster's pixels from one pixel of the photo to the next, at most.
    coarse = torch.stack([spread(place, 32, 32) for place in (x, y)]) * 32 / size
    step_u, step_v = (float(coarse.diff(dim=axis).norm(dim=0).max()) for axis in (2, 1))
    if max(step_u, step_v) <= 0.5 and size % 2 == 0:
        ground = _sampled(raster, ratio, latlon, (x, y), size // 2, (1, 1), 1)
        # Half the pixels hold all that the raster does; with antialias it is torch's fast filter.
        ground = F.interpolate(ground[None], (size, size), mode="bicubic", antialias=True)[0]
    else:
        shrink = max(1, int(min(step_u, step_v)))  # the mean of so many pixels first
        over = tuple(int(np.clip(np.ceil(0.8 * step / shrink), 1, 4)) for step in (step_v, step_u))
        ground = _sampled(raster, ratio, latlon, (x, y), size, over, shrink)
    return ground.clamp_(0, 1), latlon


def _sampled(
    raster: earth.MercatorRaster,
    ratio: np.ndarray | None,
    latlon: np.ndarray,
    at_nodes: tuple[np.ndarray, np.ndarray],
    size: int,
    over: tuple[int, int],
    shrink: int,
) -> torch.Tensor:
    """As render_ground's; each pixel is the mean of over (down, across) samples, of the raster made smaller."""
    x, y = at_nodes
    left, top, right, bottom = (int(np.floor(end)) for end in _bounds(x, y, margin=3 * shrink))
    top, bottom = max(top, 0), min(bottom, raster.source.height)
    columns, rows = (right - left) // shrink, (bottom - top) // shrink
    pixels = torch.from_numpy(earth.read_window(raster, left, top, columns * shrink, rows * shrink))
    patch = _LINEAR[pixels.int()].permute(2, 0, 1)[None]
    patch = F.avg_pool2d(patch, shrink) if shrink > 1 else patch
    at_nodes = ((x - left) / shrink / columns * 2 - 1, (y - top) / shrink / rows * 2 - 1)
    places = torch.stack([spread(place, size * over[0], size * over[1]).float() for place in at_nodes], dim=-1)[None]
    ground = F.grid_sample(patch, places, mode="bicubic", padding_mode="border", align_corners=False)
    ground = F.avg_pool2d(ground, over)[0] if max(over) > 1 else ground[0]
    if ratio is not None:
        at = torch.stack([spread(place, RATIO_STEPS, RATIO_STEPS) for place in _unwrapped(latlon)], dim=-1)
        colours = torch.from_numpy(sample_colours(ratio, at.numpy())) ** GAMMA
        ground *= F.interpolate(colours.permute(2, 0, 1)[None], (size, size), mode="bilinear")[0]
    return ground


def _bounds(x: np.ndarray, y: np.ndarray, margin: float) -> tuple[float, float, float, float]:
    """Places at the nodes -> left, top, right, bottom of all pixels between, and a margin."""
    x, y = (spread(place, 64, 64).numpy() for place in (x, y))
    # The outermost of 64 lies half a 64th inside the edge: that much more.
    margin_x, margin_y = (margin + np.ptp(place) / 64 for place in (x, y))
    return x.min() - margin_x, y.min() - margin_y, x.max() + margin_x + 1, y.max() + margin_y + 1


def _unwrapped(latlon: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(N, N, 2) -> lat (N, N), lon (N, N) without a jump at the antimeridian."""
    first = latlon[0, 0, 1]
    return latlon[..., 0], first + geo.wrap_longitude(latlon[..., 1] - first)


def sample_colours(ratio: np.ndarray, latlon: np.ndarray) -> np.ndarray:
    """Ratio (H, W, 3) of an equirectangular picture at latlon (h, w, 2) -> float32 (h, w, 3), bilinear."""
    height, width = ratio.shape[:2]
    y = ((90 - latlon[..., 0]) / 180 * height - 0.5).clip(0, height - 1)
    x = (latlon[..., 1] + 180) / 360 * width - 0.5
    row, col = np.floor(y).astype(int), np.floor(x).astype(int)
    down, right = (y - row)[..., None].astype(np.float32), (x - col)[..., None].astype(np.float32)
    below = np.minimum(row + 1, height - 1)
    upper = ratio[row, col % width] * (1 - right) + ratio[row, (col + 1) % width] * right
    lower = ratio[below, col % width] * (1 - right) + ratio[below, (col + 1) % width] * right
    return upper * (1 - down) + lower * down


def render_photo(
    raster: earth.MercatorRaster,
    ratio: np.ndarray | None,
    camera: Camera,
    rng: np.random.Generator | None,
    size: int,
    photos: Photos = "full",
) -> torch.Tensor:
    """-> uint8 (3, size, size): a 3:2 photo squashed to a square, as the public ones are."""
    ground, latlon = render_ground(raster, ratio, camera, size)
    if photos == "clear":
        return (ground ** (1 / GAMMA) * 255).round().to(torch.uint8)
    plane = ground_plane(camera, latlon)
    half = torch.stack([spread(np.ascontiguousarray(plane[..., axis]), size // 2, size // 2) for axis in (0, 1)], -1)
    return photograph(ground, camera, half.numpy(), rng, photos, CLOUD_KM)


def _draws(seed: int, query: Query) -> tuple[np.random.Generator, int]:
    rng = np.random.default_rng([seed, query.index, 4])
    return rng, int(rng.integers(80, 96))


def conditions(seed: int, queries: Sequence[Query], size: int, photos: Photos) -> dict:
    """-> {photo's id: (tilt in degrees, share under clouds in percent)}, by the draws that it is rendered with."""
    return {
        query_name(query, seed, MISSION).image_id: (
            query.camera.tilt,
            100 * draw_clouds(_draws(seed, query)[0], size // 2, CLOUD_KM)[2] if photos == "full" else 0.0,
        )
        for query in queries
    }


@dataclasses.dataclass
class Renderer(earth.Opened):
    """(path, Query) -> the file."""

    size: int
    seed: int
    weather: Photos

    def __call__(self, photo: tuple[str, Query]) -> None:
        path, query = photo
        rng, quality = _draws(self.seed, query)
        ratio = self.of_month.get(int(query.date[4:6]))
        pixels = render_photo(self.raster, ratio, query.camera, rng, self.size, self.weather)
        with replacing(self.output / path, sync=False) as file:
            file.write(encode_jpeg(pixels.permute(1, 2, 0).numpy(), quality))


def main(
    output: Annotated[Path, "the data set that gets queries/; build its database first"],
    *,
    raster: Annotated[Path, "Web Mercator GeoTIFF, as for `earth`"],
    months: Annotated[Path, "01.jpg … 12.jpg, as for `earth`", {"metavar": "FOLDER"}],
    photos: Annotated[int, "how many", {"type": positive}] = 3000,
    seed: flags.Seed = 0,
    image_size: Annotated[int, "pixels a side; 3:2 is squashed to a square", {"type": earth.image_side}] = 512,
    seasons: Annotated[
        list[int],
        "the photos' months; the default has none of `earth`'s years",
        {"choices": range(1, 13), "metavar": "MONTH"},
    ] = MONTHS,
    areas: Annotated[
        tuple[float, float] | None,
        "km², log-uniform, as far as a lens of 24 mm and the horizon go (400,000); default: as in the public "
        "names, 5,000 (at 0.6 km a pixel 94 pixels high) to 100,000",
        {"metavar": ("LOW", "HIGH")},
    ] = None,
    nadirs: Annotated[
        Literal["sets", "anywhere", "outside"],
        "sets: within the six sets' and validation's areas; outside: farther, for photos to train with",
    ] = "sets",
    weather: Annotated[
        Photos, "full: clouds, air, camera; hazy: without clouds; clear: the geometry and the season alone"
    ] = "full",
    num_workers: flags.Workers = 2,
) -> str:
    """Renders photos into output/queries -> how many were made now. Raises ValueError naming the flag.

    Every photo depends on its index and the seed alone. Positives among the folder's database of 2021, if it has one,
    are written anew.
    """
    groups = SETS if nadirs == "sets" else WHOLE_EARTH
    opened = earth.open_raster(raster)
    smallest, (low, high) = smallest_area(opened.around), areas or (AREAS_KM2[0], AREAS_KM2[-1])
    if not smallest <= low < high:
        raise ValueError(
            f"--areas {low} {high}: expected LOW HIGH, and LOW at "
            f"least {smallest:,.0f} km², which is {earth.MIN_SIDE} of the raster's pixels high"
        )
    parameters = {
        "version": VERSION,
        "raster": fingerprint(raster),
        "months": earth.month_prints(months, seasons),
        "count": photos,
        "seed": seed,
        "size": image_size,
        "areas": areas,
        "groups": groups,
        "photos": weather,
    }
    if nadirs == "outside":
        parameters["nadirs"] = nadirs

    def fits(camera: Camera) -> bool:
        return covers(camera, opened) and not (nadirs == "outside" and in_a_set(np.array([camera.nadir]))[0])

    def make() -> dict:
        queries = [
            plan_photo(seed, index, fits, groups, sorted(set(seasons)), areas)
            for index in tqdm(range(photos), desc="cameras", unit="photo", mininterval=0.5)
        ]
        return {"queries": [list(dataclasses.asdict(query).values()) for query in queries]}

    plan = kept_plan(output, parameters, make, FILE, ("queries",))
    wanted = [(f"queries/{query_name(query, seed, MISSION)}", query) for query in map(planned, plan["queries"])]
    missing = [photo for photo in wanted if not (output / photo[0]).exists()]
    if missing:
        # Along the raster's rows of blocks, so that a block is still decoded when the next photo wants it.
        missing.sort(key=lambda photo: (photo[1].camera.nadir[0] // 2, photo[1].camera.nadir[1]))
        (output / "queries").mkdir(parents=True, exist_ok=True)
        with earth.stored_ratios(months, {int(query.date[4:6]) for _, query in missing}) as ratios:
            render = Renderer(output, raster, ratios, image_size, seed, weather)
            for _ in jobs.run(missing, render, num_workers, "photos", "photo"):
                pass
    if missing or not (output / CONDITIONS_FILE).exists():
        write_conditions(output, conditions(seed, [query for _, query in wanted], image_size, weather))
    if not any((output / "database").glob(f"{DATABASE_YEAR}_*")):
        return (
            f"{output}: {len(missing):,} photos made now; no database of {DATABASE_YEAR} there: build one, and run "
            f"again for the positives"
        )
    write_positives(output / INTERSECTIONS_FILE, Catalogue.from_paths(output, sorted(path for path, _ in wanted)))
    return f"{output}: {len(missing):,} photos made now; their positives are in {INTERSECTIONS_FILE}"
