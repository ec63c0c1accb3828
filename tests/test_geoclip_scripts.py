"""End to end on the tiny world: train, resume, evaluate, predict, several processes, and what goes wrong."""

import csv
import json
import math
import os
import re
import signal
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_resume import differences

import eval_geoclip
import predict_geoclip
import train_geoclip
from datasets.gps import photos_of_dataset
from datasets.photo_batches import Schedule, candidates_of
from datasets.sets import VALIDATION, load_evaluation_data
from experiments import geoclip_demo
from models.config import ModelConfig
from models.earthloc import EarthLoc
from models.weights import save_safetensors
from utils import geo
from utils.arguments import run
from utils.checkpoint import load_checkpoint
from utils.flags import call
from utils.signals import EXIT_CODE

ROOT = Path(__file__).resolve().parent.parent
MODEL = [
    "--image_encoder",
    "resnet18",
    "--weights",
    "none",
    "--cut_after",
    "layer2",
    "--image_size",
    "32",
    "--sigmas",
    "1",
    "16",
]
SYSTEM = ["--num_workers", "0", "--device", "cpu", "--precision", "fp32"]
SHORT = [
    "--iterations",
    "4",
    "--batch_size",
    "8",
    "--queue_size",
    "20",
    "--validate_every",
    "2",
    "--lr",
    "1e-3",
    "--log_dir",
    "g",
]


def arguments(world, *more):
    return train_geoclip.parse_arguments(["--dataset_path", str(world.path), *MODEL, *SYSTEM, *SHORT, *more])


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")


@pytest.fixture(scope="module")
def trained(world, tmp_path_factory):
    """Folder of an undisturbed run of four iterations."""
    with pytest.MonkeyPatch.context() as patch:
        base = tmp_path_factory.mktemp("trained_geoclip")
        patch.chdir(base)
        return base / train_geoclip.main(arguments(world))


def test_a_run_leaves_its_outputs(trained, world):
    there = {file.name for file in trained.iterdir()}
    assert {"info.log", "debug.log", "config.json", "best.pt", "last.pt", "batch.jpg", "done"} <= there
    assert any(name.startswith("events.out.tfevents") for name in there) and not any(".tmp" in name for name in there)
    last = load_checkpoint(trained / "last.pt")
    assert last["iteration"] == 4 and json.loads((trained / "config.json").read_text())["queue_size"] == 20
    centers = photos_of_dataset(world.path).points
    assert len(last["gallery"]) == 24 and len(last["queue"]) == 20
    for point in last["queue"].numpy():
        assert geo.distance_km(point, centers).min() < 1e-6  # real places, noise is added on use only
    assert (trained / "info.log").read_text().count(
        "validation within"
    ) == 3  # before training, and after iterations 2 and 4


def test_scalars_are_finite(trained):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator").EventAccumulator
    events = accumulator(str(trained))
    events.Reload()
    assert {"loss", "hits", "scale", "lr", "validation/accuracy_750_km"} <= set(events.Tags()["scalars"])
    assert 0 < events.Scalars("loss")[0].value < 10


def test_a_resumed_run_ends_with_the_same_bits(world, trained):
    stopped = train_geoclip.main(arguments(world, "--iterations", "3"))
    resumed = train_geoclip.main(arguments(world, "--resume", str(stopped / "last.pt")))
    expected, found = load_checkpoint(trained / "last.pt"), load_checkpoint(resumed / "last.pt")
    assert found["iteration"] == 4 and differences(expected, found) == []
    assert differences(load_checkpoint(stopped / "last.pt")["queue"], found["queue"]) != []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_stops_it_and_auto_goes_on_with_the_same_bits(world, trained, monkeypatch, number):
    def update(run, *rest):
        result = original(run, *rest)
        if run.iteration == 1:
            os.kill(os.getpid(), number)
        return result

    original = train_geoclip.update
    with monkeypatch.context() as patch:
        patch.setattr(train_geoclip, "update", update)
        with pytest.raises(SystemExit) as stopped:
            train_geoclip.main(arguments(world, "--resume", "auto"))
    (folder,) = Path("logs/g").iterdir()
    assert stopped.value.code == EXIT_CODE and "stopped before iteration 2 of 4" in (folder / "info.log").read_text()
    assert load_checkpoint(folder / "last.pt")["iteration"] == 1 and not (folder / "done").exists()
    resumed = train_geoclip.main(arguments(world, "--resume", "auto"))
    for name in ("last.pt", "best.pt"):
        assert differences(load_checkpoint(trained / name), load_checkpoint(resumed / name)) == []


