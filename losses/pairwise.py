"""The pairwise loss of photos and database images (AstroLoc, ICCV 2025): each pair is pulled together, and each of the
two pushed away from the photos and from the database images of other pairs, four directions in all.
"""

from typing import Annotated

from torch import Tensor, nn
from torch.nn import functional as F

from losses.multi_similarity import masked_log_sum, pair_masks


class PairwiseLoss(nn.Module):
    """Mean over pairs of log(1 + exp(-alpha S(q, d))) / alpha, and of log(1 + sum exp(beta S)) / beta over the
    negatives of q among photos, of q among images, of d among photos, of d among images.

    alpha and beta are the paper's. That each direction is divided by beta, as in the multi-similarity loss, is ours.
    """

    def __init__(
        self, alpha: Annotated[float, "weight of positives"] = 1.0, beta: Annotated[float, "weight of negatives"] = 50.0
    ) -> None:
        super().__init__()
        self.alpha, self.beta = alpha, beta

    def forward(self, descriptors: Tensor, labels: Tensor, neutral: Tensor | None = None) -> Tensor:
        """descriptors (2 P, D): photo, image, photo, image, …, L2-normalised; labels (2 P,); neutral (2 P, 2 P) bool ->
        scalar loss. Of four years, two and two are pairs."""
        similarity = descriptors @ descriptors.T
        _, negative = pair_masks(labels, neutral)
        sides = slice(0, None, 2), slice(1, None, 2)
        pull = F.softplus(-self.alpha * similarity[sides].diagonal()) / self.alpha
        push = [masked_log_sum(self.beta * similarity[a, b], negative[a, b]) / self.beta for a in sides for b in sides]
        return (pull + sum(push)).mean()
