"""retrieval/registration.py: photos of a known place, found where they were taken, and what is refused."""

from pathlib import Path

import numpy as np
import pytest
import torch

from datasets.build.camera import Camera, footprint, ground_points
from datasets.images import read_image
from retrieval import registration
from retrieval.homographies import (
    Fit,
    corners_of,
    fit_homography,
    is_plausible,
    is_visible,
    project,
    shift,
    skew,
    slant,
    spread,
    stretch,
)
from retrieval.matching import make_matcher
from retrieval.registration import register, turn
from utils import geo

MOSAIC = Path(__file__).parents[1] / "datasets" / "build" / "blue_marble" / "bmng_5400.jpg"
PIXEL = 1000.0  # metres: the picture below stands for ground of 1 km a pixel
AROUND = 2 * geo.MERCATOR_HALF
AS_GIVEN = (((0,), None),)  # no other turns: quick where nothing is to be found


class Plane:
    """Southern Europe as flat ground, its upper left corner at `corner` metres; unknown beyond it."""

    def __init__(self, corner=(1e6, 5e6)):
        self.pixels = read_image(MOSAIC)[:, 650:1250, 2550:3150].double().numpy()
        self.corner, self.asked = np.array(corner), []

    def at(self, x, y):
        """Metres (h, w) -> (3, h, w) float, bilinear; black outside."""
        column = ((x - self.corner[0] + AROUND / 2) % AROUND - AROUND / 2) / PIXEL - 0.5
        row = (self.corner[1] - y) / PIXEL - 0.5
        known = (column >= 0) & (row >= 0) & (column < 599) & (row < 599)
        column, row = np.where(known, column, 0), np.where(known, row, 0)
        left, top = column.astype(int), row.astype(int)
        right, down = column - left, row - top
        value = sum(
            self.pixels[:, top + b, left + a] * (right if a else 1 - right) * (down if b else 1 - down)
            for a in (0, 1)
            for b in (0, 1)
        )
        return value * known

    def __call__(self, box, size=512):
        self.asked.append(box)
        steps = (np.arange(size) + 0.5) / size
        x, y = np.meshgrid(box[0] + steps * (box[2] - box[0]), box[3] - steps * (box[3] - box[1]))
        picture = self.at(x, y)
        return torch.from_numpy(picture.round().astype(np.uint8)) if picture.any() else None

    def photo(self, homography, size):
        """What a camera sees whose pixels lie at the homography's metres: (3, height, width) uint8."""
        x, y = np.meshgrid(np.arange(size[0]) + 0.5, np.arange(size[1]) + 0.5)
        there = project(homography, np.stack([x, y], axis=-1).reshape(-1, 2)).reshape(*x.shape, 2)
        return torch.from_numpy(self.at(there[..., 0], there[..., 1]).round().astype(np.uint8))

    def candidate(self, left, top, side):
        """Footprint of a square of the picture, in its pixels."""
        west, north = self.corner + np.array([left, -top]) * PIXEL
        east, south = west + side * PIXEL, north - side * PIXEL
        return geo.from_mercator(np.array([[west, south], [west, north], [east, north], [east, south]]))


def homography_at(plane, middle, azimuth, km_per_pixel=0.6, size=(384, 256), tilt=2e-4):
    """A camera over a pixel of the plane's picture whose photo's up points to `azimuth`, leaning a bit."""
    angle = np.radians(azimuth)
    east_of_right, east_of_up = np.cos(angle), np.sin(angle)
    x, y = plane.corner + np.array([middle[0], -middle[1]]) * PIXEL
    scale = km_per_pixel * 1000
    to_middle = np.array([[1, 0, -size[0] / 2], [0, 1, -size[1] / 2], [0, 0, 1.0]])
    lean = np.array([[1, 0, 0], [0, 1, 0], [tilt, 2 * tilt, 1.0]])
    turned = np.array(
        [[scale * east_of_right, -scale * east_of_up, 0], [-scale * east_of_up, -scale * east_of_right, 0], [0, 0, 1]]
    )
    return np.array([[1, 0, x], [0, 1, y], [0, 0, 1.0]]) @ turned @ lean @ to_middle