@pytest.fixture
def infinite_gradient(monkeypatch):
    """In iteration 2, the loss is finite and its gradient is not: sqrt has an infinite slope at 0."""

    def update(run, *rest):
        monkeypatch.setattr(
            train_geoclip,
            "gps_cross_entropy",
            lambda logits, *others: (
                original(logits, *others) + ((logits[0, 0] * 0).sqrt() if run.iteration == 2 else 0)
            ),
        )
        return step(run, *rest)

    step, original = train_geoclip.update, train_geoclip.gps_cross_entropy
    monkeypatch.setattr(train_geoclip, "update", update)


def test_a_gradient_that_is_not_finite_overwrites_no_checkpoint(world, infinite_gradient):
    with pytest.raises(RuntimeError, match="iteration 2: the gradient's norm is .*bad_batch_2.pt"):
        train_geoclip.main(arguments(world, "--validate_every", "1"))
    (folder,) = Path("logs/g").iterdir()
    bad = load_checkpoint(folder / "bad_batch_2.pt")["model"]
    assert bad["iteration"] == 2 and bad["views"].shape == (8, 3, 32, 32) and len(bad["paths"]) == 8
    assert all(str(world.path) in path and Path(path).is_file() for path in bad["paths"])
    for name in ("best.pt", "last.pt"):
        state = load_checkpoint(folder / name)
        assert state["iteration"] <= 2 and all(torch.isfinite(value).all() for value in state["model"].values())
    assert load_checkpoint(folder / "last.pt")["iteration"] == 2 and not (folder / "done").exists()


def test_a_skipped_update_leaves_only_a_number_and_the_queue(world, infinite_gradient):
    folder = train_geoclip.main(
        arguments(world, "--iterations", "3", "--save_every", "1", "--max_skips", "1", "--validate_every", "3")
    )
    before, after = load_checkpoint(folder / "previous.pt"), load_checkpoint(folder / "last.pt")
    assert (before["iteration"], after["iteration"]) == (2, 3) and (before["skipped"], after["skipped"]) == (0, 1)
    assert differences(before["model"], after["model"]) == differences(before["optimizer"], after["optimizer"]) == []
    assert torch.equal(before["queue"][8:], after["queue"][:-8])


def test_it_learns_the_tiny_world(world):
    """30 iterations on 24 places: photos of the places themselves are put where they belong."""
    folder = train_geoclip.main(
        arguments(
            world,
            "--iterations",
            "30",
            "--validate_every",
            "30",
            "--augmentation",
            "none",
            "--batch_size",
            "24",
            "--lr",
            "1e-3",
            "--neutral_km",
            "20",
            "--sigmas",
            "64",
        )
    )
    model, gallery = eval_geoclip.load_geoclip(folder / "last.pt")
    photos = photos_of_dataset(world.path)
    embeddings, _ = eval_geoclip.embed_photos(model, photos.paths, progress=False)
    points = gallery.numpy().astype(float)
    with torch.no_grad():
        rows, _ = eval_geoclip.locate(embeddings, model.embed_points(gallery).numpy(), model.scale.item())
    km = geo.distance_km(points[rows[:, 0]], photos.points)
    assert (km < 1).mean() > 0.5  # by chance 1 / 24


def test_evaluation_on_a_dataset(world, trained, tmp_path):
    results = eval_geoclip.main(
        eval_geoclip.parse_arguments(
            ["--resume", str(trained / "best.pt"), "--dataset_path", str(world.path), "--crops", "turns", *SYSTEM]
        )
    )
    (folder,) = (tmp_path / "cwd" / "logs" / "eval_geoclip").iterdir()
    log = (folder / "info.log").read_text()
    rows = list(csv.DictReader(open(folder / "predictions.csv", newline="")))
    km = [
        geo.distance_km(
            (float(row["latitude"]), float(row["longitude"])),
            (float(row["predicted_latitude"]), float(row["predicted_longitude"])),
        )
        for row in rows
    ]
    assert 0 < len(rows) <= 10 and results["photos"] == len(rows)
    assert [float(row["km"]) for row in rows] == pytest.approx(km, abs=0.02)
    for limit in (2500, 750, 200, 25, 1):
        (share,) = re.findall(rf"  Accuracy at {limit} km: (\d+\.\d\d)$", log, re.M)
        assert float(share) == pytest.approx(100 * np.mean(np.array(km) <= limit), abs=0.01)
        assert re.search(rf"Nadir: Accuracy at {limit} km: ", log)
    assert json.loads((folder / "results.json").read_text())["naive"]["Nadir"]["accuracy"]["200"] > 90
    assert (folder / "predictions.jpg").is_file()
    assert len(list((tmp_path / "cwd" / "logs" / "galleries").iterdir())) == 1


