"""End to end on the tiny world: train, evaluate, resume, and what goes wrong."""

import csv
import json
import os
import re
import shutil
import signal
from pathlib import Path

import pytest
import torch
from PIL import Image
from test_resume import differences
from torch.optim.optimizer import register_optimizer_step_post_hook

import eval
import train
from datasets.regions import Regions
from losses import LOSSES
from losses.multi_similarity import MultiSimilarityLoss
from utils.arguments import run
from utils.checkpoint import load_checkpoint

MODEL = [
    "--backbone",
    "resnet18",
    "--weights",
    "none",
    "--cut_after",
    "layer2",
    "--aggregator",
    "gem",
    "--descriptor_dim",
    "32",
    "--image_size",
    "32",
]
SYSTEM = ["--num_workers", "0", "--device", "cpu", "--precision", "fp32"]
SHORT = ["--iterations", "4", "--recluster_every", "2", "--batch_size", "4", "--num_clusters", "3", "--log_dir", "t"]
LINE = re.compile(
    r"Recalls on (.{15,}) < (.+) - #q: (\d+); #db: (\d+) >: R@1: (\d+\.\d), R@5: (\d+\.\d), "
    r"R@10: (\d+\.\d), R@20: (\d+\.\d), R@100: (\d+\.\d)$"
)


def arguments(world, *more):
    return train.parse_arguments(["--dataset_path", str(world.path), *MODEL, *SYSTEM, *SHORT, *more])


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")


@pytest.fixture(scope="module")
def trained(world, tmp_path_factory):
    """Folder of an undisturbed run of four iterations."""
    with pytest.MonkeyPatch.context() as patch:
        base = tmp_path_factory.mktemp("trained")
        patch.chdir(base)
        return base / train.main(arguments(world, "--validate_every", "2"))


def parsed_lines(log):
    return [match.groups() for match in map(LINE.search, log.read_text().splitlines()) if match]


def test_a_run_leaves_its_outputs(trained):
    there = {file.name for file in trained.iterdir()}
    assert {
        "info.log",
        "debug.log",
        "config.json",
        "initial.pt",
        "best.pt",
        "last.pt",
        "batch.jpg",
        "clusters.jpg",
        "done",
    } <= there
    assert any(name.startswith("events.out.tfevents") for name in there) and not any(".tmp" in name for name in there)
    last = load_checkpoint(trained / "last.pt")
    assert last["iteration"] == 4 and last["model_config"]["backbone"] == "resnet18"
    initial = load_checkpoint(trained / "initial.pt")["model"]
    assert any(not torch.equal(initial[key], last["model"][key]) for key in initial)
    # Before training, and after iterations 2 and 4.
    assert [line[1] for line in parsed_lines(trained / "info.log")] == ["Texas-validation"] * 3


def test_scalars_are_finite(trained):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator").EventAccumulator
    events = accumulator(str(trained))
    events.Reload()
    assert {"loss", "mined/anchors", "mined/pairs", "lr", "images_per_second", "validation/R@1"} <= set(
        events.Tags()["scalars"]
    )
    (loss,) = events.Scalars("loss")
    assert loss.step == 4 and 0 <= loss.value < 10
    assert [each.step for each in events.Scalars("validation/R@1")] == [0, 2, 4]


