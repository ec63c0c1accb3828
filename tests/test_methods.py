"""Published methods without their weights: networks of random ones under the published names, a hub repo that is made
here, no network, and a method of one's own."""

import csv
import json
import sys
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch
import torchvision
from torch import nn
from torch.nn import functional as F

import eval
from methods import METHODS, Described, anyloc, fetch, load_method, netvlad
from methods.uav import unprefixed
from models.config import ModelConfig
from models.earthloc import EarthLoc

torch.set_num_threads(1)
HUB = ("sfrs", "salad", "boq", "megaloc")
DIMS = {
    "netvlad": 4096,
    "cosplace": 2048,
    "convap": 4096,
    "mixvpr": 4096,
    "eigenplaces": 2048,
    "anyloc": 49152,
    "torchgeo_moco": 2048,
    "torchgeo_seco": 2048,
    "torchgeo_gassl": 2048,
    "torchgeo_earthloc": 4096,
    "ogcl_convnext": 3072,
    "ogcl_vit": 1024,
    "mbeg": 1024,
}
HUBCONF = """
from models import Net
import utils

assert utils.SIDE == 3  # not ours
"""
OF_THE_REPO = """
import torch

class Net(torch.nn.Module):
    def __init__(self, pair):
        super().__init__()
        self.pair = pair
        self.weight = torch.nn.Parameter(torch.ones(3))

    def forward(self, images):
        found = images.mean(dim=(2, 3)) * self.weight
        return (found, None) if self.pair else found
"""
ENTRIES = """
def vgg16_netvlad(pretrained):
    assert pretrained
    return Net(False)

def dinov2_salad():
    return Net(False)

def get_trained_boq(backbone_name, output_dim):
    assert (backbone_name, output_dim) == ("dinov2", 12288)
    return Net(True)

def get_trained_model():
    return Net(False)
"""
OWN = """
import torch
from torch import nn

class Quadrants(nn.Module):
    image_size = 16
    mean, std = (0.0, 0.0, 0.0), (0.5, 0.5, 0.5)
    seen = 0

    def prepare(self, batches):
        Quadrants.seen = sum(len(images) for images in batches)

    def describe(self, images):
        pooled = nn.functional.adaptive_avg_pool2d(images, 4).flatten(1)
        return pooled - pooled.mean(dim=1, keepdim=True)
"""


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise URLError("no network")

    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)
    monkeypatch.setattr(anyloc, "timm_model", refuse)
    monkeypatch.setattr(torch.hub, "load", refuse)


def normalised(images, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)):
    return (images - torch.tensor(mean).reshape(3, 1, 1)) / torch.tensor(std).reshape(3, 1, 1)


def test_all_of_the_papers_table_2_and_its_followers_are_there():
    assert METHODS.keys() == DIMS.keys() | set(HUB)
    assert all(cls.source and cls.licence for cls in METHODS.values())


@pytest.mark.parametrize("name", DIMS)
def test_networks_have_the_published_sizes(name):
    """On torch's meta device, where even a ConvNeXt-XXLarge takes no time."""
    with torch.device("meta"):
        method = METHODS[name]("none").eval()
        images = torch.empty(2, 3, method.image_size, method.image_size)
        if name == "anyloc":  # looks at its centres
            assert method.values(images).shape == (2, 23 * 23, 1536) and method.centers.numel() == DIMS[name]
        elif name in ("netvlad", "torchgeo_earthloc"):  # they switch autocast off, which knows no meta device
            assert (method.whiten if name == "netvlad" else method.net.fc).weight.shape[0] == DIMS[name]
        else:
            assert method.describe(images).shape == (2, DIMS[name])


def test_netvlads_network_runs():
    method = netvlad.NetVLAD("none", dim=5).eval()
    assert method.backbone[-1].out_channels == 512 and method.whiten.in_features == 64 * 512
    assert Described(method)(torch.rand(1, 3, 32, 32)).shape == (1, 5)


