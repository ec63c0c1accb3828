"""The notebook runs here from beginning to end, and ships without outputs."""

import re
from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).parents[1] / "notebooks" / "locate.ipynb"


def test_it_ships_small_and_without_outputs():
    nbformat = pytest.importorskip("nbformat")
    notebook = nbformat.read(NOTEBOOK, 4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert code and not any(cell.outputs or cell.execution_count for cell in code)
    assert NOTEBOOK.stat().st_size < 20_000


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