def test_evaluation_of_the_trained_model(world, trained, tmp_path):
    args = eval.parse_arguments(["--resume", str(trained / "best.pt"), "--dataset_path", str(world.path), *SYSTEM])
    eval.main(args)
    (folder,) = (tmp_path / "cwd" / "logs" / "eval").iterdir()
    results = json.loads((folder / "results.json").read_text())
    assert {"Texas", "Alps", "Texas-validation"} <= set(results["sets"])
    assert "Texas-validation" not in results["average"]["over"]
    for one in results["sets"].values():
        recalls = list(one["recalls"].values())
        assert 0 < one["queries"] <= 10 and 0 < one["database"] <= 24
        assert recalls == sorted(recalls) and 0 <= recalls[0] and recalls[-1] == 100  # 24 images: R@100 has them all
    average = results["average"]["recalls"]["1"]
    over = results["average"]["over"]
    assert average == pytest.approx(sum(results["sets"][name]["recalls"]["1"] for name in over) / len(over))

    lines = {line[1]: line for line in parsed_lines(folder / "info.log")}
    assert set(results["sets"]) <= set(lines)
    for name, one in results["sets"].items():
        assert lines[name][0].strip() == name and int(lines[name][2]) == one["queries"]
        assert int(lines[name][3]) == one["database"] and float(lines[name][4]) == round(one["recalls"]["1"], 1)

    with open(folder / "predictions.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    texas = [row for row in rows if row["set"] == "Texas" and row["rank"] == "1"]
    assert len(texas) == results["sets"]["Texas"]["queries"]
    assert sum(int(row["correct"]) for row in texas) == round(
        results["sets"]["Texas"]["recalls"]["1"] / 100 * len(texas)
    )
    for row in rows:
        assert (world.path / row["query"]).is_file() and (world.path / row["database_image"]).is_file()
        assert row["rotation"] in {"0", "90", "180", "270"} and -1.001 <= float(row["score"]) <= 1.001
        if row["correct"] == "1":
            assert float(row["km"]) < 600  # regions here are about 300 km wide
    assert (folder / "predictions.jpg").is_file()


def test_evaluation_without_rotations_of_a_fresh_model(world, tmp_path):
    eval.main(eval.parse_arguments(["--dataset_path", str(world.path), "--tta", "none", *MODEL, *SYSTEM]))
    (folder,) = (tmp_path / "cwd" / "logs" / "eval").iterdir()
    results = json.loads((folder / "results.json").read_text())
    assert results["rotations"] == [0] and results["sets"]["Alps"]["orientation"] is None


@pytest.mark.parametrize(
    "flags",
    [
        ["--batches", "random", "--augmentation", "none", "--positives", "views", "--neutral", "off"],
        ["--loss", "contrastive", "--augmentation", "image"],
        ["--augmentation", "batch", "--lr_schedule", "cosine"],
        ["--fc_init", "whitening", "--warmup", "2"],
    ],
)
def test_each_part_has_its_switch(world, flags):
    folder = train.main(arguments(world, "--iterations", "2", "--validate_every", "2", *flags))
    state = load_checkpoint(folder / "last.pt")["model"]
    assert all(torch.isfinite(value.float()).all() for value in state.values())


def test_nan_loss_stops_before_the_update_and_says_when(world, monkeypatch, tmp_path):
    class Breaks(MultiSimilarityLoss):
        calls = 0

        def forward(self, *inputs):
            Breaks.calls += 1
            return super().forward(*inputs) * (float("nan") if Breaks.calls == 3 else 1)

    monkeypatch.setattr(train, "make_loss", lambda *_: Breaks())
    weights = []
    hook = register_optimizer_step_post_hook(
        lambda optimizer, *_: weights.append(
            [each.detach().clone() for group in optimizer.param_groups for each in group["params"]]
        )
    )
    try:
        with pytest.raises(RuntimeError, match="iteration 2: the loss is nan"):
            train.main(arguments(world, "--validate_every", "1"))
    finally:
        hook.remove()
    moved = [[not torch.equal(*pair) for pair in zip(*two)] for two in zip(weights, weights[1:])]
    assert len(weights) == 3 and all(moved[0]) and not any(moved[1])
    (folder,) = (tmp_path / "cwd" / "logs" / "t").iterdir()
    last = load_checkpoint(folder / "last.pt")
    assert last["iteration"] == 2 and all(torch.isfinite(value.float()).all() for value in last["model"].values())


@pytest.mark.parametrize(
    "validate_every, message", [("1", "query descriptors are not finite"), ("2", "iteration 1: the loss is nan")]
)
def test_weights_that_exploded_are_never_saved(world, tmp_path, validate_every, message):
    with pytest.raises((RuntimeError, ValueError), match=message):
        train.main(arguments(world, "--lr", "inf", "--validate_every", validate_every))
    (folder,) = (tmp_path / "cwd" / "logs" / "t").iterdir()
    assert not (folder / "last.pt").exists() and not (folder / "best.pt").exists()


def test_no_data_set_at_the_path(tmp_path, capsys):
    args = train.parse_arguments(["--dataset_path", str(tmp_path / "nowhere"), *MODEL, *SYSTEM, *SHORT])
    with pytest.raises(SystemExit) as stop:
        run(train.main, args)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and str(tmp_path / "nowhere") in error and "--dataset_path" in error


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
@pytest.mark.parametrize("script", [train, eval])
def test_cuda_without_a_cuda_device(world, script):
    args = script.parse_arguments(["--dataset_path", str(world.path), "--device", "cuda"])
    with pytest.raises(ValueError, match="--device cuda.*--device cpu"):
        script.main(args)


def test_a_batch_larger_than_the_world(world):
    with pytest.raises(ValueError, match="24 regions do not fill a batch; --batch_size 24"):
        train.main(arguments(world, "--batch_size", "25"))


def test_weights_alone_cannot_be_resumed(world, trained):
    with pytest.raises(ValueError, match="initial.pt: holds weights only"):
        train.main(arguments(world, "--resume", str(trained / "initial.pt")))


def test_a_region_without_a_year_is_logged_and_the_run_goes_on(own_world):
    own_world.image(own_world.regions[0], 2018).unlink()
    folder = train.main(arguments(own_world, "--iterations", "1"))
    log = (folder / "info.log").read_text()
    assert "23 regions with all years" in log and "{:02d}_{:04d}_{:04d}".format(*own_world.regions[0]) in log


def test_a_data_set_of_satellite_images_alone_is_trained_on(own_world):
    shutil.rmtree(own_world.path / "queries")
    folder = train.main(arguments(own_world))
    log = (folder / "info.log").read_text()
    assert "no photos, so no validation" in log and "Recalls on" not in log
    assert load_checkpoint(folder / "best.pt")["iteration"] == load_checkpoint(folder / "last.pt")["iteration"] == 4


def test_odd_images_are_trained_on_and_broken_ones_named(own_world):
    for region, mode in zip(own_world.regions, ("L", "CMYK", "RGBA")):
        path = own_world.image(region, 2020)
        picture = Image.open(path).resize((50, 70)).convert(mode)
        path.unlink()
        picture.save(path, format="PNG" if mode == "RGBA" else "JPEG")
    train.main(arguments(own_world, "--iterations", "1", "--batch_size", "24"))
    broken = own_world.image(own_world.regions[4], 2020)
    content = broken.read_bytes()
    broken.unlink()
    broken.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=re.escape(broken.name)):
        train.main(arguments(own_world, "--iterations", "1", "--batch_size", "24"))


