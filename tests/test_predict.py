"""predict.py: from photos to places."""

import csv
import json
import os
import shutil

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

import predict
from datasets.sets import read_database
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
        return predict.main(
            predict.parse_arguments(
                [
                    *map(str, inputs),
                    "--resume",
                    str(checkpoint),
                    "--dataset_path",
                    str(world.path),
                    "--num_workers",
                    "0",
                    "--device",
                    "cpu",
                ]
            )
        )

    return run


def test_a_database_image_and_its_turned_copy_are_found_at_their_place(go, world, tmp_path):
    database = read_database(world.path)
    row = len(database) // 2
    still = world.path / database.paths[row]
    # A photo whose up is east: the image turned counter-clockwise by 90 degrees.
    with Image.open(still) as image:
        image.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.png")
    shutil.copy(still, tmp_path / "still.jpg")
    # And one that is stored another way than a viewer shows it: its EXIF orientation 6 asks for a quarter clockwise.
    with Image.open(still) as image:
        exif = Image.Exif()
        exif[0x0112] = 6
        image.transpose(Image.Transpose.ROTATE_180).save(tmp_path / "viewed.png", exif=exif)
    with Image.open(tmp_path / "viewed.png") as viewed, Image.open(tmp_path / "turned.png") as turned:
        assert np.array_equal(ImageOps.exif_transpose(viewed), turned)
    predictions = go(tmp_path / "still.jpg", tmp_path / "turned.png", tmp_path / "viewed.png", "--top_k", 2)
    assert [(each["image"].rsplit("/")[-1], each["rank"]) for each in predictions] == [
        ("still.jpg", 1),
        ("still.jpg", 2),
        ("turned.png", 1),
        ("turned.png", 2),
        ("viewed.png", 1),
        ("viewed.png", 2),
    ]
    for first, rotation in ((predictions[0], 0), (predictions[2], 90), (predictions[4], 90)):
        assert first["database_image"] == database.paths[row]
        assert first["rotation"] == rotation
        assert first["score"] == pytest.approx(1, abs=1e-3)
        np.testing.assert_allclose((first["latitude"], first["longitude"]), database.centers[row], atol=1e-5)
    for first, second in (predictions[:2], predictions[2:4], predictions[4:]):
        assert first["database_image"] != second["database_image"]
        assert first["score"] >= second["score"]
    # In the picture, photos and what was found for them look the same: all upright, the image turned as it matched.
    (picture,) = (tmp_path / "logs").rglob("predictions.jpg")
    with Image.open(picture) as image:
        sheet = np.asarray(image, dtype=np.float64)
    for row in range(3):
        photo, found, second = (sheet[26 + 164 * row :, 4 + 164 * column :][:140, :160] for column in range(3))
        assert np.abs(photo - found).mean() < 10 < 20 < np.abs(photo - second).mean()


def test_a_file_name_with_a_stray_byte_is_in_all_files(go, world, tmp_path, capfd):
    photo = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.jpg")
    try:
        shutil.copy(world.path / read_database(world.path).paths[0], photo)
    except OSError:
        pytest.skip("this file system knows no such names")
    assert go(photo, "--top_k", 1)[0]["image"] == photo
    (folder,) = (tmp_path / "logs" / "predict").iterdir()
    assert [each["image"] for each in json.loads((folder / "predictions.json").read_text())] == [photo]
    collection = json.loads((folder / "predictions.geojson").read_text())
    assert [each["properties"]["image"] for each in collection["features"]] == [photo]
    with open(folder / "predictions.csv", newline="", encoding="utf-8") as file:
        assert [each["image"] for each in csv.DictReader(file)] == [f"{tmp_path}/caf\\udce9.jpg"]
    told, failed = capfd.readouterr()
    assert r"caf\udce9.jpg: " in told and r"caf\udce9.jpg: " in (folder / "info.log").read_text()
    assert "Traceback" not in failed and (folder / "map_0000.jpg").exists() and (folder / "predictions.jpg").exists()


def test_files_hold_what_is_returned(go, world, tmp_path):
    database = read_database(world.path)
    predictions = go(world.path / database.paths[0])
    (folder,) = (tmp_path / "logs" / "predict").iterdir()
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
    # Regions overlap by half, so some have the place on their edge or corner: the circle reaches into them.
    boxes = [(each[:, 0].min(), each[:, 0].max(), each[:, 1].min(), each[:, 1].max()) for each in database.footprints]
    shown = [
        row
        for row, (south, north, west, east) in enumerate(boxes)
        if south - 0.01 < lat < north + 0.01 and west - 0.01 < lon < east + 0.01
    ]
    predictions = go(world.path / database.paths[shown[-1]], "--top_k", len(shown), "--near", lat, lon, "--near_km", 2)
    assert 1 < len(shown) < 9 and predictions[0]["database_image"] == database.paths[shown[-1]]
    assert sorted(each["database_image"] for each in predictions) == [database.paths[row] for row in shown]
    with pytest.raises(ValueError, match=f"the database has {len(shown)} images"):
        go(world.path / database.paths[0], "--top_k", len(shown) + 1, "--near", lat, lon, "--near_km", 2)
    capsys.readouterr()
    assert go(world.path / database.paths[-1], "--top_k", 1)[0]["database_image"] == database.paths[-1]
    described = len(shown)
    assert (
        f"{described} of {len(database)} images are described, {len(database) - described} are not yet"
        in capsys.readouterr().out
    )
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
