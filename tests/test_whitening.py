"""The whitening of what a trained model gives, by the covariance's own power in float64."""

import shutil

import numpy as np
import pytest
import torch

from datasets.images import read_image
from datasets.sets import read_database
from experiments import whiten
from models.config import ModelConfig
from models.earthloc import EarthLoc, load_model
from models.weights import save_safetensors
from models.whitening import whiten_outputs_
from utils.flags import call

DIM = 16


@pytest.fixture
def model():
    torch.manual_seed(0)
    return EarthLoc(ModelConfig("resnet18", "layer2", "none", "gem", DIM, 32)).eval()


@pytest.fixture
def features(model):
    """As they go into fc: (300, F), along few directions for the most part."""
    rng = np.random.default_rng(0)
    width = model.fc.in_features
    x = 0.3 * rng.normal(size=width) + rng.normal(size=(300, width)) * np.geomspace(1, 0.05, width)
    return torch.from_numpy(x).float()


def expected(outputs, power):
    """(N, D) float64: (C ** -power) (x - mean) of unit length. Turned otherwise than the model's: compare cosines."""
    centred = outputs - outputs.mean(axis=0)
    values, vectors = np.linalg.eigh(np.cov(centred.T))
    whitened = centred @ (vectors * values**-power) @ vectors.T
    return whitened / np.linalg.norm(whitened, axis=1, keepdims=True)


@torch.no_grad()
def cosines(model, features):
    found = torch.nn.functional.normalize(model.fc(features)).double().numpy()
    return found @ found.T


@pytest.mark.parametrize("power", [0, 0.25, 0.5])
def test_directions_count_by_their_variance(model, features, power):
    outputs = model.fc(features).detach()
    right = expected(outputs.double().numpy(), power)
    whiten_outputs_(model, outputs, power)
    np.testing.assert_allclose(cosines(model, features), right @ right.T, atol=1e-4)
    new = model.fc(features).detach().double().numpy()
    covariance = np.cov(new.T)
    assert np.abs(new.mean(axis=0)).max() < 1e-4 and (np.diff(np.diag(covariance)) < 1e-6).all()
    assert np.abs(covariance - np.diag(np.diag(covariance))).max() < 1e-3 * covariance.max()


def test_a_direction_without_variance_is_not_blown_up(model, features):
    with torch.no_grad():
        model.fc.weight[5] = 0
        before = model.fc.weight.norm()
        whiten_outputs_(model, model.fc(features), 0.5)
    assert torch.isfinite(model.fc.weight).all() and model.fc.weight.norm() < 1001 * before
    assert model.fc(features)[:, -1].abs().max() < 1e-2


@pytest.mark.parametrize(
    "outputs, message",
    [
        (torch.zeros(50, DIM + 1), f"of {DIM} values"),
        (torch.eye(DIM), f"more than {DIM} images"),
        (torch.full((50, DIM), torch.nan), "diverged"),
        (torch.ones(50, DIM), "the same"),
    ],
)
def test_outputs_that_cannot_be_whitened_are_an_error(model, outputs, message):
    before = model.fc.weight.clone()
    with pytest.raises(ValueError, match=message):
        whiten_outputs_(model, outputs, 0.25)
    assert torch.equal(model.fc.weight, before)


def test_the_command_whitens_by_the_images_it_can_read(world, model, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    save_safetensors(model, "plain.safetensors")
    shutil.copytree(world.path, "world")
    plain, database = load_model("plain.safetensors").eval(), read_database("world")
    broken, *paths = [database.root / path for path in database.paths]
    broken.write_bytes(b"no image")
    images = torch.from_numpy(np.stack([read_image(path, 32) for path in paths])).float() / 255
    with torch.no_grad():
        right = expected(plain.fc(plain.aggregate(images)).double().numpy(), 0.25)
    flags = ["--dataset_path", "world", "--num_workers", "0", "--device", "cpu"]
    call(whiten.main, ["plain.safetensors", "new/white.safetensors", *flags])
    assert f"whitened by {len(images)} images, 1 failed" in capsys.readouterr().out
    with torch.no_grad():
        found = load_model("new/white.safetensors").eval()(images).double().numpy()
    np.testing.assert_allclose(found @ found.T, right @ right.T, atol=0.02)  # in half precision


@pytest.mark.parametrize("flags, message", [(["--power", "2"], "2: expected 0 to 0.5"), (["--power", "nan"], "nan")])
def test_an_odd_power_is_refused_before_anything_is_read(flags, message, capsys):
    with pytest.raises(SystemExit):
        call(whiten.main, ["none.pt", "out.safetensors", "--dataset_path", "none", *flags])
    assert message in capsys.readouterr().err


def test_another_suffix_is_refused():
    with pytest.raises(ValueError, match="out.pt: .*safetensors"):
        whiten.main("none.pt", whiten.Path("out.pt"), dataset_path="none")
