"""The pairwise loss against plain loops over plain numbers in float64; two kinds of groups in one batch."""

import math

import pytest
import torch
from torch.nn import functional as F

from losses import LOSSES, scalars
from losses.joint import JointLoss
from losses.multi_similarity import MultiSimilarityLoss
from losses.pairwise import PairwiseLoss

PAIRS = 6


def batch(seed, neutral_share=0.3):
    """Descriptors (12, 5) float64 of photo, image, photo, …, labels of which two are alike, and neutral pairs."""
    generator = torch.Generator().manual_seed(seed)
    descriptors = F.normalize(torch.randn(2 * PAIRS, 5, generator=generator, dtype=torch.float64), dim=1)
    labels = torch.tensor([7, 3, 9, 3, 4, 1]).repeat_interleave(2)
    shared = torch.rand(2 * PAIRS, 2 * PAIRS, generator=generator) < neutral_share
    return descriptors, labels, shared | shared.T


def plain_loss(descriptors, labels, neutral, alpha, beta):
    points, labels = descriptors.tolist(), labels.tolist()
    photos, images = points[0::2], points[1::2]
    dot = lambda a, b: sum(x * y for x, y in zip(a, b))
    total = 0
    for i in range(PAIRS):
        total += math.log(1 + math.exp(-alpha * dot(photos[i], images[i]))) / alpha
        for own, mine in ((photos, 2 * i), (images, 2 * i + 1)):
            for others, offset in ((photos, 0), (images, 1)):
                pushed = 0
                for j in range(PAIRS):
                    other = 2 * j + offset
                    if labels[other] != labels[mine] and not (neutral is not None and neutral[mine, other]):
                        pushed += math.exp(beta * dot(own[i], others[j]))
                total += math.log(1 + pushed) / beta
    return total / PAIRS


@pytest.mark.parametrize("with_neutral", [False, True])
@pytest.mark.parametrize("alpha, beta", [(1.0, 50.0), (2.0, 5.0)])
def test_four_directions_against_plain_loops(alpha, beta, with_neutral):
    for seed in range(3):
        descriptors, labels, neutral = batch(seed)
        neutral = neutral if with_neutral else None
        found = PairwiseLoss(alpha, beta)(descriptors, labels, neutral).item()
        assert math.isclose(found, plain_loss(descriptors, labels, neutral, alpha, beta), rel_tol=1e-10)


def test_gradients_by_finite_differences():
    descriptors, labels, neutral = batch(0)
    loss = PairwiseLoss(1.0, 5.0)
    assert torch.autograd.gradcheck(lambda values: loss(values, labels, neutral), descriptors.requires_grad_())


def test_a_photo_is_pulled_to_its_own_image_alone():
    """All others neutral: gradients move the two of a pair together, in float32 at a large beta, too."""
    descriptors, labels, _ = batch(0)
    descriptors = descriptors.float().requires_grad_()
    PairwiseLoss(1.0, 1000.0)(descriptors, labels, torch.ones(12, 12, dtype=torch.bool)).backward()
    for i in range(PAIRS):
        photo, image = descriptors.detach()[2 * i : 2 * i + 2]
        weight = 1 / (1 + math.exp(photo @ image)) / PAIRS
        assert torch.allclose(descriptors.grad[2 * i], -weight * image, atol=1e-6)
    assert torch.isfinite(descriptors.grad).all()


def test_two_kinds_in_a_batch_are_the_sum_of_their_losses():
    descriptors, labels, neutral = batch(1)
    joint = JointLoss({"years": MultiSimilarityLoss(), "photos": PairwiseLoss()}, (8, 4))
    parts = (
        MultiSimilarityLoss()(descriptors[:8], labels[:8], neutral[:8, :8]),
        PairwiseLoss()(descriptors[8:], labels[8:], neutral[8:, 8:]),
    )
    assert torch.isclose(joint(descriptors, labels, neutral), sum(parts), rtol=1e-12)
    without = MultiSimilarityLoss()(descriptors[:8], labels[:8]) + PairwiseLoss()(descriptors[8:], labels[8:])
    assert torch.isclose(joint(descriptors, labels), without, rtol=1e-12)
    logged = scalars(joint, descriptors, labels, neutral)
    assert set(logged) == {"loss/years", "loss/photos", "mined/anchors", "mined/pairs"}
    assert (logged["loss/years"], logged["loss/photos"]) == parts
    assert logged["mined/pairs"] == MultiSimilarityLoss().mined_shares(descriptors[:8], labels[:8], neutral[:8, :8])[1]
    assert scalars(PairwiseLoss(), descriptors, labels, neutral) == {}
    assert joint.own_sizes(2) == [4, 2]


def test_weights_of_a_loss_of_pairs_are_trained_and_kept():
    joint = JointLoss({"years": MultiSimilarityLoss(), "photos": LOSSES["cosface"](10, 5)}, (8, 4))
    assert list(joint.state_dict()) == ["losses.photos.loss.W"]
