"""What would go wrong on a GPU, seen without one (benchmarks/pretend_gpu.py): tensors and generators on two devices,
looks from the host, which wait, and uploads for which it waits.
"""

from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import pytest
import torch
from timm.layers import BatchNormAct2d
from torch import nn

import train
import train_geoclip
from augmentations.year_wise import GROUPS, Augmentation
from benchmarks.pretend_gpu import GPU, backward_of, pretended_gpu, to_gpu
from losses.contrastive import ContrastiveLoss
from losses.multi_similarity import MultiSimilarityLoss
from models.config import ModelConfig
from models.earthloc import EarthLoc
from models.geoclip import GeoCLIP, GeoClipConfig
from models.image_encoder import BackboneEncoder
from retrieval.clustering import kmeans
from retrieval.search import ExactSearch
from utils import distributed
from utils.precision import autocast
from utils.runs import Run, make_optimizer
from utils.transfer import to_device

pytestmark = pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")


@pytest.fixture
def gpu():
    with pretended_gpu() as pretend:
        yield pretend


@pytest.fixture
def looks(gpu):
    return gpu.looks


@pytest.fixture
def uploads(gpu):
    return gpu.uploads


def test_mistakes_are_noticed(looks):
    on_gpu, on_cpu = torch.ones(3, 3, device=GPU), torch.ones(3, 3)
    assert type(on_cpu) is torch.Tensor and on_cpu.sum() == 9
    assert (on_gpu.to("cpu", non_blocking=True) == 0).all() and not looks
    for mistake in (lambda: on_gpu + on_cpu, lambda: on_gpu @ on_cpu, lambda: torch.cat([on_gpu, on_cpu])):
        with pytest.raises(RuntimeError, match="device"):
            mistake()
    on_gpu.sum().item()
    on_gpu.cpu()
    torch.nonzero(on_gpu)
    assert bool(on_gpu.isfinite().all()) and looks == ["item", "copy", "nonzero", "item"]
    assert on_gpu[torch.ones(3, dtype=torch.bool).to(GPU)].shape == (3, 3) and looks.pop() == "nonzero"


def test_generators_of_another_device_are_noticed(looks):
    elsewhere = torch.Generator()
    assert torch.rand(3, generator=elsewhere).shape == (3,)
    for mistake in (
        lambda: torch.randn(3, device=GPU, generator=elsewhere),
        lambda: torch.randperm(3, device=GPU, generator=elsewhere),
        lambda: torch.ones(3, device=GPU).uniform_(generator=elsewhere),
    ):
        with pytest.raises(RuntimeError, match="generator for cuda:0 but found one for cpu"):
            mistake()
    there = torch.Generator(GPU).manual_seed(3)
    assert torch.randn(3, device=GPU, generator=there).device == GPU
    with pytest.raises(RuntimeError, match="generator for cpu but found one for cuda"):
        torch.randn(3, generator=there)


def test_uploads_that_block_are_noticed(uploads):
    on_gpu, on_cpu = torch.ones(3, device=GPU), torch.ones(3)
    for count, mistake in enumerate(
        (
            lambda: on_cpu.to(GPU),
            lambda: torch.as_tensor(0.5, device=GPU),
            lambda: torch.tensor([1, 2], device=GPU),
            lambda: on_gpu.copy_(on_cpu),
            lambda: on_gpu[[0, 1]],
        ),
        1,
    ):
        mistake()
        assert len(uploads) == count
    for fine in (
        lambda: on_cpu.to(GPU, non_blocking=True),
        lambda: on_gpu.copy_(on_cpu, non_blocking=True),
        lambda: torch.full((3,), 0.5, device=GPU),
        lambda: on_gpu * 0.5,
        lambda: on_gpu.double(),
        lambda: on_gpu.clone().copy_(on_gpu),
        lambda: torch.arange(3, device=GPU),
        lambda: on_gpu.cpu(),
    ):
        fine()
    assert len(uploads) == 5


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("weather", [{}, {"hue": 0.05, "clouds": 0.5, "haze": 0.5, "exposure": 1.0}])
def test_augmentation_stays_on_the_gpu(looks, uploads, group, weather):
    images = torch.zeros(3, 4, 3, 64, 64, dtype=torch.uint8).to(GPU, non_blocking=True)
    augment = Augmentation(48, group, **weather)
    for rows in (None, slice(1, 3)):
        views = augment(images[rows or slice(None)], torch.Generator().manual_seed(0), rows, 3)
        assert views.shape[1:] == (4, 3, 48, 48) and views.dtype == torch.float32 and views.device == GPU
    assert not looks and not uploads


@pytest.mark.parametrize("backbone, freeze", [("resnet18", "layer2"), ("efficientnet_lite0", "blocks2")])
@pytest.mark.parametrize("aggregator, loss_fn", [("mixvpr", MultiSimilarityLoss()), ("gem", ContrastiveLoss(0.5))])
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_a_step_does_not_wait_for_the_gpu(looks, uploads, backbone, freeze, aggregator, loss_fn, precision):
    model = to_gpu(
        EarthLoc(ModelConfig(backbone, freeze_until=freeze, aggregator=aggregator, descriptor_dim=32, image_size=48))
    )
    run = Run(model, make_optimizer(model, 1e-3))
    labels = torch.arange(3, device=GPU).repeat_interleave(4)
    views = torch.rand(3, 4, 3, 48, 48).to(GPU, non_blocking=True)
    uploads.clear()  # the model's
    kinds = []
    handle = model.backbone.register_forward_hook(lambda _, inputs, output: kinds.append(output.dtype))
    with backward_of(model), patch.object(train.Outcome, "__init__", lambda *_: None):
        neutral = train.neutral_pairs(np.random.default_rng(0).random((3, 4, 2)), torch.arange(3).repeat_interleave(4))
        (neutral,) = to_device([neutral], GPU)
        for _ in range(2):
            loss, norm, descriptors = train.update(run, views.flatten(0, 1), labels, neutral, loss_fn, 1e-3, precision)
    handle.remove()
    assert set(kinds) == {torch.bfloat16 if precision == "bf16" else torch.float32}
    assert run.iteration == 2 and loss.device == norm.device == descriptors.device == GPU
    assert all(state["exp_avg"].device == GPU for state in run.optimizer.state.values())
    loss_fn.mined_shares(descriptors, labels, neutral)
    assert not looks and not uploads  # until they are logged


