"""From a candidate to the photo's own footprint (EarthMatch, Berton et al. CVPRW 2024).

Photo and candidate are matched, a homography is fitted to the matches, and the ground is drawn anew as the photo would
show it, with a margin of surroundings; that is matched again, until the footprint no longer moves.

Homographies go from the photo's pixels to metres of Web Mercator. Between a plane and its picture that is exact. The
ground is not quite one, and Mercator's scale changes over it: the best homography is off by 0.5 pixels of 512 on
average for a photo of 240 km from straight above, 0.8 for one of 190 km leaning by 40 degrees, 5 for one leaning by 58.
"""

from dataclasses import dataclass

import cv2
import numpy as np
import shapely
import torch

from retrieval.ground import Box, Ground
from retrieval.homographies import (
    FEW,
    MOST_SLANT,
    Fit,
    Point,
    azimuth,
    better,
    corners_of,
    fit_homography,
    is_in_front,
    is_plausible,
    project,
    same_place,
    shift,
    slant,
    spread,
    stretch,
)
from retrieval.matching import Matcher
from retrieval.pose import footprint_by_pose
from utils import geo

SIDE = 512  # pixels: the longer side of a photo as it is matched, and a candidate's
MULTIPLE = 32  # of which the sides are multiples: the networks' stride
SMALLEST = 16  # pixels: a photo with a shorter side shows nothing
MARGIN = 0.15  # of the photo's sides: surroundings drawn on each side of it
LARGEST_VIEW = 1536  # pixels of the square of ground from which a view is drawn

# What is tried while no candidate has more: turns to add to the retrieved one, degrees, of so many candidates. Matchers
# bear about 30 degrees, and a quarter is up to 45 off; the quarter itself may be wrong, most often where no candidate
# looks much like the photo and the right one is not among the first.
TURNS = (((0,), None), ((45, -45), 5), ((90, -90, 180), 10), ((135, -135), 5))
START_POINTS = 1024  # of a picture in the first matching: half as many take LightGlue a quarter of the time
CONTRAST = 2.0  # limit of the local equalisation: what is behind haze and thin clouds shows, and noise does not
STILL = 0.01  # of the photo's size: ground that moves less has come to rest
RESTLESS = 0.1  # of the photo's size: what still moves so far after two rounds leads nowhere


@dataclass(frozen=True)
class Registration:
    """Where a photo lies, and on what that rests.

    footprint (4, 2): lat, lon of the photo's bottom-left, top-left, top-right, bottom-right corners, as a viewer shows
    it; longitudes in [-180, 180). By the camera's pose where the nadir is known, else by the homography. rotation:
    compass azimuth of the photo's up at its centre, degrees in [0, 360). inliers of `matches` matches agree with it, in
    the last of so many rounds of refinement. spread: share of the photo that the inliers' hull covers. moved: the last
    round's largest shift of the ground under an inlier, as a share of the photo's size; inf without a round. stretch:
    of one side of a pixel's ground against the other; slant: of the finest scale in the photo to the coarsest; both at
    least 1.
    matcher: its name. homography (3, 3): the photo's pixels, from its upper left corner, to metres of Web Mercator (x
    may lie beyond ±180 degrees). photo_points (inliers, 2) x, y in its pixels and ground_points (inliers, 2) lat, lon:
    ground control points, and the ends of match lines.
    """

    footprint: np.ndarray
    inliers: int
    matches: int
    rounds: int
    rotation: float
    spread: float
    moved: float
    stretch: float
    slant: float
    matcher: str
    homography: np.ndarray
    photo_points: np.ndarray
    ground_points: np.ndarray
    photo_size: tuple[int, int] = (1, 1)  # width, height: of what photo_points are pixels


