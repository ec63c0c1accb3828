"""Pictures of the demo world: database regions and astronaut-like queries, rendered from equirectangular mosaics.

A mosaic is a uint8 tensor (3, H, 2H): 180 W to 180 E, 90 N to 90 S. All results are pure functions of the arguments.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F

from datasets import grid
from datasets.build.camera import Camera, footprint, great_circle, ground_points, incidence, orientation
from datasets.names import ImageName
from utils import geo

QUERY_SIZE = (384, 256)  # width, height: 3:2, as the station's cameras
Photos = Literal["full", "hazy", "clear"]  # what a query goes through, see render_query
MAX_NADIR_LATITUDE = 51.6  # the station's orbit
MAX_DISTANCE_KM = 2500  # the farthest ground that the data set's photos show (paper, sec. 3.1)
AREAS_KM2 = (100_000, 1_500_000)
FOCAL_MM = (14, 17, 20, 24, 28, 35, 50, 58, 85)
ALTITUDES_KM = (370, 450)
CLOUD_KM = (100, 500)  # size of the largest clouds
GAMMA = 2.2  # between what a mosaic holds and linear light
MAX_CENTER_LATITUDE = 58  # beyond it the database soon ends

# Share of the queries, (lat, lon) and radius in km of their nadirs. The first seven feed the six evaluation sets and
# validation.
GROUPS = {
    "texas": (0.09, (30, -95), 2500),
    "validation": (0.065, (30, -95), 500),
    "alps": (0.12, (45, 10), 2500),
    "california": (0.11, (38, -122), 2500),
    "gobi": (0.12, (40, 105), 2500),
    "amazon": (0.125, (-3, -60), 2500),
    "toshka": (0.12, (23, 30), 2500),
    "sea": (0.03, None, None),  # no region of the database in view
    "fiji": (0.01, (-17, 179), 1500),  # these three look across the antimeridian
    "new_zealand": (0.01, (-39, 179), 1200),
    "chukotka": (0.01, (51, 178), 1500),
    "world": (0.19, None, None),
}
ANTIMERIDIAN = ("fiji", "new_zealand", "chukotka")
LAND_SHARE = 0.96  # of the other queries: the photo's centre is land


@dataclass(frozen=True)
class Query:
    """One planned photo: number `index` of the world, what it is there for, the camera and the day."""

    index: int
    group: str
    camera: Camera
    date: str


def query_name(query: Query, seed: int, mission: str = "DEMO") -> ImageName:
    """Planned photo -> its ImageName, with the label from the ray-Earth intersections."""
    corners = footprint(query.camera)
    # + 0.0 turns a rounded -0.0 into 0.0
    corners = np.round(corners, 6) + 0.0
    area = int(round(float(grid.quadrilateral_area(geo.unwrap_footprints(corners)))))
    nadir = tuple((np.round(query.camera.nadir, 1) + 0.0).tolist())
    return ImageName(
        footprint=tuple(map(tuple, corners.tolist())),
        image_id=f"{mission}{seed % 100:02d}-E-{query.index:05d}",
        timestamp=query.date,
        nadir=nadir,
        area=area,
        orientation=round(orientation(query.camera), 1) + 0.0,
    )


def planned(fields: Sequence) -> Query:
    """As the plan's JSON holds it, `list(dataclasses.asdict(query).values())` -> Query."""
    index, group, camera, date = fields
    return Query(index, group, Camera(**camera), date)


# ---- planning: which photos are taken ----


def group_of(index: int, groups: dict = GROUPS) -> str:
    """Group of query number `index`: a low-discrepancy walk, so every prefix of the queries has the same shares."""
    bounds = np.cumsum([share for share, _, _ in groups.values()])
    position = (index + 0.5) * (np.sqrt(5) - 1) / 2 % 1 * bounds[-1]
    return list(groups)[int(np.searchsorted(bounds, position, side="right"))]


