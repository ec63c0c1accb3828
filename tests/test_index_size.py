"""The measure of what a small index loses, against plain loops."""

import numpy as np
import torch

from experiments import index_size
from experiments.index_size import RANKS, nearest
from models.config import ModelConfig
from models.earthloc import EarthLoc
from models.weights import save_safetensors
from utils.flags import call


def test_nearest_ranks_images_by_their_best_turn_among_the_given_rows():
    rng = np.random.default_rng(0)
    count, turns = 90, 4
    vectors = rng.normal(size=(turns * count, 8)).astype(np.float32)
    photo = rng.normal(size=(2, 8)).astype(np.float32)
    rows = np.sort(rng.choice(count, 60, replace=False))
    score = lambda row: max(vectors[row + turn * count] @ one for turn in range(turns) for one in photo)
    expected = sorted(rows, key=score, reverse=True)[: max(RANKS)]
    assert list(nearest(vectors, photo, rows, count)) == expected


def test_nearest_says_minus_one_where_there_are_no_more_images():
    vectors = np.eye(3, dtype=np.float32)
    found = nearest(vectors, vectors[:1], np.array([0, 2]), 3)
    assert set(found[:2]) == {0, 2} and found[0] == 0 and (found[2:] == -1).all()


def test_a_whole_index_loses_nothing_and_a_byte_a_region_most(world, tmp_path, capsys, monkeypatch):
    """On the tiny world, where every photo has right images: the lines, their sizes, and recalls that fall."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    save_safetensors(EarthLoc(ModelConfig("resnet18", "layer2", "none", "gem", 64, 32)), "m.safetensors")
    flags = ["--resume", "m.safetensors", "--dataset_path", str(world.path), "--dims", "64", "1", "--num_workers", "0"]
    call(index_size.main, flags)
    first, *table = capsys.readouterr().out.splitlines()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table if not line.startswith("| descriptors")]
    assert first.startswith("10 photos, 24 images")
    assert [row[:2] for row in rows] == [
        ["float16, images turned", str(64 * 2 * 4)],
        ["float16", str(64 * 2)],
        ["64 values of 8 bits", "64"],
        ["1 values of 8 bits", "1"],
        ["64 values of 4 bits", "32"],
        ["1 values of 4 bits", "1"],
    ]
    recalls = np.array([[float(cell) for cell in row[2:]] for row in rows])
    assert (np.diff(recalls, axis=1) >= 0).all() and (recalls[:, -1] == 100).all()  # 24 images, 50 are looked at
    assert recalls[3].sum() < recalls[2].sum() and recalls[5].sum() < recalls[4].sum()