def pixels_off(found, homography, size):
    """Largest distance of the corners found to the true ones, in the photo's pixels of average ground."""
    true = project(homography, corners_of(size))
    corners = geo.to_mercator(found.footprint)
    corners[:, 0] += np.round((true - corners)[:, 0] / AROUND) * AROUND
    area = 0.5 * abs(np.cross(true[2] - true[0], true[3] - true[1]))
    return np.linalg.norm(corners - true, axis=1).max() / np.sqrt(area / (size[0] * size[1]))


@pytest.fixture(scope="module")
def matcher():
    return make_matcher("sift")


@pytest.fixture(scope="module")
def plane():
    return Plane()


@pytest.mark.parametrize(("azimuth", "quarter"), [(0, 0), (97, 90), (140, 180), (-80, 270)])
def test_a_known_homography_is_found_to_a_pixel(plane, matcher, azimuth, quarter):
    size = (384, 256)
    homography = homography_at(plane, (300, 310), azimuth)
    photo = plane.photo(homography, size)
    (found,) = register(photo, [(plane.candidate(130, 150, 320), quarter)], plane, matcher)
    assert pixels_off(found, homography, size) < 1
    assert abs(geo.wrap_longitude(found.rotation - azimuth)) < 3
    assert found.inliers == len(found.photo_points) == len(found.ground_points) > 100 and found.matcher == "sift"
    assert 1 <= found.rounds <= 4 and found.moved < 0.05 and 0.5 < found.spread <= 1
    assert found.stretch == pytest.approx(stretch(homography, np.array(size) / 2), abs=0.03)
    # What it says of points and homography agrees with the footprint.
    there = geo.from_mercator(project(found.homography, corners_of(size)))
    np.testing.assert_allclose(there, found.footprint, atol=1e-6)
    shown = geo.from_mercator(project(homography, found.photo_points))
    assert geo.distance_km(shown, found.ground_points).max() < 3


def test_a_wrong_quarter_is_put_right(plane, matcher):
    size = (320, 320)
    homography = homography_at(plane, (300, 310), 45, size=size)
    photo = plane.photo(homography, size)
    (found,) = register(photo, [(plane.candidate(130, 150, 320), 180)], plane, matcher)
    assert pixels_off(found, homography, size) < 1


def test_refinement_improves_a_poor_start(plane, matcher):
    """The candidate shows a third of the photo, and that coarsely; what is around comes from the ground."""
    size = (384, 256)
    homography = homography_at(plane, (300, 310), 20, km_per_pixel=1.0)
    photo = plane.photo(homography, size)
    candidates = [(plane.candidate(330, 300, 180), 0)]
    (poor,) = register(photo, candidates, plane, matcher, rounds=0)
    (good,) = register(photo, candidates, plane, matcher, rounds=4)
    assert poor.rounds == 0 and poor.moved == np.inf
    assert pixels_off(good, homography, size) < min(1, pixels_off(poor, homography, size))
    assert good.inliers > 2 * poor.inliers and good.spread > 2 * poor.spread


def test_candidates_of_one_place_share_it_and_others_have_none(plane, matcher):
    homography = homography_at(plane, (300, 310), 10)
    photo = plane.photo(homography, (384, 256))
    candidates = [(plane.candidate(*place), 0) for place in ((0, 0, 90), (130, 150, 320), (150, 170, 300))]
    nowhere = geo.from_mercator(geo.to_mercator(candidates[1][0]) + [4e6, 0])
    none, first, second, unknown = register(photo, [*candidates, (nowhere, 0)], plane, matcher)
    assert none is None and unknown is None and first is second and first.inliers > 100


