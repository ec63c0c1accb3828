"""What homographies from a photo to the ground are and say: fitted to matches, refused where no camera sees so.

They go from the photo's pixels, as it is matched, to metres of Web Mercator.
"""

from dataclasses import dataclass

import cv2
import numpy as np
import shapely

from utils import geo

Point = tuple[float, float] | None  # lat, lon

MIN_INLIERS = 6  # a homography goes through any four points
FEW = 20  # inliers: with fewer, other turns are tried
THRESHOLD = 3.0  # pixels: farther from its place, a match is an outlier (EarthMatch: 3)

MOST_TILES = 9  # times the candidate's area: larger is absurd (EarthMatch)
LEAST_TILES = 1 / 400
MOST_STRETCH = 6  # of one side against the other, beyond the photo's own aspect; a slant of 80 degrees
MOST_SLANT = 8  # of the finest scale in the photo to the coarsest
FARTHEST_KM = 2500  # of ground from the nadir (paper, eq. 1)
MOST_SKEW = 0.5  # see `skew`


@dataclass(frozen=True)
class Fit:
    """A homography of the photo as it is matched (width, height pixels) to metres, and its matches (N, 2), (N, 2)."""

    homography: np.ndarray
    here: np.ndarray  # inliers, in the photo as it is matched
    there: np.ndarray  # the same in metres
    matches: int

    @property
    def inliers(self) -> int:
        return len(self.here)


def better(a: Fit | None, b: Fit | None) -> Fit | None:
    """Of two fits, either may be None: the one with more inliers, the first of equal ones."""
    return max((each for each in (a, b) if each is not None), key=lambda fit: fit.inliers, default=None)


def fit_homography(here: np.ndarray, there: np.ndarray, to_ground: np.ndarray) -> Fit | None:
    """Matches (M, 2) in the photo and (M, 2) in a picture of the ground, whose pixels lie at to_ground -> Fit or None.

    MAGSAC++ (Barath et al. 2020); OpenCV's random numbers always start from the same seed.
    """
    if len(here) < MIN_INLIERS:
        return None
    found, _ = cv2.findHomography(here, there, cv2.USAC_MAGSAC, THRESHOLD, maxIters=10_000, confidence=0.9999)
    if found is None or not np.isfinite(found).all() or abs(np.linalg.det(found)) < 1e-12:
        return None
    close = np.linalg.norm(project(found, here) - there, axis=1) < THRESHOLD
    close &= depth(found, here) * np.sign(found[2, 2]) > 0
    if close.sum() < MIN_INLIERS:
        return None
    return Fit(to_ground @ found, here[close], project(to_ground, there[close]), len(here))


def depth(homography: np.ndarray, points: np.ndarray) -> np.ndarray:
    """(3, 3), (N, 2) -> (N,) the third homogeneous coordinate: its sign changes at the horizon."""
    return np.asarray(points) @ homography[2, :2] + homography[2, 2]


def project(homography: np.ndarray, points: np.ndarray) -> np.ndarray:
    """(3, 3), (N, 2) -> (N, 2) float64."""
    points = np.asarray(points, dtype=np.float64)
    return (points @ homography[:2, :2].T + homography[:2, 2]) / depth(homography, points)[:, None]


def corners_of(size: tuple[int, int]) -> np.ndarray:
    """(width, height) -> (4, 2) x, y of the bottom-left, top-left, top-right and bottom-right corners."""
    width, height = size
    return np.array([[0, height], [0, 0], [width, 0], [width, height]], dtype=np.float64)


def is_in_front(homography: np.ndarray, corners: np.ndarray) -> bool:
    """No horizon between the corners: all lie on one side of it."""
    depths = depth(homography, corners)
    return (depths > 0).all() or (depths < 0).all()


def jacobian(homography: np.ndarray, point: np.ndarray) -> np.ndarray:
    """(3, 3), (2,) -> (2, 2): ground per pixel there."""
    x, y = project(homography, [point])[0]
    bottom = homography[2]
    return (homography[:2, :2] - np.outer([x, y], bottom[:2])) / (bottom[:2] @ point + bottom[2])


def slant(homography: np.ndarray, corners: np.ndarray) -> float:
    """How many times coarser one corner of the photo is than another: lengths, not areas."""
    scales = [np.sqrt(abs(np.linalg.det(jacobian(homography, corner)))) for corner in corners]
    return float(max(scales) / max(min(scales), 1e-300))


