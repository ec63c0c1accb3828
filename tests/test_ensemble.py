"""Several models as one: what it gives, its file, and what can't be put together."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from experiments import ensemble, whiten
from models.config import EnsembleConfig, ModelConfig
from models.earthloc import EarthLoc, Ensemble, build_model, load_model
from models.weights import interface, save_safetensors, weights_fingerprint
from retrieval.locator import EARTH_INDEX, INDEX_WEIGHTS, SHIPPED, default_weights, open_index
from utils.flags import call

MIXVPR = ModelConfig("resnet18", "conv1", "none", "mixvpr", 16, 32, {"mix_depth": 1})
GEM = ModelConfig("resnet18", "layer1", "none", "gem", 8, 32)
SMALLER = ModelConfig("resnet18", "layer1", "none", "gem", 8, 64)


@pytest.fixture
def files(tmp_path, monkeypatch):
    """Weights of three models, in the current folder."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    for name, config in (("a", MIXVPR), ("b", GEM), ("other", SMALLER)):
        save_safetensors(EarthLoc(config), f"{name}.safetensors")


def images():
    return torch.rand(5, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def test_similarity_is_the_mean_of_the_members(files, capsys):
    call(ensemble.main, ["new/both.safetensors", "a.safetensors", "b.safetensors"])
    both = load_model("new/both.safetensors").eval()
    assert isinstance(both, Ensemble) and (both.config.image_size, both.config.descriptor_dim) == (32, 24)
    assert "resnet18 mixvpr 16 + resnet18 gem 8" in capsys.readouterr().out
    found = both(images()).double().numpy()
    a, b = (load_model(f"{name}.safetensors").eval()(images()).double().numpy() for name in "ab")
    assert found.shape == (5, 24)
    for i in range(5):
        for j in range(5):
            assert found[i] @ found[j] == pytest.approx((a[i] @ a[j] + b[i] @ b[j]) / 2, abs=1e-6)
    assert np.ptp((a @ a.T - b @ b.T)[0]) > 0.01  # the members do not agree, so the mean says something


def test_it_is_saved_and_published_as_one_model_is(files):
    both = call(ensemble.main, ["both.safetensors", "a.safetensors", "b.safetensors"])
    both.save_pretrained("hub")
    card = (Path("hub") / "README.md").read_text()
    assert "resnet18 mixvpr 16 + resnet18 gem 8" in card and "| aggregator | mixvpr | gem |" in card
    loaded = EarthLoc.from_pretrained("hub")
    assert loaded.config == both.config and not loaded.training
    assert (
        weights_fingerprint(loaded) == weights_fingerprint(both) == weights_fingerprint(load_model("both.safetensors"))
    )
    save_file(load_file("hub/model.safetensors"), "hub/model.safetensors")  # its metadata are lost
    assert EarthLoc.from_pretrained("hub").config == both.config


def test_its_interface_tells_each_normalisation_where_they_differ():
    same = interface(Ensemble(EnsembleConfig((MIXVPR, GEM))))
    assert same["mean"] == [0.485, 0.456, 0.406] and same["output"] == "float32 (batch, 24), of unit length"
    lite = ModelConfig("efficientnet_lite0", None, "none", "gem", 8, 32)
    both = interface(Ensemble(EnsembleConfig((MIXVPR, lite))))
    assert both["std"] == [[0.229, 0.224, 0.225], [round(128 / 255, 6)] * 3]
    assert json.dumps(both)


@pytest.mark.parametrize(
    "names, message",
    [
        (["a"], "an ensemble of 1"),
        (["a", "other"], r"images of \[32, 64\] px"),
        (["a", "both"], "both.safetensors: is an ensemble itself"),
        (["a", "none"], "no weights at none.safetensors"),
    ],
)
def test_what_cannot_be_put_together(files, names, message):
    call(ensemble.main, ["both.safetensors", "a.safetensors", "b.safetensors"])
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        call(ensemble.main, ["out.safetensors", *(f"{name}.safetensors" for name in names)])
    with pytest.raises(ValueError, match="out.pt: expected a name that ends in .safetensors"):
        call(ensemble.main, ["out.pt", "a.safetensors", "b.safetensors"])
    assert not Path("out.safetensors").exists() and not Path("out.pt").exists()


def test_what_is_trained_is_one_model(files):
    call(ensemble.main, ["both.safetensors", "a.safetensors", "b.safetensors"])
    with pytest.raises(ValueError, match="both.safetensors: several models in one file; give the file of one"):
        build_model(MIXVPR, "both.safetensors")
    with pytest.raises(ValueError, match="both.safetensors: several models in one file; whiten each"):
        whiten.main("both.safetensors", Path("out.safetensors"), dataset_path="none")


def test_a_damaged_file_says_what_to_do(files):
    both = call(ensemble.main, ["both.safetensors", "a.safetensors", "b.safetensors"])
    state = both.state_dict()
    save_file(state, "bare.safetensors")
    with pytest.raises(ValueError, match="without their config; make it again"):
        load_model("bare.safetensors")
    del both.members[1].fc
    save_safetensors(both, "both.safetensors")
    with pytest.raises(ValueError, match=r"(?s)2 missing: members\.1\.fc.*python -m experiments.ensemble"):
        load_model("both.safetensors")


def test_what_ships_is_made_of_what_ships():
    both = load_model(INDEX_WEIGHTS)
    for member, name in zip(both.members, ("earth", "earth_salad"), strict=True):
        assert weights_fingerprint(member) == weights_fingerprint(load_model(SHIPPED / f"{name}.safetensors"))
    assert len(open_index(EARTH_INDEX, both, INDEX_WEIGHTS, None)) > 40_000  # refused if others had made it
    assert default_weights(None) == INDEX_WEIGHTS and default_weights("data").name == "earth.safetensors"
