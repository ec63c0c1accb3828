"""The loss against plain loops in float64 and against pytorch-metric-learning, with and without neutral pairs."""

import math

import pytest
import torch
from torch.nn import functional as F

from losses.multi_similarity import MultiSimilarityLoss, mine, pair_masks

ALPHA, BETA, BASE, EPSILON = 1.0, 50.0, 0.0, 0.1


def batch(seed, regions=6, years=4, dim=8, spread=0.6):
    """Descriptors float64 that need a gradient, labels, and some neutral pairs of regions."""
    generator = torch.Generator().manual_seed(seed)
    centers = torch.randn(regions, 1, dim, generator=generator, dtype=torch.float64)
    points = centers + spread * torch.randn(regions, years, dim, generator=generator, dtype=torch.float64)
    descriptors = F.normalize(points.flatten(0, 1), dim=1).requires_grad_()
    labels = torch.arange(regions).repeat_interleave(years)
    shared = torch.rand(regions, regions, generator=generator) < 0.3
    shared = (shared | shared.T) & ~torch.eye(regions, dtype=torch.bool)
    return descriptors, labels, shared.repeat_interleave(years, 0).repeat_interleave(years, 1)


def plain_loss(descriptors, labels, neutral, neutral_filter="before"):
    """Wang et al. 2019 in loops over plain numbers -> loss and the sets of mined pairs."""

    def is_neutral(i, j):
        return neutral is not None and bool(neutral[i, j])

    points, labels = descriptors.tolist(), labels.tolist()
    count, total, mined = len(points), 0.0, set()
    for i in range(count):
        similarity = [sum(x * y for x, y in zip(points[i], points[j])) for j in range(count)]
        positives = [j for j in range(count) if j != i and labels[j] == labels[i]]
        negatives = [
            j for j in range(count) if labels[j] != labels[i] and not (neutral_filter == "before" and is_neutral(i, j))
        ]
        kept_positives = [
            j for j in positives if negatives and similarity[j] - EPSILON < max(similarity[k] for k in negatives)
        ]
        kept_negatives = [
            j
            for j in negatives
            if positives and similarity[j] + EPSILON > min(similarity[k] for k in positives) and not is_neutral(i, j)
        ]
        mined |= {(i, j) for j in kept_positives + kept_negatives}
        total += math.log(1 + sum(math.exp(-ALPHA * (similarity[j] - BASE)) for j in kept_positives)) / ALPHA
        total += math.log(1 + sum(math.exp(BETA * (similarity[j] - BASE)) for j in kept_negatives)) / BETA
    return total / count, mined


def library_loss(descriptors, labels, neutral):
    """pytorch-metric-learning. A neutral pair is no matter for its miner, so each anchor mines among the others."""
    losses = pytest.importorskip("pytorch_metric_learning.losses")
    miners = pytest.importorskip("pytorch_metric_learning.miners")
    reducers = pytest.importorskip("pytorch_metric_learning.reducers")
    # Over all anchors, those without a mined pair too.
    loss = losses.MultiSimilarityLoss(alpha=ALPHA, beta=BETA, base=BASE, reducer=reducers.MeanReducer())
    miner = miners.MultiSimilarityMiner(epsilon=EPSILON)
    if neutral is None:
        return loss(descriptors, labels, miner(descriptors, labels))
    tuples = []
    for i in range(len(labels)):
        others = torch.nonzero(~neutral[i] & (torch.arange(len(labels)) != i))[:, 0]
        a1, p, a2, n = miner(descriptors[i : i + 1], labels[i : i + 1], descriptors[others], labels[others])
        tuples.append((a1 + i, others[p], a2 + i, others[n]))
    return loss(descriptors, labels, tuple(torch.cat(parts) for parts in zip(*tuples)))


@pytest.mark.parametrize("with_neutral, neutral_filter", [(False, "before"), (True, "before"), (True, "after")])
@pytest.mark.parametrize("seed", range(4))
def test_loss_and_mined_shares_against_plain_loops(seed, with_neutral, neutral_filter):
    descriptors, labels, neutral = batch(seed)
    neutral = neutral if with_neutral else None
    loss_fn = MultiSimilarityLoss(ALPHA, BETA, BASE, EPSILON, neutral_filter)
    expected, mined = plain_loss(descriptors, labels, neutral, neutral_filter)
    assert math.isclose(loss_fn(descriptors, labels, neutral).item(), expected, rel_tol=1e-10)
    anchors, pairs = loss_fn.mined_shares(descriptors, labels, neutral)
    possible = 24 * 23 - (int(neutral.sum()) if with_neutral else 0)
    assert 0 < len(mined) < possible
    assert math.isclose(anchors.item(), len({i for i, _ in mined}) / 24, rel_tol=1e-6)
    assert math.isclose(pairs.item(), len(mined) / possible, rel_tol=1e-6)


