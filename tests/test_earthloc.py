from dataclasses import asdict, replace

import numpy as np
import pytest
import torch

from models.config import ModelConfig
from models.earthloc import EarthLoc, build_model

torch.set_num_threads(1)

TINY = ModelConfig("resnet18", descriptor_dim=32, image_size=64, aggregator_settings={"mix_depth": 2})
TINY_GEM = replace(TINY, aggregator="gem", aggregator_settings={"gem_grid": 2})
TINY_LITE = ModelConfig("efficientnet_lite0", cut_after="blocks2", descriptor_dim=16, image_size=64)


def tiny(config=TINY, seed=0):
    torch.manual_seed(seed)
    return build_model(config, weights="none")


@pytest.fixture(scope="module")
def images():
    """Smooth random pictures: noise alone gives every network the same features."""
    coarse = torch.rand(24, 3, 5, 5, generator=torch.Generator().manual_seed(1))
    return torch.nn.functional.interpolate(coarse, (64, 64), mode="bicubic").clamp(0, 1)


def test_default_is_the_papers_model():
    with torch.device("meta"):
        model = EarthLoc(ModelConfig(freeze_until="layer2"))
        features = model.aggregate(torch.empty(2, 3, 320, 320))
    shapes = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    assert features.shape == (2, 4096)
    assert shapes["aggregator.mix.3.mix.1.weight"] == (400, 400)
    assert shapes["aggregator.channel_proj.weight"] == (1024, 1024)
    assert shapes["aggregator.row_proj.weight"] == (4, 400)
    assert shapes["fc.weight"] == (4096, 4096)
    assert model.backbone.frozen == ("conv1", "layer1", "layer2")


def test_state_dict_has_the_released_names_and_nothing_else():
    prefixes = ("backbone.model.conv1.", "backbone.model.bn1.", "backbone.model.layer")
    prefixes += ("aggregator.mix.", "aggregator.channel_proj.", "aggregator.row_proj.", "fc.")
    keys = list(tiny().state_dict())
    assert all(key.startswith(prefixes) for key in keys)
    assert all(any(key.startswith(prefix) for key in keys) for prefix in prefixes)


@pytest.mark.parametrize("config", [TINY, TINY_GEM, TINY_LITE], ids=["mixvpr", "gem", "lite0"])
def test_descriptors_have_unit_length(config, images):
    with torch.no_grad():
        descriptors = tiny(config).eval()(images[:3])
    assert descriptors.shape == (3, config.descriptor_dim) and descriptors.dtype == torch.float32
    torch.testing.assert_close(descriptors.norm(dim=1), torch.ones(3))


@pytest.mark.parametrize(
    "config",
    [TINY, TINY_LITE, *(replace(TINY_LITE, backbone=f"efficientnet_lite{digit}") for digit in (1, 2))],
    ids=["resnet", "lite0", "lite1", "lite2"],
)
def test_images_are_normalised_inside(config, images):
    model = tiny(config).eval()
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    if config is not TINY:
        mean, std = (127 / 255,) * 3, (128 / 255,) * 3
    normalised = torch.stack([(images[:2, c] - mean[c]) / std[c] for c in range(3)], dim=1)
    with torch.no_grad():
        torch.testing.assert_close(model.aggregate(images[:2]), model.aggregator(model.backbone(normalised)))


@pytest.mark.parametrize("config", [TINY, TINY_GEM, TINY_LITE], ids=["mixvpr", "gem", "lite0"])
def test_bf16_channels_last_describes_as_float32_does(config, images):
    model = tiny(config).eval()
    with torch.no_grad():
        exact = model(images[:4])
        model = model.to(memory_format=torch.channels_last)
        torch.testing.assert_close(model(images[:4].to(memory_format=torch.channels_last)), exact, rtol=0, atol=1e-4)
        with torch.autocast("cpu", torch.bfloat16):
            low = model(images[:4].to(memory_format=torch.channels_last))
    assert low.dtype == torch.float32
    assert (low * exact).sum(1).min() > 0.99


