"""Checkpoints: written whole or not at all, and nothing in one is executed."""

import itertools
import logging
import os
import pathlib
import random
import resource
import signal
import sys
import time
from datetime import datetime

import pytest
import torch

from utils import checkpoint, logs
from utils.checkpoint import load_checkpoint, newest_checkpoint, save_checkpoint

STATE = {"model": {"weight": torch.arange(2000.0)}, "iteration": 7, "best": 1.5, "args": {"lr": "1"}}


class Trap:
    """Touches a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return pathlib.Path.touch, (self.path,)


def test_round_trip(tmp_path):
    save_checkpoint(tmp_path / "last.pt", STATE)
    loaded = load_checkpoint(tmp_path / "last.pt")
    assert torch.equal(loaded.pop("model")["weight"], STATE["model"]["weight"])
    assert loaded == {"iteration": 7, "best": 1.5, "args": {"lr": "1"}}
    assert [file.name for file in tmp_path.iterdir()] == ["last.pt"]


def test_the_old_file_survives_a_failed_save(tmp_path, monkeypatch):
    save_checkpoint(tmp_path / "last.pt", STATE)

    def half(state, file):
        file.write(b"half of it")
        raise OSError("no space left on device")

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(OSError, match="no space"):
        save_checkpoint(tmp_path / "last.pt", {"model": {}, "iteration": 8})
    monkeypatch.undo()
    assert load_checkpoint(tmp_path / "last.pt")["iteration"] == 7


def test_what_cannot_be_pickled_leaves_the_old_file(tmp_path):
    save_checkpoint(tmp_path / "last.pt", STATE)
    with pytest.raises(Exception):  # noqa: B017
        save_checkpoint(tmp_path / "last.pt", {**STATE, "function": lambda: 0})
    assert load_checkpoint(tmp_path / "last.pt")["iteration"] == 7


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9, 0.999])
def test_a_truncated_file_is_named(tmp_path, share):
    path = tmp_path / "last.pt"
    save_checkpoint(path, STATE)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    with pytest.raises(ValueError, match="last.pt"):
        load_checkpoint(path)


@pytest.mark.parametrize("content", [[1, 2], {}, "text"])
def test_what_is_no_state_is_named(tmp_path, content):
    torch.save(content, tmp_path / "odd.pt")
    with pytest.raises(ValueError, match="odd.pt"):
        load_checkpoint(tmp_path / "odd.pt")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="none.pt"):
        load_checkpoint(tmp_path / "none.pt")


@pytest.mark.parametrize("legacy", [False, True])
def test_a_malicious_file_leaves_no_trace(tmp_path, legacy):
    path, trace = tmp_path / "evil.pt", tmp_path / "trace"
    torch.save({"model": {"weight": Trap(trace)}}, path, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(ValueError, match="evil.pt"):
        load_checkpoint(path)
    assert not trace.exists()
    torch.load(path, weights_only=False)  # the trap does work
    assert trace.exists()


def test_a_bare_state_dict_is_a_model(tmp_path):
    torch.save({"weight": torch.ones(2)}, tmp_path / "bare.pt")
    assert list(load_checkpoint(tmp_path / "bare.pt")) == ["model"]


def test_one_flipped_bit_is_noticed(tmp_path):
    """torch.load takes it for a weight."""
    path = tmp_path / "last.pt"
    save_checkpoint(path, STATE)
    content = bytearray(path.read_bytes())
    content[content.index(STATE["model"]["weight"].numpy().tobytes()) + 4001] ^= 1
    path.write_bytes(content)
    assert not torch.equal(torch.load(path)["model"]["weight"], STATE["model"]["weight"])
    with pytest.raises(ValueError, match="last.pt: damaged"):
        load_checkpoint(path)


def iterations_kept(folder):
    """-> {file: its iteration} of a folder where four checkpoints were saved, one after the other."""
    for iteration in range(4):
        save_checkpoint(folder / "last.pt", {**STATE, "iteration": iteration}, "previous.pt")
    return {file.name: load_checkpoint(file)["iteration"] for file in folder.iterdir()}


def test_the_one_before_is_kept(tmp_path):
    assert iterations_kept(tmp_path) == {"last.pt": 3, "previous.pt": 2}


def test_the_one_before_is_kept_without_links(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError("this file system has no links")

    monkeypatch.setattr(os, "link", refuse)
    assert iterations_kept(tmp_path) == {"last.pt": 3, "previous.pt": 2}


@pytest.mark.parametrize(
    "damage",
    [lambda content: b"", lambda content: content[:3000], lambda content: content[:3000] + b"?" + content[3001:]],
)
def test_the_newest_whole_one_is_taken_with_a_line(tmp_path, caplog, damage):
    runs = [tmp_path / name for name in ("2026-01-01_00-00-00", "2026-01-02_00-00-00", "2026-01-03_00-00-00")]
    for run in runs:
        run.mkdir()
    for iteration in (1, 2):
        save_checkpoint(runs[1] / "last.pt", {**STATE, "iteration": iteration}, "previous.pt")
    save_checkpoint(runs[0] / "last.pt", {**STATE, "iteration": 9})
    for place in (tmp_path, runs[1], runs[1] / "last.pt"):
        assert newest_checkpoint(place)[0] == runs[1] / "last.pt"
    (runs[1] / "last.pt").write_bytes(damage((runs[1] / "last.pt").read_bytes()))
    with caplog.at_level(logging.WARNING):
        for place in (tmp_path, runs[1], runs[1] / "last.pt"):
            path, state = newest_checkpoint(place)
            assert path == runs[1] / "previous.pt" and state["iteration"] == 1
    assert f"{runs[1] / 'last.pt'}: " in caplog.text
    (runs[1] / "previous.pt").write_bytes(b"")
    assert newest_checkpoint(tmp_path)[0] == runs[0] / "last.pt"
    with pytest.raises(ValueError, match="previous.pt"):
        newest_checkpoint(runs[1])
    with pytest.raises(FileNotFoundError, match="2026-01-03_00-00-00: no checkpoint to go on with"):
        newest_checkpoint(runs[2])


def test_of_many_runs_of_one_second_the_newest_is_gone_on_with(tmp_path, monkeypatch):
    class Stopped(datetime):
        now = classmethod(lambda cls: cls(2026, 1, 2, 3, 4, 5))

    monkeypatch.setattr(logs, "datetime", Stopped)
    for number in range(12):
        run = logs.make_log_dir("mine", tmp_path)
        save_checkpoint(run / "last.pt", {**STATE, "iteration": number})
        assert newest_checkpoint(tmp_path / "mine")[1]["iteration"] == number


def test_killed_at_every_step_of_saving(tmp_path):
    """kill -9 at each call that the module makes, and at each return: both names always hold whole files."""
    path, found = tmp_path / "last.pt", []
    for step in itertools.count():
        for iteration in (1, 2):
            save_checkpoint(path, {**STATE, "iteration": iteration}, "previous.pt")
        child = os.fork()
        if not child:
            steps = itertools.count()

            def profile(frame, *_):
                if frame.f_code.co_filename == checkpoint.__file__ and next(steps) == step:
                    os.kill(os.getpid(), signal.SIGKILL)

            sys.setprofile(profile)
            save_checkpoint(path, {**STATE, "iteration": 3}, "previous.pt")
            os._exit(0)
        _, status = os.waitpid(child, 0)
        found.append(tuple(load_checkpoint(each)["iteration"] for each in (path.with_name("previous.pt"), path)))
        if os.WIFEXITED(status):
            break
    assert found == sorted(found) and set(found) == {(1, 2), (2, 2), (2, 3)} and found[-1] == (2, 3)


@pytest.mark.slow
def test_killed_twenty_times_while_saving(tmp_path):
    """The same at random moments, of a process that does nothing but save: the names are one step apart."""
    path, moments, reached = tmp_path / "last.pt", random.Random(0), [0]
    save_checkpoint(path, {**STATE, "iteration": 0})
    big = {"weight": torch.arange(1_000_000.0)}
    for _ in range(20):
        child = os.fork()
        if not child:
            for iteration in range(reached[-1] + 1, 10**9):
                save_checkpoint(path, {"model": big, "iteration": iteration}, "previous.pt")
        time.sleep(moments.uniform(0.0, 0.15))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        reached.append(load_checkpoint(path)["iteration"])
        if (tmp_path / "previous.pt").exists():
            assert reached[-1] - 1 <= load_checkpoint(tmp_path / "previous.pt")["iteration"] <= reached[-1]
    assert reached == sorted(reached)


def test_a_full_disk_is_reported_and_the_old_file_stays(tmp_path):
    """The limit on file sizes makes write() itself fail, as a full disk does."""
    path = tmp_path / "last.pt"
    save_checkpoint(path, STATE)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        with pytest.raises(OSError, match="last.pt: not written .*untouched.*--resume"):
            save_checkpoint(path, {"model": {"weight": torch.ones(100_000)}, "iteration": 8}, "previous.pt")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert load_checkpoint(path)["iteration"] == 7
    assert [file.name for file in tmp_path.iterdir()] == ["last.pt"]
