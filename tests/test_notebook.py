"""The notebook runs here from beginning to end, and ships without outputs."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).parents[1] / "notebooks" / "locate.ipynb"


def test_it_ships_small_and_without_outputs():
    nbformat = pytest.importorskip("nbformat")
    notebook = nbformat.read(NOTEBOOK, 4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert code and not any(cell.outputs or cell.execution_count for cell in code)
    assert NOTEBOOK.stat().st_size < 20_000


def first_cell():
    nbformat = pytest.importorskip("nbformat")
    return next(cell.source for cell in nbformat.read(NOTEBOOK, 4).cells if cell.cell_type == "code")


def test_inside_a_clone_nothing_is_to_be_said(monkeypatch):
    monkeypatch.delenv("EARTHLOC_REPOSITORY", raising=False)
    monkeypatch.setattr(sys, "path", sys.path[:])
    monkeypatch.chdir(NOTEBOOK.parent)
    exec(first_cell(), {})
    assert Path.cwd() == NOTEBOOK.parents[1] and sys.path[0] == str(NOTEBOOK.parents[1])


def test_elsewhere_the_repository_is_cloned_from_the_address_that_is_given(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path[:])
    monkeypatch.delenv("EARTHLOC_REPOSITORY", raising=False)
    with pytest.raises(ValueError, match="EARTHLOC_REPOSITORY"):
        exec(first_cell(), {})
    commands = []
    monkeypatch.setattr(
        subprocess, "run", lambda command, check: commands.append(command) or Path("earthloc").mkdir(exist_ok=True)
    )
    monkeypatch.setenv("EARTHLOC_REPOSITORY", "https://host/x.git")
    exec(first_cell(), {})
    assert commands[0][-2:] == ["https://host/x.git", "earthloc"] and commands[1][1:4] == ["-m", "pip", "install"]
    assert Path.cwd() == tmp_path / "earthloc"


@pytest.mark.slow
def test_it_runs_offline_and_finds_the_photo(monkeypatch):
    nbformat = pytest.importorskip("nbformat")
    executors = pytest.importorskip("nbconvert.preprocessors")
    pytest.importorskip("ipykernel")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    notebook = nbformat.read(NOTEBOOK, 4)
    executors.ExecutePreprocessor(timeout=250).preprocess(notebook, {"metadata": {"path": NOTEBOOK.parent}})
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    printed = "".join(output.get("text", "") for output in outputs)
    pictures = [output for output in outputs if "image/png" in output.get("data", {})]
    (away,) = re.findall(r"the first is (\d+) km from the truth", printed)
    assert int(away) < 200 and len(pictures) == 3 and printed.count("up is") == 3
