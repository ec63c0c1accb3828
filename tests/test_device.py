"""What would go wrong on a GPU, seen without one: tensors on two devices, and looks from the host, which wait.

torch's fake tensors say that they are on a GPU and hold nothing: operations on them only tell shapes, types and devices,
and raise where the devices are mixed. What runs on the CPU is real.
"""

from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import train
import train_geoclip
from augmentations.year_wise import GROUPS, Augmentation
from losses.contrastive import ContrastiveLoss
from losses.multi_similarity import MultiSimilarityLoss
from models.earthloc import EarthLoc, ModelConfig
from models.geoclip import GeoCLIP, GeoClipConfig
from models.image_encoder import BackboneEncoder
from utils.clustering import kmeans
from utils.precision import autocast
from utils.runs import Run, make_optimizer
from utils.search import ExactSearch

pytestmark = pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
GPU = torch.device("cuda:0")
aten = torch.ops.aten


class PretendGPU(TorchDispatchMode):
    """`looks`: operations for which the host waits. What it sees is all zeros, or True."""

    def __init__(self):
        super().__init__()
        self.looks = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        leaves = tree_leaves((args, kwargs))
        if not any(isinstance(each, FakeTensor) or isinstance(each, torch.device) and each.type == "cuda"
                   for each in leaves):
            with unset_fake_temporarily():
                return function(*args, **kwargs)
        if function is aten._local_scalar_dense.default:
            self.looks.append("item")
            return args[0].dtype == torch.bool
        if function is aten.nonzero.default:
            self.looks.append("nonzero")
            return torch.empty(0, args[0].dim(), dtype=torch.long, device=GPU)
        if function is aten.bincount.default:
            self.looks.append("bincount")
            return torch.zeros(args[2], dtype=torch.long, device=GPU)
        result = function(*args, **kwargs)
        if isinstance(result, FakeTensor) and result.device.type == "cpu":
            if not kwargs.get("non_blocking"):
                self.looks.append("copy")
            with unset_fake_temporarily():
                return torch.zeros(result.shape, dtype=result.dtype)
        return result


@pytest.fixture
def looks():
    pretend = PretendGPU()
    with patch.object(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False), \
            patch.object(torch.cuda, "is_bf16_supported", lambda *_: True), \
            FakeTensorMode(allow_non_fake_inputs=True), pretend:
        yield pretend.looks


def to_gpu(model):
    """As model.to(GPU), which fake tensors do not know how to do."""
    for module in model.modules():
        for name, each in module._parameters.items():
            if each is not None:
                module._parameters[name] = nn.Parameter(each.detach().to(GPU), each.requires_grad)
        for name, each in module._buffers.items():
            if each is not None:
                module._buffers[name] = each.to(GPU)
    return model


def backward_of(model):
    """In place of Tensor.backward, whose engine wants a real GPU: gradients of the right shape, type and device."""
    def backward(loss):
        assert loss.requires_grad and loss.device == GPU
        for each in model.parameters():
            each.grad = torch.zeros_like(each) if each.requires_grad else None
    return patch.object(torch.Tensor, "backward", backward)


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


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("weather", [{}, {"hue": 0.05, "clouds": 0.5, "haze": 0.5, "exposure": 1.0}])
def test_augmentation_stays_on_the_gpu(looks, group, weather):
    images = torch.zeros(3, 4, 3, 64, 64, dtype=torch.uint8).to(GPU)
    views = Augmentation(48, group, **weather)(images, torch.Generator().manual_seed(0))
    assert views.shape == (3, 4, 3, 48, 48) and views.dtype == torch.float32 and views.device == GPU
    assert not looks


@pytest.mark.parametrize("backbone, freeze", [("resnet18", "layer2"), ("efficientnet_lite0", "blocks2")])
@pytest.mark.parametrize("aggregator, loss_fn", [("mixvpr", MultiSimilarityLoss()), ("gem", ContrastiveLoss(0.5))])
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_a_step_does_not_wait_for_the_gpu(looks, backbone, freeze, aggregator, loss_fn, precision):
    model = to_gpu(EarthLoc(ModelConfig(backbone, freeze_until=freeze, aggregator=aggregator, descriptor_dim=32,
                                        image_size=48)))
    run = Run(model, make_optimizer(model, 1e-3))
    labels = torch.arange(3, device=GPU).repeat_interleave(4)
    views = torch.rand(3, 4, 3, 48, 48).to(GPU)
    kinds = []
    handle = model.backbone.register_forward_hook(lambda _, inputs, output: kinds.append(output.dtype))
    with backward_of(model), patch.object(train.Outcome, "__init__", lambda *_: None):
        neutral = train.neutral_pairs(np.random.default_rng(0).random((3, 4, 2)), labels)
        for _ in range(2):
            loss, norm, descriptors = train.update(run, views.flatten(0, 1), labels, neutral, loss_fn, 1e-3, GPU,
                                                   precision)
    handle.remove()
    assert set(kinds) == {torch.bfloat16 if precision == "bf16" else torch.float32}
    assert run.iteration == 2 and loss.device == norm.device == descriptors.device == GPU
    assert all(state["exp_avg"].device == GPU for state in run.optimizer.state.values())
    assert not looks
    loss_fn.mined_shares(descriptors, labels, neutral)
    assert not looks  # until they are logged


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


def test_geoclip_computes_on_the_gpu(looks):
    model = to_gpu(GeoCLIP(GeoClipConfig("resnet18", image_size=48, freeze_until="layer2")))
    assert isinstance(model.image_encoder, BackboneEncoder)
    points = np.random.default_rng(0).uniform(-60, 60, (7, 2))
    loss, hits = train_geoclip.loss_of(model.train(), torch.rand(3, 3, 48, 48).to(GPU), points[:3], points,
                                       np.arange(3), torch.ones(3, dtype=torch.bool, device=GPU), 100.0, "bf16")
    assert loss.device == hits.device == GPU and loss.shape == hits.shape == ()
    assert not looks


def test_kmeans_and_search_compute_on_the_gpu(looks):
    descriptors = np.random.default_rng(0).normal(size=(1500, 16)).astype(np.float32)
    labels, centers = kmeans(descriptors, 5, 0, iterations=2, device=GPU)
    assert labels.shape == (1500,) and centers.shape == (5, 16)
    search = ExactSearch(descriptors, GPU, torch.float16, block=512)
    found = search._candidates(descriptors[:4], 10, np.arange(0, 1500, 3))
    assert [each.shape for each in found] == [(4, 10), (4, 10)]
    assert set(looks) == {"copy", "nonzero", "bincount"}
