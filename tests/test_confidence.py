"""retrieval/confidence.py and the synthetic photos to which it is fitted."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from datasets import grid
from datasets.build.camera import Camera, footprint, project
from datasets.names import Catalogue
from datasets.overlap import share_ground
from experiments import registration as script
from experiments.confidence import (
    SIZE,
    draw_camera,
    draw_candidates,
    fit,
    fit_all,
    held_back,
    kept_rows,
    reliability,
    render,
)
from experiments.registration import corners_off, iou, measure, sides_ratio
from models.config import ModelConfig
from models.earthloc import EarthLoc
from models.weights import save_safetensors
from retrieval.confidence import COEFFICIENTS, FEATURES, VERIFIED, features, probability
from retrieval.locator import Locator
from retrieval.matching import MATCHERS
from retrieval.registration import Registration
from utils import geo
from utils.flags import call


def registration(inliers=120, matches=200, matcher="xfeat", **more):
    corners = np.zeros((4, 2))
    values = dict(rounds=2, rotation=0.0, spread=0.5, moved=0.004, stretch=1.4, slant=1.1, homography=np.eye(3))
    values |= dict(photo_points=np.zeros((inliers, 2)), ground_points=np.zeros((inliers, 2)))
    return Registration(corners, inliers, matches, matcher=matcher, **(values | more))


@pytest.mark.parametrize("matcher", MATCHERS)
def test_more_that_agrees_is_more_probable(matcher):
    few = [probability(registration(n, 2 * n, matcher)) for n in (6, 12, 25, 50, 100, 400)]
    assert few == sorted(few) and len(set(few)) > 3 and 0 <= few[0] and few[-1] <= 1
    shares = [probability(registration(30, 60, matcher, spread=share)) for share in (0.02, 0.1, 0.4, 0.9)]
    assert shares == sorted(shares)
    bent = [probability(registration(30, 60, matcher, slant=slant)) for slant in (8, 4, 2, 1)]
    assert bent == sorted(bent)


@pytest.mark.parametrize("matcher", MATCHERS)
def test_what_chance_brings_is_not_verified_and_a_good_match_is(matcher):
    """False pairs of real photos reach 22 inliers, in a corner of the photo, true ones have up to 358."""
    for inliers, matches, spread in ((8, 41, 0.11), (12, 30, 0.05), (22, 90, 0.1)):
        assert probability(registration(inliers, matches, matcher, spread=spread, slant=2.0, stretch=2.0)) < VERIFIED
    assert probability(registration(200, 300, matcher)) >= VERIFIED
    assert probability(None) == 0


def test_the_probability_is_the_logistic_of_the_features():
    one = registration(50, 115, spread=0.16, stretch=1.5, slant=1.2)
    intercept, *weights = COEFFICIENTS["xfeat"]
    given = [np.log(50), np.log(0.161), np.log(1.5 * 1.2)]
    total = intercept + sum(weight * value for weight, value in zip(weights, given, strict=True))
    assert probability(one) == pytest.approx(1 / (1 + np.exp(-total)))
    assert len(weights) == len(FEATURES) == len(features(one)) and set(COEFFICIENTS) >= set(MATCHERS)
    assert features(replace(one, slant=2.4))[2] - features(one)[2] == pytest.approx(np.log(2))


def test_a_matcher_without_a_fit_gets_the_least_and_is_never_verified():
    for inliers, slant in ((8, 1.0), (20, 1.1), (30, 3.0), (60, 1.5), (90, 6.0)):
        one = registration(inliers, 2 * inliers, slant=slant)
        least = min(probability(replace(one, matcher=name)) for name in MATCHERS)
        assert probability(replace(one, matcher="vismatch:roma")) == pytest.approx(min(least, 0.89))
    sure = registration(2000, 2048)
    assert 0.5 < probability(replace(sure, matcher="vismatch:roma")) < VERIFIED < probability(sure)


def test_fitting_separates_what_is_right():
    rng = np.random.default_rng(0)
    right = rng.uniform(size=400) < 0.3
    rows = rng.normal(size=(400, 4)) + 2 * right[:, None] * [1, 1, 0, 0]
    coefficients, intercept = fit(rows, right)
    chance = 1 / (1 + np.exp(-(rows @ coefficients + intercept)))
    assert ((chance > 0.5) == right).mean() > 0.9 and coefficients[:2].min() > 4 * np.abs(coefficients[2:]).max()


def test_each_matchers_right_ones_are_set_against_all_wrong_ones():
    rng = np.random.default_rng(0)
    good, fair, bad = (rng.normal(level, 0.3, (60, 4)) for level in (3, 1, 0))
    fitted = fit_all({"a": (np.concatenate([good, bad]), np.arange(120) < 60), "b": (fair, np.ones(60, dtype=bool))})
    assert set(fitted) == {"a", "b"}
    for name, rows in (("a", good), ("b", fair)):
        coefficients, intercept = fit(np.concatenate([rows, bad]), np.arange(120) < 60)
        np.testing.assert_allclose(fitted[name], [intercept, *coefficients])
    assert fit_all({"b": (fair, np.ones(60, dtype=bool))}) == {}


def test_each_fold_is_judged_by_a_fit_to_the_others(monkeypatch):
    monkeypatch.setattr("experiments.confidence.FOLDS", 4)
    rng = np.random.default_rng(0)
    found = {}
    for name in "ab":
        right = rng.uniform(size=40) < 0.5
        found[name] = rng.normal(size=(40, 3)) + right[:, None], right
    judged = held_back(found)
    for name in "ab":
        expected = []
        for fold in range(4):
            inside = np.arange(40) // 10 == fold
            rest = fit_all({each: (rows[~inside], right[~inside]) for each, (rows, right) in found.items()})[name]
            for each, (rows, right) in found.items():
                for row, good in zip(rows[inside], right[inside]):
                    if each == name or not good:
                        expected.append((1 / (1 + np.exp(-rest[0] - row @ rest[1:])), good))
        np.testing.assert_allclose(sorted(zip(*judged[name])), sorted(expected))


def test_reliability_counts_both_kinds_alike():
    chance, right = np.array([0.95, 0.6, 0.7, 0.95, 0.02, 0.0]), np.array([1, 1, 0, 0, 0, 0], dtype=bool)
    brier = ((0.05**2 + 0.4**2) / 2 + (0.7**2 + 0.95**2 + 0.02**2) / 4) / 2
    lines = reliability(chance, right, 500)
    assert f"Brier score {brier:.4f}" in lines[0]
    # A right one weighs 1/4, a wrong one 1/8.
    assert "0 to 0.1: 2 registrations, said 0.010, right 0.000" in lines[1]
    assert f"0.5 to 0.9: 2 registrations, said {(0.6 * 2 + 0.7) / 3:.3f}, right {2 / 3:.3f}" in lines[2]
    assert "0.9 to 1: 2 registrations, said 0.950" in lines[3]
    assert [line.strip() for line in lines[4:6]] == [
        "from 0.5: 2 of 2 right ones, 2 wrong of 500 false candidates",
        "from 0.9: 1 of 2 right ones, 1 wrong of 500 false candidates",
    ]


def test_a_fit_goes_on_where_it_stopped(tmp_path):
    asked = []

    def rows_of(photos):
        for number in photos:
            asked.append(number)
            yield [(np.full(3, number + share), number % 2 == 0, True) for share in (0.0, 0.5)][: number % 3]

    path = tmp_path / "kept" / "xfeat.npz"
    kept_rows(path, 3, rows_of)
    features, right, true, photos = kept_rows(path, 7, rows_of)
    assert photos == 7 == kept_rows(path, 5, rows_of)[3]
    assert asked == list(range(7))
    assert features[:, 0].tolist() == [1, 2, 2.5, 4, 5, 5.5] and features.shape == (6, 3)
    assert right.tolist() == [False, True, True, True, False, False] and true.all()
    np.testing.assert_array_equal(kept_rows(None, 7, rows_of)[0], features)
    assert kept_rows(None, 1, rows_of)[0].shape == (0, 3)


class Stripes:
    """Ground whose red is the longitude's tenths of a degree, and green the latitude's."""

    def __call__(self, box, size=512):
        steps = (np.arange(size) + 0.5) / size
        x, y = np.meshgrid(box[0] + steps * (box[2] - box[0]), box[3] - steps * (box[3] - box[1]))
        latlon = geo.from_mercator(np.stack([x, y], axis=-1))
        level = 127 + 100 * np.sin(latlon[..., ::-1] * 2)
        return torch.from_numpy(np.concatenate([level, 0 * level[..., :1]], axis=-1)).permute(2, 0, 1).to(torch.uint8)


def test_a_synthetic_photo_shows_what_its_camera_sees(monkeypatch):
    """The place under a pixel, found by the camera's own projection, has that pixel's colour; weather aside."""
    monkeypatch.setattr("experiments.confidence.haze_opacity", lambda *_: torch.zeros(1))
    monkeypatch.setattr("experiments.confidence.cloud_opacity", lambda *_: torch.zeros(1))
    monkeypatch.setattr("experiments.confidence.expose", lambda photos, strength: photos)
    camera = Camera((30.0, 179.5), 415.0, 30.0, 75.0, 33.0, 120.0)
    ratios = [np.full((180, 360, 3), 0.5, dtype=np.float32)]
    photo = render(camera, Stripes(), ratios, np.random.default_rng(0)).double()
    inside = geo.centers(footprint(camera)) + np.random.default_rng(1).uniform(-0.3, 0.3, (60, 2))
    u, v = project(camera, inside)
    assert photo.shape == (3, SIZE, SIZE) and np.ptp(inside[:, 1]) < 1
    kept = (np.minimum(u, v) > 0.05) & (np.maximum(u, v) < 0.95)
    assert kept.sum() > 10
    for latlon, x, y in zip(inside[kept], u[kept] * SIZE, v[kept] * SIZE):
        around = photo[:2, int(y) - 4 : int(y) + 5, int(x) - 4 : int(x) + 5].mean(dim=(1, 2)).numpy()
        assert np.abs(around - (127 + 100 * np.sin(latlon[::-1] * 2)) / 2).max() < 5


def test_candidates_show_the_photo_or_nothing_of_it(monkeypatch):
    monkeypatch.setattr(grid, "is_land", lambda lat, lon: np.ones(np.broadcast(lat, lon).shape, dtype=bool))
    for seed in range(12):
        rng = np.random.default_rng(seed)
        camera = draw_camera(rng)
        corners = footprint(camera)
        for true in (True, False):
            place, rotation = draw_candidates(camera, rng, true)
            assert share_ground(corners[None], place[None])[0, 0] == true and rotation in (0, 90, 180, 270)


def test_iou_and_sides_of_known_rectangles():
    one = np.array([[0, 179.0], [1, 179.0], [1, -179.5], [0, -179.5]])
    other = np.array([[0, 179.5], [1, 179.5], [1, -179.0], [0, -179.0]])
    assert iou(one, other) == pytest.approx(0.5, abs=1e-6) and iou(one, one) == pytest.approx(1)
    assert iou(one, one + [2, 0]) == 0
    assert sides_ratio(one) == pytest.approx(1.5, rel=1e-3)


def test_corners_are_compared_in_any_order():
    """Names have them in any; moved by 0.1 degrees of latitude all are off by as much."""
    label = np.array([[10, 20.0], [11, 20.2], [11.3, 22.0], [10.1, 21.8]])
    moved = label + [0.1, 0]
    for each in (moved, np.roll(moved, 1, axis=0), moved[::-1], np.roll(moved[::-1], 2, axis=0)):
        assert corners_off(label, each) == pytest.approx(0.1 * np.pi / 180 * geo.EARTH_RADIUS_KM, rel=1e-6)
    assert corners_off(label, moved[[0, 2, 1, 3]]) > 50  # that is no outline


def test_ranks_are_counted_before_and_after_registration():
    square = np.array([[0, 0], [1, 0], [1, 1], [0, 1.0]])
    # Retrieval has the right one second; registered, it comes first with a footprint of its own.
    candidates = [square + [5, 0], square, square + [9, 0]]
    places = [
        SimpleNamespace(score=0.5, footprint=square + 0.5, registration="found", inliers=50),
        SimpleNamespace(score=0.8, footprint=square + [5, 0], registration=None, inliers=9),
        SimpleNamespace(score=0.1, footprint=square + [9, 0], registration=None, inliers=0),
    ]
    found = measure("x", square, places, candidates, 2.0)
    assert found["ranks"] == [2, 1] and found["right"] and found["best"] is places[0] and found["false"] == 9
    assert measure("x", square, places, candidates[::-1], 2.0)["ranks"] == [2, 1]
    assert measure("x", square, places, [square, *candidates], 2.0)["ranks"] == [1, 1]
    assert found["iou"] == pytest.approx(0.25 / 1.75, rel=1e-3)
    elsewhere = measure("x", square + [30, 0], places, candidates, 2.0)
    assert elsewhere["ranks"] == [None, None] and not elsewhere["right"] and elsewhere["iou"] == 0


def test_the_command_tells_the_order_that_retrieval_has(world, tmp_path, monkeypatch, capsys):
    """Near the nadir that is not the order of scores; nothing is registered here, so it is the order after, too."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    save_safetensors(EarthLoc(ModelConfig("resnet18", "layer2", "none", "gem", 64, 32)), "m.safetensors")
    monkeypatch.setattr("retrieval.registration.register", lambda photo, tried, *_, **__: [None] * len(tried))
    flags = ["--resume", "m.safetensors", "--register", "sift", "--candidates", "20", "--device", "cpu"]
    call(script.main, [str(world.path), *flags])
    photos = Catalogue.read(world.path, "queries")
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if line.split()[0] in set(photos.ids)]
    locator = Locator.from_files("m.safetensors", world.path, register="none")
    ranks, by_score = [], []
    for path, nadir, label in zip(photos.paths, photos.nadirs, photos.footprints):
        (places,) = locator([photos.root / path], [tuple(nadir)], 20)
        right = share_ground(label[None], np.array([place.footprint for place in places]))[0]
        ranks.append([1 + int(right.argmax())] * 2 if right.any() else None)
        order = np.argsort([-place.score for place in places], kind="stable")
        by_score.append([1 + int(right[order].argmax())] * 2 if right.any() else None)
    assert [[int(word) for word in line[1:3]] if line[1] != "-" else None for line in lines] == ranks != by_score