def test_weights_none_freezes_nothing_and_says_so():
    model = tiny()
    assert model.config.freeze_until == "none" and model.backbone.frozen == ()
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_freezing_what_was_never_trained_is_an_error():
    with pytest.raises(ValueError, match="--freeze_until layer1 with --weights none"):
        build_model(replace(TINY, freeze_until="layer1"), weights="none")


def test_imagenet_weights_freeze_up_to_stride_8():
    model = build_model(ModelConfig("efficientnet_lite0", descriptor_dim=16, image_size=64), weights="imagenet")
    assert model.config.cut_after == "blocks4" and model.config.freeze_until == "blocks2"
    assert not model.backbone.model.blocks[2].training and model.backbone.model.blocks[3].training


@pytest.mark.parametrize("frozen_batchnorm", ["fixed", "adapt"])
def test_averages_of_frozen_stages_move_if_they_are_to_adapt(frozen_batchnorm, images):
    torch.manual_seed(0)
    model = EarthLoc(replace(TINY, freeze_until="layer1", frozen_batchnorm=frozen_batchnorm))
    norm = model.backbone.model.layer1[1].bn2
    with torch.no_grad():
        model.train()(images)
    assert (norm.running_mean != 0).all() == (norm.running_var != 1).all() == (frozen_batchnorm == "adapt")


def test_config_with_its_defaults_filled_in_builds_the_same_model():
    for config in (TINY, replace(TINY, freeze_until="conv1"), TINY_GEM):
        model = EarthLoc(config)
        again = EarthLoc(ModelConfig(**asdict(model.config)))
        assert again.config == model.config and again.backbone.frozen == model.backbone.frozen


@pytest.mark.parametrize(
    "change, words",
    [
        ({"backbone": "resnet19"}, ["--backbone resnet19", "resnet18"]),
        ({"backbone": "no_such"}, ["--backbone no_such", "resnet50"]),
        ({"backbone": "swin_tiny_patch4_window7_224"}, ["--backbone swin_tiny", "neither a ViT nor a CNN"]),
        ({"frozen_batchnorm": "off"}, ["--frozen_batchnorm off", "fixed, adapt"]),
        ({"cut_after": "layer9"}, ["--cut_after layer9"]),
        ({"freeze_until": "layer4"}, ["--freeze_until layer4", "--cut_after layer3"]),
        ({"aggregator": "no_such"}, ["--aggregator no_such", "mixvpr, gem"]),
        ({"descriptor_dim": 0}, ["--descriptor_dim 0"]),
        ({"descriptor_dim": 30}, ["--descriptor_dim 30", "--out_rows 4", "--mix_channels"]),
        ({"image_size": -1}, ["--image_size -1"]),
        ({"aggregator_settings": {"mix_channels": 0}}, ["--mix_channels 0"]),
        ({"aggregator_settings": {"mix_depth": -1}}, ["--mix_depth -1"]),
        ({"aggregator_settings": {"out_rows": 0}}, ["--out_rows 0"]),
        ({"aggregator_settings": {"gem_grid": 2, "power": 1}}, ["--gem_grid, --power", "--aggregator mixvpr"]),
        ({"aggregator": "gem", "aggregator_settings": {"gem_grid": 0}}, ["--gem_grid 0"]),
        ({"aggregator": "gem", "aggregator_settings": {"gem_grid": 5}}, ["--gem_grid 5", "4 x 4", "--image_size"]),
        ({"backbone": "vit_tiny_patch16_224", "image_size": 40}, ["--image_size 40", "multiple of 16", "32 or 48"]),
    ],
)
def test_bad_config_is_an_error_that_names_the_flag(change, words):
    with pytest.raises(ValueError) as error, torch.device("meta"):
        EarthLoc(replace(TINY, **change))
    assert all(word in str(error.value) for word in words)


@pytest.mark.parametrize("bad", [torch.zeros(1, 3, 64, 64, dtype=torch.uint8), torch.zeros(3, 64, 64)])
def test_images_that_are_no_float_batch_are_an_error(bad):
    with pytest.raises(ValueError, match="RGB in \\[0, 1\\]"):
        tiny()(bad)