@pytest.mark.parametrize("with_neutral", [False, True])
@pytest.mark.parametrize("spread", [0.05, 0.3, 0.6, 2.0])
def test_loss_and_gradient_against_pytorch_metric_learning(spread, with_neutral):
    for seed in range(3):
        descriptors, labels, neutral = batch(seed, spread=spread)
        neutral = neutral if with_neutral else None
        ours = MultiSimilarityLoss(ALPHA, BETA, BASE, EPSILON)(descriptors, labels, neutral)
        theirs = library_loss(descriptors, labels, neutral)
        assert torch.isclose(ours, theirs, rtol=1e-9)
        gradients = []
        for loss in (ours, theirs):
            # The library normalises once more: only the part of the gradient along the sphere compares.
            (gradient,) = torch.autograd.grad(loss, descriptors, allow_unused=True)
            gradient = torch.zeros_like(descriptors) if gradient is None else gradient
            points = descriptors.detach()
            gradients.append(gradient - (gradient * points).sum(1, keepdim=True) * points)
        assert torch.allclose(*gradients, rtol=1e-7, atol=1e-12)


def test_hand_checked_pair():
    """Two regions, two years: similarities 0.6 within, 0.8 (a neutral pair when asked) and 0 across."""
    angles = torch.tensor([0.0, math.acos(0.6), -math.acos(0.8), math.pi])
    descriptors = torch.stack([angles.cos(), angles.sin()], dim=1).double()
    labels = torch.tensor([0, 0, 1, 1])
    positive, negative = pair_masks(labels)
    kept_positive, kept_negative = mine(descriptors @ descriptors.T, positive, negative, 0.1)
    assert kept_positive[0].tolist() == [False, True, False, False]  # 0.6 - 0.1 < 0.8
    assert kept_negative[0].tolist() == [False, False, True, False]  # 0.8 + 0.1 > 0.6, -1 + 0.1 is not


def test_a_neutral_pair_sets_no_mining_threshold():
    """The most similar other region is neutral: the positive it would have mined is not, nor is it itself."""
    angles = torch.tensor([0.0, math.acos(0.6), -math.acos(0.8), math.pi])
    descriptors = torch.stack([angles.cos(), angles.sin()], dim=1).double()
    labels = torch.tensor([0, 0, 1, 2])
    neutral = torch.zeros(4, 4, dtype=torch.bool)
    neutral[0, 2] = neutral[2, 0] = True
    similarity = descriptors @ descriptors.T
    assert mine(similarity, *pair_masks(labels), 0.1)[0][0, 1]
    kept_positive, kept_negative = mine(similarity, *pair_masks(labels, neutral), 0.1)
    assert not kept_positive[0].any() and not kept_negative[0].any()


def test_neutral_pairs_get_no_gradient():
    descriptors, labels, _ = batch(0, regions=2)
    neutral = labels[:, None] != labels[None, :]
    loss = MultiSimilarityLoss(ALPHA, BETA, BASE, EPSILON)(descriptors, labels, neutral)
    assert loss.item() == 0
    assert torch.autograd.grad(loss, descriptors)[0].abs().max() == 0


def test_filtered_after_the_mining_neutral_pairs_still_choose_the_positives():
    descriptors, labels, _ = batch(0, regions=2, spread=2.0)
    neutral = labels[:, None] != labels[None, :]
    loss = MultiSimilarityLoss(ALPHA, BETA, BASE, EPSILON, "after")(descriptors, labels, neutral)
    _, mined = plain_loss(descriptors, labels, neutral, "after")
    assert loss.item() > 0 and mined and all(labels[i] == labels[j] for i, j in mined)


def test_stable_where_exponentials_overflow_in_float32():
    descriptors = F.normalize(torch.ones(8, 4), dim=1).requires_grad_()
    loss = MultiSimilarityLoss(1.0, 1000.0, 0.0, 0.1)(descriptors, torch.arange(4).repeat_interleave(2))
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(descriptors.grad).all()
