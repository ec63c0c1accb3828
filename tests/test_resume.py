"""A run that was stopped and resumed ends with the same bits as one that never stopped; signals come when they like."""

import itertools
import os
import random
import re
import runpy
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import train
from datasets.batches import Batches
from datasets.regions import Regions
from retrieval import clustering, evaluation
from utils.checkpoint import load_checkpoint, save_checkpoint
from utils.runs import Run
from utils.signals import EXIT_CODE, Stop, Stopped

ROOT = Path(__file__).parents[1]
MODEL = [
    "--backbone",
    "resnet18",
    "--weights",
    "none",
    "--cut_after",
    "layer1",
    "--aggregator",
    "gem",
    "--descriptor_dim",
    "16",
    "--image_size",
    "32",
]
# New clusters before iterations 1, 5 and 9, validation after 3, 6, 9 and 10; the fourth iteration's batches come from
# random clusters, those after from k-means.
SHORT = [
    "--iterations",
    "10",
    "--recluster_every",
    "4",
    "--validate_every",
    "3",
    "--batch_size",
    "4",
    "--log_dir",
    "r",
    "--num_clusters",
    "3",
    "--log_every",
    "1",
    "--clouds",
    "0.5",
    "--haze",
    "0.5",
    "--lr_schedule",
    "cosine",
    "--warmup",
    "3",
    "--device",
    "cpu",
    "--precision",
    "fp32",
]


def words(world, workers=0, *more):
    return ["--dataset_path", str(world.path), *MODEL, *SHORT, "--num_workers", str(workers), *map(str, more)]


def go(world, *more, workers=0):
    """Trains in this process -> the run's folder, also where a signal stopped it."""
    before = set(Path("logs/r").glob("*"))
    try:
        return train.main(train.parse_arguments(words(world, workers, *more))).absolute()
    except SystemExit as stopped:
        assert stopped.code == EXIT_CODE
        (folder,) = set(Path("logs/r").glob("*")) - before
        return folder.absolute()


def differences(a, b, name=""):
    """Two checkpoints -> names of what is not the same to the last bit."""
    if isinstance(a, torch.Tensor):
        same = a.dtype == b.dtype and a.shape == b.shape and a.numpy().tobytes() == b.numpy().tobytes()
        return [] if same else [name]
    if isinstance(a, dict):
        if list(a) != list(b):
            return [name]
        return [
            each for key in a if (name, key) != ("", "args") for each in differences(a[key], b[key], f"{name}/{key}")
        ]
    if isinstance(a, (list, tuple)):
        if len(a) != len(b):
            return [name]
        return [each for i, pair in enumerate(zip(a, b)) for each in differences(*pair, f"{name}/{i}")]
    return [] if type(a) is type(b) and a == b else [name]