def test_evaluation_leaves_broken_images_out_and_says_so(own_world, trained, tmp_path):
    broken = own_world.image(own_world.regions[1])
    broken.unlink()
    broken.write_bytes(b"no image")
    eval.main(
        eval.parse_arguments(
            ["--resume", str(trained / "best.pt"), "--dataset_path", str(own_world.path), "--tta", "none", *SYSTEM]
        )
    )
    (folder,) = (tmp_path / "cwd" / "logs" / "eval").iterdir()
    assert f"left out: {own_world.path}" in (folder / "info.log").read_text()
    assert broken.name not in (folder / "predictions.csv").read_text()


@pytest.fixture
def proxy_loss(monkeypatch):
    """The README's class under the README's name."""
    section = (Path(__file__).parents[1] / "README.md").read_text().split("`losses/proxy.py`:")[1]
    space = {}
    exec(section.split("```python\n")[1].split("```")[0], space)
    monkeypatch.setitem(LOSSES, re.search(r'`"(\w+)": ProxyLoss`', section)[1], space["ProxyLoss"])


def test_a_loss_with_weights_of_its_own(world, proxy_loss, monkeypatch):
    """One class and one line in the registry: its setting is a flag; its weights are trained, saved and resumed."""
    seen, real, original = [], train.neutral_pairs, train.update
    stop_at = None

    def update(run, views, labels, neutral, loss_fn, *rest):
        seen[-1] += (labels, loss_fn)
        result = original(run, views, labels, neutral, loss_fn, *rest)
        if run.iteration == stop_at:
            os.kill(os.getpid(), signal.SIGTERM)
        return result

    monkeypatch.setattr(train, "update", update)
    monkeypatch.setattr(train, "neutral_pairs", lambda shown, places: seen.append([shown]) or real(shown, places))
    flags = ("--loss", "proxy", "--temperature", "0.5", "--lr", "0.01", "--log_every", "1")
    folder = train.main(arguments(world, *flags))
    regions, _ = Regions.read(world.path)
    for footprints, labels, loss_fn in seen:  # labels are the regions' rows in the data set
        assert labels.shape == (16,) and loss_fn.temperature == 0.5
        assert (regions.footprints[labels.numpy()] == footprints.repeat(4, axis=0)).all()
    expected = load_checkpoint(folder / "last.pt")
    proxies = expected["loss"]["proxies"]
    assert proxies.shape == (24, 32) and any(
        each.get("exp_avg").shape == (24, 32) and (each["exp_avg"] != 0).all()
        for each in expected["optimizer"]["state"].values()
    )
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator").EventAccumulator(str(folder))
    events.Reload()
    assert "loss" in events.Tags()["scalars"] and "mined/anchors" not in events.Tags()["scalars"]

    stop_at = 3
    with pytest.raises(SystemExit):
        train.main(arguments(world, *flags, "--log_dir", "stopped"))
    stop_at = None
    stopped = load_checkpoint(*Path("logs/stopped").glob("*/last.pt"))
    assert stopped["iteration"] == 3 and differences(stopped["loss"], expected["loss"]) != []
    resumed = train.main(arguments(world, *flags, "--log_dir", "stopped", "--resume", "auto"))
    assert differences(expected, load_checkpoint(resumed / "last.pt")) == []
