"""The contrastive loss against plain loops."""

import math

import pytest
import torch
from torch.nn import functional as F

from losses.contrastive import ContrastiveLoss


def plain_loss(descriptors, labels, neutral, margin):
    points, pulls, pushes, count = descriptors.tolist(), [], [], len(labels)
    for i in range(count):
        for j in range(count):
            similarity = sum(x * y for x, y in zip(points[i], points[j]))
            if i != j and labels[i] == labels[j]:
                pulls.append(1 - similarity)
            elif labels[i] != labels[j] and not (neutral is not None and neutral[i, j]) and similarity > margin:
                pushes.append(similarity - margin)
    return sum(pulls) / max(len(pulls), 1) + sum(pushes) / max(len(pushes), 1), len(pulls) + len(pushes)


@pytest.mark.parametrize("with_neutral", [False, True])
@pytest.mark.parametrize("margin", [-2.0, 0.0, 0.5, 2.0])
def test_against_plain_loops(margin, with_neutral):
    generator = torch.Generator().manual_seed(0)
    descriptors = F.normalize(torch.randn(12, 4, generator=generator, dtype=torch.float64), dim=1)
    labels = torch.arange(4).repeat_interleave(3)
    neutral = torch.zeros(12, 12, dtype=torch.bool)
    neutral[:3, 3:6] = neutral[3:6, :3] = True
    neutral = neutral if with_neutral else None
    loss_fn = ContrastiveLoss(margin)
    expected, active = plain_loss(descriptors, labels, neutral, margin)
    assert math.isclose(loss_fn(descriptors, labels, neutral).item(), expected, rel_tol=1e-10)
    possible = 12 * 11 - (18 if with_neutral else 0)
    assert math.isclose(loss_fn.mined_shares(descriptors, labels, neutral)[1].item(), active / possible, rel_tol=1e-6)


def test_only_violating_and_positive_pairs_have_a_gradient():
    descriptors = torch.eye(4, dtype=torch.float64).requires_grad_()
    labels = torch.tensor([0, 0, 1, 2])
    ContrastiveLoss(0.5)(descriptors, labels).backward()
    assert descriptors.grad[:2].abs().sum() > 0 and descriptors.grad[2:].abs().sum() == 0
