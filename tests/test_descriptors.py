"""Descriptors kept on disk: described once, safe against kills, changed files, other models and broken files."""

import json
import logging
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import eval as evaluation_script
from utils import descriptors, retrieval

COMMON = dict(image_size=16, batch_size=2, progress=False, rotations=(0, 90))


class Counting(torch.nn.Module):
    """Mean colour of the four quadrants through a matrix; counts images, and fails at one of them if asked to."""

    def __init__(self, seed=0, fail_after=None):
        super().__init__()
        self.fc = torch.nn.Linear(12, 6)
        torch.nn.init.normal_(self.fc.weight, generator=torch.Generator().manual_seed(seed))
        torch.nn.init.zeros_(self.fc.bias)
        self.images, self.fail_after = 0, fail_after

    def forward(self, images):
        if self.fail_after is not None and self.images >= self.fail_after:
            raise RuntimeError("out of memory")
        self.images += len(images)
        return torch.nn.functional.normalize(self.fc(torch.nn.functional.adaptive_avg_pool2d(images, 2).flatten(1)))


@pytest.fixture
def root(tmp_path):
    """A data set of nine images; the one called 5.png is none."""
    folder = tmp_path / "data"
    folder.mkdir()
    for i in range(9):
        pixels = np.kron(np.random.default_rng(i).integers(0, 256, (2, 2, 3)), np.ones((8, 8, 1))).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    (folder / "5.png").write_bytes(b"not an image")
    return folder


def paths(count=9):
    return [f"{i}.png" for i in range(count)]


def plain(root, names, model=None):
    return retrieval.describe(model or Counting(), [root / name for name in names], **COMMON)[0]


def keep(root, names, model, folder=None, **more):
    values, failures = retrieval.describe_kept(folder or root.parent / "kept", model, root, names, **COMMON, **more)
    return np.array(values), [row for row, _ in failures]


def stored(root):
    return sorted((root.parent / "kept").iterdir())


def same(kept, expected):
    """float16 of the same numbers, NaN where the other is NaN."""
    return np.array_equal(kept, expected.astype(np.float16), equal_nan=True)


ONE = 1 * 1  # the model sees one blank image to learn its dimension


def test_kept_is_float16_of_what_describe_returns_and_nothing_is_described_twice(root):
    model = Counting().train()
    first, failed = keep(root, paths(), model)
    assert same(first, plain(root, paths())) and failed == [5] and np.isnan(first[:, 5]).all()
    assert model.images == ONE + 2 * 9 and model.training
    again = Counting()
    second, failed = keep(root, paths(), again)
    assert np.array_equal(first, second, equal_nan=True) and failed == [5]
    assert again.images == ONE + 2 * 1  # the broken image is tried again, no other
    header = json.loads(stored(root)[0].open("rb").read(4096))
    assert header["images"] == 9 and header["dim"] == 6 and header["layers"] == 2


def test_a_run_that_fails_in_the_middle_goes_on_where_it_was(root):
    names = [name for name in paths() if name != "5.png"]
    with pytest.raises(RuntimeError, match="out of memory"):
        keep(root, names, Counting(fail_after=ONE + 2 * 4))
    model = Counting()
    values, _ = keep(root, names, model)
    assert same(values, plain(root, names)) and model.images == ONE + 2 * 4


KILLED = """
import os, signal, sys, time, torch
sys.path.insert(0, os.getcwd())
from tests.test_descriptors import COMMON, Counting, paths
from utils import retrieval
class Dies(Counting):
    def forward(self, images):
        if self.images >= 1 + 2 * 6:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().forward(images)
retrieval.describe_kept(sys.argv[2], Dies(), sys.argv[1], paths(), **COMMON, commit_every=0)
"""


def test_a_killed_run_goes_on_where_it_was(root):
    folder = root.parent / "kept"
    code = subprocess.run([sys.executable, "-c", KILLED, root, folder], capture_output=True, text=True)
    assert code.returncode == -signal.SIGKILL, code.stderr
    (name,) = folder.iterdir()
    # The class's name is in the fingerprint: this test's model is to find the killed one's file.
    model = type("Dies", (Counting,), {})()
    values, _ = keep(root, paths(), model)
    assert [each.name for each in folder.iterdir()] == [name.name]
    assert same(values, plain(root, paths())) and model.images == ONE + 2 * 4  # 0 … 4 were kept, 5 is no image


def test_descriptors_without_their_mark_or_with_another_checksum_are_not_trusted(root):
    names = paths(5)
    first, _ = keep(root, names, Counting())
    (path,) = stored(root)
    file = descriptors.DescriptorFile(path, descriptors.image_fingerprints(root, names), (2, 5, 6))
    file.values[1, 3, 2] += 1  # a bit that flipped
    file.marks["image"][0] = 0  # killed between the descriptors and their mark
    file.values.flush(), file.marks.flush()
    model = Counting()
    second, _ = keep(root, names, model)
    assert np.array_equal(first, second) and model.images == ONE + 2 * 2