def losses(folder):
    """{iteration: loss} of a run's scalars."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator").EventAccumulator
    events = accumulator(str(folder))
    events.Reload()
    return {each.step: each.value for each in events.Scalars("loss")} if "loss" in events.Tags()["scalars"] else {}


def same_end(expected, found):
    """Names of what differs between the ends of two runs: checkpoints, and every loss that the second one logged."""
    logged, again = losses(expected), losses(found)
    return (
        differences(load_checkpoint(expected / "last.pt"), load_checkpoint(found / "last.pt"))
        + [
            f"best{each}"
            for each in differences(load_checkpoint(expected / "best.pt"), load_checkpoint(found / "best.pt"))
        ]
        + [f"loss of {step}" for step, value in again.items() if logged[step] != value]
    )


# Where a run can be stopped: each is called once an iteration, validation, clustering, file, …
SEAMS = {
    "update": (train, "update"),
    "validate": (train, "validate"),
    "score": (evaluation, "score_set"),
    "cluster": (train, "make_clusters"),
    "describe": (Regions, "files"),
    "k-means": (clustering, "faiss_kmeans"),
    "load": (Batches, "__getitem__"),
    "save": (torch, "save"),
}


def signal_at(monkeypatch, name, call, after=True, number=signal.SIGTERM):
    """The signal comes at the end, or at the start, of that call of SEAMS[name]: 0 is the first one (of "update" in a
    fresh run: the iteration)."""
    original, calls = getattr(*SEAMS[name]), itertools.count()

    def patched(*values, **more):
        here = next(calls) == call
        if here and not after:
            signal.raise_signal(number)
        result = original(*values, **more)
        if here and after:
            signal.raise_signal(number)
        return result

    monkeypatch.setattr(*SEAMS[name], patched)


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")


@pytest.fixture(scope="module")
def undisturbed(world, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("undisturbed"))
        return go(world)


def test_no_two_images_of_the_world_are_alike(world):
    """Else a swap of images would not be noticed by what follows."""
    contents = [file.read_bytes() for file in world.path.rglob("*.jpg")]
    assert len(contents) == len(set(contents)) == 24 * 4 + 10


def test_the_same_run_twice(world, undisturbed):
    assert same_end(undisturbed, go(world)) == []
    assert set(losses(undisturbed)) == set(range(1, 11))


# (seam, call, at its end, iteration that is left off at). Files that are saved: initial weights, best.pt and last.pt
# after the third iteration, …
POINTS = [
    ("update", 1, True, 2),
    ("score", 1, True, 3),
    ("save", 1, False, 3),
    ("cluster", 1, False, 4),
    *(
        pytest.param(*point, marks=pytest.mark.slow)
        for point in [
            ("validate", 0, False, 0),
            ("score", 0, False, 0),
            ("cluster", 0, True, 0),
            ("load", 0, True, 0),
            ("update", 0, True, 1),
            ("load", 1, False, 1),
            ("update", 1, False, 2),
            ("update", 2, True, 3),
            ("validate", 1, False, 3),
            ("validate", 1, True, 3),
            ("save", 1, True, 3),
            ("save", 2, True, 3),
            ("describe", 0, True, 4),
            ("k-means", 0, False, 4),
            ("cluster", 1, True, 4),
            ("update", 5, True, 6),
            ("k-means", 1, True, 8),
            ("load", 9, True, 9),
            ("update", 9, True, 10),
            ("validate", 4, False, 10),
        ]
    ),
]


@pytest.mark.parametrize("name, call, after, iteration", POINTS)
def test_stopped_anywhere_it_ends_with_the_same_bits(world, undisturbed, monkeypatch, name, call, after, iteration):
    with monkeypatch.context() as patch:
        signal_at(patch, name, call, after)
        stopped = go(world)
    assert load_checkpoint(stopped / "last.pt")["iteration"] == iteration and not (stopped / "done").exists()
    resumed = go(world, "--resume", stopped)
    assert same_end(undisturbed, resumed) == []
    assert set(losses(stopped)) | set(losses(resumed)) == set(range(1, 11)) and (resumed / "done").exists()


def test_stopped_again_and_again(world, undisturbed, monkeypatch):
    """Each run goes on where the one before left off; calls are counted anew in each."""
    folder, reached = "auto", []
    for name, call, after in [
        ("validate", 0, False),
        ("score", 0, False),
        ("load", 0, False),
        ("load", 1, True),
        ("update", 0, True),
        ("validate", 0, True),
        ("update", 0, True),
        ("describe", 0, False),
        ("k-means", 0, True),
        ("update", 0, True),
        ("save", 0, False),
        ("update", 3, False),
    ]:
        with monkeypatch.context() as patch:
            signal_at(patch, name, call, after)
            folder = go(world, "--resume", folder)
        assert not (folder / "done").exists()
        reached.append(load_checkpoint(folder / "last.pt")["iteration"])
    assert reached == [0, 0, 0, 1, 2, 3, 4, 4, 4, 5, 6, 10]
    assert same_end(undisturbed, go(world, "--resume", folder)) == []


@pytest.mark.parametrize("before, after", [(2, 2), (0, 1)])
def test_the_number_of_workers_changes_nothing(world, undisturbed, monkeypatch, before, after):
    with monkeypatch.context() as patch:
        signal_at(patch, "update", 5)
        stopped = go(world, workers=before)
    assert same_end(undisturbed, go(world, "--resume", stopped, workers=after)) == []


@pytest.fixture(scope="module")
def stopped_at_6(world, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("stopped"))
        signal_at(patch, "update", 5)
        return go(world)


@pytest.mark.parametrize("lost", ["optimizer", "clusters", "best", "iteration"])
def test_without_a_part_of_the_checkpoint_the_end_is_another(world, undisturbed, stopped_at_6, tmp_path, lost):
    stopped = shutil.copytree(stopped_at_6, tmp_path / "stopped")
    state = load_checkpoint(stopped / "last.pt")
    state[lost] = {
        "optimizer": {**state["optimizer"], "state": {}},
        "clusters": state["clusters"][1:],
        "best": 101.0,
        "iteration": state["iteration"] - 1,
    }[lost]
    save_checkpoint(stopped / "last.pt", state)
    assert same_end(undisturbed, go(world, "--resume", stopped)) != []


def test_random_numbers_that_are_not_in_the_checkpoint_change_the_end(world, monkeypatch):
    """The control of the tests above: draws that go on from iteration to iteration, as a plain generator's would."""

    def start_process(patch):
        stream = np.random.default_rng(0)
        patch.setattr(train, "iteration_seed", lambda *_: int(stream.integers(2**31)))

    start_process(monkeypatch)
    expected = go(world)
    with monkeypatch.context() as patch:
        start_process(patch)
        signal_at(patch, "update", 5)
        stopped = go(world)
    start_process(monkeypatch)
    found = same_end(expected, go(world, "--resume", stopped))
    assert any(each.startswith("/model") for each in found) and "loss of 10" in found


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGUSR1])
def test_each_signal_stops_with_a_line_that_says_how_to_go_on(world, monkeypatch, number):
    monkeypatch.setattr(sys, "argv", ["train.py", "--lr", "1", "--resume", "old/last.pt", "--seed", "0"])
    signal_at(monkeypatch, "update", 0, number=number)
    stopped = go(world)
    log = (stopped / "info.log").read_text()
    assert f"{signal.Signals(number).name}: stopped before iteration 2 of 10, all is saved" in log
    assert re.search(r"Go on with: python train.py --lr 1 --seed 0 --resume logs/r/[\d_-]+$", log, re.MULTILINE)


