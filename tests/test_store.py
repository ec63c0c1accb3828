"""Descriptors kept on disk: described once, safe against kills, changed files, other models and broken files."""

import errno
import logging
import os
import select
import shutil
import signal
import sqlite3
import subprocess
import sys
from contextlib import closing
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import eval as evaluation_script
import predict
from datasets.sets import load_evaluation_data, read_database
from models.earthloc import ModelConfig, build_model
from retrieval import describe as retrieval
from retrieval import store as descriptors
from retrieval.describe import Describer
from retrieval.search import SEARCHES, make_search
from utils.checkpoint import save_checkpoint

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
    return Describer(model or Counting(), **COMMON)([root / name for name in names])[0]


def keep(root, names, model, folder=None, **more):
    values, failures = Describer(model, **COMMON).kept(folder or root.parent / "kept", root, names, **more)
    return np.array(values), [row for row, _ in failures]


def stored(root):
    """The files of vectors, each with its marks beside it."""
    files = set((root.parent / "kept").iterdir())
    vectors = sorted(path for path in files if path.suffix == ".f16")
    marks = {path.with_suffix(".marks") for path in vectors}
    assert files - marks - set(vectors) <= {Path(f"{path}-journal") for path in marks}  # after a kill
    return vectors


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
from tests.test_store import COMMON, Counting, paths
from retrieval.describe import Describer
class Dies(Counting):
    def forward(self, images):
        if self.images >= 1 + 2 * 6:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().forward(images)
