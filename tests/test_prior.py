"""The prior by distance from the nadir: against the public names, and against plain loops."""

import math
import statistics

import numpy as np
import pytest
import torch

from datasets.nadirs import DISTANCE_SHARES, DISTANCES_KM
from experiments import nadir_prior
from models.config import ModelConfig
from models.earthloc import EarthLoc
from models.weights import save_safetensors
from retrieval import earth_index
from retrieval.prior import SPREADS, log_prior, weigh
from utils.flags import call


def cap_km2(km):
    return 2 * math.pi * 6371.0088**2 * (1 - math.cos(km / 6371.0088))


def share_between(near, far, steps=400):
    """Of all photos, by the prior: the density summed over thin rings."""
    total = lambda a, b: sum(
        math.exp(log_prior((low + high) / 2)) * (cap_km2(high) - cap_km2(low))
        for low, high in zip(np.linspace(a, b, steps)[:-1], np.linspace(a, b, steps)[1:])
    )
    return total(near, far) / total(0, 2500)


def test_it_falls_from_the_nadir_outwards_and_no_place_in_reach_is_impossible():
    logs = log_prior(np.arange(0, 2501, 10))
    assert logs[0] == 0 and (np.diff(logs) <= 0).all() and -8 < logs[-1] < -6
    assert log_prior([[0, 5000]]).shape == (1, 2)


@pytest.mark.parametrize("far, share", [(180, 0.2), (323, 0.5), (507, 0.75), (764, 0.95)])
def test_as_many_photos_look_so_far_as_in_the_public_names(far, share):
    """But for one in twenty that looks anywhere, and what straight lines between rings make of it."""
    expected = 0.95 * share + 0.05 * cap_km2(far) / cap_km2(2500)
    assert share_between(0, far) == pytest.approx(expected, abs=0.02)
    assert dict(zip(DISTANCES_KM, DISTANCE_SHARES))[far] == share


def test_weighing_orders_by_score_in_spreads_and_log_prior():
    rng = np.random.default_rng(0)
    scores, rows = rng.normal(0.3, 0.1, size=(3, 40)), np.stack([rng.permutation(60)[:40] for _ in range(3)])
    rotations, logs = rng.choice([0, 90, 180, 270], size=(3, 40)), -rng.uniform(0, 7, size=60)
    found = weigh(scores, rows, rotations, logs, 5)
    changed = 0
    for photo in range(3):
        spread = statistics.pstdev(scores[photo].tolist())
        likely = [score / (SPREADS * spread) + logs[row] for score, row in zip(scores[photo], rows[photo])]
        best = sorted(range(40), key=lambda place: -likely[place])[:5]
        changed += best != sorted(range(40), key=lambda place: -scores[photo][place])[:5]
        for part, whole in zip(found, (scores, rows, rotations)):
            assert part[photo].tolist() == [whole[photo][place] for place in best]
    assert changed == 3


def test_without_weight_the_order_is_the_scores_own_and_few_places_stay_few():
    scores, rows = np.array([[0.9, 0.5, -np.inf]]), np.array([[4, 2, -1]])
    found = weigh(scores, rows, np.zeros((1, 3), int), np.array([0, 0, 0, 0, -50.0]), 9, spreads=0)
    assert found[1].tolist() == [[4, 2, -1]]
    found = weigh(scores, rows, np.zeros((1, 3), int), np.array([0, 0, 0, 0, -50.0]), 9)
    assert found[1].tolist() == [[2, 4, -1]] and found[0].tolist() == [[0.5, 0.9, -np.inf]]
    one = weigh(scores[:, :1], rows[:, :1], np.zeros((1, 1), int), np.full(5, -7.0), 3)
    assert one[1].tolist() == [[4]]


def test_the_surprise_is_that_of_a_plain_sum():
    scores, logs, right = np.array([0.4, 0.1, 0.3, 0.2]), np.array([-1.0, 0.0, -2.0, -0.5]), np.array([1, 0, 1, 0]) > 0
    shares = [math.exp(s / (0.5 * statistics.pstdev(scores.tolist())) + p) for s, p in zip(scores, logs)]
    expected = -math.log((shares[0] + shares[2]) / sum(shares))
    assert nadir_prior.surprise_at(right, scores, logs, 0.5) == pytest.approx(expected)


def test_the_command_prints_a_row_for_each_weight_and_each_distance(world, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    save_safetensors(EarthLoc(ModelConfig("resnet18", "layer2", "none", "gem", 64, 32)), "m.safetensors")
    flags = ["--resume", "m.safetensors", "--dataset_path", str(world.path), "--weights", "0", "0.5", "100"]
    cells = lambda lines: [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    at_one = []
    for error in ("0", "2000"):
        call(nadir_prior.main, [*flags, "--num_workers", "0", "--nadir_error", error])
        first, *table = capsys.readouterr().out.splitlines()
        at = next(row for row, line in enumerate(table) if line.startswith("| km"))
        weights, far = cells(table[1:at]), cells(table[at + 1 :])
        assert first.startswith("10 photos, 24 images") and [row[0] for row in weights] == ["0", "0.5", "100"]
        assert weights[0][4] == "nan" and all(float(row[4]) > 0 for row in weights[1:])
        assert sum(int(row[1]) for row in far) == 10
        mean = sum(int(row[1]) * float(row[2]) for row in far) / 10  # by score alone: the first row, taken apart
        assert mean == pytest.approx(float(weights[0][1]), abs=0.1)
        at_one.append(float(weights[2][1]))
    assert at_one[0] > 90  # by the nadir alone: the tiny world's photos show what lies below
    assert at_one[1] < at_one[0]


def test_an_index_stands_in_for_the_images_and_must_be_theirs(world, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(("m", "other")):
        torch.manual_seed(seed)
        save_safetensors(EarthLoc(ModelConfig("resnet18", "layer2", "none", "gem", 64, 32)), f"{name}.safetensors")
    data = ["--dataset_path", str(world.path), "--num_workers", "0"]
    whole = call(earth_index.main, ["i.safetensors", "--resume", "m.safetensors", *data, "--dim", "64"])
    capsys.readouterr()

    def surprise(*more):
        call(nadir_prior.main, [*data, "--resume", "m.safetensors", "--weights", "0.5", *more])
        return float(capsys.readouterr().out.splitlines()[2].split("|")[5])

    exact = surprise()
    assert surprise("--index", "i.safetensors") == pytest.approx(exact, rel=0.05)
    whole.codes[:] = whole.codes[::-1].copy()  # other regions' descriptors
    whole.save("i.safetensors")
    assert surprise("--index", "i.safetensors") != pytest.approx(exact, rel=0.05)
    with pytest.raises(ValueError, match="i.safetensors: was not made with other.safetensors"):
        call(nadir_prior.main, [*data, "--resume", "other.safetensors", "--index", "i.safetensors"])
    whole.regions[0] += 1
    whole.save("i.safetensors")
    with pytest.raises(ValueError, match="i.safetensors: was not made"):
        surprise("--index", "i.safetensors")
