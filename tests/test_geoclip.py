"""GeoCLIP's model, its weights in all their forms, the loss and its queue."""

import json
import sys
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from losses.gps_contrastive import advance_queue, gps_cross_entropy, initial_queue, neutral_mask
from models.geoclip import GeoCLIP, GeoClipConfig, build_geoclip
from models.geoclip_weights import checkpoint_of, load_geoclip, load_location_encoder, read_geoclip
from models.location_encoder import LocationEncoder
from retrieval.geolocation import read_photo
from utils import geo
from utils.checkpoint import save_checkpoint

needs_package = pytest.mark.skipif(find_spec("geoclip") is None, reason="pip install --no-deps geoclip")
SMALL = GeoClipConfig("resnet18", cut_after="layer2", image_size=32, sigmas=(1.0,))


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    """A small random CLIP, both towers, as the hub holds it; projections of 768, as the published MLP wants."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.CLIPConfig(
        projection_dim=768,
        text_config=dict(
            hidden_size=16,
            intermediate_size=16,
            num_attention_heads=2,
            num_hidden_layers=1,
            projection_dim=768,
            vocab_size=64,
            bos_token_id=0,
            eos_token_id=2,
        ),
        vision_config=dict(
            hidden_size=16,
            intermediate_size=32,
            num_attention_heads=2,
            num_hidden_layers=2,
            image_size=56,
            patch_size=14,
            projection_dim=768,
        ),
    )
    folder = tmp_path_factory.mktemp("clip")
    transformers.CLIPModel(config).save_pretrained(folder)
    return folder


@torch.no_grad()
def test_clip_encoder_is_clips_image_features_and_the_mlp(clip_folder):
    transformers = pytest.importorskip("transformers")
    model = GeoCLIP(GeoClipConfig(clip=str(clip_folder))).eval()
    whole = transformers.CLIPModel.from_pretrained(clip_folder).eval()
    images = torch.rand(2, 3, 56, 56)
    mean, std = (
        torch.tensor(each).view(1, 3, 1, 1)
        for each in ([0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711])
    )
    features = whole.visual_projection(whole.vision_model((images - mean) / std).pooler_output)
    hidden = (features @ model.image_encoder.mlp[0].weight.T + model.image_encoder.mlp[0].bias).clamp(min=0)
    expected = hidden @ model.image_encoder.mlp[2].weight.T + model.image_encoder.mlp[2].bias
    assert torch.allclose(model.image_encoder(images), expected, atol=1e-5)
    assert model.embed_images(images).norm(dim=1).tolist() == pytest.approx([1, 1], abs=1e-5)


@pytest.mark.parametrize("shape", [(90, 60), (40, 120), (56, 56)])
def test_clips_own_preprocessing(tmp_path, shape):
    transformers = pytest.importorskip("transformers")
    pixels = np.kron(np.random.default_rng(0).integers(0, 256, (shape[1] // 4, shape[0] // 4, 3)), np.ones((4, 4, 1)))
    path = tmp_path / "photo.png"
    Image.fromarray(pixels.astype(np.uint8)).save(path)
    processor = transformers.CLIPImageProcessor(size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56})
    expected = processor(images=Image.open(path), return_tensors="pt")["pixel_values"][0]
    mean, std = torch.tensor(processor.image_mean), torch.tensor(processor.image_std)
    found = (read_photo(path, 56, "crop").float() / 255 - mean.view(3, 1, 1)) / std.view(3, 1, 1)
    assert (found - expected).abs().max() < 1.5 / 255 / 0.26  # one grey level: the two round differently


def test_clip_is_frozen_and_not_in_checkpoints(clip_folder):
    model = GeoCLIP(GeoClipConfig(clip=str(clip_folder))).train()
    assert not model.image_encoder.clip.training
    assert not any(p.requires_grad for p in model.image_encoder.clip.parameters())
    model(torch.rand(2, 3, 56, 56), torch.zeros(3, 2)).sum().backward()
    assert model.image_encoder.mlp[0].weight.grad is not None
    assert set(model.own_state()) == {
        "logit_scale",
        *(f"image_encoder.mlp.{i}.{kind}" for i in (0, 2) for kind in ("weight", "bias")),
        *(f"location_encoder.{key}" for key in LocationEncoder().state_dict()),
    }


def test_no_clip_says_what_to_do(tmp_path, monkeypatch):
    pytest.importorskip("transformers")
    with pytest.raises(RuntimeError, match="could not be loaded.*--clip FOLDER"):
        GeoCLIP(GeoClipConfig(clip=str(tmp_path)))
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(RuntimeError, match="pip install transformers.*efficientnet_lite0"):
        GeoCLIP(GeoClipConfig(clip=str(tmp_path)))


@needs_package
def test_published_weights_in_all_their_forms(clip_folder, tmp_path):
    """The package's three files, and a hub release made from them, give the same model."""
    from_package, gallery = load_geoclip("geoclip", clip=str(clip_folder))
    assert gallery is None and not any(name.split(".")[0] == "geoclip" for name in sys.modules)
    assert 10 < from_package.scale.item() < 100
    state, config, _ = read_geoclip("geoclip")
    save_file(state, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"sigma": [1, 16, 256], "model_type": "geoclip-geolocation"}))
    from_hub, _ = load_geoclip(tmp_path, clip=str(clip_folder))
    bare = {key.removeprefix("location_encoder."): value for key, value in state.items() if key.startswith("location")}
    save_file(bare, tmp_path / "bare.safetensors")
    images, points = torch.rand(2, 3, 56, 56), torch.tensor([[10.0, 20.0], [-30.0, 170.0], [48.0, 2.0]])
    with torch.no_grad():
        assert torch.equal(from_package(images, points), from_hub(images, points))
        for source in ("geoclip", tmp_path, tmp_path / "bare.safetensors"):
            assert torch.equal(load_location_encoder(source)(points), from_package.location_encoder(points))