@pytest.mark.parametrize(
    "name, keys",
    [
        ("cosplace", {"backbone.0.weight", "backbone.7.2.conv3.weight", "aggregation.1.p", "aggregation.3.bias"}),
        ("eigenplaces", {"backbone.0.weight", "backbone.1.running_var", "aggregation.1.p", "aggregation.3.weight"}),
        (
            "mixvpr",
            {
                "backbone.model.conv1.weight",
                "backbone.model.layer3.5.bn3.bias",
                "aggregator.mix.3.mix.3.bias",
                "aggregator.channel_proj.weight",
                "aggregator.row_proj.bias",
            },
        ),
        ("convap", {"backbone.model.layer4.2.conv3.weight", "aggregator.channel_pool.weight"}),
        ("torchgeo_moco", {"net.conv1.weight", "net.layer4.2.bn3.running_mean"}),
    ],
)
def test_weights_have_the_published_names(name, keys):
    with torch.device("meta"):
        own = METHODS[name]("none").state_dict()
    assert keys <= own.keys()
    left = {"mixvpr": "layer3"}.get(name, "layer4")  # the last part that is kept
    with torch.device("meta"):
        whole = torchvision.models.resnet50().state_dict()
    count = sum(not key.startswith("fc.") and key.split(".")[0] <= left for key in whole)
    heads = {"cosplace": 3, "eigenplaces": 3, "mixvpr": 4 * 6 + 4, "convap": 2, "torchgeo_moco": 0}
    assert len(own) == count + heads[name]


def test_cosplace_is_generalised_mean_of_unit_features_then_linear(tmp_path):
    torch.manual_seed(0)
    method = METHODS["cosplace"]("none").eval()
    state = method.state_dict()
    state["aggregation.1.p"].fill_(2.5)
    torch.save(state, tmp_path / "cosplace.pth")
    loaded = load_method("cosplace", tmp_path / "cosplace.pth")
    images = torch.rand(2, 3, 64, 64)
    resnet = torchvision.models.resnet50()
    names = [name for name, _ in resnet.named_children()]
    resnet.load_state_dict(
        {
            f"{names[int(key.split('.')[1])]}.{key.split('.', 2)[2]}": value
            for key, value in state.items()
            if key.startswith("backbone.")
        }
        | {f"fc.{key}": value for key, value in resnet.fc.state_dict().items()}
    )
    with torch.no_grad():
        x = normalised(images)
        for name in names[:-2]:
            x = getattr(resnet.eval(), name)(x)
        features = x.double().numpy()
        expected = []
        for image in features.reshape(2, 2048, -1):
            unit = image / np.linalg.norm(image, axis=0)
            pooled = (np.maximum(unit, 1e-6) ** 2.5).mean(axis=1) ** (1 / 2.5)
            flat = (
                state["aggregation.3.weight"].double().numpy() @ pooled + state["aggregation.3.bias"].double().numpy()
            )
            expected.append(flat / np.linalg.norm(flat))
        np.testing.assert_allclose(loaded(images), expected, atol=2e-5)


def test_a_wrong_file_is_refused_with_its_misfits(tmp_path):
    torch.save({"aggregation.1.p": torch.ones(1), "stranger": torch.ones(2)}, tmp_path / "wrong.pth")
    with pytest.raises(ValueError, match="(?s)CosPlace does not fit.*missing.*unexpected: stranger"):
        load_method("cosplace", tmp_path / "wrong.pth")
    with pytest.raises(FileNotFoundError, match="no file .*gone.pth.*cosplace.pth"):
        load_method("cosplace", tmp_path / "gone.pth")


def toy_layers(rng):
    """A network of MatConvNet of one convolution (3 -> 2), NetVLAD of 4 centres and a whitening to 3."""
    layers = [[] for _ in range(34)]
    layers[0] = [rng.normal(size=(3, 3, 3, 2)).astype("f4"), rng.normal(size=2).astype("f4")]
    layers[30] = [rng.normal(size=(2, 4)).astype("f4"), rng.normal(size=(2, 4)).astype("f4")]
    layers[33] = [rng.normal(size=(1, 1, 8, 3)).astype("f4"), rng.normal(size=3).astype("f4")]
    return layers


