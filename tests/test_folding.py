"""Folded stages compute what the plain ones do, and follow every change of the parameters."""

import copy

import pytest
import torch
from torch import nn

from models.backbone import Backbone, stage_names
from models.folding import fold_batchnorm

torch.set_num_threads(1)


def scrambled(name, cut, freeze=None):
    """A backbone, frozen as a whole unless said otherwise, with BatchNorms that do something."""
    torch.manual_seed(0)
    backbone = Backbone(name, cut_after=cut, freeze_until=freeze or cut)
    for module in backbone.modules():
        if isinstance(module, nn.BatchNorm2d):
            for value, low, high in (
                (module.running_mean, -1, 1),
                (module.running_var, 0.5, 2),
                (module.weight.data, 0.5, 1.5),
                (module.bias.data, -1, 1),
            ):
                value.uniform_(low, high)
    return backbone


def plain(backbone, images):
    with torch.no_grad():
        return backbone._run(images, backbone.frozen)


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "efficientnet_lite0", "regnety_002"])
@pytest.mark.parametrize("deepest", [0, -1])
def test_folded_stages_compute_the_same(name, deepest):
    backbone = scrambled(name, stage_names(name)[:4][deepest]).double()
    images = torch.randn(2, 3, 48, 48, dtype=torch.float64)
    expected = plain(backbone, images)
    assert expected.abs().mean() > 1e-3
    found = backbone.train()(images)
    assert backbone._folded[1] is not None and not torch.equal(found, expected)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    assert torch.equal(backbone.eval()(images), expected)  # gradients of what comes before may be wanted
    parts = [backbone.model.get_submodule(part) for part in backbone._part_names(backbone.frozen)]
    norms = [each for each in fold_batchnorm(parts).modules() if isinstance(each, nn.BatchNorm2d)]
    assert not norms and any(isinstance(each, nn.BatchNorm2d) for part in parts for each in part.modules())


@pytest.mark.parametrize("name", ["resnet18", "efficientnet_lite0"])
@pytest.mark.parametrize("frozen", [0, 2])
def test_evaluation_without_gradients_is_folded_as_a_whole(name, frozen):
    backbone = scrambled(name, stage_names(name)[3], (*stage_names(name), "none")[frozen - 1]).double().eval()
    images = torch.randn(2, 3, 48, 48, dtype=torch.float64)
    for _ in range(2):
        expected = backbone(images)
        assert expected.requires_grad and expected.abs().mean() > 1e-3
        for context in (torch.no_grad, torch.inference_mode):
            with context():
                found = backbone(images)
            assert not torch.equal(found, expected)
            torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
        backbone.train()(images).square().mean().backward()  # moves the statistics
        torch.optim.SGD([each for each in backbone.parameters() if each.requires_grad], lr=1e-2).step()
        backbone.eval()


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.load_state_dict({key: value * 0.9 for key, value in model.state_dict().items()}),
        lambda model: model.model.bn1.running_mean.add_(0.5),
        lambda model: model.double(),
        lambda model: setattr(model.model.conv1, "weight", nn.Parameter(model.model.conv1.weight.data * 0.8)),
        lambda model: setattr(model.model.layer1[0].bn1.weight, "data", model.model.layer1[0].bn1.weight.data * 0.7),
    ],
)
def test_folding_follows_the_parameters(change):
    backbone, images = scrambled("resnet18", "layer1"), torch.randn(1, 3, 32, 32)
    with torch.inference_mode():  # as when a run begins with a validation
        before = backbone(images)
    change(backbone)
    images = images.to(backbone.model.conv1.weight.dtype)
    after = backbone(images)
    torch.testing.assert_close(after, plain(backbone, images), rtol=1e-4, atol=1e-4)
    if images.dtype == torch.float32:
        assert (after - before).abs().max() > 1e-3


def test_folding_is_done_once_and_leaves_the_state_alone():
    backbone, images = scrambled("resnet18", "layer1"), torch.randn(1, 3, 32, 32)
    before = {key: value.clone() for key, value in backbone.state_dict().items()}
    backbone(images)
    folded = backbone._folded[1]
    backbone.eval()(images)
    backbone.train()(images)
    assert backbone._folded[1] is folded
    assert all(torch.equal(before[key], value) for key, value in backbone.state_dict().items())
    assert list(before) == list(backbone.state_dict()) and len(list(backbone.children())) == 1
    other = copy.deepcopy(backbone)
    other.model.conv1.weight.data.zero_()
    assert not torch.allclose(other(images), backbone(images))


class PreActivated(nn.Module):
    """A BatchNorm that is registered after a convolution and takes something else."""

    def __init__(self):
        super().__init__()
        self.first, self.norm, self.second, self.after = (
            nn.Conv2d(3, 4, 1),
            nn.BatchNorm2d(4),
            nn.Conv2d(4, 4, 1),
            nn.BatchNorm2d(4),
        )

    def forward(self, x):
        x = self.first(x)
        return x + self.after(self.second(self.norm(x.relu())))


def test_a_batchnorm_that_takes_no_convolutions_output_stays():
    torch.manual_seed(0)
    parts = [nn.Identity(), PreActivated().eval()]
    for norm in (parts[1].norm, parts[1].after):
        norm.running_mean.uniform_(-1, 1), norm.running_var.uniform_(0.5, 2)
    folded, images = fold_batchnorm(parts), torch.randn(2, 3, 5, 5)
    assert isinstance(folded[1].norm, nn.BatchNorm2d) and isinstance(folded[1].after, nn.Identity)
    torch.testing.assert_close(folded(images), parts[1](images))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in folded.modules())
    alone = fold_batchnorm([nn.BatchNorm2d(3)])
    assert isinstance(alone[0], nn.BatchNorm2d)
