"""Bits that come again, and what is said about precision."""

import os

import pytest
import torch

import app
import predict
import train
from retrieval import earth_index
from utils.flags import parse
from utils.precision import deterministic


def test_deterministic_holds_inside_and_ends(monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    with deterministic(False):
        assert not torch.are_deterministic_algorithms_enabled() and "CUBLAS_WORKSPACE_CONFIG" not in os.environ
    with pytest.raises(KeyError), deterministic(True):
        assert (
            torch.are_deterministic_algorithms_enabled() and not torch.is_deterministic_algorithms_warn_only_enabled()
        )
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8" and not torch.backends.cudnn.benchmark
        raise KeyError
    assert not torch.are_deterministic_algorithms_enabled() and torch.backends.cudnn.benchmark
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    with deterministic(True):
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"  # the user's own stays


def test_training_is_deterministic_all_through_where_it_is_asked_for(world, tmp_path, monkeypatch):
    from test_resume import MODEL, SHORT

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    seen, update = [], train.update
    recorded = lambda *values: seen.append(torch.are_deterministic_algorithms_enabled()) or update(*values)
    monkeypatch.setattr(train, "update", recorded)
    flags = ["--dataset_path", str(world.path), *MODEL, *SHORT, "--num_workers", "0", "--iterations", "2"]
    for more in ([], ["--deterministic"]):
        train.main(train.parse_arguments([*flags, *more]))
    assert seen == [False] * 2 + [True] * 2 and not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize("script", [train, predict, app, earth_index], ids=lambda each: each.__name__)
def test_help_says_what_precision_means_for_convolutions(script, capsys):
    with pytest.raises(SystemExit):
        parse(script.main, ["--help"]) if script is earth_index else script.parse_arguments(["--help"])
    told = " ".join(capsys.readouterr().out.split())
    assert "convolutions on a GPU in TF32" in told and "factors of 7 bits" in told
    assert script is not train or "--deterministic" in told
