"""predict.py: from photos to places."""

import csv
import json
import os
import shutil
import signal
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

import predict
from datasets.names import ImageName
from datasets.sets import read_database
from models.config import ModelConfig
from models.earthloc import build_model
from retrieval import describe
from retrieval.archive import Archive
from utils.checkpoint import save_checkpoint
from utils.signals import EXIT_CODE


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
                    *("--register", "none"),
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


def test_every_feature_says_what_others_rely_on(go, world, tmp_path):
    database = read_database(world.path)
    go(world.path / database.paths[0], "--top_k", 2)
    (folder,) = (tmp_path / "logs" / "predict").iterdir()
    features = json.loads((folder / "predictions.geojson").read_text())["features"]
    names = "image rank score inliers probability verified latitude longitude rotation database_image area_km2"
    for rank, each in enumerate(features, 1):
        place = each["properties"]
        assert set(names.split()) <= set(place) and place["rank"] == rank
        assert (place["inliers"], place["probability"], place["verified"]) == (0, None, False)
        name = ImageName.parse(place["database_image"])
        assert place["area_km2"] == name.area
        np.testing.assert_allclose((place["latitude"], place["longitude"]), name.nadir, atol=0.02)


def test_exports_lie_as_the_photos_do_and_one_failure_costs_nothing(go, world, tmp_path, monkeypatch):
    database = read_database(world.path)
    photos = {"a/one.jpg": 3, "b/one.jpg": 9, "b/one.jpeg": 5}
    for name, row in photos.items():
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(world.path / database.paths[row], tmp_path / "in" / name)

    def fail(*_):
        raise MemoryError

    monkeypatch.setitem(predict.EXPORTS, "kmz", fail)
    go(tmp_path / "in", "--export", "kmz", "geojson", "report", "--output", tmp_path / "out")
    exports = next((tmp_path / "out").rglob("exports"))
    found = {path.relative_to(exports).as_posix() for path in exports.rglob("*") if path.is_file()}
    assert found == {f"in/{name}.{kind}" for name in photos for kind in ("geojson", "report.html")}
    for name, row in photos.items():
        first = json.loads((exports / "in" / f"{name}.geojson").read_text())["features"][0]["properties"]
        assert first["database_image"] == database.paths[row] and first["rank"] == 1
    assert len((tmp_path / "out" / "predictions.csv").read_text().splitlines()) == 1 + 3 * 3


def test_photos_from_elsewhere_are_exported_under_their_whole_path(go, world, tmp_path, monkeypatch):
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    photo = world.path / read_database(world.path).paths[0]
    go(photo, "--export", "geojson")
    (exports,) = Path("logs/predict").glob("*/exports")
    assert (exports / f"{str(photo).lstrip('/')}.geojson").is_file()


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
    for output in (broken, broken / "below"):
        with pytest.raises(ValueError, match=f"--output {output}: cannot be a folder"):
            go(photo, "--output", output)
    with pytest.raises(ValueError, match="none of the 1 images could be read"):
        go(broken)
    assert {each["image"] for each in go(broken, photo)} == {str(photo)}


