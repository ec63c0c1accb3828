"""Fits the probability that a registered place is right: the numbers in retrieval/confidence.py.

python -m experiments.confidence --raster august.tif --months months/ --register sift xfeat --keep fit/

Synthetic photos: what a camera on the station would see of the raster, in the colours of another month, under clouds
and behind haze, exposed anew. Each is registered on candidates that show its ground and on others that do not. A
registration is right where its footprint's IoU with the camera's is above 0.5. So that there are wrong ones to learn
from, those count, too, that registration itself would refuse because the ground drawn anew does not confirm them. No
real photo takes part.

Each fifth of the photos is then judged by a fit to the others: how often is what has a probability of so much right,
and what would be verified.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated

import cv2
import numpy as np
import torch
from kornia.filters import gaussian_blur2d
from tqdm import tqdm

from augmentations.weather import HAZE_COLOUR, NOISE, cloud_opacity, expose, haze_opacity
from datasets import grid
from datasets.build.camera import Camera, footprint, ground_points, orientation
from datasets.build.earth import RASTER_MONTH, month_ratios
from experiments.registration import iou
from retrieval.confidence import FEATURES, features
from retrieval.ground import Ground, RasterGround
from retrieval.homographies import FARTHEST_KM
from retrieval.matching import Matcher, make_matcher, matcher_flag
from retrieval.registration import register, square
from utils import geo
from utils.arguments import positive
from utils.files import replacing
from utils.flags import DEVICE, Device, Seed, command

Row = tuple[np.ndarray, bool, bool]  # features (F,), right, true

SIZE = 512  # pixels, as the public data set's photos: whatever the camera's aspect, squashed to a square
WIDTHS_KM = (60, 500)  # of a photo, at its middle
REGION_SHARE = (0.7, 3)  # a candidate's side, of the photo's
TURNS = (((0,), None),)  # the quarter is right: what other turns would find is found in the same way
FOLDS = 5
BINS = (0, 0.1, 0.5, 0.9, 1)  # of the probabilities, in which their reliability is told
LEVELS = (0.5, 0.9, 0.95, 0.99)  # from which a place may count as verified
SEA = 0.1  # share of the photos that may show no land


def draw_camera(rng: np.random.Generator) -> Camera:
    """A camera on the station's orbit whose photo is on Earth, between the latitudes that the raster holds."""
    while True:
        nadir = (float(rng.uniform(-51, 51)), float(rng.uniform(-180, 180)))
        altitude, tilt = float(rng.uniform(400, 430)), float(60 * rng.uniform() ** 0.8)
        width = float(np.exp(rng.uniform(*np.log(WIDTHS_KM))))
        focal = 36 * altitude / np.cos(np.radians(tilt)) / width
        camera = Camera(nadir, altitude, tilt, float(rng.uniform(0, 360)), float(rng.uniform(-180, 180)), focal)
        corners = footprint(camera)
        if np.isnan(corners).any() or np.abs(corners[:, 0]).max() > 60:
            continue
        if geo.distance_km(corners, nadir).max() > FARTHEST_KM:
            continue
        lat, lon = ground_points(camera, *np.meshgrid(np.linspace(0.1, 0.9, 8), np.linspace(0.1, 0.9, 8))).T
        if grid.is_land(lat, lon).mean() > 0.3 or rng.uniform() < SEA:
            return camera


def render(camera: Camera, ground: Ground, ratios: Sequence[np.ndarray], rng: np.random.Generator) -> torch.Tensor:
    """-> uint8 (3, SIZE, SIZE): the camera's photo in one of the months' colours, under clouds and behind haze."""
    middles = (np.arange(SIZE) + 0.5) / SIZE
    latlon = ground_points(camera, *np.meshgrid(middles, middles))
    unwrapped = latlon.copy()
    unwrapped[..., 1] = latlon[0, 0, 1] + geo.wrap_longitude(latlon[..., 1] - latlon[0, 0, 1])
    places = geo.to_mercator(unwrapped)
    box = square(places.reshape(-1, 2))
    side = 1024
    picture = ground(box, side)
    if picture is None:
        return torch.zeros(3, SIZE, SIZE, dtype=torch.uint8)
    scale = side / (box[2] - box[0])
    x, y = (places[..., 0] - box[0]) * scale - 0.5, (box[3] - places[..., 1]) * scale - 0.5
    photo = sample(picture.permute(1, 2, 0).numpy().astype(np.float32) / 255, x, y)
    ratio = ratios[rng.integers(len(ratios))]
    height, width = ratio.shape[:2]
    # Not across the mosaic's seam, where the nearest column stands for the other side's: 7 km at ±180 degrees.
    x = (geo.wrap_longitude(latlon[..., 1]) + 180) / 360 * width - 0.5
    photo = photo * sample(ratio, x, (90 - latlon[..., 0]) / 180 * height - 0.5)
    photo = torch.from_numpy(photo).permute(2, 0, 1)[None].clamp(0, 1)
    generator = torch.Generator().manual_seed(int(rng.integers(2**31)))
    # Raster and candidates are one picture, without a camera or years between: all the more weather is in between.
    colour = torch.tensor(HAZE_COLOUR)[:, None, None]
    uniform, noise = torch.rand(1, 7, generator=generator), torch.randn(1, NOISE, generator=generator)
    photo = photo + haze_opacity(0.95, uniform[:, :3], SIZE) * (colour - photo)
    photo = photo + cloud_opacity(0.95, uniform[:, 3:], noise, SIZE) * (1 - photo)
    photo = expose(photo, torch.full((1, 1, 1, 1), float(rng.uniform(0, 1))))[0]
    photo = gaussian_blur2d(photo[None], 9, (float(rng.uniform(0.1, 2)),) * 2)[0]
    photo = photo + torch.randn(photo.shape, generator=generator) * float(rng.uniform(0, 0.05))
    return (photo * 255).round().clamp(0, 255).to(torch.uint8)