def test_netvlad_of_the_authors_file_is_theirs():
    layers = toy_layers(np.random.default_rng(0))
    state = netvlad.from_matlab(layers)
    image = np.random.default_rng(1).normal(size=(3, 4, 5))
    kernel, bias = layers[0]
    features = np.array(
        [
            [
                [
                    (kernel[..., out].transpose(2, 0, 1) * image[:, i : i + 3, j : j + 3]).sum() + bias[out]
                    for j in range(3)
                ]
                for i in range(2)
            ]
            for out in range(2)
        ]
    )
    (assign, negative), (matrix, offset) = layers[30], layers[33]
    sums = np.zeros((2, 4))
    for feature in features.reshape(2, -1).T:
        feature = feature / np.linalg.norm(feature)
        scores = np.exp(assign.T @ feature)
        sums += scores / scores.sum() * (feature[:, None] + negative)
    sums /= np.linalg.norm(sums, axis=0)
    flat = sums.ravel() / np.linalg.norm(sums)  # over centres fastest
    expected = flat @ matrix[0, 0] + offset

    x = F.conv2d(torch.from_numpy(image)[None].float(), state["backbone.0.weight"], state["backbone.0.bias"])
    layer = netvlad.aggregators.NetVLAD(2, 1, 1, vlad_clusters=4)
    layer.load_state_dict({key[8:]: value for key, value in state.items() if key.startswith("netvlad.")})
    with torch.no_grad():
        found = layer(x) @ state["whiten.weight"].T + state["whiten.bias"]
    np.testing.assert_allclose(found[0], expected, atol=1e-5)


def test_matlabs_file_is_read_layer_by_layer(tmp_path):
    from scipy.io import savemat

    layers = toy_layers(np.random.default_rng(0))
    cells = np.empty(34, dtype=object)
    for i, weights in enumerate(layers):
        inner = np.empty(len(weights), dtype=object)
        inner[:] = weights
        cells[i] = {"type": "conv", "weights": inner} if weights else {"type": "relu"}
    savemat(tmp_path / "net.mat", {"net": {"layers": cells}})
    found = netvlad.read_matlab(tmp_path / "net.mat")
    assert [len(each) for each in found] == [len(each) for each in layers]
    expected = netvlad.from_matlab(layers)
    for key, value in netvlad.from_matlab(found).items():
        assert torch.equal(value, expected[key]), key
    (tmp_path / "net.mat").write_bytes(b"no such file")
    with pytest.raises(ValueError, match="net.mat: no file of the NetVLAD authors"):
        netvlad.read_matlab(tmp_path / "net.mat")


@pytest.mark.parametrize("name", HUB)
def test_a_hub_repo_at_hand_is_used(name, tmp_path):
    (tmp_path / "hubconf.py").write_text(HUBCONF + ENTRIES)
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "__init__.py").write_text(OF_THE_REPO)
    (tmp_path / "utils.py").write_text("SIDE = 3")
    before = {key: value for key, value in sys.modules.items() if key.split(".")[0] in ("models", "utils")}
    method = load_method(name, str(tmp_path))
    after = {key: value for key, value in sys.modules.items() if key.split(".")[0] in ("models", "utils")}
    assert before == after and "models.weights" in after
    images = torch.rand(2, 3, 16, 16)
    expected = normalised(images, *((method.method.mean, method.method.std) if name == "sfrs" else ())).mean((2, 3))
    torch.testing.assert_close(method(images), F.normalize(expected, dim=1))
    with pytest.raises(FileNotFoundError, match="has no hubconf.py.*a copy of"):
        load_method(name, str(tmp_path / "elsewhere"))
    with pytest.raises(ValueError, match="no --weights none"):
        load_method(name, "none")


