"""GeoCLIP's loss: each photo against the batch's coordinates and a queue of others (arXiv 2309.16020, sec. 3.3)."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from utils import geo


def initial_queue(points: np.ndarray, size: int, rng: np.random.Generator) -> np.ndarray:
    """(N, 2) training coordinates -> (size, 2), drawn from them: real places from the start, not noise around 0, 0."""
    if not len(points):
        raise ValueError("the queue needs training coordinates to start from, and there are none")
    return np.asarray(points, dtype=np.float64)[rng.choice(len(points), size, replace=size > len(points))]


def advance_queue(queue: np.ndarray, points: np.ndarray) -> np.ndarray:
    """First in, first out: queue (Q, 2) and the whole batch's points (B, 2), over all processes -> the next queue.

    A pure function of its arguments, so the queue is the same in every process.
    """
    return np.concatenate([queue, points])[len(points) :][-len(queue) :] if len(queue) else queue


def neutral_mask(points: np.ndarray, candidates: np.ndarray, km: float) -> np.ndarray:
    """(B, 2), (N, 2) degrees -> (B, N) bool: candidates nearer than km, which are no negatives of that photo.

    The photo's own candidate is to be kept by the caller. km = 0: nothing is neutral, the paper's loss.
    """
    if km <= 0:
        return np.zeros((len(points), len(candidates)), dtype=bool)
    cosines = geo.to_unit_vectors(points) @ geo.to_unit_vectors(candidates).T
    return cosines > np.cos(min(km / geo.EARTH_RADIUS_KM, np.pi)) - (km >= np.pi * geo.EARTH_RADIUS_KM)


def gps_cross_entropy(
    logits: Tensor, targets: Tensor, neutral: Tensor | None = None, readable: Tensor | None = None
) -> Tensor:
    """logits (B, N), targets (B,) columns -> scalar: mean cross-entropy, in float32.

    neutral (B, N) bool: columns that take no part (a target always does). readable (B,) bool: rows of photos that
    could not be read count as zero, the mean stays over B.
    """
    logits = logits.float()
    if neutral is not None:
        own = F.one_hot(targets, logits.shape[1]).bool()
        logits = logits.masked_fill(neutral & ~own, -torch.inf)
    losses = F.cross_entropy(logits, targets, reduction="none")
    if readable is not None:
        losses = losses.where(readable, 0)
    return losses.mean()