def test_a_look_at_an_outcome_is_at_a_copy_that_was_under_way(looks):
    waited = []
    event = SimpleNamespace(record=lambda: waited.append("record"), synchronize=lambda: waited.append("synchronize"))
    with patch.object(torch.cuda, "Event", lambda: event):
        outcome = train.Outcome(0, torch.ones((), device=GPU), torch.ones((), device=GPU), 0, None, None)
        assert waited == ["record"] and not looks
        assert outcome.problem() is None and waited == ["record", "synchronize"] and not looks


@pytest.mark.parametrize("backbone", ["resnet18", "efficientnet_lite0"])
def test_description_does_not_wait_for_the_gpu(looks, backbone):
    model = to_gpu(EarthLoc(ModelConfig(backbone, descriptor_dim=32, image_size=48))).eval()
    images = torch.rand(2, 3, 48, 48).to(GPU)
    for context in (torch.no_grad(), torch.inference_mode()):
        with context, autocast(GPU, "bf16"):
            described = model(images)
        assert described.shape == (2, 32) and described.dtype == torch.float32 and described.device == GPU
    assert not looks


def test_whitening_computes_on_the_gpu(looks):
    """At 4,096-d the features' rank never reaches the last rows, which are drawn."""
    model = to_gpu(EarthLoc(ModelConfig("resnet18", image_size=48, descriptor_dim=4096)))
    features = model.train().aggregate(torch.rand(16, 3, 48, 48).to(GPU))
    assert model.whiten_(features, generator=torch.Generator().manual_seed(0)) == 16
    assert model.fc.weight.device == model.fc.bias.device == GPU and model.fc.weight.shape == (4096, 4096)


@pytest.mark.parametrize("backbone", ["resnet18", "efficientnet_lite0"])
def test_batchnorm_of_several_gpus_is_torchs(gpu, backbone):
    """On CPUs it is ours. Names and weights stay, and what freezes and folds a BatchNorm2d still finds it."""
    config = ModelConfig(backbone, descriptor_dim=32, image_size=48, frozen_batchnorm="adapt")
    model = to_gpu(EarthLoc(config))
    before = [(name, each.data_ptr()) for name, each in model.state_dict().items()]
    norms = [each for each in model.modules() if isinstance(each, nn.BatchNorm2d)]
    distributed.use_global_batchnorm(model.train())
    assert len(norms) > 10 and all(isinstance(each, nn.SyncBatchNorm) and each.training for each in norms)
    assert before == [(name, each.data_ptr()) for name, each in model.state_dict().items()]
    own = distributed.use_global_batchnorm(nn.Sequential(nn.BatchNorm2d(3)))
    assert isinstance(own[0], distributed.GlobalBatchNorm) and not isinstance(own[0], nn.SyncBatchNorm)


def test_torchs_batchnorm_ends_with_the_activation_of_timms():
    """In one process it needs no GPU."""
    torch.manual_seed(0)
    x, layer = torch.randn(8, 3, 5, 5), BatchNormAct2d(3)
    expected = layer(x), layer.eval()(x)
    layer.reset_running_stats()
    layer.train().__class__ = distributed.SyncBatchNorm
    assert torch.equal(layer(x), expected[0]) and (expected[0] >= 0).all()
    assert torch.equal(layer.eval()(x), expected[1])


def test_geoclip_computes_on_the_gpu(gpu):
    model = to_gpu(GeoCLIP(GeoClipConfig("resnet18", image_size=48, freeze_until="layer2")))
    assert isinstance(model.image_encoder, BackboneEncoder)
    points = np.random.default_rng(0).uniform(-60, 60, (7, 2))
    views = torch.rand(3, 3, 48, 48).to(GPU)
    gpu.uploads.clear()
    gpu.sent.clear()
    loss, hits = train_geoclip.loss_of(
        model.train(), views, points[:3], points, np.arange(3), torch.ones(3, dtype=torch.bool), 100.0, "bf16"
    )
    assert loss.device == hits.device == GPU and loss.shape == hits.shape == ()
    assert not gpu.looks and not gpu.uploads and len(gpu.sent) == 1


def test_kmeans_and_search_compute_on_the_gpu(looks):
    descriptors = np.random.default_rng(0).normal(size=(1500, 16)).astype(np.float32)
    labels, centers = kmeans(descriptors, 5, 0, iterations=2, device=GPU)
    assert labels.shape == (1500,) and centers.shape == (5, 16)
    search = ExactSearch(descriptors, GPU, torch.float16, block=512)
    found = search._candidates(descriptors[:4], 10, np.arange(0, 1500, 3))
    assert [each.shape for each in found] == [(4, 10), (4, 10)]
    assert set(looks) == {"copy", "nonzero", "bincount"}