def test_a_signal_before_the_first_iteration(world, monkeypatch):
    monkeypatch.setattr(train, "read_regions", lambda *_: signal.raise_signal(signal.SIGTERM))
    stopped = go(world)
    assert "stopped before the first iteration" in (stopped / "info.log").read_text()
    assert not (stopped / "last.pt").exists()


def test_auto_starts_and_goes_on_by_itself(world, undisturbed, monkeypatch):
    with monkeypatch.context() as patch:
        signal_at(patch, "update", 6)
        first = go(world, "--resume", "auto")
    assert "no checkpoint yet" in (first / "info.log").read_text()
    (Path("logs/r") / "2020-01-01_00-00-00").mkdir()  # an older run, and one that was killed at once
    save_checkpoint(Path("logs/r/2020-01-01_00-00-00/last.pt"), {"model": {"w": torch.ones(1)}, "iteration": 9})
    (Path("logs/r") / "2999-01-01_00-00-00").mkdir()
    second = go(world, "--resume", "auto")
    assert f"Resumed {first.relative_to(Path.cwd())}/last.pt at iteration 7" in (second / "info.log").read_text()
    assert same_end(undisturbed, second) == []


def test_a_truncated_last_checkpoint_falls_back_to_the_one_before(world, undisturbed, monkeypatch):
    with monkeypatch.context() as patch:
        signal_at(patch, "update", 6)
        stopped = go(world)
    last = stopped / "last.pt"
    last.write_bytes(last.read_bytes()[:5000])
    resumed = go(world, "--resume", stopped)
    log = (resumed / "info.log").read_text()
    assert f"{last}: truncated" in log and f"Resumed {stopped / 'previous.pt'} at iteration 6" in log
    assert same_end(undisturbed, resumed) == []


def test_other_flags_are_named(world, undisturbed):
    resumed = go(world, "--resume", undisturbed, "--lr", "0.5", "--save_every", "7")
    warned = [line for line in (resumed / "info.log").read_text().splitlines() if "not the same run" in line]
    assert len(warned) == 1 and "--lr is 0.5, and was 0.0001" in warned[0]