def stretch(homography: np.ndarray, point: np.ndarray) -> float:
    """How many times longer a pixel's ground is than wide there, in the directions that differ most."""
    long, short = np.linalg.svd(jacobian(homography, point), compute_uv=False)
    return float(long / max(short, 1e-300))


def is_plausible(fit: Fit, size: tuple[int, int], area: float, nadir: Point) -> bool:
    """Whether a camera could have seen it so: not folded, not mirrored, convex, of sensible size, sides and slant.

    area: m² of the candidate. nadir: lat, lon or None.
    """
    corners = corners_of(size)
    if not is_in_front(fit.homography, corners):
        return False
    outline = project(fit.homography, corners)
    edges = np.roll(outline, -1, axis=0) - outline
    turns = edges[:, 0] * np.roll(edges[:, 1], -1) - edges[:, 1] * np.roll(edges[:, 0], -1)
    # From bottom-left over the top, clockwise as a map shows it: all turns to the right.
    if not (np.isfinite(outline).all() and (turns < 0).all()) or np.abs(outline[:, 1]).max() > geo.MERCATOR_HALF:
        return False
    if not LEAST_TILES * area <= shapely.Polygon(outline).area <= MOST_TILES * area:
        return False
    if stretch(fit.homography, np.array(size) / 2) > MOST_STRETCH or slant(fit.homography, corners) > MOST_SLANT:
        return False
    return nadir is None or is_visible(geo.from_mercator(outline), nadir)


def is_visible(footprint: np.ndarray, nadir: tuple[float, float], altitude_km: float = 415.0) -> bool:
    """Whether a camera above the nadir (lat, lon) could have taken a photo with this footprint (4, 2), degrees."""
    if geo.distance_km(footprint, nadir).max() > FARTHEST_KM:
        return False
    return skew(footprint, nadir, altitude_km) <= MOST_SKEW


def skew(footprint: np.ndarray, nadir: tuple[float, float], altitude_km: float = 415.0) -> float:
    """How far the rays from the camera to the corners are from those of a rectangle about the optical axis: 0 for one.

    Rays to the corners of a centred rectangle have the same length at the picture's plane, so as unit vectors, too,
    opposite ones have the same sum. The difference, over their distance. Whatever the focal length and the aspect.
    """
    rays = geo.to_unit_vectors(footprint) - geo.to_unit_vectors(nadir) * (1 + altitude_km / geo.EARTH_RADIUS_KM)
    a, b, c, d = rays / np.linalg.norm(rays, axis=1, keepdims=True)
    return float(np.linalg.norm(a + c - b - d) / max(np.linalg.norm(a - c), np.linalg.norm(b - d), 1e-12))


def shift(old: Fit, new: Fit) -> float:
    """Two Fits -> the largest shift of the ground under the new one's inliers, in the photo's pixels. The corners would
    be no measure: far from the inliers they swing by themselves."""
    area = np.linalg.det(jacobian(new.homography, new.here.mean(axis=0)))
    before, after = (project(fit.homography, new.here) for fit in (old, new))
    return np.linalg.norm(after - before, axis=1).max() / np.sqrt(abs(area))


def same_place(sure: Fit, other: Fit, size: tuple[int, int], iou: float = 0.6) -> bool:
    """Whether two Fits show much the same ground, the first with enough inliers to be trusted."""
    if sure.inliers < 2 * FEW:
        return False
    outlines = [project(fit.homography, corners_of(size)) for fit in (sure, other)]
    # Candidates on either side of the antimeridian may lead to the same place a turn apart.
    outlines[1][:, 0] -= np.round((outlines[1] - outlines[0])[:, 0].mean() / (2 * geo.MERCATOR_HALF)) * (
        2 * geo.MERCATOR_HALF
    )
    a, b = map(shapely.Polygon, outlines)
    shared = a.intersection(b).area
    return shared >= iou * (a.area + b.area - shared)


def azimuth(below: np.ndarray, middle: np.ndarray) -> float:
    """Compass direction from one point (lat, lon) to another nearby, degrees in [0, 360)."""
    north = middle[0] - below[0]
    east = geo.wrap_longitude(middle[1] - below[1]) * np.cos(np.radians(middle[0]))
    return float(np.degrees(np.arctan2(east, north)) % 360)


def spread(points: np.ndarray, size: tuple[int, int]) -> float:
    """Points (M, 2) in a picture (width, height) -> the share of it that their convex hull covers."""
    return float(shapely.MultiPoint(points).convex_hull.area / (size[0] * size[1]))