def draw_nadir(
    rng: np.random.Generator, center: tuple[float, float] | None, radius_km: float | None
) -> tuple[float, float]:
    """Uniform over the circle on the sphere (or over the whole Earth), within the orbit's latitudes -> (lat, lon)."""
    while True:
        if center is None:
            lat, lon = np.degrees(np.arcsin(rng.uniform(-1, 1))), rng.uniform(-180, 180)
        else:
            # Uniform in area: 1 - cos(angle) is uniform.
            angle = np.arccos(1 - rng.uniform() * (1 - np.cos(radius_km / geo.EARTH_RADIUS_KM)))
            lat, lon = great_circle(center, rng.uniform(0, 2 * np.pi), angle)
        if abs(lat) <= MAX_NADIR_LATITUDE:
            return float(lat), float(geo.wrap_longitude(lon))


def draw_camera(
    rng: np.random.Generator, center: tuple[float, float] | None = None, radius_km: float | None = None
) -> Camera:
    """A random camera whose photo lies on Earth, near enough and of a usable area. Draws until one fits."""
    while True:
        nadir = draw_nadir(rng, center, radius_km)
        altitude, tilt = float(rng.uniform(*ALTITUDES_KM)), float(60 * rng.uniform() ** 0.8)
        focal = float(rng.choice(FOCAL_MM))
        azimuth, roll = float(rng.uniform(0, 360)), float(rng.uniform(-180, 180))
        # A flat Earth's area decides most draws at no cost: curvature only makes the true one larger.
        flat = 36 * 23.9 * (altitude / focal) ** 2 / np.cos(np.radians(tilt)) ** 3
        if flat > AREAS_KM2[1] or flat < AREAS_KM2[0] / 3:
            continue
        camera = Camera(nadir, altitude, tilt, azimuth, roll, focal)
        corners = footprint(camera)
        if np.isnan(corners).any() or geo.distance_km(corners, nadir).max() > MAX_DISTANCE_KM:
            continue
        area = grid.quadrilateral_area(geo.unwrap_footprints(corners))
        # Mosaics of 10 km/px show little on small ground: lean towards larger photos.
        if AREAS_KM2[0] <= area <= AREAS_KM2[1] and rng.uniform() < np.sqrt(area / AREAS_KM2[1]):
            return camera


def _sees_database(camera: Camera, regions: tuple[np.ndarray, np.ndarray]) -> bool:
    """Whether a region of (centres (N, 2), radii (N,) km) could share ground with the photo; never wrongly no."""
    corners = footprint(camera)
    center = geo.centers(corners)
    return bool((geo.distance_km(center, regions[0]) < geo.distance_km(center, corners).max() + regions[1]).any())


def plan_query(seed: int, index: int, regions: tuple[np.ndarray, np.ndarray], is_land: Callable) -> Query:
    """Query number `index` of world `seed` -> Query. regions: database (centres (N, 2), radii (N,) km).

    is_land: function of (lat, lon) arrays, degrees -> bool.
    """
    rng = np.random.default_rng([seed, index, 1])
    group = group_of(index)
    _, center, radius_km = GROUPS[group]
    wants_land = rng.uniform() < LAND_SHARE
    u, v = np.meshgrid(np.linspace(0.1, 0.9, 6), np.linspace(0.1, 0.9, 6))
    for _ in range(5000):
        camera = draw_camera(rng, center, radius_km)
        if group == "sea":
            fits = not _sees_database(camera, regions)
        elif group in ANTIMERIDIAN:
            longitudes = footprint(camera)[:, 1]
            points = ground_points(camera, u, v)
            fits = np.ptp(longitudes) > 180 and is_land(points[..., 0], points[..., 1]).mean() > 0.04
        else:
            lat, lon = ground_points(camera, 0.5, 0.5)
            fits = abs(lat) < MAX_CENTER_LATITUDE and (not wants_land or is_land(lat, lon))
        if fits:
            break
    else:
        raise ValueError(f"query {index} ({group}): no camera fits in 5000 draws; use finer --zooms")
    date = np.datetime64("2012-01-01") + rng.integers(0, 4018)
    return Query(index, group, camera, str(date).replace("-", ""))