def test_the_antimeridian_is_no_edge(matcher):
    size = (384, 256)
    here, over = Plane(), Plane((geo.MERCATOR_HALF - 300_000, 5e6))
    results = []
    for plane in (here, over):
        homography = homography_at(plane, (300, 310), 10)
        candidate = plane.candidate(130, 150, 320)
        candidate[:, 1] = geo.wrap_longitude(candidate[:, 1])
        results += register(plane.photo(homography, size), [(candidate, 0)], plane, matcher)
        assert pixels_off(results[-1], homography, size) < 1
    moved = results[1].footprint - results[0].footprint
    assert np.ptp(results[1].footprint[:, 1]) > 300 and np.abs(results[1].footprint[:, 1]).max() <= 180
    shift = np.degrees((over.corner[0] - here.corner[0]) / 6378137)
    assert np.abs(geo.wrap_longitude(moved[:, 1] - shift)).max() < 0.01 and np.abs(moved[:, 0]).max() < 0.01


def test_the_same_input_gives_the_same_bits(plane, matcher):
    photo = plane.photo(homography_at(plane, (300, 310), 30), (384, 256))
    photo = (photo.float() + 25 * torch.randn(photo.shape, generator=torch.Generator().manual_seed(0))).clamp(0, 255)
    candidates = [(plane.candidate(130, 150, 320), 0), (plane.candidate(10, 10, 200), 90)]
    one, other = (register(photo.to(torch.uint8), candidates, plane, matcher, turns=AS_GIVEN) for _ in range(2))
    assert one[0].footprint.tobytes() == other[0].footprint.tobytes() and one[0].matches == other[0].matches
    assert (one[1] is None) == (other[1] is None)


@pytest.mark.parametrize(
    "photo",
    [
        torch.full((3, 200, 300), 60, dtype=torch.uint8),
        torch.full((3, 1, 1), 60, dtype=torch.uint8),
        torch.randint(0, 256, (3, 8, 400), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)),
        torch.randint(0, 256, (3, 200, 300), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)),
    ],
    ids=["sea", "pixel", "strip", "noise"],
)
def test_what_shows_no_ground_is_not_found(plane, matcher, photo):
    assert register(photo, [(plane.candidate(130, 150, 320), 0)] * 2, plane, matcher, turns=AS_GIVEN) == [None, None]
    assert register(photo, [], plane, matcher) == []


# ---- what is refused ----

SIZE = (300, 200)
UPRIGHT = np.array([[500.0, 0, 1e6], [0, -500.0, 5e6], [0, 0, 1]])
AREA = (300 * 500.0) ** 2


def plausible(change, area=AREA, nadir=None):
    """change (3, 3): of the photo's pixels, around its middle."""
    middle = np.array([[1, 0, 150], [0, 1, 100], [0, 0, 1.0]])
    return is_plausible(Fit(UPRIGHT @ middle @ change @ np.linalg.inv(middle), *[None] * 3), SIZE, area, nadir)


def test_implausible_quadrilaterals_are_refused():
    turned = [turn(torch.zeros(3, 4, 4, dtype=torch.uint8), angle)[1].copy() for angle in (0, 37, 90, 200)]
    for each in turned:
        each[:2, 2] = 0
        assert plausible(each)
    for mirrored in (np.diag([-1, 1, 1.0]), np.diag([1, -1, 1.0]), np.array([[0, 1, 0], [1, 0, 0], [0, 0, 1.0]])):
        assert not plausible(mirrored)
    for lean, fine in ((0.001, True), (0.004, True), (0.0058, False), (0.0068, False)):  # the last crosses the horizon
        assert plausible(np.array([[1, 0, 0], [0, 1, 0], [lean, 0, 1.0]])) == fine
    for scale, fine in ((0.08, True), (0.04, False), (3.5, True), (3.8, False)):  # 9 × and 1/400 of the candidate
        assert plausible(np.diag([scale, scale, 1.0])) == fine
    for long, fine in ((2.2, True), (5.5, True), (6.5, False)):
        assert plausible(np.diag([long / 2, 0.5, 1.0])) == fine
    assert not plausible(np.array([[1, 0, 0], [0, 1, 0], [np.nan, 0, 1.0]]))