def test_a_changed_image_is_described_anew_with_a_line(root, caplog):
    caplog.set_level(logging.INFO)
    keep(root, paths(5), Counting())
    Image.new("RGB", (16, 16), (200, 10, 10)).save(root / "2.png")
    os.utime(root / "3.png", (1, 1))
    model = Counting()
    values, _ = keep(root, paths(5), model)
    assert same(values, plain(root, paths(5))) and model.images == ONE + 2 * 2
    assert "3 of 5 images are described, 2 entries are stale" in caplog.text


def test_images_that_come_and_go_leave_the_others_kept(root):
    keep(root, ["0.png", "1.png", "2.png", "3.png"], Counting())
    model = Counting()
    names = ["3.png", "1.png", "7.png", "2.png", "8.png"]
    values, _ = keep(root, names, model)
    assert same(values, plain(root, names)) and model.images == ONE + 2 * 2
    assert len(stored(root)) == 1


def test_another_model_has_another_file(root):
    keep(root, paths(4), Counting(seed=0))
    other = Counting(seed=1)
    values, _ = keep(root, paths(4), other)
    assert same(values, plain(root, paths(4), Counting(seed=1))) and other.images == ONE + 2 * 4
    assert len(stored(root)) == 2


def test_the_fingerprint_counts_all_that_changes_a_descriptor():
    model, changed = Counting(), Counting()
    changed.fc.bias.data[3] = 1e-7
    buffered = Counting()
    buffered.register_buffer("mean", torch.zeros(1), persistent=False)
    prints = [descriptors.model_fingerprint(*each) for each in (
        (model, 16, "fp32", (0,)), (changed, 16, "fp32", (0,)), (buffered, 16, "fp32", (0,)),
        (model, 32, "fp32", (0,)), (model, 16, "bf16", (0,)), (model, 16, "fp32", (0, 90)))]
    assert len(set(prints)) == len(prints)
    assert descriptors.model_fingerprint(Counting(), 16, "fp32", (0,)) == prints[0]
    assert descriptors.model_fingerprint(Counting().bfloat16(), 16, "fp32", (0,)) != prints[0]


@pytest.mark.parametrize("damage", ["truncated", "garbage", "empty", "other model"])
def test_a_broken_file_is_described_anew_with_a_line(root, damage, caplog):
    caplog.set_level(logging.INFO)
    first, _ = keep(root, paths(4), Counting())
    (path,) = stored(root)
    whole = path.read_bytes()
    header = json.loads(whole[:4096])
    path.write_bytes({"truncated": whole[:-3], "garbage": b"\xff" * len(whole), "empty": b"", "other model":
                      json.dumps({**header, "model": "0" * 64}).encode().ljust(4096) + whole[4096:]}[damage])
    model = Counting()
    second, _ = keep(root, paths(4), model)
    assert np.array_equal(first, second) and model.images == ONE + 2 * 4
    assert "described anew" in caplog.text


def test_no_images_and_no_room(root, monkeypatch):
    values, failed = keep(root, [], Counting())
    assert values.shape == (2, 0, 6) and not failed
    (root.parent / "file").touch()
    with pytest.raises(ValueError, match="file: is a file or lies in one; give a folder, or none"):
        keep(root, paths(4), Counting(), root.parent / "file")
    monkeypatch.setattr(descriptors.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 10}))
    with pytest.raises(ValueError, match="GB for the descriptors; give --descriptors another folder"):
        keep(root, paths(4), Counting())


def test_a_diverged_model_is_not_kept(root):
    model = Counting()
    model.fc.weight.data[:] = np.nan
    values, failed = keep(root, paths(3), model)
    assert np.isnan(values).all() and not failed
    again = Counting()
    again.fc.weight.data[:] = np.nan
    keep(root, paths(3), again)
    assert again.images == ONE + 2 * 3


FLAGS = ["--device", "cpu", "--precision", "fp32", "--num_workers", "0", "--weights", "none", "--backbone", "resnet18",
         "--aggregator", "gem", "--descriptor_dim", "16", "--image_size", "32"]


def test_eval_keeps_its_descriptors_and_scores_the_same(world, tmp_path, monkeypatch):
    """In memory, kept, and from the file of the run before: the same recalls, each image described once."""
    monkeypatch.chdir(tmp_path)
    counted = []
    read = retrieval.read_image
    monkeypatch.setattr(retrieval, "read_image", lambda path, size: counted.append(path) or read(path, size))

    def recalls(*more):
        counted.clear()
        argv = ["--dataset_path", str(world.path), *FLAGS, *more]
        result = evaluation_script.main(evaluation_script.parse_arguments(argv))
        return [(each.recalls, each.distinct) for each in result.results], len(counted)

    in_memory, images = recalls("--descriptors", "none")
    assert images == 24 + 10 and not (tmp_path / "logs" / "descriptors").exists()
    assert recalls() == (in_memory, images)
    assert recalls() == (in_memory, 0)
    assert recalls("--search", "flat") == (in_memory, 0)
    assert recalls("--rotate", "queries", "--descriptors", str(tmp_path / "other"))[1] == images
    assert {path.suffix for path in (tmp_path / "logs" / "descriptors").iterdir()} == {".f16"}
