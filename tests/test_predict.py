"""predict.py: from photos to places."""

import csv
import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

import predict
from datasets.evaluation import read_database
from models.config import ModelConfig
from models.earthloc import build_model
from utils.checkpoint import save_checkpoint


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    from dataclasses import asdict

    torch.manual_seed(0)
    config = ModelConfig("resnet18", cut_after="layer1", aggregator="gem", descriptor_dim=32, image_size=32)
    model = build_model(config, "none")
    path = tmp_path_factory.mktemp("model") / "best.pt"
    save_checkpoint(path, {"model": model.state_dict(), "model_config": asdict(model.config)})
    return path


@pytest.fixture
def go(world, checkpoint, tmp_path, monkeypatch):
    """Runs predict.py in an empty folder on the tiny world."""
    monkeypatch.chdir(tmp_path)

    def run(*inputs):
        return predict.main(predict.parse_arguments([*map(str, inputs), "--resume", str(checkpoint), "--dataset_path",
                                                     str(world.path), "--num_workers", "0", "--device", "cpu"]))
    return run


def test_a_database_image_and_its_turned_copy_are_found_at_their_place(go, world, tmp_path):
    database = read_database(world.path)
    row = len(database) // 2
    still = world.path / database.paths[row]
    # A photo whose up is east: the image turned counter-clockwise by 90 degrees.
    with Image.open(still) as image:
        image.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.png")
    shutil.copy(still, tmp_path / "still.jpg")
    predictions = go(tmp_path / "still.jpg", tmp_path / "turned.png", "--top_k", 2)
    assert [(each["image"].rsplit("/")[-1], each["rank"]) for each in predictions] == [
        ("still.jpg", 1), ("still.jpg", 2), ("turned.png", 1), ("turned.png", 2)]
    for first, rotation in ((predictions[0], 0), (predictions[2], 90)):
        assert first["database_image"] == database.paths[row]
        assert first["rotation"] == rotation
        assert first["score"] == pytest.approx(1, abs=1e-3)
        np.testing.assert_allclose((first["latitude"], first["longitude"]), database.centers[row], atol=1e-5)
    for first, second in (predictions[:2], predictions[2:]):
        assert first["database_image"] != second["database_image"]
        assert first["score"] >= second["score"]


def test_files_hold_what_is_returned(go, world, tmp_path):
    database = read_database(world.path)
    predictions = go(world.path / database.paths[0])
    folder, = (tmp_path / "logs" / "predict").iterdir()
    assert json.loads((folder / "predictions.json").read_text()) == predictions
    with open(folder / "predictions.csv", newline="") as file:
        assert [float(each["score"]) for each in csv.DictReader(file)] == [each["score"] for each in predictions]
    collection = json.loads((folder / "predictions.geojson").read_text())
    for feature, prediction in zip(collection["features"], predictions, strict=True):
        ring = np.array(feature["geometry"]["coordinates"][0])
        row = list(database.paths).index(prediction["database_image"])
        assert {tuple(corner) for corner in ring[:, ::-1]} == {tuple(corner) for corner in database.footprints[row]}
        assert (ring[0] == ring[-1]).all()
        # Counter-clockwise: the shoelace formula is positive.
        assert np.sum(ring[:-1, 0] * ring[1:, 1] - ring[1:, 0] * ring[:-1, 1]) > 0
    assert {"predictions.jpg", "map_0000.jpg", "config.json"} <= {each.name for each in folder.iterdir()}


def test_near_leaves_out_what_is_far_and_describes_it_only_when_asked(go, world, capsys):
    database = read_database(world.path)
    lat, lon = database.centers[0]
    predictions = go(world.path / database.paths[-1], "--top_k", 1, "--near", lat, lon, "--near_km", 10)
    assert [each["database_image"] for each in predictions] == [database.paths[0]]
    capsys.readouterr()
    assert go(world.path / database.paths[-1], "--top_k", 1)[0]["database_image"] == database.paths[-1]
    assert f"1 of {len(database)} images are described, {len(database) - 1} are not yet" in capsys.readouterr().out
    capsys.readouterr()
    go(world.path / database.paths[-1])
    assert f"{len(database)} of {len(database)} images are described\n" in capsys.readouterr().out


def test_wrong_input_is_named(go, world, tmp_path):
    photo = world.path / read_database(world.path).paths[0]
    with pytest.raises(FileNotFoundError, match="nowhere.jpg: no such image or folder"):
        go(tmp_path / "nowhere.jpg")
    with pytest.raises(ValueError, match="--near"):
        go(photo, "--near", 95, 0)
    with pytest.raises(ValueError, match="--top_k 3: the database has 0 images within 5 km of 89, 0"):
        go(photo, "--near", 89, 0, "--near_km", 5)
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"no picture")
    with pytest.raises(ValueError, match="none of the 1 images could be read"):
        go(broken)
    assert {each["image"] for each in go(broken, photo)} == {str(photo)}