def test_hub_repos_are_pinned_to_a_commit(monkeypatch):
    asked = []
    monkeypatch.setattr(torch.hub, "load", lambda repo, entry, **more: asked.append((repo, more)) or nn.Identity())
    for name in HUB:
        load_method(name)
    for repo, more in asked:
        owner, commit = repo.split(":")
        assert "/" in owner and len(commit) == 40 and int(commit, 16) and more["source"] == "github"
    assert len(asked) == 4


@pytest.mark.parametrize("name", METHODS)
def test_without_a_network_one_line_says_so(name, no_network, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with torch.device("meta"), pytest.raises(RuntimeError) as error:
        load_method(name)
    assert "could not be had from" in str(error.value) and "--weights PATH" in str(error.value)
    assert "\n" not in str(error.value) and [*tmp_path.rglob("*.pth")] == []


def test_a_page_in_place_of_a_file_is_not_kept(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(
        torch.hub, "download_url_to_file", lambda url, path, **more: Path(path).write_bytes(b"<html>too many</html>")
    )
    with pytest.raises(RuntimeError, match="what came is no such file"):
        fetch.state_of("It", "published", "https://example.org/it.pth")
    assert not (tmp_path / "checkpoints" / "it.pth").exists()


def test_what_was_fetched_once_is_not_fetched_again(no_network, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    torch.save({"state_dict": {"a": torch.ones(1)}}, tmp_path / "checkpoints" / "it.pth")
    assert fetch.state_of("It", "published", "https://example.org/it.pth?v=1") == {"a": torch.ones(1)}


def test_anyloc_is_hard_vlad_over_a_vocabulary_of_the_database():
    torch.manual_seed(0)
    method = anyloc.AnyLoc("none", backbone="vit_tiny_patch16_224", block=1, clusters=3).eval()
    images = torch.randn(4, 3, 64, 64)
    with pytest.raises(ValueError, match="no vocabulary"):
        method.describe(images)
    with torch.no_grad():
        method.prepare(iter([images[:2], images[2:]]))
        vit = method.vit
        x = vit.norm_pre(vit._pos_embed(vit.patch_embed(images)))
        x = vit.blocks[1].norm1(vit.blocks[0](x))
        linear = vit.blocks[1].attn.qkv
        values = (x @ linear.weight[2 * 192 :].T + linear.bias[2 * 192 :])[:, 1:].double().numpy()
        found = method.describe(images).numpy()
    values /= np.linalg.norm(values, axis=2, keepdims=True)
    centers = method.centers.double().numpy()
    assert np.isfinite(centers).all() and not np.allclose(centers[0], centers[1])
    for image, own in zip(values, found):
        sums = np.zeros((3, 192))
        for value in image:
            nearest = np.argmax(centers @ value / np.linalg.norm(centers, axis=1))
            sums[nearest] += value - centers[nearest]
        norms = np.linalg.norm(sums, axis=1, keepdims=True)
        expected = (sums / np.maximum(norms, 1e-12)).ravel()
        np.testing.assert_allclose(own, expected, atol=2e-4)


def test_torchgeos_files_load_with_and_without_their_classifier(tmp_path):
    torch.manual_seed(1)
    state = {
        key: torch.rand_like(value.float()) for key, value in METHODS["torchgeo_gassl"]("none").net.state_dict().items()
    }
    torch.save(state | {"fc.weight": torch.ones(2, 2048), "fc.bias": torch.ones(2)}, tmp_path / "r.pth")
    method = load_method("torchgeo_gassl", tmp_path / "r.pth").method
    assert torch.equal(method.net.layer4[2].conv3.weight, state["layer4.2.conv3.weight"])


def test_torchgeos_earthloc_is_ours_under_other_names(tmp_path):
    torch.manual_seed(0)
    settings = {"out_rows": 2, "mix_depth": 1}
    ours = EarthLoc(ModelConfig("resnet18", "layer2", "none", "mixvpr", 16, 32, settings)).eval()
    state = {key.replace("backbone.model.", "backbone."): value for key, value in ours.state_dict().items()}
    torch.save(state, tmp_path / "e.pth")
    method = load_method("torchgeo_earthloc", str(tmp_path / "e.pth"))
    images = torch.rand(2, 3, 32, 32)
    torch.testing.assert_close(method(images), ours(images))


def test_prefixes_are_taken_off():
    assert [unprefixed(key) for key in ("module.model.stem.0.weight", "backbone.model.a", "norm.bias")] == [
        "stem.0.weight",
        "a",
        "norm.bias",
    ]


def test_only_a_module_with_describe_and_a_size_is_a_method(tmp_path):
    class Half(nn.Module):
        image_size = 3

    for each, word in ((object(), "an nn.Module"), (Half(), "`describe`")):
        with pytest.raises(ValueError, match=word):
            Described(each)
    with pytest.raises(ValueError, match="--method nosuch: unknown; choose of netvlad"):
        load_method("nosuch")
    (tmp_path / "two.py").write_text("from torch import nn\n")
    with pytest.raises(ValueError, match="two.py: has 0 classes"):
        load_method(str(tmp_path / "two.py"))
    with pytest.raises(FileNotFoundError, match="gone.py"):
        load_method(str(tmp_path / "gone.py"))


def arguments(world, *more):
    flags = "--num_workers 0 --device cpu --precision fp32 --descriptors none".split()
    return eval.parse_arguments(["--dataset_path", str(world.path), *flags, *more])


def test_a_method_of_ones_own_is_evaluated_and_told(world, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(OWN)
    args = arguments(world, "--method", "mine.py", "--results", "r/results.csv")
    result = eval.main(args)
    assert result.average()[1] > 50  # turned photos of these very pictures
    eval.main(args)
    lines = [*csv.DictReader(open("r/results.csv"))]
    assert [line["method"] for line in lines] == ["mine.py"] * 2
    assert float(lines[0]["average R@1"]) == pytest.approx(result.average()[1], abs=0.006)
    assert float(lines[0]["Texas R@10"]) == pytest.approx(result["Texas"].recalls[10], abs=0.006)
    assert lines[0]["dataset"] == str(world.path) and lines[0]["Amazon R@1"] == "" and lines[0]["tta"] == "4x90"
    (stored, _) = sorted(Path("logs/eval").glob("*/results.json"))
    assert json.loads(stored.read_text())["model"] == "mine.py"


def test_of_several_methods_one_that_cannot_be_had_is_left_out(world, tmp_path, monkeypatch, no_network):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    Path("mine.py").write_text(OWN)
    Path("also.py").write_text(OWN)
    with pytest.raises(RuntimeError, match="1 of 3 methods are left out: megaloc"):
        eval.main(arguments(world, "--method", "mine.py", "megaloc", "also.py", "--results", "results.csv"))
    assert [line["method"] for line in csv.DictReader(open("results.csv"))] == ["mine.py", "also.py"]
    assert sorted(path.parent.name for path in Path("logs/eval").glob("*/*/results.json")) == ["also", "mine"]
    with pytest.raises(ValueError, match="--method and --resume"):
        eval.main(arguments(world, "--method", "mine.py", "--resume", "x.pt"))
    with pytest.raises(ValueError, match="--weights f.pth: fits one --method"):
        eval.main(arguments(world, "--method", "mine.py", "also.py", "--weights", "f.pth"))


def test_a_method_sees_a_sample_of_the_database(world, tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(OWN)
    method = load_method(str(tmp_path / "mine.py"))
    data = eval.load_evaluation_data(world.path)
    batches = [*eval.database_sample(data, method.image_size, 5, 0, "cpu", count=12)]
    assert [each.shape for each in batches] == [(5, 3, 16, 16), (5, 3, 16, 16), (2, 3, 16, 16)]
    assert 0 <= min(each.min() for each in batches) and max(each.max() for each in batches) <= 1
    method.prepare(iter(batches))
    assert method.method.seen == 12