class Photo:
    """A photo at the size at which it is matched; its features are computed once for each turn that is asked for."""

    def __init__(self, pixels: torch.Tensor, matcher: Matcher) -> None:
        height, width = pixels.shape[1:]
        scale = SIDE / max(height, width)
        self.size = tuple(max(MULTIPLE, round(each * scale / MULTIPLE) * MULTIPLE) for each in (width, height))
        self.scale = np.diag([self.size[0] / width, self.size[1] / height, 1.0])  # the file's pixels -> these
        self.pixels, self.matcher, self.kept = equalise(squash(pixels, self.size)), matcher, {}

    def features(self, rotation: float) -> tuple[object, np.ndarray]:
        """Turned clockwise by so many degrees: north is up where the photo's up has that azimuth. -> the features, and
        (3, 3) the turned photo's pixels to the upright one's."""
        rotation = rotation % 360
        if rotation not in self.kept:
            turned, back = turn(self.pixels, rotation)
            self.kept[rotation] = self.matcher.features(turned), back
        return self.kept[rotation]


def turn(pixels: torch.Tensor, degrees: float) -> tuple[torch.Tensor, np.ndarray]:
    """uint8 (3, H, W) turned clockwise, on black, as large as it needs -> uint8 (3, h, w), and (3, 3) its pixels to
    those of the given. Quarters are exact."""
    height, width = pixels.shape[1:]
    cos, sin = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    size = tuple(int(np.ceil(each - 1e-6)) for each in np.abs([[cos, sin], [sin, cos]]) @ [width, height])
    if degrees % 90:
        size = tuple(-(-each // MULTIPLE) * MULTIPLE for each in size)
    back = np.array([[cos, sin, 0], [-sin, cos, 0], [0, 0, 1.0]])
    back[:2, 2] = np.array([width, height]) / 2 - back[:2, :2] @ np.array(size) / 2
    return warp(pixels, back, size), back


def register(
    photo: torch.Tensor,
    candidates: list[tuple[np.ndarray, float]],
    ground: Ground,
    matcher: Matcher,
    rounds: int = 4,
    nadir: tuple[float, float] | None = None,
    turns: tuple = TURNS,
    confirm: bool = True,
) -> list[Registration | None]:
    """photo: uint8 (3, H, W), as a viewer shows it. candidates: (footprint (4, 2) of a database image, rotation in
    degrees as predict.py gives it: the photo's up is near that azimuth). ground: see retrieval/ground.py. matcher: see
    retrieval/matching.py. nadir: lat, lon of the point below the camera, where it is known. turns: see TURNS; the first
    line alone is fastest. confirm: what is not found again in the ground drawn anew is nothing.

    -> one Registration a candidate, None where nothing plausible was found. Candidates that lead to the same footprint
    share it, and once one is sure those with few matches have none. The same input gives the same output.
    """
    nothing = [None] * len(candidates)
    if min(photo.shape[1:]) < SMALLEST:
        return nothing
    shown = Photo(photo, matcher)
    pictures, starts = {}, [None] * len(candidates)
    for added, count in turns:
        if max((fit.inliers for fit in starts if fit), default=0) >= FEW:
            break
        for k, (footprint, rotation) in enumerate(candidates[:count]):
            for degrees in added:
                found = start(shown, footprint, rotation + degrees, ground, nadir, pictures)
                starts[k] = better(starts[k], found)
    # The surest first, so that those that lead to the same place need not be refined again, and chance ones not at all.
    found, results = [], list(nothing)
    for k in sorted(range(len(candidates)), key=lambda k: -starts[k].inliers if starts[k] else 0):
        sure = max((fit.inliers for fit, _ in found), default=0) >= 3 * FEW
        if starts[k] is None or sure and starts[k].inliers < FEW:
            continue
        area = shapely.Polygon(geo.to_mercator(geo.unwrap_footprints(candidates[k][0]))).area
        same = next((each for fit, each in found if same_place(fit, starts[k], shown.size)), None)
        if same is None:
            fit, done, moved = refine(shown, starts[k], ground, rounds, area, nadir)
            if fit is None and confirm:
                continue
            same = as_registration(shown, fit or starts[k], done, moved, nadir)
            found.append((fit or starts[k], same))
        results[k] = same
    return results


def start(
    shown: Photo, footprint: np.ndarray, rotation: float, ground: Ground, nadir: Point, pictures: dict
) -> Fit | None:
    """The photo, turned by `rotation`, against the candidate's own image -> Fit or None. pictures: what is kept of the
    candidates."""
    corners = geo.to_mercator(geo.unwrap_footprints(footprint))
    box = square(corners)
    if box not in pictures:
        picture = ground(box, SIDE)
        pictures[box] = None if picture is None else shown.matcher.features(equalise(picture))
    if pictures[box] is None:
        return None
    features, back = shown.features(rotation)
    here, there = shown.matcher.match(features, pictures[box], START_POINTS)
    fit = fit_homography(project(back, here), there, pixels_to_metres(box, SIDE))
    if fit is None or not is_plausible(fit, shown.size, shapely.Polygon(corners).area, nadir):
        return None
    return fit


def refine(
    shown: Photo, fit: Fit, ground: Ground, rounds: int, area: float, nadir: Point
) -> tuple[Fit | None, int, float]:
    """-> the Fit after so many rounds or once it rests, the number of rounds, the last shift; (None, …) where the
    ground drawn anew does not confirm it."""
    moved, done = np.inf, 0
    for done in range(1, rounds + 1):
        drawn = draw(fit.homography, shown.size, ground)
        if drawn is None:
            return None, done, np.inf
        picture, to_ground = drawn
        # False starts end in the first round, which need not be dear.
        points = START_POINTS if done == 1 else None
        here, there = shown.matcher.match(shown.features(0)[0], shown.matcher.features(equalise(picture)), points)
        new = fit_homography(here, there, to_ground)
        if new is None or not is_plausible(new, shown.size, area, nadir):
            return None, done, np.inf
        moved = shift(fit, new) / np.sqrt(np.prod(shown.size))
        # A view that is worse than the last one is no reason to give that up.
        fit = new if new.inliers >= 0.8 * fit.inliers or done == 1 else fit
        if done > 1 and (moved < STILL or fit is not new):
            break
    return (fit, done, moved) if done < 2 or moved < RESTLESS else (None, done, np.inf)


def as_registration(shown: Photo, fit: Fit, rounds: int, moved: float, nadir: Point) -> Registration:
    """A fit in the frames of the last round -> the photo's Registration, in pixels of the whole photo and degrees."""
    homography = fit.homography @ shown.scale
    homography = homography / homography[2, 2]
    width, height = shown.size
    to_photo = np.diag(shown.scale)[:2]
    corners = geo.from_mercator(project(fit.homography, corners_of(shown.size)))
    below, middle = geo.from_mercator(project(fit.homography, [[width / 2, height / 2 + 0.5], [width / 2, height / 2]]))
    ground = geo.from_mercator(fit.there)
    for points in (corners, ground):
        points[:, 1] = geo.wrap_longitude(points[:, 1])
    if nadir is not None:
        corners = by_pose(fit, corners, ground, shown.size, nadir)
    return Registration(
        footprint=corners,
        inliers=fit.inliers,
        matches=fit.matches,
        rounds=rounds,
        rotation=azimuth(below, middle),
        spread=spread(fit.here, shown.size),
        moved=float(moved),
        stretch=stretch(homography, np.array(shown.size) / 2 / to_photo),
        slant=slant(fit.homography, corners_of(shown.size)),
        matcher=shown.matcher.name,
        photo_size=tuple((np.array(shown.size) / to_photo).round().astype(int).tolist()),
        homography=homography,
        photo_points=fit.here / to_photo,
        ground_points=ground,
    )


def by_pose(
    fit: Fit, corners: np.ndarray, ground: np.ndarray, size: tuple[int, int], nadir: tuple[float, float]
) -> np.ndarray:
    """The footprint of the camera above the nadir (see retrieval/pose.py), where it fits the inliers about as well as
    the homography does, which has more freedom; else `corners`, the homography's."""
    found = footprint_by_pose(fit.here, ground, size, nadir, corners)
    if found is None:
        return corners
    footprint, off = found
    back = project(np.linalg.inv(fit.homography), fit.there)
    own = np.median(np.linalg.norm(back - fit.here, axis=1))
    return footprint if np.median(off) < 1.3 * own + 0.3 else corners


# ---- pictures ----


def squash(pixels: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """uint8 (3, H, W) -> uint8 (3, height, width) for size (width, height), antialiased."""
    if pixels.shape[1:] == (size[1], size[0]):
        return pixels
    planes = torch.nn.functional.interpolate(pixels[None], (size[1], size[0]), mode="bicubic", antialias=True)
    return planes[0]


def equalise(pixels: torch.Tensor) -> torch.Tensor:
    """uint8 (3, H, W) -> the same with its lightness equalised locally (CLAHE, 8 × 8 cells)."""
    lab = cv2.cvtColor(np.ascontiguousarray(pixels.permute(1, 2, 0).numpy()), cv2.COLOR_RGB2LAB)
    lab[..., 0] = cv2.createCLAHE(CONTRAST, (8, 8)).apply(np.ascontiguousarray(lab[..., 0]))
    return torch.from_numpy(cv2.cvtColor(lab, cv2.COLOR_LAB2RGB)).permute(2, 0, 1).contiguous()


def square(corners: np.ndarray) -> Box:
    """(N, 2) metres -> the smallest square box around them: (west, south, east, north)."""
    low, high = corners.min(axis=0), corners.max(axis=0)
    middle, half = (low + high) / 2, (high - low).max() / 2
    return (*(middle - half), *(middle + half))


def pixels_to_metres(box: Box, size: int) -> np.ndarray:
    """(3, 3): pixels of the north-up picture (size × size) of a box -> metres."""
    west, _, east, north = box
    pixel = (east - west) / size
    return np.array([[pixel, 0, west], [0, -pixel, north], [0, 0, 1.0]])


def draw(homography: np.ndarray, size: tuple[int, int], ground: Ground) -> tuple[torch.Tensor, np.ndarray] | None:
    """The ground as a photo with this homography shows it, with a margin around -> uint8 (3, h, w), and (3, 3) its
    pixels to metres; None where nothing is known of it."""
    for margin in (MARGIN, 0.0):  # beyond the photo there may be the horizon
        width, height = (max(MULTIPLE, round(each * (1 + 2 * margin) / MULTIPLE) * MULTIPLE) for each in size)
        # The view's pixels -> the photo's: the same scale, its middle in the middle.
        to_photo = np.array([[1, 0, (size[0] - width) / 2], [0, 1, (size[1] - height) / 2], [0, 0, 1.0]])
        to_ground = homography @ to_photo
        corners = corners_of((width, height))
        if is_in_front(to_ground, corners) and slant(to_ground, corners) < 2 * MOST_SLANT:
            break
    outline = project(to_ground, corners)
    box = square(outline)
    pixel = np.sqrt(shapely.Polygon(outline).area / (width * height))
    side = int(np.clip(round((box[2] - box[0]) / pixel), 64, LARGEST_VIEW))
    picture = ground(box, side)
    if picture is None:
        return None
    back = np.linalg.inv(pixels_to_metres(box, side)) @ to_ground
    return warp(picture, back, (width, height)), to_ground


def warp(pixels: torch.Tensor, back: np.ndarray, size: tuple[int, int]) -> torch.Tensor:
    """uint8 (3, H, W) -> uint8 (3, height, width) for size (width, height); back (3, 3): its pixels to the given's."""
    # OpenCV counts from the centre of the first pixel.
    half = np.array([[1, 0, 0.5], [0, 1, 0.5], [0, 0, 1.0]])
    back = np.linalg.inv(half) @ back @ half
    picture = np.ascontiguousarray(pixels.permute(1, 2, 0).numpy())
    drawn = cv2.warpPerspective(picture, back, size, flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP)
    return torch.from_numpy(drawn).permute(2, 0, 1).contiguous()