def test_images_of_another_size_are_an_error_that_names_the_flag():
    with pytest.raises(ValueError, match="--image_size"):
        tiny()(torch.zeros(1, 3, 96, 96))


def skewed_features(n, f, seed=0):
    """Unit vectors that share a large mean and differ along few directions: what a fresh MixVPR gives."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=f) * 5 + rng.normal(size=(n, f)) * np.geomspace(1, 0.05, f) @ rng.normal(size=(f, f)) / f**0.5
    return torch.from_numpy(x / np.linalg.norm(x, axis=1, keepdims=True)).float()


def test_whitened_features_have_zero_mean_and_identity_covariance():
    model, features = tiny(), skewed_features(500, 32)
    assert model.whiten_(features, regulariser=0) == 32
    out = model.fc(features).detach().double().numpy()
    np.testing.assert_allclose(out.mean(0), 0, atol=1e-3)
    np.testing.assert_allclose(np.cov(out.T), np.eye(32), atol=1e-3)


@pytest.mark.parametrize("power, regulariser, std", [(1.0, 0.1, 1.0), (0.5, 0.01, 1.0), (0.0, 0.0, 0.02)])
def test_variances_after_whitening_are_those_of_the_formula(power, regulariser, std):
    model = tiny(replace(TINY, descriptor_dim=8, aggregator_settings={"mix_channels": 8}))
    features = skewed_features(500, 32)
    assert model.whiten_(features, power, regulariser, std) == 8
    variances = np.sort(np.linalg.eigvalsh(np.cov(features.double().numpy().T)))[::-1]
    expected = std**2 * variances[:8] / (variances[:8] + regulariser * variances.mean()) ** power
    covariance = np.cov(model.fc(features).detach().double().numpy().T)
    np.testing.assert_allclose(covariance, np.diag(expected), atol=2e-3 * expected.max())


def test_rows_beyond_the_rank_say_nothing_of_the_features_and_still_learn():
    model, features = tiny(), skewed_features(10, 32)
    assert model.whiten_(features, generator=torch.Generator().manual_seed(0)) == 9
    out = model.fc(features).detach()
    assert out[:, 9:].abs().max() < 1e-3 < out[:, :9].abs().max()
    lengths = model.fc.weight.detach().norm(dim=1)
    torch.testing.assert_close(lengths[9:], lengths[:9].min().expand(23))
    directions = model.fc.weight.detach() / lengths[:, None]
    torch.testing.assert_close(directions @ directions.T, torch.eye(32), atol=1e-5, rtol=0)
    gradient = torch.autograd.grad((model.fc(skewed_features(10, 32, seed=1)) ** 2).sum(), model.fc.weight)[0]
    assert (gradient.norm(dim=1) > 0).all()


def test_more_rows_than_features_are_filled():
    model = tiny(replace(TINY, descriptor_dim=48, aggregator_settings={"mix_channels": 8}))
    assert model.whiten_(skewed_features(100, 32)) == 32
    assert torch.isfinite(model.fc.weight).all() and (model.fc.weight.norm(dim=1) > 0).all()


def test_whitening_spreads_the_descriptors_of_a_fresh_model(images):
    """The plateau's cause: descriptors of different images start almost identical."""
    model = tiny().eval()

    def mean_cosine():
        with torch.no_grad():
            y = model(images)
        cosines = y @ y.T
        return float((cosines.sum() - cosines.trace()) / (len(y) * (len(y) - 1)))

    assert mean_cosine() > 0.9
    with torch.no_grad():
        model.whiten_(model.aggregate(images))
    assert abs(mean_cosine()) < 0.1


@pytest.mark.parametrize(
    "features, message",
    [
        (torch.zeros(5, 31), "N >= 2, 32"),
        (torch.zeros(1, 32), "N >= 2, 32"),
        (torch.full((5, 32), float("nan")), "nan"),
        (torch.ones(5, 32), "the same"),
    ],
)
def test_features_that_cannot_be_whitened_are_an_error(features, message):
    with pytest.raises(ValueError, match=message):
        tiny().whiten_(features)