def test_stretch_and_slant_are_those_of_small_steps():
    homography = UPRIGHT @ np.array([[1.3, 0.2, 5], [0.1, 0.7, 3], [4e-4, 9e-4, 1]])
    step, scales = 1e-3, []
    for corner in [*corners_of(SIZE), np.array(SIZE) / 2]:
        x, y, zero = project(homography, corner + step * np.array([[1, 0], [0, 1], [0, 0]]))
        ground = np.stack([x - zero, y - zero], axis=1) / step
        lengths = np.sqrt(np.linalg.eigvalsh(ground.T @ ground))
        scales.append(np.sqrt(lengths.prod()))
    assert stretch(homography, np.array(SIZE) / 2) == pytest.approx(lengths[1] / lengths[0], rel=1e-4)
    assert slant(homography, corners_of(SIZE)) == pytest.approx(max(scales[:4]) / min(scales[:4]), rel=1e-4)
    square = np.array([[30, 20], [90, 20], [90, 80], [30, 80], [50, 50]])
    assert spread(square, SIZE) == pytest.approx(60 * 60 / (300 * 200))


@pytest.mark.parametrize("tilt", [0, 20, 45, 55])
def test_a_cameras_footprint_is_possible_and_others_are_not(tilt):
    camera = Camera((20.0, 179.0), 415.0, tilt, 75.0, 33.0, 85.0)
    corners = footprint(camera)
    assert skew(corners, camera.nadir) < 1e-6 and is_visible(corners, camera.nadir)
    # Nadirs are rounded to a tenth of a degree, and the altitude is not known.
    assert is_visible(corners, np.array(camera.nadir) + [0.05, -0.05], 400)
    bent = corners.copy()
    bent[0] += 1.5 * (corners[0] - corners[2])
    assert not is_visible(bent, camera.nadir)
    assert not is_visible(corners, (20.0, 150.0))  # 3,000 km away: beyond the horizon


def test_a_nadir_elsewhere_leaves_nothing(plane, matcher):
    homography = homography_at(plane, (300, 310), 10)
    photo, candidates = plane.photo(homography, (384, 256)), [(plane.candidate(130, 150, 320), 0)]
    below = geo.from_mercator(project(homography, [[192, 128]]))[0]
    assert register(photo, candidates, plane, matcher, nadir=tuple(below))[0] is not None
    assert register(photo, candidates, plane, matcher, nadir=(below[0], below[1] + 60), turns=AS_GIVEN) == [None]