def test_validation_is_told_apart_by_the_nadir_alone(world, tmp_path):
    """Positions are all that GeoCLIP needs: no database, no positives."""
    (tmp_path / "queries").symlink_to(world.path / "queries")
    left = {Path(path).name for path in eval_geoclip.queries_of(tmp_path).paths}
    args = train_geoclip.parse_arguments(["--dataset_path", str(world.path)])
    validation = {Path(path).name for path in train_geoclip.load_photos(args)[1].paths}

    def texas_km(name):
        lat, lon = map(math.radians, map(float, name.split("@")[11:13]))
        lat0, lon0 = map(math.radians, (30.0, -95.0))
        cosine = math.sin(lat) * math.sin(lat0) + math.cos(lat) * math.cos(lat0) * math.cos(lon - lon0)
        return 6371 * math.acos(min(1, cosine))

    names = {path.name for path in (world.path / "queries").iterdir()}
    inside = {name for name in names if texas_km(name) <= 500}
    assert 0 < len(inside) < len(names) and validation == inside and left == names - inside


@pytest.fixture
def csv_photos(world, tmp_path):
    """The world's queries in the form of Im2GPS3k: a CSV beside a folder."""
    photos = photos_of_dataset(world.path, "queries")
    with open(tmp_path / "p.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("IMG_ID", "LAT", "LON"))
        writer.writerows((path.name, *point) for path, point in zip(photos.paths, photos.points))
    return tmp_path / "p.csv", world.path / "queries"


def test_train_and_evaluate_on_a_csv(csv_photos, world, tmp_path):
    table, images = csv_photos
    with open(table, "a") as file:
        file.write("lost.jpg,1,2\n")
    flags = ["--train_csv", str(table), "--images", str(images), "--val_csv", str(table), "--val_images", str(images)]
    folder = train_geoclip.main(train_geoclip.parse_arguments([*flags, *MODEL, *SYSTEM, *SHORT, "--iterations", "2"]))
    log = (folder / "info.log").read_text()
    assert "10 training images, 10 validation" in log and "1 of 11 images are not in" in log and "lost.jpg" in log
    gallery = tmp_path / "g.csv"
    gallery.write_text("latitude,longitude\n30,-95\n45,10\n-80,180\n")
    results = eval_geoclip.main(
        eval_geoclip.parse_arguments(
            [
                "--resume",
                str(folder / "last.pt"),
                "--csv",
                str(table),
                "--images",
                str(images),
                "--gallery",
                str(gallery),
                "--cache_dir",
                "none",
                *SYSTEM,
            ]
        )
    )
    assert results["gallery"] == 3 and results["photos"] == 10 and "Nadir" not in results["naive"]


def test_prediction(world, trained, tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    source = next((world.path / "queries").iterdir())
    Image.open(source).save(images / "a.png")
    (images / "broken.jpg").write_bytes(b"no image")
    predictions = predict_geoclip.main(
        predict_geoclip.parse_arguments(
            [str(images), str(source), "--resume", str(trained / "best.pt"), "--top_k", "5", *SYSTEM]
        )
    )
    (folder,) = (tmp_path / "cwd" / "logs" / "predict_geoclip").iterdir()
    assert [each["rank"] for each in predictions] == [1, 2, 3, 4, 5] * 2
    assert json.loads((folder / "predictions.json").read_text()) == predictions
    table = list(csv.DictReader(open(folder / "predictions.csv", newline="")))
    features = json.loads((folder / "predictions.geojson").read_text())["features"]
    for each, row, feature in zip(predictions, table, features, strict=True):
        assert float(row["latitude"]) == each["latitude"] and 0 < each["probability"] < 1
        assert feature["geometry"]["coordinates"] == [each["longitude"], each["latitude"]]
    shares = [each["probability"] for each in predictions[:5]]
    assert shares == sorted(shares, reverse=True)
    log = (folder / "info.log").read_text()
    assert "1 of 3 images could not be read" in log and "broken.jpg: cannot be read" in log
    assert {"map_0000.jpg", "map_0001.jpg"} <= {file.name for file in folder.iterdir()}


def test_photos_are_predicted_as_a_viewer_shows_them(tmp_path, trained):
    shown = Image.effect_noise((60, 40), 90).convert("RGB").resize((300, 200))
    shown.save(tmp_path / "shown.png")
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown a quarter clockwise
    shown.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.png", exif=exif)
    paths = [str(tmp_path / name) for name in ("shown.png", "turned.png")]
    flags = ["--resume", str(trained / "best.pt"), "--top_k", "3", *SYSTEM]
    predictions = predict_geoclip.main(predict_geoclip.parse_arguments([*paths, *flags]))
    without = [{key: value for key, value in each.items() if key != "image"} for each in predictions]
    for one, other in zip(without[:3], without[3:], strict=True):
        assert one == pytest.approx(other, abs=1e-6)


def test_prediction_near_a_place(world, trained):
    query = str(next((world.path / "queries").iterdir()))
    flags = ["--resume", str(trained / "best.pt"), "--top_k", "12", *SYSTEM]
    alps = predict_geoclip.main(
        predict_geoclip.parse_arguments([query, "--near", "45", "10", "--near_km", "800", *flags])
    )
    assert all(geo.distance_km((each["latitude"], each["longitude"]), (45, 10)) < 800 for each in alps)
    assert sum(each["probability"] for each in alps) == pytest.approx(1, abs=1e-4)  # the 12 places of that block


def test_only_broken_images(tmp_path, trained):
    (tmp_path / "x.jpg").write_bytes(b"no image")
    with pytest.raises(ValueError, match="none of the 1 images could be read"):
        predict_geoclip.main(
            predict_geoclip.parse_arguments([str(tmp_path / "x.jpg"), "--resume", str(trained / "best.pt"), *SYSTEM])
        )


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--top_k", "25"], "--top_k 25: must be between 1 and the gallery's 24"),
        (["--near", "95", "0"], "--near, row 1: latitude 95"),
        (["--gallery", "nowhere.csv"], "nowhere.csv: no such CSV"),
        (["--gallery", "grid:1"], "grid of 1 km"),
        (["--resume", "nowhere.pt"], "nowhere.pt: no such weights"),
    ],
)
def test_wrong_flags_of_prediction(world, trained, capsys, flags, message):
    query = str(next((world.path / "queries").iterdir()))
    args = predict_geoclip.parse_arguments([query, "--resume", str(trained / "best.pt"), *SYSTEM, *flags])
    with pytest.raises(SystemExit):
        run(predict_geoclip.main, args)
    (error,) = capsys.readouterr().err.strip().splitlines()[-1:]
    assert error.startswith("error: ") and message in error