@pytest.fixture
def photos(world, tmp_path):
    """A folder with ten photos: database images, the odd ones of the first block (Texas), the others of the Alps."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(10):
        region = world.regions[number // 2 + (0 if number % 2 else 12)]
        shutil.copy(world.image(region), folder / f"{number}.jpg")
    return folder


TEXAS, ALPS = (30.0, -95.0), (45.0, 10.0)


def test_a_table_gives_each_photo_its_nadir_and_its_columns_are_kept(go, world, photos, tmp_path, capsys):
    rows = [f"{number}.jpg,{TEXAS[0]},{TEXAS[1]},roll {number},9" for number in range(6)]  # even ones are of the Alps
    table = tmp_path / "nadirs.csv"
    table.write_text("path,nadir_lat,nadir_lon,film,score\n" + "\n".join(rows) + "\n")
    predictions = go(photos, "--nadirs", table, "--top_k", 1)
    assert [Path(each["image"]).name for each in predictions] == [f"{number}.jpg" for number in range(10)]
    for number, each in enumerate(predictions):
        in_texas = each["longitude"] < 0
        assert in_texas == (number < 6 or number % 2 == 1)
        known = TEXAS if number < 6 else (None, None)
        assert (each["nadir_lat"], each["nadir_lon"]) == known
        assert each["film"] == (f"roll {number}" if number < 6 else "") and each["score"] <= 1.001
        assert each["table_score"] == ("9" if number < 6 else "")
    told = capsys.readouterr().out
    assert "nadirs.csv: 4 of 10 photos have no row, such as" in told
    assert "where the nadirs come from: 6 table, 4 none" in told
    near = go(photos, "--nadirs", table, "--near", *ALPS, "--top_k", 1)
    assert [each["longitude"] < 0 for each in near] == [True] * 6 + [False] * 4
    (tmp_path / "swapped.csv").write_text("path,nadir_lat,nadir_lon\n0.jpg,-95,30\n")
    with pytest.raises(ValueError, match="swapped.csv, line 2: nadir_lat is -95.*swapped"):
        go(photos, "--nadirs", tmp_path / "swapped.csv")


def test_a_nadir_with_nothing_in_reach_is_told_and_costs_no_other_photo(go, photos, tmp_path):
    table = tmp_path / "nadirs.csv"
    table.write_text("path,nadir_lat,nadir_lon\n0.jpg,-40,100\n1.jpg,30,-95\n")
    predictions = go(photos, "--nadirs", table, "--top_k", 1)
    assert [Path(each["image"]).name for each in predictions] == [f"{number}.jpg" for number in range(1, 10)]
    (folder,) = (tmp_path / "logs" / "predict").iterdir()
    with open(folder / "failures.csv", newline="") as file:
        (failure,) = csv.DictReader(file)
    assert failure["image"].endswith("0.jpg") and "shows nothing within 2500 km of -40, 100" in failure["why"]


def test_odd_photos_are_located_or_listed_with_why(go, world, tmp_path):
    odd = tmp_path / "odd"
    odd.mkdir()
    still = Image.open(world.image(world.regions[3]))
    still.convert("CMYK").save(odd / "cmyk.jpg")
    still.convert("L").save(odd / "grey.png")
    Image.new("RGB", (1, 1)).save(odd / "one.png")
    Image.new("RGB", (64, 64)).save(odd / "night.png")
    (odd / "text.jpg").write_bytes(b"no picture")
    (odd / "empty.jpg").write_bytes(b"")
    (odd / "cut.jpg").write_bytes(world.image(world.regions[3]).read_bytes()[:700])
    content = bytearray((odd / "night.png").read_bytes())
    content[16:24] = (20_000).to_bytes(4, "big") * 2  # 400 megapixels, says its header
    content[29:33] = zlib.crc32(content[12:29]).to_bytes(4, "big")
    (odd / "huge.png").write_bytes(content)
    predictions = go(odd, "--top_k", 1)
    placed = [Path(each["image"]).name for each in predictions]
    assert {"cmyk.jpg", "grey.png", "night.png"} <= set(placed)
    (folder,) = (tmp_path / "logs" / "predict").iterdir()
    with open(folder / "failures.csv", newline="") as file:
        why = {Path(row["image"]).name: row["why"] for row in csv.DictReader(file)}
    assert sorted(placed + list(why)) == sorted(each.name for each in odd.iterdir())
    assert (
        "1 × 1 pixels, too small" in why["one.png"]
        and "400000000 pixels) exceeds limit of 178956970 pixels: scale it down" in why["huge.png"]
    )
    assert "of no known kind" in why["text.jpg"] and "empty.jpg" in why["empty.jpg"]
    (tmp_path / "nothing").mkdir()
    with pytest.raises(ValueError, match="nothing: no image in this folder"):
        go(tmp_path / "nothing")


# ---- archives ----


def lines(folder):
    return [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]


@pytest.fixture
def archive(go, photos, tmp_path):
    """Runs predict.py in batches of 3 on the ten photos -> its folder."""

    def run(*more, output="out"):
        go(photos, "--output", tmp_path / output, "--top_k", 2, "--batch_size", 3, *more)
        return tmp_path / output

    return run


def test_an_archive_that_was_killed_goes_on_where_it_was(archive, photos, tmp_path, monkeypatch):
    (photos / "broken.jpg").write_bytes(b"no picture")
    whole = archive(output="whole")
    add, read, batches, files = Archive.add, describe.read_image, [], []

    def killed(self, places, failures=()):
        if len(batches) == 2:
            raise KeyboardInterrupt
        batches.append(add(self, places, failures))

    monkeypatch.setattr(Archive, "add", killed)
    with pytest.raises(KeyboardInterrupt):
        archive()
    assert len(lines(tmp_path / "out")) == 2 * 6 and not (tmp_path / "out" / "predictions.json").exists()
    monkeypatch.setattr(Archive, "add", add)
    monkeypatch.setattr(describe, "read_image", lambda path, *more: files.append(path) or read(path, *more))
    folder = archive()
    assert sorted(Path(path).name for path in files) == ["6.jpg", "7.jpg", "8.jpg", "9.jpg", "broken.jpg"]
    for name in ("predictions.jsonl", "predictions.json", "predictions.csv", "predictions.geojson", "failures.csv"):
        assert (folder / name).read_bytes() == (whole / name).read_bytes()
    files.clear()
    archive()  # nothing is left but what could not be read
    assert [Path(path).name for path in files] == ["broken.jpg"]
    shutil.copy(photos / "0.jpg", photos / "new.jpg")
    archive()
    assert len(lines(folder)) == 2 * 11
    with pytest.raises(ValueError, match="made with top_k 2, now it is 1"):
        archive("--top_k", 1)
    assert len(lines(folder)) == 2 * 11


def test_a_signal_ends_it_after_the_batch(archive, tmp_path, monkeypatch):
    add = Archive.add

    def signalled(self, *batch):
        add(self, *batch)
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Archive, "add", signalled)
    with pytest.raises(SystemExit) as stopped:
        archive()
    assert stopped.value.code == EXIT_CODE and len(lines(tmp_path / "out")) == 2 * 3
    monkeypatch.setattr(Archive, "add", add)
    assert len(lines(archive())) == 2 * 10


def test_shards_make_together_what_one_run_makes(archive, tmp_path, monkeypatch, capsys):
    whole = archive(output="whole")
    archive("--shard", "0/3")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "2")
    monkeypatch.setenv("SLURM_ARRAY_TASK_COUNT", "3")
    archive()
    merging = predict.parse_arguments(["--merge", str(tmp_path / "out")])
    with pytest.raises(ValueError, match="not finished: --shard 1/3"):
        predict.main(merging)
    archive("--shard", "1/3")
    predictions = list(predict.main(merging))
    assert predictions == json.loads((whole / "predictions.json").read_text())
    for name in ("predictions.jsonl", "predictions.csv", "predictions.geojson"):
        assert (tmp_path / "out" / name).read_bytes() == (whole / name).read_bytes()
    assert "out: 10 photos, 20 places, 0 failures" in capsys.readouterr().out


def test_more_shards_than_photos_and_a_shard_of_broken_ones(archive, photos, tmp_path):
    for number in range(2, 10):
        (photos / f"{number}.jpg").unlink()
    (photos / "1.jpg").write_bytes(b"no picture")
    for number in range(4):
        archive("--shard", f"{number}/4")
    predictions = list(predict.main(predict.parse_arguments(["--merge", str(tmp_path / "out")])))
    assert [Path(each["image"]).name for each in predictions] == ["0.jpg"] * 2
    assert "1.jpg: cannot be read" in (tmp_path / "out" / "failures.csv").read_text()


def test_a_signal_ends_the_description_of_the_database(archive, tmp_path, monkeypatch):
    read, files = describe.read_image, []

    def signalled(path, *more):
        files.append(path)
        if "database" in str(path) and len(files) == 13:
            os.kill(os.getpid(), signal.SIGTERM)
        return read(path, *more)

    monkeypatch.setattr(describe, "read_image", signalled)
    with pytest.raises(SystemExit) as stopped:
        archive()
    assert stopped.value.code == EXIT_CODE and len(files) == 13 and not lines(tmp_path / "out")
    assert len(lines(archive())) == 2 * 10
    assert len({path for path in files if "database" in str(path)}) == 24


def test_photos_descriptors_can_be_kept(archive, photos, tmp_path, monkeypatch):
    first = archive("--keep_photos")
    read, files = describe.read_image, []
    monkeypatch.setattr(describe, "read_image", lambda path, *more: files.append(path) or read(path, *more))
    kept = {path.name for path in (tmp_path / "logs" / "descriptors").glob("photos_*")}
    assert len(kept) == 2
    before = (first / "predictions.jsonl").read_bytes()
    for name in ("predictions.jsonl", "progress.json"):
        (first / name).unlink()
    (photos / "5.jpg").touch()
    os.utime(photos / "5.jpg", (1, 1))  # it changed
    assert (archive("--keep_photos") / "predictions.jsonl").read_bytes() == before
    assert [Path(path).name for path in files] == ["5.jpg"]


def test_flags_that_do_not_go_together(photos, capsys):
    for argv, told in (
        ([], "photos are needed"),
        ([str(photos), "--resume", "x", "--shard", "0/2"], "--shard needs --output"),
    ):
        with pytest.raises(SystemExit):
            predict.parse_arguments(argv)
        assert told in capsys.readouterr().err


def test_not_a_data_set_and_an_index_at_once(photos, checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = ["--resume", str(checkpoint), "--device", "cpu", "--dataset_path", "data", "--index", "x"]
    with pytest.raises(ValueError, match="--dataset_path and --index: give one"):
        predict.main(predict.parse_arguments([str(photos), *flags]))
