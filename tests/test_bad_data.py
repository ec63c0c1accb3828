"""Broken images in mid-run, losses that are not finite, and files from strangers."""

import os
import pathlib
import struct
import zlib

import numpy as np
import pytest
import torch
from conftest import World, region_picture
from PIL import Image
from test_resume import MODEL, differences, same_end, signal_at

import eval
import train
from datasets import grid, images
from datasets.batches import SPARES, BatchLoader, spares
from datasets.images import read_image
from datasets.names import YEARS, Catalogue
from datasets.overlap import INTERSECTIONS_FILE, load_intersections
from datasets.regions import RegionDataset, Regions
from datasets.sets import load_evaluation_data, positive_pairs
from utils.checkpoint import load_checkpoint
from utils.runs import Run
from utils.signals import Stop, Stopped

FLAGS = [*MODEL, "--log_dir", "b", "--device", "cpu", "--precision", "fp32", "--num_clusters", "2", "--log_every", "1"]


def png_header(width, height):
    """A PNG that says to be so large, and has no pixels."""
    chunk = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))


def plant(path, kind):
    content = path.read_bytes()
    path.unlink()  # the worlds' files are links
    if kind == "empty":
        path.touch()
    elif kind == "truncated":
        path.write_bytes(content[: len(content) // 2])
    elif kind == "no image":
        path.write_bytes(b"<html>404</html>")
    elif kind == "too large":
        path.write_bytes(png_header(300_000, 300_000))
    elif kind == "too small":
        Image.new("RGB", (1, 3)).save(path)
    elif kind == "denied":  # root may read everything, so what open() says then is played (see `denied`)
        path.write_bytes(content)
        path.chmod(0)


KINDS = ("empty", "truncated", "no image", "too large", "too small", "denied", "vanished")


@pytest.fixture
def denied(monkeypatch):
    """open() for an ordinary user, also where the tests run as root."""
    original = images.Path.read_bytes

    def ordinary(path):
        if path.exists() and not path.stat().st_mode & 0o400:
            raise PermissionError(13, "Permission denied", str(path))
        return original(path)

    monkeypatch.setattr(images.Path, "read_bytes", ordinary)


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")


def go(world, *more):
    return train.main(train.parse_arguments(["--dataset_path", str(world.path), *FLAGS, *map(str, more)])).absolute()


# Substitutes


def test_substitutes_come_from_the_cluster_first_and_never_twice():
    clusters = [np.arange(0, 30), np.arange(30, 50)]
    batch = np.array([3, 9, 12])
    found = spares(batch, clusters, [1, 2])
    assert found.shape == (3, SPARES) and np.array_equal(found, spares(batch, clusters, [1, 2]))
    assert len(set(found.ravel()) | set(batch)) == 3 * SPARES + 3 and (found < 30).all()
    assert not np.array_equal(found, spares(batch, clusters, [1, 3]))
    short = spares(np.arange(32, 48), clusters, 0)  # four of its own are left for 16 places, then others
    assert set(short[:4, 0]) == {30, 31, 48, 49} and set(short[4:, 0]) <= set(range(30))
    assert sorted(short[short >= 0]) == [*range(32), 48, 49][:34] and (short[:, -1] == -1).all()


def test_a_place_gets_its_own_substitute_whoever_loads_it(own_world):
    regions, _ = Regions.read(own_world.path)
    for row in (2, 5, 11):
        plant(regions.root / regions.paths[row][1], "empty")
    batch, others = np.array([2, 3, 5, 7]), np.array([[1, 4], [6, 8], [11, 9], [10, 12]])
    loader = BatchLoader(RegionDataset(regions, 8), 0)
    ((rows, pixels, errors),) = loader.serve(batch[None], lambda _: others)
    assert rows.tolist() == [1, 3, 9, 7] and [row for row, _ in errors] == [2, 5, 11]
    assert torch.equal(pixels[2], RegionDataset(regions, 8)[9][1])
    ((half, _, _),) = loader.serve(batch[None, 2:], lambda _: others[2:])
    assert half.tolist() == [9, 7]
    ((rows, _, errors),) = loader.serve(batch[None])
    assert rows.tolist() == [-1, 3, -1, 7] and len(errors) == 2


# In training


@pytest.mark.parametrize("workers", [0, 2])
def test_broken_images_of_each_kind_are_replaced(own_world, denied, monkeypatch, workers):
    """One of each kind, one vanishes in mid-run; all are met, and the same run again ends with the same bits."""
    regions, _ = Regions.read(own_world.path)
    broken = {kind: regions.root / regions.paths[3 * k][k % 4] for k, kind in enumerate(KINDS)}
    saved = broken["vanished"].read_bytes()
    for kind in KINDS[:-1]:
        plant(broken[kind], kind)
    original, seen = train.update, []

    def watched(run, *rest):
        if run.iteration == 3:
            plant(broken["vanished"], "vanished")
        return original(run, *rest)

    monkeypatch.setattr(train, "update", watched)
    real = train.neutral_pairs
    monkeypatch.setattr(train, "neutral_pairs", lambda shown, labels: seen.append(shown) or real(shown, labels))
    flags = (
        "--iterations",
        18,
        "--recluster_every",
        8,
        "--validate_every",
        18,
        "--batch_size",
        4,
        "--max_unreadable",
        0.4,
        "--num_workers",
        workers,
    )
    first = go(own_world, *flags)
    log = (first / "info.log").read_text()
    for kind, path in broken.items():
        assert log.count(f"another region takes its place: {path}") == 1, kind
    assert all(len(np.unique(each, axis=0)) == 4 for each in seen)  # no region twice in a batch
    bad = {str(regions.footprints[3 * k]) for k in range(len(KINDS) - 1)}
    assert not bad & {str(footprint) for each in seen for footprint in each}
    if not workers:  # what vanishes while workers read ahead is met at another moment
        broken["vanished"].write_bytes(saved)
        assert same_end(first, go(own_world, *flags)) == []


def test_too_many_broken_images_stop_the_run(own_world):
    for region in own_world.regions[:5]:
        plant(own_world.image(region, 2019), "empty")
    message = r"\d of 24 regions have an image that cannot be read, .*--max_unreadable 0.1 .*@"
    with pytest.raises(ValueError, match=message):
        go(
            own_world,
            "--iterations",
            9,
            "--recluster_every",
            9,
            "--batch_size",
            8,
            "--num_workers",
            0,
            "--max_unreadable",
            0.1,
        )


def test_stopped_and_resumed_among_broken_images(own_world, monkeypatch):
    for region in own_world.regions[:6:2]:
        plant(own_world.image(region, 2021), "truncated")
    flags = (
        "--iterations",
        6,
        "--recluster_every",
        3,
        "--validate_every",
        6,
        "--batch_size",
        5,
        "--max_unreadable",
        0.4,
        "--num_workers",
        0,
    )
    expected = go(own_world, *flags)
    with monkeypatch.context() as patch:
        signal_at(patch, "update", 3)
        with pytest.raises(SystemExit):
            go(own_world, *flags)
    assert same_end(expected, go(own_world, *flags, "--resume", "logs/b")) == []


@pytest.mark.slow
def test_one_percent_of_each_kind(world, denied, tmp_path, monkeypatch):
    """200 regions with 800 images, of which 8 of each kind are broken; 60 iterations meet nearly all of them."""
    regions = [(9, 160 + 2 * i, 100 + 2 * j) for i in range(10) for j in range(20)]
    path = tmp_path / "big"
    for region in regions:
        for year in YEARS:
            file = path / grid.image_path(*region, year)
            file.parent.mkdir(parents=True, exist_ok=True)
            region_picture(region, year).save(file, quality=92)
    os.symlink(world.path / "queries", path / "queries")
    os.link(world.path / INTERSECTIONS_FILE, path / INTERSECTIONS_FILE)
    read, _ = Regions.read(path)
    choice = np.random.default_rng(0).permutation(800)[: 8 * len(KINDS)].reshape(len(KINDS), 8)
    files = [[path / read.paths[k // 4][k % 4] for k in row] for row in choice]
    for kind, group in zip(KINDS[:-1], files):
        for file in group:
            plant(file, kind)
    original = train.update

    def watched(run, *rest):
        if run.iteration == 10:
            for file in files[-1]:
                file.unlink()
        return original(run, *rest)

    monkeypatch.setattr(train, "update", watched)
    folder = go(
        World(path, regions),
        "--iterations",
        120,
        "--recluster_every",
        40,
        "--validate_every",
        120,
        "--batch_size",
        8,
        "--num_workers",
        2,
        "--max_unreadable",
        0.4,
    )
    log = (folder / "info.log").read_text()
    met = [log.count(f"takes its place: {file}") for group in files for file in group]
    assert max(met) == 1 and sum(met) > 0.7 * len(met) and load_checkpoint(folder / "last.pt")["iteration"] == 120


@pytest.mark.parametrize("kind", KINDS[:-1])
def test_evaluation_leaves_each_kind_out(own_world, denied, kind):
    broken = own_world.image(own_world.regions[1])
    plant(broken, kind)
    result = eval.main(
        eval.parse_arguments(
            [
                "--dataset_path",
                str(own_world.path),
                "--weights",
                "none",
                *MODEL[:2],
                *MODEL[4:],
                "--tta",
                "none",
                "--device",
                "cpu",
                "--precision",
                "fp32",
                "--num_workers",
                "0",
            ]
        )
    )
    assert [note for note in result.notes if note.startswith(f"left out: {broken}")]
    row = result.data.database.paths.index(str(broken.relative_to(own_world.path)))
    assert all(row not in one.set.database_rows and row not in one.database_images for one in result.results)


# Not finite


class Poison:
    """Loss, or its gradient, is not finite in one iteration."""

    def __init__(self, patch, iteration, gradient):
        original = train.update

        def update(run, views, labels, neutral, loss_fn, *rest):
            def poisoned(descriptors, *inputs):
                loss = loss_fn(descriptors, *inputs)
                if run.iteration != iteration:
                    return loss
                # sqrt has an infinite slope at 0: a finite loss, and a gradient that is not.
                return loss + (descriptors[0, 0] * 0).sqrt() if gradient else loss * torch.nan

            return original(run, views, labels, neutral, poisoned, *rest)

        patch.setattr(train, "update", update)


@pytest.mark.parametrize(
    "gradient, what, save_every",
    [(False, "the loss is nan", 1), (True, "the gradient's norm is", 1), (False, "the loss is nan", 2)],
)
def test_the_batch_of_a_nan_is_saved_and_the_run_stops(world, monkeypatch, gradient, what, save_every):
    """On an iteration that is not logged, whether a checkpoint is due right after it or not."""
    Poison(monkeypatch, 2, gradient)
    flags = (
        "--iterations",
        5,
        "--recluster_every",
        5,
        "--batch_size",
        4,
        "--num_workers",
        0,
        "--log_every",
        100,
        "--save_every",
        save_every,
    )
    with pytest.raises(RuntimeError, match=f"iteration 2: {what}.*bad_batch_2.pt"):
        go(world, *flags)
    folder = max(pathlib.Path("logs/b").iterdir())
    bad, last = load_checkpoint(folder / "bad_batch_2.pt"), load_checkpoint(folder / "last.pt")
    assert bad["model"]["iteration"] == 2 and bad["model"]["views"].shape == (16, 3, 32, 32)
    regions, _ = Regions.read(world.path)
    paths = bad["model"]["paths"]
    assert len(paths) == 16 and all(tuple(paths[k : k + 4]) in list(regions.paths) for k in range(0, 16, 4))
    assert last["iteration"] == 2 and last["skipped"] == 0


def test_a_signal_right_after_a_skipped_update_does_not_hide_it(world, monkeypatch):
    flags = ("--iterations", 4, "--recluster_every", 4, "--batch_size", 4, "--num_workers", 0, "--max_skips", 1)
    with monkeypatch.context() as patch:
        Poison(patch, 1, False)
        checks = iter([None, None, Stopped("test")])

        def check(_):
            outcome = next(checks)
            if outcome:
                raise outcome

        patch.setattr(Stop, "check", check)
        with pytest.raises(SystemExit):
            go(world, *flags)
    folder = max(pathlib.Path("logs/b").iterdir())
    last = load_checkpoint(folder / "last.pt")
    assert (last["iteration"], last["skipped"]) == (2, 1) and (folder / "bad_batch_1.pt").is_file()


def test_a_skipped_update_leaves_nothing_behind(world, monkeypatch):
    """Neither weights, nor BatchNorm's averages, nor Adam's moments; and a run resumed around it ends alike."""
    flags = (
        "--iterations",
        4,
        "--recluster_every",
        4,
        "--validate_every",
        4,
        "--batch_size",
        4,
        "--num_workers",
        0,
        "--save_every",
        1,
        "--max_skips",
        1,
    )
    with monkeypatch.context() as patch:
        Poison(patch, 2, False)
        states = {}
        save = Run.save
        patch.setattr(
            Run,
            "save",
            lambda run, path, args: save(run, path, args) or states.update({run.iteration: load_checkpoint(path)}),
        )
        expected = go(world, *flags)
        before, after = states[2], states[3]
        assert [differences(before[key], after[key]) for key in ("model", "optimizer", "clusters")] == [[], [], []]
        assert (before["skipped"], after["skipped"], after["iteration"]) == (0, 1, 3)
        assert differences(states[3]["model"], states[4]["model"]) != []
        patch.setattr(Run, "save", save)
        for stop in (2, 3):
            with patch.context() as inner:
                original = Stop.check
                inner.setattr(
                    Stop,
                    "check",
                    lambda self: (
                        (_ for _ in ()).throw(Stopped("test")) if state["run"].iteration == stop else original(self)
                    ),
                )
                state = {}
                start = train.start
                inner.setattr(train, "start", lambda *rest: state.setdefault("run", start(*rest)))
                before = set(pathlib.Path("logs/b").iterdir())
                with pytest.raises(SystemExit):
                    go(world, *flags)
            (stopped,) = set(pathlib.Path("logs/b").iterdir()) - before
            assert load_checkpoint(stopped / "last.pt")["iteration"] == stop
            assert same_end(expected, go(world, *flags, "--resume", stopped)) == []


# Strangers


class Trap:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return pathlib.Path.touch, (self.path,)


def test_traps_in_a_run_and_a_data_set_leave_no_trace(world, own_world, tmp_path):
    trace = tmp_path / "trace"
    (own_world.path / INTERSECTIONS_FILE).unlink()
    torch.save({"a": [Trap(trace)]}, own_world.path / INTERSECTIONS_FILE)
    with pytest.raises(ValueError, match=INTERSECTIONS_FILE):
        load_evaluation_data(own_world.path)
    torch.save({"model": {}, "optimizer": Trap(trace)}, tmp_path / "last.pt")
    for flag in ("--resume", "--weights"):
        with pytest.raises(ValueError, match="last.pt: refused"):
            go(world, "--batch_size", 4, "--num_workers", 0, flag, tmp_path / "last.pt")
    assert not trace.exists()


def test_paths_of_the_intersections_reach_nothing_outside(world):
    table = load_intersections(world.path / INTERSECTIONS_FILE)
    queries, database = Catalogue.read(world.path, "queries"), Catalogue.read(world.path, "database", 2021)
    name = next(name for name, found in table.items() if found)
    right = pathlib.PurePosixPath(table[name][0][0]).name
    evil = {
        name: [
            ("/etc/passwd", 1.0),
            ("../../../etc/passwd", 1.0),
            ("database/../../x.jpg", 1.0),
            ("", 1.0),
            (f"../../elsewhere/{right}", 0.5),
            ("a\n@\x00.jpg", 1.0),
        ],
        "../../etc/hosts": [(right, 1.0)],
    }
    pairs, notes = positive_pairs(queries, database, evil)
    # Only what is in the folder's own listing is found, by its name.
    assert pairs.tolist() == [[queries.names.index(name), database.names.index(right)]]
    assert any(note.startswith("5 of 6 positives") for note in notes)


def test_an_image_that_says_to_be_huge_is_refused_before_decoding(tmp_path):
    for width, height in ((300_000, 300_000), (2**31 - 1, 1), (20_000, 11_000)):
        path = tmp_path / "bomb.jpg"
        path.write_bytes(png_header(width, height))
        with pytest.raises(ValueError, match="bomb.jpg"):
            read_image(path, 32)


def test_postscript_under_an_image_name_is_never_run(tmp_path):
    path = tmp_path / "photo.jpg"
    path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n%%EndComments\nshowpage\n%%EOF\n")
    assert Image.open(path).format == "EPS"  # Pillow alone would start ghostscript for its pixels
    with pytest.raises(ValueError, match="photo.jpg"):
        read_image(path)