def test_unreadable_training_images_take_no_part_and_are_listed(own_world):
    broken = own_world.image(own_world.regions[3])
    broken.unlink()
    broken.write_bytes(b"no image")
    folder = train_geoclip.main(arguments(own_world, "--batch_size", "96", "--iterations", "2"))
    log = (folder / "info.log").read_text()
    assert log.count(f"left out: {broken}") == 1 and "1 training images could not be read" in log
    for region in own_world.regions:
        for year in (2018, 2019, 2020):
            own_world.image(region, year).unlink()
            own_world.image(region, year).write_bytes(b"no image")
    with pytest.raises(ValueError, match="of 96 training images cannot be read"):
        train_geoclip.main(arguments(own_world, "--batch_size", "96", "--iterations", "2"))


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--batch_size", "97"], "at most the 96 training images"),
        (["--train_csv", "x.csv"], "one of the two"),
        (["--resume", "nowhere.pt"], "nowhere.pt"),
    ],
)
def test_wrong_flags_of_training(world, flags, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        train_geoclip.main(arguments(world, *flags))


def test_a_loss_that_is_not_finite_stops_before_the_update(world, tmp_path):
    with pytest.raises(RuntimeError, match="iteration 1: the loss is nan"):
        train_geoclip.main(arguments(world, "--lr", "inf"))
    (folder,) = (tmp_path / "cwd" / "logs" / "g").iterdir()
    assert not (folder / "last.pt").exists()


def test_each_process_gets_its_share_and_all_know_the_whole():
    whole = Schedule(103, 10, 25, seed=1)
    shares = [list(Schedule(103, 10, 25, 1, rank, 2)) for rank in range(2)]
    for iteration, rows in enumerate(whole):
        assert shares[0][iteration] + shares[1][iteration] == rows
        assert rows == Schedule(103, 10, 25, 1, 1, 2).batch(iteration).tolist()
    epochs = [row for rows in list(whole)[:10] for row in rows]
    assert len(set(epochs)) == 100  # an epoch shows an image once
    assert list(Schedule(103, 10, 25, 1, start=7)) == list(whole)[7:]


def test_noise_is_the_same_in_every_process_and_new_each_iteration():
    points, queue = np.zeros((4, 2)), np.full((6, 2), 10.0)
    first = candidates_of(points, queue, 150.0, 1000.0, 0, 3)
    assert np.array_equal(first, candidates_of(points, queue, 150.0, 1000.0, 0, 3))
    assert not np.isclose(first, candidates_of(points, queue, 150.0, 1000.0, 0, 4)).any()
    assert geo.distance_km(first[:4], points).max() < 1 and 0 < geo.distance_km(first[4:], queue).max() < 6


def test_table_beside_earthloc_and_the_nadir(world, trained, tmp_path):
    torch.manual_seed(0)
    earthloc = EarthLoc(ModelConfig("resnet18", "layer1", "none", "gem", 16, 32))
    save_safetensors(earthloc, tmp_path / "earthloc.safetensors", half=False)
    flags = [
        "--geoclip",
        str(trained / "best.pt"),
        "--earthloc",
        str(tmp_path / "earthloc.safetensors"),
        "--dataset_path",
        str(world.path),
        "--num_workers",
        "0",
    ]
    rows = call(geoclip_demo.main, flags)
    data = load_evaluation_data(world.path)
    test = np.setdiff1d(np.arange(10), data.only(VALIDATION).query_rows)
    expected = [geo.distance_km(data.queries.nadirs[row], data.queries.centers[row]) for row in test]
    assert rows["nadir"]["median_km"] == pytest.approx(np.median(expected))
    nearest = [geo.distance_km(data.queries.centers[row], data.database.centers).min() for row in test]
    assert rows["limit: the nearest centre"]["median_km"] == pytest.approx(np.median(nearest))
    assert rows["database image nearest to the nadir"]["recall_at_1"] == 100  # the photos lie at their nadirs
    assert rows["GeoCLIP"]["accuracy"][2500] <= 100 and rows["GeoCLIP"]["median_km"] >= np.median(nearest)
    (folder,) = (tmp_path / "cwd" / "logs" / "geoclip_demo_table").iterdir()
    lines = [line for line in (folder / "info.log").read_text().splitlines() if "| GeoCLIP, within 2500 km" in line]
    assert len(lines) == 1 and set(json.loads((folder / "results.json").read_text())["rows"]) == set(rows)


@pytest.mark.slow
@pytest.mark.skipif(find_spec("transformers") is None, reason="pip install transformers")
def test_two_processes_train_as_one_does(world, tmp_path):
    """torchrun with gloo, a CLIP encoder (no BatchNorm), no augmentation: the same weights and the same queue."""
    import transformers

    torch.manual_seed(0)
    transformers.CLIPVisionModelWithProjection(
        transformers.CLIPVisionConfig(
            hidden_size=16,
            intermediate_size=16,
            num_attention_heads=2,
            num_hidden_layers=1,
            image_size=28,
            patch_size=14,
            projection_dim=24,
        )
    ).save_pretrained(tmp_path / "clip")
    flags = [
        "--dataset_path",
        str(world.path),
        "--image_encoder",
        "clip",
        "--clip",
        str(tmp_path / "clip"),
        "--sigmas",
        "1",
        *SYSTEM,
        *SHORT,
        "--augmentation",
        "none",
        "--validate_every",
        "4",
    ]
    single = train_geoclip.main(train_geoclip.parse_arguments([*flags, "--log_dir", "single"]))
    # Tests may run side by side: --standalone picks a free port.
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        str(ROOT / "train_geoclip.py"),
        *flags,
        "--log_dir",
        "double",
    ]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=200,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    (double,) = Path("logs/double").iterdir()  # one folder: only the first process writes
    expected, found = load_checkpoint(single / "last.pt"), load_checkpoint(double / "last.pt")
    assert torch.equal(found["queue"], expected["queue"])
    for key, value in expected["model"].items():
        # Adam's steps are up to lr long even for gradients of rounding noise; an update here is about 3e-3.
        assert (value - found["model"][key]).abs().mean() < 1e-5, key


@pytest.mark.parametrize("group, alike", [("batch", True), ("image", False)])
def test_what_shares_one_augmentation(group, alike):
    args = train_geoclip.parse_arguments(
        ["--augmentation", group, "--rotation", "30", "--turns", "off", "--flip", "off"]
    )
    image = torch.randint(0, 256, (1, 3, 40, 40), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    augment = train_geoclip.make_augmentation(args, 32)
    views = augment(image.expand(3, 1, -1, -1, -1), torch.Generator().manual_seed(1))[:, 0]
    assert views.shape == (3, 3, 32, 32)
    assert ((views[0] - views[1:]).abs().max() < 1e-6) == alike