# ---- rendering ----


def _resampling_weights(positions: np.ndarray) -> tuple[np.ndarray, torch.Tensor]:
    """positions (N,) in source pixels -> source pixels (M,) int, may lie outside, and their weights (N, M) float32.

    Cubic convolution, widened where the source is finer than the output so that nothing aliases.
    """
    scale = max(1.0, float(np.abs(np.diff(positions)).max())) if len(positions) > 1 else 1.0
    first = int(np.floor(positions.min() - 2 * scale))
    source = np.arange(first, int(np.ceil(positions.max() + 2 * scale)) + 1)
    x = np.abs(source - positions[:, None]) / scale
    near, far = 1.5 * x**3 - 2.5 * x**2 + 1, -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    weights = np.where(x < 1, near, np.where(x < 2, far, 0))
    return source, torch.from_numpy((weights / weights.sum(axis=1, keepdims=True)).astype(np.float32))


def render_region(mosaic: torch.Tensor, zoom: int, row: int, col: int, size: int) -> torch.Tensor:
    """mosaic (3, H, 2H) uint8 and a region of the grid -> (3, size, size) uint8, north up, Web Mercator."""
    height, width = mosaic.shape[1:]
    steps = (np.arange(size) + 0.5) / size * grid.TILES
    lat, lon = grid.tile_latitude(zoom, row + steps), grid.tile_longitude(zoom, col + steps)
    rows, row_weights = _resampling_weights((90 - lat) / 180 * height - 0.5)
    cols, col_weights = _resampling_weights((lon + 180) / 360 * width - 0.5)
    # Columns go around the Earth, rows end at the poles.
    patch = mosaic[:, rows.clip(0, height - 1)][:, :, cols % width].float()
    return (row_weights @ patch @ col_weights.T).round().clamp(0, 255).to(torch.uint8)


