"""Exported files describe as the model does, whatever the number of images."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

from experiments import export as script
from models.config import ModelConfig
from models.earthloc import EarthLoc, load_model
from models.weights import save_safetensors
from utils.flags import call

CONFIG = ModelConfig("resnet18", "conv1", "none", "mixvpr", 16, 32, {"mix_depth": 1})
SHIPPED = Path(__file__).parents[1] / "weights"


def export_all(weights, folder):
    """-> model and folder of its exports."""
    argv = [str(weights), str(folder / "out"), "--format", "safetensors", "onnx", "torch_export"]
    written = call(script.main, argv)
    assert [path.name for path in written] == ["out.safetensors", "out.onnx", "out.pt2"]
    return load_model(weights).eval(), folder


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported")
    torch.manual_seed(0)
    model = EarthLoc(CONFIG)
    for module in model.modules():  # what BatchNorm learned must be in the files, too
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(), module.running_var.uniform_(0.5, 2)
    save_safetensors(model, folder / "weights.safetensors", half=False)
    return export_all(folder / "weights.safetensors", folder)


def images_of(count, size=32):
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(count))


@torch.no_grad()
def onnx_session(model, folder):
    """-> the file's session, and by how much it describes otherwise than the model does."""
    runtime, size = pytest.importorskip("onnxruntime"), model.config.image_size
    session, errors = runtime.InferenceSession(folder / "out.onnx", providers=["CPUExecutionProvider"]), []
    for count in (1, 2, 5):
        (found,) = session.run(["descriptors"], {"images": images_of(count, size).numpy()})
        expected = model(images_of(count, size)).numpy()
        assert found.shape == expected.shape
        errors.append(np.abs(found - expected).max())
    return session, np.max(errors)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["earth", "earth_ensemble"])
def test_the_shipped_weights_export(name, tmp_path):
    _, error = onnx_session(*export_all(SHIPPED / f"{name}.safetensors", tmp_path))
    assert error < 1e-4


def test_onnx_runs_elsewhere_with_any_number_of_images(exported):
    session, error = onnx_session(*exported)
    assert error < 1e-4
    told = session.get_modelmeta().custom_metadata_map
    assert json.loads(told["image_size"]) == 32 and json.loads(told["descriptor_dim"]) == 16
    assert json.loads(told["std"]) == [0.229, 0.224, 0.225] and "RGB in [0, 1]" in told["input"]


@torch.no_grad()
def test_torch_export_loads_without_our_code(exported):
    model, folder = exported
    extra = {"interface.json": ""}
    loaded = torch.export.load(folder / "out.pt2", extra_files=extra).module()
    for count in (1, 2, 5):
        assert (loaded(images_of(count)) - model(images_of(count))).abs().max() < 1e-4
    assert json.loads(extra["interface.json"])["mean"] == [0.485, 0.456, 0.406]


@torch.no_grad()
def test_half_precision_safetensors_tell_what_they_take(exported):
    model, folder = exported
    with safe_open(folder / "out.safetensors", framework="pt") as file:
        told = json.loads(file.metadata()["interface"])
        assert file.get_tensor("fc.weight").dtype == torch.float16
    assert told["output"] == "float32 (batch, 16), of unit length"
    assert (load_model(folder / "out.safetensors").eval()(images_of(3)) * model(images_of(3))).sum(1).min() > 0.999


def test_the_ending_says_the_format_and_hub_makes_a_folder(exported, tmp_path, capsys):
    _, folder = exported
    assert script.targets(tmp_path / "a.b", ["onnx", "hub"]) == {"onnx": tmp_path / "a.b.onnx", "hub": tmp_path / "a.b"}
    assert script.targets(tmp_path / "a.pt2", None) == {"torch_export": tmp_path / "a.pt2"}
    with pytest.raises(ValueError, match="say --format"):
        script.targets(tmp_path / "a", None)
    call(script.main, [str(folder / "out.safetensors"), str(tmp_path / "hub"), "--format", "hub"])
    assert EarthLoc.from_pretrained(tmp_path / "hub").config == load_model(folder / "out.safetensors").config
    assert (tmp_path / "hub" / "README.md").is_file()
    assert "(batch, 3, 32, 32), RGB in [0, 1]" in capsys.readouterr().out


def test_a_missing_package_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(RuntimeError, match="onnxscript is not installed; pip install onnx onnxscript"):
        script.export(EarthLoc(CONFIG), tmp_path / "a.onnx", "onnx")
    assert not list(tmp_path.iterdir())
