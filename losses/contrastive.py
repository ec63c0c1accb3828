"""The plain contrastive loss, neutral-aware like the multi-similarity loss: the baseline of the paper's sec. 4.1."""

from typing import Annotated

from torch import Tensor, nn
from torch.nn import functional as F

from losses.multi_similarity import pair_masks


class ContrastiveLoss(nn.Module):
    """Pairs pulled to similarity 1, or pushed below a margin (Hadsell et al. 2006, on cosine similarity)."""

    def __init__(self, margin: Annotated[float, "similarity above which a negative is pushed"] = 0.5) -> None:
        super().__init__()
        self.margin = margin

    def forward(self, descriptors: Tensor, labels: Tensor, neutral: Tensor | None = None) -> Tensor:
        """descriptors (N, D), L2-normalised; labels (N,); neutral (N, N) bool -> scalar loss.

        Positives and the negatives above the margin are averaged apart, so that many easy negatives weigh nothing.
        """
        similarity = descriptors @ descriptors.T
        positive, negative = pair_masks(labels, neutral)
        violating = negative & (similarity.detach() > self.margin)
        pull = ((1 - similarity) * positive).sum() / positive.sum().clamp(min=1)
        push = (F.relu(similarity - self.margin) * violating).sum() / violating.sum().clamp(min=1)
        return pull + push

    def mined_shares(self, descriptors: Tensor, labels: Tensor, neutral: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Same arguments -> (share of anchors with a pair that has a gradient, share of such pairs), in [0, 1]."""
        similarity = descriptors.detach() @ descriptors.detach().T
        positive, negative = pair_masks(labels, neutral)
        active = positive | (negative & (similarity > self.margin))
        return active.any(dim=1).float().mean(), active.sum() / (positive | negative).sum().clamp(min=1)