Describer(Dies(), **COMMON).kept(sys.argv[2], sys.argv[1], paths(), commit_every=0)
"""


def test_a_killed_run_goes_on_where_it_was(root):
    folder = root.parent / "kept"
    code = subprocess.run([sys.executable, "-c", KILLED, root, folder], capture_output=True, text=True)
    assert code.returncode == -signal.SIGKILL, code.stderr
    left = stored(root)
    # The class's name is in the fingerprint: this test's model is to find the killed one's file.
    model = type("Dies", (Counting,), {})()
    values, _ = keep(root, paths(), model)
    assert stored(root) == left
    assert same(values, plain(root, paths())) and model.images == ONE + 2 * 4  # 0 … 4 were kept, 5 is no image


def test_descriptors_without_their_mark_or_with_another_checksum_are_not_trusted(root):
    names = paths(5)
    first, _ = keep(root, names, Counting())
    (path,) = stored(root)
    vectors = np.memmap(path, np.float16, "r+").reshape(-1, 6)
    with closing(sqlite3.connect(path.with_suffix(".marks"))) as marks:
        rows = marks.execute("SELECT path, first, step FROM images ORDER BY first").fetchall()
        vectors[rows[3][1] + rows[3][2], 2] += 1  # the second rotation: a bit that flipped
        marks.execute("UPDATE images SET image = 0 WHERE path = ?", rows[0][:1])  # killed before the mark
        marks.commit()
    vectors.flush()
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
    (path,) = stored(root)
    assert path.stat().st_size == 5 * 2 * 6 * 2  # in the old ones' place


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
    prints = [
        descriptors.model_fingerprint(*each)
        for each in (
            (model, 16, "fp32"),
            (changed, 16, "fp32"),
            (buffered, 16, "fp32"),
            (model, 32, "fp32"),
            (model, 16, "bf16"),
        )
    ]
    assert len(set(prints)) == len(prints)
    assert descriptors.model_fingerprint(Counting(), 16, "fp32") == prints[0]
    assert descriptors.model_fingerprint(Counting().bfloat16(), 16, "fp32") != prints[0]


@pytest.mark.parametrize(
    "suffix, damage, lost",
    [
        (".f16", lambda whole: whole[:-3], 1),
        (".f16", lambda whole: b"\xff" * len(whole), 4),
        (".f16", lambda whole: b"", 4),
        (".marks", lambda whole: whole[:3000], 4),
        (".marks", lambda whole: b"\xff" * len(whole), 4),
        (".marks", lambda whole: b"", 4),
    ],
)
def test_what_is_broken_is_described_anew_with_a_line(root, suffix, damage, lost, caplog):
    caplog.set_level(logging.INFO)
    first, _ = keep(root, paths(4), Counting())
    path = stored(root)[0].with_suffix(suffix)
    path.write_bytes(damage(path.read_bytes()))
    caplog.clear()
    model = Counting()
    second, _ = keep(root, paths(4), model)
    assert np.array_equal(first, second) and model.images == ONE + 2 * lost
    assert f"{4 - lost} of 4 images are described" in caplog.text
    assert ("described anew" in caplog.text) == (
        suffix == ".marks" and len(path.read_bytes()) > 0 and damage(b"1") != b""
    )


@pytest.mark.parametrize(
    "content, why",
    [
        (b'{"format": "earthloc descriptors 2", "model": "0"}'.ljust(4096), "of an earlier version's form"),
        (b"\xff" * 4096, "truncated or broken"),
    ],
)
def test_marks_that_cannot_be_used_are_told_where_no_log_is_set_up(root, content, why, caplog):
    """By a warning, which Python shows by itself; once."""
    keep(root, paths(4), Counting())
    (path,) = stored(root)
    path.with_suffix(".marks").write_bytes(content)
    for lines in (1, 0):
        caplog.clear()
        keep(root, paths(4), Counting())
        told = [each.getMessage() for each in caplog.records if each.levelno == logging.WARNING]
        assert told == [f"{path.parent}: {path.stem} is described anew, its marks are {why}"] * lines


def test_no_images_and_no_room(root, monkeypatch):
    values, failed = keep(root, [], Counting())
    assert values.shape == (2, 0, 6) and not failed
    (root.parent / "file").touch()
    with pytest.raises(ValueError, match="file: is a file or lies in one; give a folder"):
        keep(root, paths(4), Counting(), root.parent / "file")

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", full)
        with pytest.raises(
            ValueError, match="no room .No space left.* GB of descriptors; give --descriptors a folder on another"
        ):
            keep(root, paths(4), Counting())
    model = Counting()  # once there is room, nothing of that is left
    assert same(keep(root, paths(4), model)[0], plain(root, paths(4))) and model.images == ONE + 2 * 4


def test_a_diverged_model_is_not_kept(root):
    model = Counting()
    model.fc.weight.data[:] = np.nan
    values, failed = keep(root, paths(3), model)
    assert np.isnan(values).all() and not failed
    again = Counting()
    again.fc.weight.data[:] = np.nan
    keep(root, paths(3), again)
    assert again.images == ONE + 2 * 3


def test_lists_that_overlap_share_a_file_and_each_finds_its_own(root):
    names = [name for name in paths() if name != "5.png"]
    for some, fresh in ((names[:4], 4), (names[6:1:-1], 3), (names, 1), (names[3:5], 0)):
        model = Counting()
        values, _ = keep(root, some, model)
        assert same(values, plain(root, some)) and model.images == ONE + 2 * fresh
    (path,) = stored(root)
    assert path.stat().st_size == 8 * 2 * 6 * 2  # no image twice


def test_only_the_wanted_are_looked_at(root, monkeypatch):
    looked = []
    checksums, stat = descriptors._checksums, os.stat
    names = [name for name in paths() if name != "5.png"]
    keep(root, names[:6], Counting())
    monkeypatch.setattr(
        descriptors, "_checksums", lambda values, rows: looked.append(len(rows)) or checksums(values, rows)
    )
    monkeypatch.setattr(
        descriptors.os,
        "stat",
        lambda path, *more, **other: (
            (looked.append(Path(path).name) if str(path).endswith("png") else None) or stat(path, *more, **other)
        ),
    )
    model = Counting()
    values, _ = Describer(model, **COMMON).kept(root.parent / "kept", root, names, wanted=[1, 4, 7])
    assert {each for each in looked if isinstance(each, str)} == {"1.png", "4.png", "8.png"}
    assert [each for each in looked if isinstance(each, int)] == [2, 1]  # two of the file, and a new one
    assert model.images == ONE + 2 and values.shape == (2, 8, 6)
    assert same(values[:, [1, 4, 7]], plain(root, ["1.png", "4.png", "8.png"]))
    with pytest.raises(IndexError):
        values[:, 0]


def test_room_that_a_failed_run_left_is_used_by_the_next(root):
    with pytest.raises(RuntimeError, match="out of memory"):
        keep(root, paths(4), Counting(fail_after=ONE + 2 * 2))
    (path,) = stored(root)
    keep(root, ["7.png", "8.png"], Counting())
    model = Counting()
    values, _ = keep(root, paths(5), model)
    assert same(values, plain(root, paths(5))) and model.images == ONE + 2 * 3
    assert path.stat().st_size == 7 * 2 * 6 * 2


def test_an_image_given_twice_has_one_place(root):
    model = Counting()
    names = ["1.png", "2.png", "1.png"]
    assert same(keep(root, names, model)[0], plain(root, names))
    (path,) = stored(root)
    assert path.stat().st_size == 2 * 2 * 6 * 2
    keep(root, names, model)
    assert model.images == 2 * ONE + 2 * 3


WAITS = """
import logging, os, sys, time
sys.path.insert(0, os.getcwd())
from pathlib import Path
from tests.test_store import COMMON, Counting
from retrieval.describe import Describer
logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
root, folder, gate, *names = sys.argv[1:]
class Slow(Counting):
    def forward(self, images):
        if gate != "none" and self.images == 5:
            print("in the middle", flush=True)
            sys.stdin.readline()
        return super().forward(images)