def test_own_checkpoint_comes_back_whole(tmp_path):
    torch.manual_seed(0)
    model = build_geoclip(SMALL, "none").eval()
    gallery = np.array([[1.0, 2.0], [3.0, 4.0]], dtype=np.float32)
    save_checkpoint(tmp_path / "m.pt", checkpoint_of(model, gallery))
    loaded, points = load_geoclip(tmp_path / "m.pt")
    images, places = torch.rand(2, 3, 32, 32), torch.tensor([[5.0, 6.0]])
    with torch.no_grad():
        assert torch.equal(loaded(images, places), model(images, places))
    assert points.tolist() == gallery.tolist() and loaded.config == model.config


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda p: (p / "x.pt").write_bytes(b"junk"), "x.pt: truncated, or not written by torch.save"),
        (lambda p: torch.save({"weights": torch.zeros(1)}, p / "x.pt"), "x.pt: no checkpoint of train_geoclip.py"),
        (lambda p: save_file({"a": torch.zeros(1)}, p / "x.safetensors"), "holds no location encoder"),
        (lambda p: (p / "x.safetensors").write_bytes(b"junk"), "no safetensors file"),
        (lambda p: (p / "folder").mkdir(), "folder: neither model.safetensors nor location_encoder_weights.pth"),
        (lambda p: None, "no such weights.*geoclip for those"),
    ],
)
def test_other_files_are_refused(tmp_path, make, message):
    make(tmp_path)
    path = next(iter(tmp_path.iterdir()), tmp_path / "nothing.pt")
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        load_geoclip(path)


def test_weights_of_another_shape(tmp_path):
    state = checkpoint_of(build_geoclip(SMALL, "none"), np.zeros((1, 2)))
    state["geoclip_config"]["gem_grid"] = 2
    save_checkpoint(tmp_path / "m.pt", state)
    with pytest.raises(ValueError, match="of another shape: image_encoder.mlp.0.weight, image_encoder.norm"):
        load_geoclip(tmp_path / "m.pt")