def test_save_every(world, monkeypatch):
    signal_at(monkeypatch, "update", 4)
    monkeypatch.setattr(Run, "save", lambda run, path, args: saved.append((path.name, run.iteration)))
    saved = []
    go(world, "--save_every", "2")
    assert [each for each in saved if each[0] == "last.pt"] == [("last.pt", k) for k in (2, 3, 4, 5)]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_stopped_up_to_twenty_times_at_random_moments(world, undisturbed):
    """Threads send the signals. Those that come after a run's end meet the handler that was there before: none."""
    moments = random.Random(0)
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        for kill in range(21):
            timer = threading.Timer(moments.uniform(0.05, 0.6), os.kill, (os.getpid(), signal.SIGTERM))
            if kill < 20:
                timer.start()
            folder = go(world, "--resume", "auto")
            timer.cancel()
            if (folder / "done").exists():
                break
    finally:
        signal.signal(signal.SIGTERM, before)
    assert same_end(undisturbed, folder) == []


def test_a_signal_is_a_wish_until_it_is_looked_at():
    before = signal.getsignal(signal.SIGTERM)
    with Stop() as stop:
        signal.raise_signal(signal.SIGUSR1)
        with pytest.raises(Stopped, match="SIGUSR1"):
            stop.check()
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_system_without_sigusr1_can_import_it(monkeypatch):
    monkeypatch.delattr(signal, "SIGUSR1")
    names = runpy.run_path(str(ROOT / "utils" / "signals.py"))
    assert names["SIGNALS"] == (signal.SIGTERM, signal.SIGINT)


def test_a_signal_while_a_checkpoint_is_read_does_not_make_it_damaged(tmp_path, monkeypatch):
    save_checkpoint(tmp_path / "last.pt", {"model": {"w": torch.ones(1)}, "iteration": 1})
    monkeypatch.setattr(torch, "load", lambda *_, **__: signal.raise_signal(signal.SIGTERM))
    with Stop() as stop, pytest.raises(Stopped, match="SIGTERM"), stop.at_once():
        load_checkpoint(tmp_path / "last.pt")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_second_signal_ends_the_process_at_once(number):
    child = os.fork()
    if not child:
        with Stop():
            signal.raise_signal(number)
            signal.raise_signal(number)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == number


def launch(world, *more, workers=2):
    """Trains in a process group of its own, as a cluster would."""
    return subprocess.Popen(
        [sys.executable, str(ROOT / "train.py"), *words(world, workers, *more)],
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("numbers", [(signal.SIGTERM, signal.SIGINT, signal.SIGUSR1), (signal.SIGKILL,)])
def test_a_process_group_gets_up_to_twenty_signals(world, undisturbed, numbers):
    """Whole groups, workers too, at random moments. kill -9 loses what was done since the last checkpoint, no more."""
    moments, kills = random.Random(1), 0
    while not list(Path("logs/r").glob("*/done")):
        process = launch(world, "--resume", "auto", "--save_every", 1)
        sent = moments.choice(numbers)
        if kills < 20:
            for line in process.stdout:  # imports and the like are over
                if "The outputs are in" in line:
                    break
            time.sleep(moments.uniform(0, 0.5))
            os.killpg(process.pid, sent)
            kills += 1
        output = process.communicate()[0]
        # What comes after the run's last moment, while Python ends, meets no handler any more.
        assert process.returncode in (0, EXIT_CODE, -sent), output
    (folder,) = (path.parent for path in Path("logs/r").glob("*/done"))
    assert same_end(undisturbed, folder.absolute()) == []


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("workers, again", [(0, 0), (2, 2), (0, 2), (2, 0)])
def test_stopped_at_every_iteration(world, undisturbed, monkeypatch, workers, again):
    for iteration in range(10):
        with monkeypatch.context() as patch:
            signal_at(patch, "update", iteration)
            stopped = go(world, workers=workers)
        assert same_end(undisturbed, go(world, "--resume", stopped, workers=again)) == [], iteration