def sample_mosaic(mosaic: torch.Tensor, latlon: np.ndarray) -> torch.Tensor:
    """mosaic (3, H, 2H) uint8, latlon (..., 2) of shape (h, w, 2) -> (3, h, w) float32 in 0...255, bicubic."""
    height, width = mosaic.shape[1:]
    middle = latlon[latlon.shape[0] // 2, latlon.shape[1] // 2, 1]
    x = (middle + geo.wrap_longitude(latlon[..., 1] - middle) + 180) / 360 * width - 0.5
    y = (90 - latlon[..., 0]) / 180 * height - 0.5
    cols = np.arange(int(np.floor(x.min())) - 2, int(np.ceil(x.max())) + 3)
    rows = np.arange(int(np.floor(y.min())) - 2, int(np.ceil(y.max())) + 3)
    patch = mosaic[:, rows.clip(0, height - 1)][:, :, cols % width].float()
    places = np.stack([(x - cols[0]) / (len(cols) - 1), (y - rows[0]) / (len(rows) - 1)], axis=-1) * 2 - 1
    places = torch.from_numpy(places.astype(np.float32))
    sampled = F.grid_sample(patch[None], places[None], mode="bicubic", padding_mode="border", align_corners=True)
    return sampled[0].clamp(0, 255)


def _pixel_grid(size: tuple[int, int], factor: int = 1) -> tuple[np.ndarray, np.ndarray]:
    width, height = size[0] * factor, size[1] * factor
    return np.meshgrid((np.arange(width) + 0.5) / width, (np.arange(height) + 0.5) / height, sparse=True)


def render_ground(mosaic: torch.Tensor, camera: Camera, size: tuple[int, int] = QUERY_SIZE) -> torch.Tensor:
    """What the camera sees through perfectly clear air: (3, h, w) float32 in 0...255. size: (width, height)."""
    return _supersampled(mosaic, camera, ground_points(camera, *_pixel_grid(size)))


def _supersampled(mosaic: torch.Tensor, camera: Camera, latlon: np.ndarray) -> torch.Tensor:
    """latlon (h, w, 2) of pixel centres -> (3, h, w), each the mean of as many samples as the coarsest pixel needs."""
    across = np.linalg.norm(np.diff(geo.to_unit_vectors(latlon[::16]), axis=1), axis=-1).max()
    down = np.linalg.norm(np.diff(geo.to_unit_vectors(latlon[:, ::16]), axis=0), axis=-1).max()
    km = geo.EARTH_RADIUS_KM * max(across, down)
    # A mosaic's pixel is narrower towards the poles.
    spacing = np.pi * geo.EARTH_RADIUS_KM / mosaic.shape[1] * np.cos(np.radians(np.abs(latlon[..., 0]).max()))
    factor = int(np.clip(np.ceil(0.8 * km / spacing), 1, 4))  # cubic weights bear a little more
    if factor > 1:
        height, width = latlon.shape[:2]
        latlon = ground_points(camera, *_pixel_grid((width, height), factor))
    return F.avg_pool2d(sample_mosaic(mosaic, latlon)[None], factor)[0]


def _fractal(noise: np.ndarray, cells: float) -> torch.Tensor:
    """White noise (size, size) -> smooth field, mean 0, spread 1, power falling beyond `cells` waves across."""
    size = len(noise)
    frequency = np.hypot(np.fft.fftfreq(size)[:, None], np.fft.rfftfreq(size)[None]) * size
    amplitude = (1 + (frequency / cells) ** 2) ** -0.85
    amplitude[0, 0] = 0
    field = np.fft.irfft2(np.fft.rfft2(noise) * amplitude, s=(size, size))
    return torch.from_numpy((field / field.std()).astype(np.float32))


def ground_plane(camera: Camera, latlon: np.ndarray) -> np.ndarray:
    """latlon (h, w, 2) -> (h, w, 2) km to the east and north in the plane that touches the ground at the centre."""
    up = geo.to_unit_vectors(ground_points(camera, 0.5, 0.5))
    east = np.array([-up[1], up[0], 0]) / np.hypot(up[0], up[1])
    offsets = geo.to_unit_vectors(latlon) - up
    return np.stack([offsets @ east, offsets @ np.cross(up, east)], axis=-1) * geo.EARTH_RADIUS_KM


def draw_clouds(
    rng: np.random.Generator, size: int, cloud_km: tuple[float, float] = CLOUD_KM
) -> tuple[float, np.ndarray, float]:
    """-> km of the largest clouds, white noise (size, size), share of the photo's pixels that some cloud covers."""
    largest = rng.uniform(*cloud_km)
    noise = rng.standard_normal((size, size), dtype=np.float32)
    return largest, noise, min(0.55, rng.beta(0.7, 4.5))


def _clouds(
    rng: np.random.Generator, plane: np.ndarray, cloud_km: tuple[float, float]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Opacity and brightness (h, w) of procedural clouds that lie on the ground and so follow the perspective."""
    extent = np.abs(plane).max() * 1.05
    largest, noise, coverage = draw_clouds(rng, max(plane.shape), cloud_km)
    field = _fractal(noise, 2 * extent / largest)
    places = torch.from_numpy((plane / extent).astype(np.float32))
    field = F.grid_sample(field[None, None], places[None], mode="bicubic", padding_mode="border", align_corners=True)
    field = field[0, 0]
    edge = torch.quantile(field[::4, ::4], 1 - coverage)
    above = (field - edge) / float(rng.uniform(0.7, 2.0))
    opacity = 1 - torch.exp(-2 * above.clamp(min=0) ** 1.5)
    return opacity * float(rng.uniform(0.75, 1.0)), 0.7 + 0.25 * torch.tanh(above)


def render_query(
    mosaic: torch.Tensor,
    camera: Camera,
    rng: np.random.Generator,
    size: tuple[int, int] = QUERY_SIZE,
    photos: Photos = "full",
) -> torch.Tensor:
    """A photo as an astronaut might have taken it: clouds, haze, exposure, colour, lens, noise -> (3, h, w) uint8.

    photos: "full", "hazy" without the clouds (and otherwise with the same draws), "clear" with the geometry alone.
    """
    if photos == "clear":
        return render_ground(mosaic, camera, size).round().to(torch.uint8)
    latlon = ground_points(camera, *_pixel_grid(size))
    light = (_supersampled(mosaic, camera, latlon) / 255) ** GAMMA
    return photograph(light, camera, ground_plane(camera, latlon), rng, photos)


def photograph(
    light: torch.Tensor,
    camera: Camera,
    plane: np.ndarray,
    rng: np.random.Generator,
    photos: Photos = "full",
    cloud_km: tuple[float, float] = CLOUD_KM,
) -> torch.Tensor:
    """What the camera sees through clear air, linear light (3, h, w) in 0...1, is overwritten -> (3, h, w) uint8 photo.

    plane: ground_plane of its pixels, or of fewer (h', w', 2) spread alike, for coarser clouds in less time. cloud_km:
    from where to where the largest clouds' size is drawn. photos: "full", or "hazy" without the clouds.
    """
    opacity, brightness = _clouds(rng, plane, cloud_km)
    if opacity.shape != light.shape[1:]:
        both = torch.stack([opacity, brightness])[None]
        opacity, brightness = F.interpolate(both, light.shape[1:], mode="bilinear")[0]
    if photos == "full":
        light = light.mul_(1 - opacity).add_(brightness * opacity)

    # Air between: its path grows as 1 / cos(incidence) with the slant; blue scatters most.
    # So smooth that a few points will do.
    coarse = 1 / incidence(camera, *np.meshgrid(np.linspace(0, 1, 25), np.linspace(0, 1, 17)))
    path = F.interpolate(
        torch.from_numpy(coarse.clip(max=8).astype(np.float32))[None, None],
        light.shape[1:],
        mode="bilinear",
        align_corners=True,
    )[0, 0]
    depth = torch.tensor([0.055, 0.08, 0.14])[:, None, None] * float(rng.lognormal(0, 0.35)) * path
    airlight = torch.tensor([0.17, 0.24, 0.36])[:, None, None]
    clear = torch.exp(depth.neg_())
    light = light.mul_(clear).add_(airlight * (1 - clear))

    balance = torch.from_numpy(rng.lognormal(0, 0.07, 3).astype(np.float32))[:, None, None]
    # Half-automatic exposure towards middle grey, with the photographer's taste on top.
    exposure = float((0.13 / light.mean().clamp(min=0.01)) ** 0.75) * float(rng.lognormal(0, 0.22))
    corner = float(rng.uniform(0, 0.3))
    u, v = _pixel_grid(light.shape[:0:-1])
    radius = torch.from_numpy((((u - 0.5) ** 2 + (v - 0.5) ** 2) * 2).astype(np.float32))
    light = light.mul_(balance).mul_(exposure).mul_(1 - corner * radius)

    noise = torch.from_numpy(rng.standard_normal(light.shape, dtype=np.float32))
    light += noise.mul_((light.clamp(min=0) + 0.02).sqrt_().mul_(float(rng.uniform(0.002, 0.012))))
    # A soft shoulder, so that clouds do not clip hard.
    tone = (1 - torch.exp(light.clamp_(min=0).mul_(-1.7))).pow_(1 / float(rng.uniform(1.9, 2.4)))
    contrast, saturation = float(rng.uniform(0.9, 1.3)), float(rng.uniform(0.8, 1.2))
    tone = tone.sub_(0.5).mul_(contrast).add_(0.5)
    grey = tone.mean(dim=0, keepdim=True)
    tone = tone.sub_(grey).mul_(saturation).add_(grey)
    return tone.mul_(255).round_().clamp_(0, 255).to(torch.uint8)