def test_backbone_of_a_trained_earthloc(tmp_path):
    from models.config import ModelConfig
    from models.earthloc import EarthLoc

    earthloc = EarthLoc(ModelConfig("resnet18", "layer2", "none", "gem", 16, 32))
    torch.save(earthloc.state_dict(), tmp_path / "earthloc.pt")
    model = build_geoclip(SMALL, tmp_path / "earthloc.pt")
    assert torch.equal(model.image_encoder.backbone.model.conv1.weight, earthloc.backbone.model.conv1.weight)
    assert model.config.freeze_until == "layer2"


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"image_encoder": "vgg"}, "--image_encoder vgg"),
        ({"sigmas": ()}, "--sigmas"),
        ({"sigmas": (1, -1)}, "--sigmas"),
        ({"image_size": 224}, "--image_size: CLIP"),
        ({"image_encoder": "resnet18", "cut_after": "blocks1"}, "--cut_after"),
        ({"image_encoder": "resnet18", "image_size": 0}, "--image_size 0"),
        ({"image_encoder": "resnet18", "gem_grid": 0}, "--gem_grid 0"),
    ],
)
def test_configs_that_cannot_be(fields, message):
    with pytest.raises(ValueError, match=message):
        GeoClipConfig(**fields)


def test_scale_is_clamped_and_can_come_back():
    model = build_geoclip(SMALL, "none")
    assert model.scale.item() == pytest.approx(1 / 0.07)
    with torch.no_grad():
        model.logit_scale.fill_(9.0)
    assert model.scale.item() == 100
    model.clamp_scale_()
    assert model.logit_scale.exp().item() == pytest.approx(100, rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_loss_at_scale_100_is_finite_in_low_precision(dtype):
    torch.manual_seed(0)
    model = build_geoclip(SMALL, "none").train()
    with torch.no_grad():
        model.logit_scale.fill_(np.log(100))
    points = torch.rand(300, 2) * 90
    with torch.autocast("cpu", dtype):
        logits = model(torch.rand(8, 3, 32, 32), points)
    assert logits.dtype == torch.float32 and 100 * 0.99 < model.scale.item() <= 100
    loss = gps_cross_entropy(logits * 10, torch.arange(8))  # ten times beyond what can come
    loss.backward()
    assert torch.isfinite(loss)
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_loss_by_loops():
    rng = np.random.default_rng(0)
    logits, targets = rng.normal(0, 3, (4, 9)), [2, 0, 1, 3]
    neutral = rng.uniform(size=(4, 9)) < 0.4
    readable = [True, True, False, True]
    total = 0.0
    for i in range(4):
        kept = [j for j in range(9) if j == targets[i] or not neutral[i, j]]
        if readable[i]:
            total += np.log(sum(np.exp(logits[i, j]) for j in kept)) - logits[i, targets[i]]
    found = gps_cross_entropy(*map(torch.tensor, (logits, targets, neutral, readable)))
    assert found.item() == pytest.approx(total / 4, rel=1e-5)


def test_queue_is_first_in_first_out():
    queue = np.arange(10, dtype=float).reshape(5, 2)
    assert advance_queue(queue, np.array([[90.0, 91.0]])).tolist() == [[2, 3], [4, 5], [6, 7], [8, 9], [90, 91]]
    batch = np.arange(100, 114, dtype=float).reshape(7, 2)
    assert advance_queue(queue, batch).tolist() == batch[-5:].tolist()  # a batch larger than the queue
    assert len(advance_queue(np.zeros((0, 2)), batch)) == 0
    assert queue[0, 0] == 0  # untouched


def test_queue_starts_with_real_places():
    points = np.array([[10.0, 20.0], [-30.0, 40.0], [50.0, -60.0]])
    queue = initial_queue(points, 64, np.random.default_rng(0))
    assert queue.shape == (64, 2) and {tuple(each) for each in queue} == {tuple(each) for each in points}
    few = initial_queue(points, 2, np.random.default_rng(0))
    assert len(np.unique(few, axis=0)) == 2  # nothing twice where there is enough
    with pytest.raises(ValueError, match="training coordinates"):
        initial_queue(np.zeros((0, 2)), 4, np.random.default_rng(0))


@pytest.mark.parametrize("km", [0, 5, 900, 30_000])
def test_neutral_by_distance(km):
    rng = np.random.default_rng(0)
    points, candidates = rng.uniform((-90, -180), (90, 180), (2, 60, 2))
    candidates[:5] = points[:5] + 0.01
    expected = [[geo.distance_km(a, b) < km for b in candidates] for a in points]
    assert neutral_mask(points, candidates, km).tolist() == expected