def test_turned_pixels_go_back_to_their_place():
    pixels = torch.randint(0, 256, (3, 40, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    for quarter in range(4):
        turned, back = turn(pixels, 90 * quarter)
        assert torch.equal(turned, torch.rot90(pixels, -quarter, (1, 2)))
        rows, columns = np.indices(turned.shape[1:]).reshape(2, -1)
        x, y = (project(back, np.stack([columns + 0.5, rows + 0.5], axis=1)) - 0.5).round().astype(int).T
        assert torch.equal(pixels[:, y, x], turned.reshape(3, -1))
    turned, back = turn(pixels, 45)
    corners = project(np.linalg.inv(back), corners_of((64, 40)))
    assert (corners >= -1e-9).all() and (corners <= [turned.shape[2], turned.shape[1]]).all()
    # A quarter of a turn clockwise, half of it: what was up is now to the upper right.
    up = corners[1:3].mean(axis=0) - corners[[0, 3]].mean(axis=0)
    assert up[0] > 0 > up[1] and up[0] == pytest.approx(-up[1])


def test_what_moves_is_measured_where_the_inliers_are():
    here = np.random.default_rng(0).uniform(20, 60, (30, 2))
    old = Fit(UPRIGHT, here, project(UPRIGHT, here), 30)
    moved = UPRIGHT @ np.array([[1, 0, 3], [0, 1, 4.0], [0, 0, 1]])
    assert shift(old, Fit(moved, here, None, 30)) == pytest.approx(5)
    # A lean about the inliers' middle carries the far corners away, not them.
    middle = np.array([[1, 0, 40], [0, 1, 40], [0, 0, 1.0]])
    leaning = UPRIGHT @ middle @ np.array([[1, 0, 0], [0, 1, 0], [1e-3, 1e-3, 1]]) @ np.linalg.inv(middle)
    far = np.linalg.norm(project(leaning, corners_of(SIZE)) - project(UPRIGHT, corners_of(SIZE)), axis=1).max() / 500
    assert shift(old, Fit(leaning, here, None, 30)) < 2 < 20 < far


def test_the_cameras_pose_takes_the_place_of_a_homography_that_swings():
    camera, size = Camera((20.0, 10.0), 415.0, 35.0, 75.0, 33.0, 120.0), (512, 512)
    rng = np.random.default_rng(0)
    places = rng.uniform(0.6, 0.9, (40, 2))
    here, there = places * size + rng.normal(size=(40, 2)), geo.to_mercator(ground_points(camera, *places.T))
    pixel = 500
    fit = fit_homography(here, there / pixel * [1, -1], np.diag([pixel, -pixel, 1.0]))
    ground = geo.from_mercator(fit.there)
    swung = geo.from_mercator(project(fit.homography, corners_of(size)))
    truth = footprint(camera)
    found = registration.by_pose(fit, swung, ground, size, camera.nadir)
    off, before = (geo.distance_km(each, truth).max() for each in (found, swung))
    assert off < before / 2
    # A crop of a leaning photo, whose axis is elsewhere, fits no camera as well: the homography stays.
    wide = Camera((20.0, 10.0), 415.0, 45.0, 75.0, 180.0, 35.0)
    places = rng.uniform(0, 1, (150, 2))
    there = geo.to_mercator(ground_points(wide, *(0.4 * places.T)))
    middle = there.mean(axis=0)
    to_ground = np.array([[1000, 0, middle[0]], [0, -1000, middle[1]], [0, 0, 1]])
    fit = fit_homography(places * size, (there - middle) / 1000 * [1, -1], to_ground)
    corners = geo.from_mercator(project(fit.homography, corners_of(size)))
    assert registration.by_pose(fit, corners, geo.from_mercator(fit.there), size, wide.nadir) is corners


@pytest.mark.parametrize(("tilt", "focal", "pixels"), [(0, 60, 2), (20, 120, 2), (40, 120, 4)])
def test_photos_of_the_sphere_are_nearly_homographies(tilt, focal, pixels):
    """What a plane leaves out: pixels of 512 between where a camera sees the ground, and the best homography."""
    camera = Camera((30.0, 10.0), 415.0, tilt, 75.0, 33.0, focal)
    u, v = (each.ravel() for each in np.meshgrid(np.linspace(0, 1, 9), np.linspace(0, 1, 9)))
    here, there = np.stack([u, v], axis=1) * 512, geo.to_mercator(ground_points(camera, u, v)) * [1, -1]
    pixel = np.sqrt(np.ptp(there, axis=0).prod()) / 512
    fit = fit_homography(here, there / pixel, np.eye(3))
    off = np.linalg.norm(project(fit.homography, here) - there / pixel, axis=1)
    assert fit.inliers >= 70 and off.max() < pixels


def test_every_candidate_is_tried_in_all_quarters_while_none_is_sure(plane, matcher, monkeypatch):
    """The right one may be the last, and its retrieved quarter wrong."""
    tried = set()

    def start(shown, footprint, rotation, *_):
        tried.add((footprint[0, 0], rotation % 360))

    monkeypatch.setattr(registration, "start", start)
    candidates = [(np.full((4, 2), float(k)), 90 * (k % 4)) for k in range(10)]
    assert register(torch.zeros(3, 64, 64, dtype=torch.uint8), candidates, plane, matcher) == [None] * 10
    assert {(k, quarter) for k in range(10) for quarter in (0, 90, 180, 270)} <= tried
    assert {(k, eighth) for k in range(5) for eighth in (45, 135, 225, 315)} <= tried
