"""docs/models.md says what there is."""

import re
from pathlib import Path

import pytest
import torch

from losses import LOSSES
from methods import METHODS, load_method
from models.aggregators import AGGREGATORS
from models.backbone import LITE_PACKAGES, Backbone
from models.config import ModelConfig
from models.earthloc import EarthLoc
from utils.settings import settings_of

TEXT = (Path(__file__).parents[1] / "docs" / "models.md").read_text()
REQUIREMENTS = (Path(__file__).parents[1] / "requirements.txt").read_text()


def test_all_names_and_the_losses_settings_are_there():
    for name in (*AGGREGATORS, *LOSSES, *METHODS):
        assert f"`{name}`" in TEXT or f"`{name.replace('torchgeo_gassl', '_gassl')}`" in TEXT, name
    for loss in LOSSES.values():
        assert all(f"--{name}" in TEXT for name in settings_of(loss))


@pytest.mark.parametrize("name", AGGREGATORS)
def test_weights_are_counted(name):
    with torch.device("meta"):
        model = EarthLoc(ModelConfig(aggregator=name))
    own, last = (sum(each.numel() for each in part.parameters()) / 1e6 for part in (model.aggregator, model.fc))
    row = next(line for line in TEXT.splitlines() if line.startswith(f"| `{name}` |"))
    assert [float(each) for each in row.split(" | ")[3].split(" + ")] == pytest.approx([own, last], abs=0.051)


@pytest.mark.parametrize("name", LITE_PACKAGES)
def test_weights_of_a_lite_are_counted_and_its_package_is_named(name):
    with torch.device("meta"):
        weights = sum(each.numel() for each in Backbone(name).parameters())
    row = next(line for line in TEXT.splitlines() if line.startswith(f"| `{name}` |"))
    assert float(row.split(" | ")[1]) == pytest.approx(weights / 1e6, abs=0.0051)
    assert LITE_PACKAGES[name] in row or f"{LITE_PACKAGES[name]}==" in REQUIREMENTS


def test_the_example_runs(tmp_path):
    (tmp_path / "mine.py").write_text(re.search(r"```python\n(.*?)```", TEXT, re.S)[1])
    method = load_method(str(tmp_path / "mine.py"))
    assert method.image_size == 224 and method(torch.rand(2, 3, 8, 8)).shape == (2, 48)
