"""The experiments' scripts on the tiny world."""

import json
import statistics
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

import train
from experiments import ablation, curve, demo, export, plain_recall, real_photos, table3
from models.earthloc import load_model
from utils.flags import call

TINY = [
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
    "--num_workers",
    "0",
    "--device",
    "cpu",
    "--precision",
    "fp32",
    "--iterations",
    "1",
    "--batch_size",
    "4",
    "--num_clusters",
    "3",
]


def test_the_demo_ends_with_a_photo_on_a_map(world, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.args").write_text(" ".join([*TINY, "--log_dir", "demo"]))
    monkeypatch.setattr(demo, "PRESET", tmp_path / "tiny.args")
    call(demo.main, ["--dataset_path", str(world.path)])
    lines = capsys.readouterr().out.splitlines()
    (photo,) = (Path(line.split("? ")[1]) for line in lines if line.startswith("Where was this photo taken?"))
    assert photo.is_file() and photo.parent == world.path / "queries"
    (folder,) = (tmp_path / "logs" / "demo").iterdir()
    (told,) = (line for line in lines if line.startswith("Map: "))
    assert f"logs/demo/{folder.name}/located_map.jpg " in told and (folder / "located_map.jpg").is_file()
    features = json.loads((tmp_path / told.split()[-1]).read_text())["features"]
    (place,) = (line for line in lines if line.startswith("At "))
    first = features[0]["properties"]
    assert first["image"] == str(photo) and place.startswith(f"At {first['latitude']:.1f} {first['longitude']:.1f}, ")


def test_the_surest_photo_is_the_one_with_the_highest_first_score(tmp_path):
    (tmp_path / "table.csv").write_text("query,rank,score\na,1,0.5\nb,1,0.75\nb,2,0.7\nc,2,0.9\nd,1,0.625\n")
    assert demo.surest(tmp_path / "table.csv") == "b"


def test_table3_trains_what_it_says_and_prints_it_beside_the_paper(world, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    argv = ["--rows", "views", "all", "--seeds", "0", "1", "--rotate", "queries"]
    argv += ["--dataset_path", str(world.path), *TINY]
    call(table3.main, argv)
    lines = capsys.readouterr().out.splitlines()
    views, everything = [line.split("|") for line in lines if line.startswith(("| views", "| everything"))]
    assert views[5].strip() == "26.2" and everything[6].strip() == "88.9"
    means = []
    for seed in (0, 1):
        (results,) = (tmp_path / "logs" / "table3" / f"all_{seed}_eval").glob("*/results.json")
        means.append(json.loads(results.read_text())["average"]["recalls"]["1"])
        assert json.loads(results.with_name("config.json").read_text())["rotate"] == "queries"
        (config,) = (tmp_path / "logs" / "table3" / f"views_{seed}").glob("*/config.json")
        assert '"positives": "views"' in config.read_text() and f'"seed": {seed}' in config.read_text()
    assert float(everything[2].split("±")[0]) == pytest.approx(sum(means) / 2, abs=0.051)

    # Again: nothing is trained twice.
    monkeypatch.setattr(table3.train, "main", None)
    call(table3.main, argv)
    assert capsys.readouterr().out.splitlines()[-1].startswith("| everything")


def test_table3_refuses_a_wrong_flag_before_training(capsys):
    with pytest.raises(SystemExit):
        call(table3.main, ["--seeds", "0", "--no_such_flag", "1"])
    assert "--no_such_flag" in capsys.readouterr().err


def test_an_ablation_compares_each_change_with_the_recipe_of_the_same_seed(world, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    argv = ["--change", "loss=circle gamma=40", "--seeds", "0", "1", "--dataset_path", str(world.path), *TINY]
    call(ablation.main, argv)
    rows = [[cell.strip() for cell in line.split("|")] for line in capsys.readouterr().out.splitlines()]
    rows = {row[1]: row for row in rows if len(row) > 2}

    def results(name, k):
        found = [(tmp_path / "logs" / "ablation" / f"{name}_{seed}_eval").glob("*/results.json") for seed in (0, 1)]
        return [json.loads(file.read_text())["average"]["recalls"][k] for each in found for file in each]

    for seed in (0, 1):
        (config,) = (tmp_path / "logs" / "ablation" / f"loss=circle_gamma=40_{seed}").glob("*/config.json")
        told = json.loads(config.read_text())
        assert (told["loss"], told["gamma"], told["seed"]) == ("circle", 40, seed)
    for title, name in (("as it is", "as_it_is"), ("loss=circle gamma=40", "loss=circle_gamma=40")):
        for column, k in ((2, "1"), (3, "10"), (4, "100")):
            mean, deviation = map(float, rows[title][column].split(" ± "))
            assert mean == pytest.approx(statistics.mean(results(name, k)), abs=0.051)
            assert deviation == pytest.approx(statistics.stdev(results(name, k)), abs=0.051)
    more = [b - a for a, b in zip(results("as_it_is", "1"), results("loss=circle_gamma=40", "1"), strict=True)]
    told = list(map(float, rows["loss=circle gamma=40"][5].split(" ± ")))
    assert told == pytest.approx([statistics.mean(more), statistics.stdev(more)], abs=0.051)


@pytest.mark.parametrize("given, told", (("no_such_flag=1", "--no_such_flag"), ("loss", "NAME=VALUE")))
def test_an_ablation_refuses_a_wrong_change_before_training(given, told, capsys):
    with pytest.raises(SystemExit):
        call(ablation.main, ["--change", "batch_size=8", given])
    assert told in capsys.readouterr().err


def test_a_curve_of_the_kept_checkpoints_and_an_export_of_the_last(world, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    folder = train.main(
        train.parse_arguments(
            [
                "--dataset_path",
                str(world.path),
                *TINY,
                "--iterations",
                "4",
                "--validate_every",
                "4",
                "--keep_every",
                "2",
            ]
        )
    )
    flags = [str(folder), "--dataset_path", str(world.path), "--device", "cpu", "--num_workers", "0"]
    call(curve.main, flags)
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ") and line[2].isdigit()]
    assert [row.split("|")[1].strip() for row in rows] == ["0", "2", "4"]
    assert (folder / "curve.png").is_file()
    monkeypatch.setattr(curve, "evaluate", None)  # again: read, not evaluated
    call(curve.main, flags)
    assert capsys.readouterr().out.count("| 4 |") == 1

    call(export.main, [str(folder / "last.pt"), "small.safetensors"])
    whole, small = load_model(folder / "last.pt"), load_model("small.safetensors")
    assert small.config == whole.config
    for key, value in whole.state_dict().items():
        assert (small.state_dict()[key].float() - value.float()).abs().max() <= 1e-3 * value.float().abs().max() + 1e-6
    assert (tmp_path / "small.safetensors").stat().st_size < 0.8 * (folder / "initial.pt").stat().st_size


def test_a_curve_of_a_run_that_kept_nothing(tmp_path):
    with pytest.raises(ValueError, match="--keep_every"):
        call(curve.main, [str(tmp_path), "--dataset_path", "nowhere", "--device", "cpu"])


def test_plain_and_fast_runs_take_the_same_draws(world, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    argv = ["--dataset_path", str(world.path), *TINY, "--hue", "0.05"]
    call(plain_recall.main, argv)
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [line[:2] for line in lines[-4:]] == [["plain", "0"], ["fast", "0"], ["plain", "mean"], ["fast", "mean"]]
    assert [line[2:] for line in lines[-4:-2]] == [line[2:] for line in lines[-2:]]
    # Nearly the same first batch, and so nearly the same loss; other draws would be far off.
    images = torch.randint(0, 256, (2, 4, 3, 80, 80), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    smooth = F.avg_pool2d(images.flatten(0, 1).float(), 9, 1, 4).byte().unflatten(0, (2, 4))

    def views(way, seed=0):
        return plain_recall.year_wise(32, (0.5, 0.5, 0.5, 0.05), way)(smooth, torch.Generator().manual_seed(seed))

    plain, fast = views(plain_recall.one_by_one), views(plain_recall.at_once)
    assert (plain - fast).abs().mean() < 0.01 < (plain - views(plain_recall.at_once, 1)).abs().mean() / 3


def test_real_photos_are_looked_for_among_the_images_and_on_earth(world, tmp_path, capsys, monkeypatch):
    """A model that tells the tiny world's regions apart by their mean colours: each photo is found at once."""
    from datasets.names import Catalogue
    from models.config import ModelConfig
    from models.earthloc import EarthLoc
    from models.weights import save_safetensors
    from retrieval import earth_index

    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    save_safetensors(EarthLoc(ModelConfig("resnet18", "layer2", "none", "gem", 64, 32)), "m.safetensors")
    common = ["--resume", "m.safetensors", "--dataset_path", str(world.path)]
    call(earth_index.main, ["i.safetensors", *common, "--dim", "32", "--bits", "8", "--num_workers", "0"])
    call(real_photos.main, [*common, "--index", "i.safetensors"])
    lines = capsys.readouterr().out.splitlines()
    assert "10 of 10 photos have a right image among 24" in lines
    recalls = [float(cell) for cell in next(line for line in lines if "m.safetensors |" in line).split("|")[2:6]]
    assert recalls == sorted(recalls) and 0 <= recalls[0] <= recalls[3] == 100  # 20 of 24 images, 9 right each
    near, by_prior, world_wide = (lines[-1].split("|")[column] for column in (2, 4, 6))
    photos = Catalogue.read(world.path, "queries")
    assert len(near.split()) == len(world_wide.split()) == (photos.areas >= 2000).sum()
    assert sum(map(int, by_prior.split())) < sum(map(int, near.split()))  # they show what lies below them
    assert all(1 <= int(rank) <= 24 for rank in near.split())
    assert all(int(a) <= int(b) for a, b in zip(near.split(), world_wide.split()))
    save_safetensors(EarthLoc(ModelConfig("resnet18", "layer2", "none", "gem", 64, 32)), "other.safetensors")
    with pytest.raises(ValueError, match="i.safetensors: was not made with other.safetensors"):
        call(real_photos.main, [*common[2:], "--resume", "other.safetensors", "--index", "i.safetensors"])
    with pytest.raises(ValueError, match="--index: 2 for 1 weights"):
        call(
            real_photos.main,
            [*common[2:], "--resume", "other.safetensors", "--index", "i.safetensors", "i.safetensors"],
        )


def test_milvus_beside_faiss_and_a_file_into_it_and_back(tmp_path, capsys, monkeypatch):
    pytest.importorskip("milvus_lite")
    import numpy as np

    from datasets import grid
    from experiments import milvus
    from retrieval.earth_index import compress

    monkeypatch.setattr(milvus, "alone", lambda work, *values: work(*values))  # processes would take minutes to start
    regions = np.array([(8, row, col) for row in range(60, 140, 2) for col in range(0, 60, 2)])
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(len(regions), 12)) @ rng.normal(size=(12, 16)) + 0.3 * rng.normal(
        size=(len(regions), 16)
    )
    compress(regions, vectors.astype(np.float32), 16, "x").save(tmp_path / "i.safetensors")
    argv = ["--index", str(tmp_path / "i.safetensors"), "--rows", "600", "--queries", "40", "--keys", "flat", "sq8"]
    table = call(milvus.main, [*argv, "--near_km", "1500"])
    assert len(grid.footprints(regions)) == 1200 and [row["way"] for row in table][3:] == ["milvus flat", "milvus sq8"]
    flat, exact, sq8 = table[0], table[3], table[4]
    assert flat["recall1"] == flat["recall10"] == exact["recall1"] == exact["recall10"] == exact["near_recall"] == 100
    assert sq8["recall10"] > 50 and flat["memory"] == pytest.approx(4 * 16, abs=1) and exact["disk"] > 2 * 16
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len(lines) == 7 and all(line.count("|") == 12 for line in lines)
