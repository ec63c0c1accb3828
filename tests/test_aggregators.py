"""An aggregator of one's own, as the README shows it: a class and its line in the dict."""

import re
from pathlib import Path

import pytest
import torch
from torch import nn

import train
from models.aggregators import AGGREGATORS
from models.backbone import Backbone
from models.config import ModelConfig
from models.earthloc import EarthLoc, load_model
from utils.checkpoint import load_checkpoint

torch.set_num_threads(1)
README = Path(__file__).parents[1] / "README.md"


@pytest.fixture
def power_token(monkeypatch):
    """The README's class under the README's name."""
    section = README.read_text().split("## Your own idea")[1]
    code = re.search(r"```python\n(.*?)```", section, re.S)[1]
    namespace = {}
    exec(code, namespace)
    name, cls = re.search(r'`"(\w+)": (\w+)` in `AGGREGATORS`', section).groups()
    monkeypatch.setitem(AGGREGATORS, name, namespace[cls])
    return name


def test_the_readmes_aggregator_is_trained_by_flags_alone(power_token, world, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    flags = [
        "--backbone",
        "resnet18",
        "--weights",
        "none",
        "--cut_after",
        "layer1",
        "--descriptor_dim",
        "16",
        "--image_size",
        "32",
        "--num_workers",
        "0",
        "--device",
        "cpu",
        "--precision",
        "fp32",
        "--iterations",
        "1",
        "--recluster_every",
        "1",
        "--batch_size",
        "4",
        "--num_clusters",
        "3",
        "--augmentation",
        "none",
    ]
    folder = train.main(
        train.parse_arguments(
            ["--dataset_path", str(world.path), "--aggregator", power_token, "--token_dim", "3", *flags]
        )
    )
    state = load_checkpoint(folder / "last.pt")
    assert state["model_config"]["aggregator_settings"] == {"power": 0.5, "token_dim": 3}
    before = load_checkpoint(folder / "initial.pt")["model"]["aggregator.project.weight"]
    assert before.shape == (3, 64) and not torch.equal(state["model"]["aggregator.project.weight"], before)
    model = load_model(folder / "last.pt").eval()
    assert torch.equal(model.aggregator.project.weight, state["model"]["aggregator.project.weight"])
    assert model.aggregator.power == 0.5
    with pytest.raises(SystemExit):
        train.parse_arguments(["--help"])
    assert "power_token: of the mean (default: 0.5)" in " ".join(capsys.readouterr().out.split())


def test_an_aggregator_that_names_the_token_gets_it(monkeypatch):
    class Token(nn.Module):
        def __init__(self, channels, height, width):
            super().__init__()
            self.out_dim, self.size = channels, (channels, height, width)

        def forward(self, x, token):
            assert x.shape[1:] == self.size
            return token

    monkeypatch.setitem(AGGREGATORS, "token", Token)
    images = torch.rand(2, 3, 32, 32)
    for name in ("vit_tiny_patch16_224", "resnet18"):
        torch.manual_seed(0)
        model = EarthLoc(ModelConfig(name, aggregator="token", descriptor_dim=8, image_size=32)).eval()
        torch.manual_seed(0)
        backbone = Backbone(name).eval()
        normalised = (images - torch.tensor(backbone.mean)[:, None, None]) / torch.tensor(backbone.std)[:, None, None]
        torch.testing.assert_close(model.aggregate(images), backbone.features_and_token(normalised)[1])


@pytest.mark.parametrize(
    "name, size", [("convnext_atto", 64), ("vit_tiny_patch16_224", 48), ("efficientnet_lite0", 64)]
)
@pytest.mark.parametrize("aggregator", AGGREGATORS)
def test_any_backbone_goes_with_any_aggregator(name, size, aggregator):
    small = {"salad": {"salad_clusters": 5}, "netvlad": {"vlad_clusters": 4}, "boq": {"boq_channels": 16}}
    model = EarthLoc(ModelConfig(name, None, None, aggregator, 8, size, small.get(aggregator, {})))
    descriptors = model(torch.rand(2, 3, size, size))
    assert descriptors.shape == (2, 8)
    (descriptors * torch.randn(8)).sum().backward()
    assert all(each.grad is not None for each in model.parameters())