model = Slow()
Describer(model, **COMMON).kept(folder, root, names, commit_every=0)
print("described", (model.images - 1) // 2, flush=True)
"""


def test_two_processes_one_file(root):
    """The second waits until the first is through, and then describes only what that one did not."""
    folder = root.parent / "kept"

    def start(gate, *names):
        return subprocess.Popen(
            [sys.executable, "-c", WAITS, root, folder, gate, *names],
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )

    with start("gate", *paths(5)) as first:
        assert "0 of 5 images are described" in first.stdout.readline()
        assert first.stdout.readline() == "in the middle\n"
        with start("none", "4.png", "6.png", "2.png") as second:
            assert "another process describes with the same model, waiting" in second.stdout.readline()
            assert not select.select([second.stdout], [], [], 1)[0]  # whatever its speed: it says nothing until then
            assert first.communicate("go\n")[0] == "described 5\n"
            assert "2 of 3 images are described" in second.stdout.readline()
            assert second.stdout.readline() == "described 1\n"
    model = type("Slow", (Counting,), {})()
    values, _ = keep(root, [*paths(5), "6.png"], model)
    assert same(values, plain(root, [*paths(5), "6.png"])) and model.images == ONE


def test_files_of_other_models_are_listed_and_removed_if_asked(root, caplog):
    caplog.set_level(logging.INFO)
    folder = root.parent / "kept"
    for seed in (0, 1, 2):
        keep(root, paths(3), Counting(seed))
    mine, other, busy = (
        folder / descriptors.file_name(descriptors.place_name(root), Describer(Counting(seed), 16).fingerprint, (0, 90))
        for seed in (0, 1, 2)
    )
    foreign = [folder / "notes.f16", folder / "notes.txt", folder / "b.marks", other.with_suffix(".txt")]
    for path in foreign:
        path.write_text("mine")
    (root / "elsewhere.f16").write_text("mine")
    (folder / f"a_{'0' * 16}_0.f16").symlink_to(root / "elsewhere.f16")
    everything, fingerprint = set(folder.iterdir()), Describer(Counting(), 16).fingerprint

    descriptors.tidy(folder, fingerprint)
    assert set(folder.iterdir()) == everything and mine in everything
    assert f"{folder}: 2 files (0.00 GB) of other models; --forget_descriptors removes them" in caplog.text
    with descriptors._locked(busy.with_suffix(".marks")):
        descriptors.tidy(folder, fingerprint, forget=True)
    assert set(folder.iterdir()) == everything - {other, other.with_suffix(".marks")}
    assert f"removed {other}" in caplog.text and f"{busy}: kept, another process describes into it" in caplog.text
    descriptors.tidy(folder / "none", fingerprint, forget=True)
    model = Counting()
    keep(root, paths(3), model)
    assert model.images == ONE


@pytest.mark.parametrize("kind", SEARCHES)
def test_the_searches_read_kept_descriptors_where_they_lie(kind, tmp_path, monkeypatch):
    """Rows of a memory map in any order give what a copy of them gives; the map is never read whole."""
    rng = np.random.default_rng(0)
    vectors = np.memmap(tmp_path / "vectors", np.float16, "w+", shape=(9000, 8))
    vectors[:] = rng.normal(size=vectors.shape)
    index = rng.permutation(9000)[:8000].reshape(2, 4000)
    kept = descriptors.Rows(vectors, index)
    assert kept.shape == (2, 4000, 8) and kept.ndim == 3 and len(kept) == 2
    flat, copied = kept.reshape(8000, 8), vectors[index].reshape(8000, 8)
    assert np.shares_memory(flat.vectors, vectors) and np.array_equal(np.asarray(flat, dtype=np.float32), copied)
    queries, rows = rng.normal(size=(5, 8)).astype(np.float32), rng.permutation(8000)[:6000]
    expected = [make_search(kind, copied).search(queries, 30, each) for each in (None, rows)]
    monkeypatch.setattr(descriptors.Rows, "__array__", None)
    search = make_search(kind, flat)
    for each, right in zip((None, rows), expected):
        found = search.search(queries, 30, each)
        assert np.array_equal(found[0], right[0]) and np.array_equal(found[1], right[1])


FLAGS = [
    "--device",
    "cpu",
    "--precision",
    "fp32",
    "--num_workers",
    "0",
    "--weights",
    "none",
    "--backbone",
    "resnet18",
    "--aggregator",
    "gem",
    "--descriptor_dim",
    "16",
    "--image_size",
    "32",
]


def test_eval_keeps_its_descriptors_and_scores_the_same(world, tmp_path, monkeypatch):
    """In memory, kept, and from the file of the run before: the same recalls, each image described once."""
    monkeypatch.chdir(tmp_path)
    counted = []
    read = retrieval.read_image
    monkeypatch.setattr(retrieval, "read_image", lambda path, *more: counted.append(path) or read(path, *more))

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
    assert {path.suffix for path in (tmp_path / "logs" / "descriptors").iterdir()} == {".f16", ".marks"}


def test_eval_and_predict_describe_nothing_twice(world, tmp_path, monkeypatch):
    """Each after the other, though eval wants the sets' images and predict those near a point."""
    monkeypatch.chdir(tmp_path)
    model = build_model(
        ModelConfig("resnet18", cut_after="layer1", aggregator="gem", descriptor_dim=16, image_size=32), "none"
    )
    save_checkpoint("model.pt", {"model": model.state_dict(), "model_config": asdict(model.config)})
    read, files = retrieval.read_image, []
    monkeypatch.setattr(retrieval, "read_image", lambda path, *more: files.append(str(path)) or read(path, *more))
    database, data = read_database(world.path), load_evaluation_data(world.path)
    photo = shutil.copy(world.path / data.queries.paths[0], tmp_path / "photo.jpg")  # its own name tells its nadir

    def described(script, *more):
        files.clear()
        inputs = [str(photo), "--register", "none"] if script is predict else []
        script.main(
            script.parse_arguments(
                [
                    *inputs,
                    "--resume",
                    "model.pt",
                    "--dataset_path",
                    str(world.path),
                    "--num_workers",
                    "0",
                    "--device",
                    "cpu",
                    *map(str, more),
                ]
            )
        )
        return sum(Path(path).is_relative_to(world.path / "database") for path in files)

    everything = len(data.database_rows)
    assert everything == len(database)
    for tta in ((), ("--tta", "none", "--rotate", "queries")):
        folder = ("--descriptors", tmp_path / f"kept{len(tta)}")
        near = ("--near", *database.centers[0], "--near_km", 1000)
        first = described(predict, *folder, *near)
        assert 3 <= first < everything
        assert described(evaluation_script, *folder, *tta) == everything - (0 if tta else first)
        assert described(predict, *folder) == (everything - first if tta else 0)
        assert described(evaluation_script, *folder, *tta) == 0
    other = ("--descriptors", tmp_path / "other")
    assert described(evaluation_script, *other) == everything
    assert described(predict, *other) == described(predict, *other, *near) == 0
    assert {path.suffix for path in (tmp_path / "other").iterdir()} == {".f16", ".marks"}


def test_the_scripts_forget_descriptors_of_other_models(world, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    common = ["--dataset_path", str(world.path), *FLAGS]
    for more in (["--seed", "0"], ["--seed", "1"]):
        evaluation_script.main(evaluation_script.parse_arguments([*common, *more]))
    folder = tmp_path / "logs" / "descriptors"
    both = set(folder.iterdir())
    evaluation_script.main(evaluation_script.parse_arguments([*common, "--seed", "1", "--forget_descriptors"]))
    assert len(both) == 8 and len(set(folder.iterdir())) == 4 and set(folder.iterdir()) < both
    model = build_model(ModelConfig("resnet18", aggregator="gem", descriptor_dim=16, image_size=32), "none")
    save_checkpoint("model.pt", {"model": model.state_dict(), "model_config": asdict(model.config)})
    photo = next((world.path / "queries").iterdir())
    predict.main(
        predict.parse_arguments(
            [
                str(photo),
                "--resume",
                "model.pt",
                "--dataset_path",
                str(world.path),
                "--num_workers",
                "0",
                "--device",
                "cpu",
                "--register",
                "none",
                "--forget_descriptors",
            ]
        )
    )
    assert len(set(folder.iterdir())) == 2 and not set(folder.iterdir()) & both
