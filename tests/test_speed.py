"""The speed measurements: what they make and count is right, and each runs on the tiny world."""

import importlib
import re
from argparse import Namespace
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import speed_augmentation, speed_describe, speed_kmeans, speed_search, speed_step
from datasets.sets import load_evaluation_data
from models.config import ModelConfig
from models.earthloc import EarthLoc
from utils.checkpoint import save_checkpoint
from utils.flags import call


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    torch.manual_seed(0)
    model = EarthLoc(ModelConfig("resnet18", aggregator="gem", descriptor_dim=16, image_size=32))
    path = tmp_path_factory.mktemp("model") / "fresh.pt"
    save_checkpoint(path, {"model": model.state_dict(), "model_config": asdict(model.config)})
    return path


def flags(world, checkpoint, tmp_path, *more):
    return ["--dataset_path", str(world.path), "--resume", str(checkpoint), "--device", "cpu", *more]


def test_spread_keeps_the_real_ones_and_stays_near_them(tmp_path):
    rng = np.random.default_rng(0)
    real = speed_search.unit(rng.normal(size=(300, 8)) @ rng.normal(size=(8, 40)) + 0.3 * rng.normal(size=(300, 40)))
    real = real.astype(np.float32)
    made, around = speed_search.spread(real, 2000, tmp_path / "made.npy")
    assert made.dtype == np.float16 and made.shape == (2000, 40) and np.array_equal(around[:300], np.arange(300))
    assert np.abs(made[:300].astype(np.float32) - real).max() < 1e-3
    assert np.linalg.norm(made.astype(np.float32), axis=1) == pytest.approx(np.ones(2000), abs=2e-3)
    products = made[300:].astype(np.float32) @ real.T
    own = products[np.arange(1700), around[300:]]
    neighbour = np.sort(real @ real.T, axis=1)[:, -2][around[300:]]
    # As a rule closer to the one it is around than that one's nearest neighbour is, and never the same.
    assert (own > neighbour).mean() > 0.9 and own.max() < 0.9999
    assert ((products > own[:, None]).sum(axis=1) < speed_search.NEAREST).mean() > 0.99


def test_objective_against_a_plain_loop():
    rng = np.random.default_rng(1)
    points, labels = rng.normal(size=(60, 5)).astype(np.float32), rng.integers(4, size=60)
    expected = np.mean(
        [((point - points[labels == label].mean(axis=0)) ** 2).sum() for point, label in zip(points, labels)]
    )
    assert speed_kmeans.objective(points, labels, block=7) == pytest.approx(expected, rel=1e-5)


def test_plain_description_agrees_with_the_union(world, checkpoint, tmp_path, capsys):
    call(speed_describe.main, flags(world, checkpoint, tmp_path, "--num_workers", "0"))
    text = capsys.readouterr().out
    cosine = float(re.search(r"mean cosine of the two ways' descriptors: ([\d.]+)", text)[1])
    assert cosine > 0.98
    data = load_evaluation_data(world.path)
    views = sum(len(one.query_rows) + 4 * len(one.database_rows) for one in data.sets)
    assert re.search(rf"each set, plain +{views} +{views} ", text)
    assert re.search(
        rf"union once +{len(data.query_rows) + len(data.database_rows)} "
        rf"+{len(data.query_rows) + 4 * len(data.database_rows)} ",
        text,
    )
    assert re.search(r"again, kept +0 +0 ", text)
    assert 0 < float(re.search(r"of the union once, the network itself takes ([\d.]+)%", text)[1]) <= 100


def test_search_and_kmeans_tables(world, checkpoint, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    common = flags(world, checkpoint, tmp_path, "--descriptors", str(tmp_path / "kept"), "--dim", "64")
    call(speed_search.main, [*common, "--rows", "1500", "--singles", "1"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("96 real descriptors, 1500 with those around them")
    rows = {line.split("  ")[0]: line for line in lines[2:]}
    assert all(
        " 0.00 " in rows[name] and rows[name].endswith(" 100.0") for name in rows if name.startswith(("faiss", "exac"))
    )
    assert any(name == "compressed" for name in rows)
    with pytest.raises(ValueError, match="--rows 50: the data set has 96 descriptors"):
        call(speed_search.main, [*common, "--rows", "50"])
    call(speed_kmeans.main, [*common, "--rows", "400", "--num_clusters", "5"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 7 and min(float(line.split()[-1]) for line in lines[2:]) == 0  # against the best, percent


@pytest.mark.parametrize("name", sorted(path.stem for path in Path(speed_step.__file__).parent.glob("[!_]*.py")))
def test_every_benchmark_can_be_imported(name):
    assert importlib.import_module(f"benchmarks.{name}").__doc__


def test_a_training_step_is_measured(capsys):
    args = speed_step.parse_arguments(
        ["--image_size", "32", "--descriptor_dim", "64", "--batch_size", "2", "--repeats", "1", "--device", "cpu"]
    )
    speed_step.main(args)
    rows = {line[:26].strip(): line[26:].split() for line in capsys.readouterr().out.splitlines()}
    for name in ("baseline", "ours", "ours, cached files"):
        parts, total = np.array(rows[name][:3], dtype=float), float(rows[name][3])
        assert (parts >= 0).all() and abs(parts.sum() - total) <= 2
    assert float(rows["baseline"][5]) == 1


def test_the_augmentation_is_measured(capsys):
    speed_augmentation.main(Namespace(image_size=32, batch_size=2, repeats=1, device="cpu"))
    rows = dict(re.findall(r"^(.*?)\s+([\d.]+)$", capsys.readouterr().out, re.MULTILINE))
    for hue in ("0.0", "0.05"):
        times = float(rows[f"chain, hue {hue}"]) / float(rows[f"one warp, hue {hue}"])
        assert float(rows[f"times faster than the chain, hue {hue}:"]) == pytest.approx(times, rel=0.1, abs=0.1)
