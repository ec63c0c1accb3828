"""Checkpoints: written whole or not at all, and nothing in one is executed."""

import pathlib

import pytest
import torch

from utils.checkpoint import load_checkpoint, save_checkpoint

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
    with pytest.raises(Exception):
        save_checkpoint(tmp_path / "last.pt", {**STATE, "function": lambda: 0})
    assert load_checkpoint(tmp_path / "last.pt")["iteration"] == 7


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9, 0.999])
def test_a_truncated_file_is_named(tmp_path, share):
    path = tmp_path / "last.pt"
    save_checkpoint(path, STATE)
    path.write_bytes(path.read_bytes()[:int(path.stat().st_size * share)])
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