def sample(picture: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """(H, W, 3) float32 at places (h, w) in its pixels -> (h, w, 3), bilinear."""
    return cv2.remap(
        picture, x.astype(np.float32), y.astype(np.float32), cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE
    )


def draw_candidates(camera: Camera, rng: np.random.Generator, true: bool) -> tuple[np.ndarray, int]:
    """-> footprint (4, 2), rotation (degrees): a square of ground that shows the photo's middle, or one that shows
    nothing of it."""
    corners = footprint(camera)
    middle = geo.centers(corners)
    radius = geo.distance_km(corners, middle).max()
    side = 1.4 * radius * float(np.exp(rng.uniform(*np.log(REGION_SHARE))))
    rotation = -orientation(camera)
    reach = 0.3 * side if true else max(FARTHEST_KM, 2 * (radius + side))
    for tries in itertools.count():
        away = rng.uniform(-reach, reach, 2)
        lat = middle[0] + away[0] / 111.2
        if abs(lat) > 58:
            continue
        lon = middle[1] + away[1] / 111.2 / np.cos(np.radians(lat))
        # Amid an ocean there may be no land in reach.
        if true or np.hypot(*away) > radius + side and (tries > 200 or grid.is_land(lat, lon)):
            break
    half = side / 2 / (111.2 * np.cos(np.radians(lat))) / 180 * geo.MERCATOR_HALF
    x, y = geo.to_mercator([lat, lon])
    box = np.array([[x - half, y - half], [x - half, y + half], [x + half, y + half], [x + half, y - half]])
    if not true:
        rotation = rng.uniform(0, 360)
    return geo.from_mercator(box), int(round(rotation / 90) * 90 % 360)


def collect(
    photos: Iterable[int], false: int, matcher: Matcher, ground: Ground, ratios: Sequence[np.ndarray], seed: int
) -> Iterator[list[Row]]:
    """photos: their numbers. Yields for each photo (features, right, true) of what was registered, a row each: features
    (F,), whether the place is right, and whether the candidate was a true one."""
    for index in photos:
        rng = np.random.default_rng([seed, index])
        camera = draw_camera(rng)
        photo, truth = render(camera, ground, ratios, rng), footprint(camera)
        kinds = [True] + [False] * false
        rows = []
        for true in kinds:  # one by one: a sure one would end the search for the others
            candidates = [draw_candidates(camera, rng, true)]
            (found,) = register(photo, candidates, ground, matcher, turns=TURNS, confirm=False)
            if found is not None:
                rows.append((features(found), iou(truth, found.footprint) > 0.5, true))
        yield rows


def kept_rows(
    path: Path | None, photos: int, rows_of: Callable[[range], Iterable[list[Row]]]
) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    """-> features (N, F), right (N,), true (N,), and of how many photos: those in the file, if there is one, and what
    lacks of so many. They go there as they come, so that a second run goes on. rows_of: numbers of photos -> the rows
    of each."""
    rows, there = [], 0
    if path is not None and path.is_file():
        with np.load(path) as kept:
            rows, there = list(zip(kept["features"], kept["right"], kept["true"])), int(kept["photos"])
    for done, new in enumerate(rows_of(range(there, photos)), there + 1):
        rows += new
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(path) as file:
                np.savez(file, **dict(zip(("features", "right", "true"), columns(rows))), photos=done)
    return *columns(rows), max(there, photos)


def columns(rows: Sequence[Row]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """-> features (N, F), right (N,), true (N,)."""
    found, right, true = zip(*rows) if rows else ([], [], [])
    return np.array(found).reshape(-1, len(FEATURES)), np.array(right, dtype=bool), np.array(true, dtype=bool)


def fit(rows: np.ndarray, right: np.ndarray, strength: float = 3.0) -> tuple[np.ndarray, float]:
    """Features (N, F) and what is right (N,) -> coefficients (F,), intercept. Both kinds weigh the same. strength: of
    the fit against the pull to zero; of 0.3 to 100, 3 had the best log loss for xfeat (8 folds, three times)."""
    from sklearn.linear_model import LogisticRegression

    model = LogisticRegression(C=strength, class_weight="balanced", max_iter=10_000).fit(rows, right)
    return model.coef_[0], float(model.intercept_[0])


def fit_all(found: dict[str, tuple[np.ndarray, np.ndarray]]) -> dict[str, list[float]]:
    """{matcher: (features, right)} -> {matcher: [intercept, *coefficients]}, those with right ones. Wrong ones are rare
    and much alike, so each matcher's right ones are set against the wrong ones of all."""
    wrong = np.concatenate([rows[~right] for rows, right in found.values()])
    fitted = {}
    for name, (rows, right) in found.items():
        if right.any() and len(wrong):
            both = np.concatenate([rows[right], wrong])
            coefficients, intercept = fit(both, np.arange(len(both)) < right.sum())
            fitted[name] = [intercept, *coefficients.tolist()]
    return fitted


def held_back(found: dict[str, tuple[np.ndarray, np.ndarray]]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """{matcher: (features, right)}, in the order of the photos -> {matcher: (probabilities (N,), right (N,) bool)}: its
    right ones and the wrong ones of all, each fold by a fit to the other folds."""
    chances = {name: [] for name in found}
    folds = {name: np.arange(len(right)) * FOLDS // max(len(right), 1) for name, (_, right) in found.items()}
    for fold in range(FOLDS):
        rest = {name: (rows[folds[name] != fold], right[folds[name] != fold]) for name, (rows, right) in found.items()}
        for name, (intercept, *coefficients) in fit_all(rest).items():
            for each, (rows, right) in found.items():
                taken = (folds[each] == fold) & (~right | (each == name))
                chance = 1 / (1 + np.exp(-(intercept + rows[taken] @ coefficients)))
                chances[name] += zip(chance, right[taken])
    told = {name: np.array(each).T for name, each in chances.items() if each}
    return {name: (chance, right > 0) for name, (chance, right) in told.items()}


def reliability(chance: np.ndarray, right: np.ndarray, tried: int) -> list[str]:
    """Probabilities (N,) and what is right (N,), of so many false candidates -> lines. Both kinds weigh the same, as in
    the fit."""
    weights = np.where(right, 0.5 / max(right.sum(), 1), 0.5 / max((~right).sum(), 1))
    lines = [f"  Brier score {np.sum(weights * (chance - right) ** 2):.4f} (0.25: says nothing)"]
    for low, high in itertools.pairwise(BINS):
        inside = (low <= chance) & ((chance < high) | (high == 1))
        if inside.any():
            said, true = (np.average(each[inside], weights=weights[inside]) for each in (chance, right))
            lines.append(f"  {low:g} to {high:g}: {inside.sum()} registrations, said {said:.3f}, right {true:.3f}")
    for level in LEVELS:
        good, bad = (chance[right] >= level).sum(), (chance[~right] >= level).sum()
        lines.append(f"  from {level:g}: {good} of {right.sum()} right ones, {bad} wrong of {tried} false candidates")
    return lines


def main(
    *,
    raster: Annotated[str, "Web Mercator GeoTIFF of the whole Earth, August"],
    months: Annotated[Path, "folder with 01.jpg … 12.jpg, equirectangular"],
    register: Annotated[list[str], "matchers", matcher_flag()] = ("xfeat",),
    matcher_weights: Annotated[str | None, "folder with the matcher's published files"] = None,
    photos: Annotated[int, "how many", {"type": positive}] = 150,
    false: Annotated[int, "false candidates a photo; there is one true one", {"type": positive}] = 3,
    every_month: Annotated[int, "of the months, take every so many", {"type": positive}] = 6,
    keep: Annotated[Path | None, "folder in which the features are kept as they come; a second run goes on"] = None,
    seed: Seed = 0,
    device: Device = DEVICE,
) -> None:
    """Prints the reliability of what was held back, and the lines for COEFFICIENTS."""
    ground = RasterGround(raster)
    wanted = [month for month in range(1, 13) if month != RASTER_MONTH][::every_month]
    ratios = [ratio.astype(np.float32) for _, ratio in month_ratios(months, wanted)]
    found, tried = {}, 0
    for name in register:
        matcher = make_matcher(name, matcher_weights, device)

        def rows_of(numbers: range) -> Iterator[list[Row]]:
            return collect(tqdm(numbers, desc=name, unit="photo"), false, matcher, ground, ratios, seed)

        rows, right, true, count = kept_rows(keep and keep / f"{name}.npz", photos, rows_of)
        found[name], tried = (rows, right), tried + count * false
        print(
            f"{name}: {true.sum()} of {count} true candidates registered, {(~true).sum()} of {count * false} false "
            f"ones; {right.sum()} right, {(~right).sum()} wrong"
        )
    fitted = fit_all(found)
    if not fitted:
        print("only one kind, nothing to fit; more --photos or --false")
    for name, (chance, right) in held_back(found).items():
        print("\n".join([f"{name}, held back:", *reliability(chance, right, tried)]))
    for name, numbers in fitted.items():
        print(f'    "{name}": ({", ".join(f"{number:.2f}" for number in numbers)}),')


if __name__ == "__main__":
    command(main)
