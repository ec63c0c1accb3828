"""Neutral-aware multi-similarity loss (paper, sec. 4.4) on dense masks.

Two errata of the paper, settled here: eq. 2 contradicts its own prose, and the prose holds (different regions that
share ground take no part); eq. 3 has a sign error, negatives use exp(+beta (S - base)), as in the loss it extends
(Wang et al. 2019, "Multi-Similarity Loss with General Pair Weighting", eq. 15).
"""

from typing import Annotated, Literal

import torch
from torch import Tensor, nn


def pair_masks(labels: Tensor, neutral: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """labels (N,), neutral (N, N) bool or None -> positive, negative (N, N) bool masks.

    positive: same label, not oneself. negative: another label, and not neutral.
    """
    same = labels[:, None] == labels[None, :]
    positive = same & ~torch.eye(len(labels), dtype=torch.bool, device=labels.device)
    negative = ~same if neutral is None else ~same & ~neutral
    return positive, negative


def mine(similarity: Tensor, positive: Tensor, negative: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """similarity (N, N) and pair masks -> the masks of the pairs worth training on (Wang et al. 2019, eqs. 11 and 12).

    A negative is kept when it is more similar than the least similar positive less epsilon; a positive when it is less
    similar than the most similar negative plus epsilon. A pair in neither mask sets no threshold.
    """
    hardest_positive = similarity.masked_fill(~positive, torch.inf).amin(dim=1, keepdim=True)
    hardest_negative = similarity.masked_fill(~negative, -torch.inf).amax(dim=1, keepdim=True)
    return positive & (similarity - epsilon < hardest_negative), negative & (similarity + epsilon > hardest_positive)


def masked_log_sum(exponents: Tensor, mask: Tensor) -> Tensor:
    """(N, N) exponents -> (N,) log(1 + sum over the mask of exp), stable whatever the exponents."""
    exponents = exponents.masked_fill(~mask, -torch.inf)
    one = torch.zeros(len(exponents), 1, dtype=exponents.dtype, device=exponents.device)
    return torch.cat([exponents, one], dim=1).logsumexp(dim=1)


class MultiSimilarityLoss(nn.Module):
    """Multi-similarity loss with its mining, neutral-aware. Paper's values: alpha 1, beta 50, base 0, epsilon 0.1.

    neutral_filter: neutral pairs leave "before" the mining, so that they set no threshold (the paper's eq. 2), or
    "after" it (the released code): there a neutral pair is mined like a negative and decides which positives are kept.
    """

    def __init__(
        self,
        alpha: Annotated[float, "weight of positives"] = 1.0,
        beta: Annotated[float, "weight of negatives"] = 50.0,
        base: Annotated[float, "lambda in the paper"] = 0.0,
        epsilon: Annotated[float, "margin of the mining"] = 0.1,
        neutral_filter: Annotated[
            Literal["before", "after"], "neutral pairs leave before or after the mining"
        ] = "before",
    ) -> None:
        super().__init__()
        self.alpha, self.beta, self.base, self.epsilon = alpha, beta, base, epsilon
        self.neutral_filter = neutral_filter

    def forward(self, descriptors: Tensor, labels: Tensor, neutral: Tensor | None = None) -> Tensor:
        """descriptors (N, D) float32 or wider, L2-normalised; labels (N,); neutral (N, N) bool -> scalar loss."""
        similarity = descriptors @ descriptors.T
        positive, negative = self.mined(similarity.detach(), labels, neutral)
        pull = masked_log_sum(-self.alpha * (similarity - self.base), positive) / self.alpha
        push = masked_log_sum(self.beta * (similarity - self.base), negative) / self.beta
        return (pull + push).mean()

    def mined(self, similarity: Tensor, labels: Tensor, neutral: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """similarity (N, N), labels (N,), neutral (N, N) bool -> masks (N, N) of the positives and negatives in use."""
        first, last = (neutral, None) if self.neutral_filter == "before" else (None, neutral)
        positive, negative = mine(similarity, *pair_masks(labels, first), self.epsilon)
        return positive, negative if last is None else negative & ~last

    @torch.no_grad()
    def mined_shares(self, descriptors: Tensor, labels: Tensor, neutral: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Same arguments -> (share of anchors with a mined pair, share of pairs that were mined), scalars in [0, 1]."""
        mined_positive, mined_negative = self.mined(descriptors @ descriptors.T, labels, neutral)
        positive, negative = pair_masks(labels, neutral)
        mined = mined_positive | mined_negative
        return mined.any(dim=1).float().mean(), mined.sum() / (positive | negative).sum().clamp(min=1)
