"""Losses of pytorch-metric-learning on our batches, neutral pairs left out where a loss takes pairs.

Each is a line: its class there and its settings, whose defaults are the library's unless said. Of a pair-based loss
the library counts the pairs that it is given: all positives, and the negatives that share no ground. FastAP ranks a
whole batch by labels, and the class-based losses know a region only by its weights: for these neutral pairs are
negatives.
"""

from typing import Annotated

from torch import Tensor, nn

from losses.multi_similarity import pair_masks


def library_loss(name: str, **settings: object) -> nn.Module:
    """A loss of pytorch-metric-learning by the name of its class."""
    from pytorch_metric_learning import losses

    return getattr(losses, name)(**settings)


class PairLoss(nn.Module):
    """A loss over pairs or triplets, which are chosen here."""

    def __init__(self, name: str, **settings: object) -> None:
        super().__init__()
        self.loss = library_loss(name, **settings)

    def forward(self, descriptors: Tensor, labels: Tensor, neutral: Tensor | None = None) -> Tensor:
        """descriptors (N, D), L2-normalised; labels (N,); neutral (N, N) bool -> scalar loss."""
        positive, negative = pair_masks(labels, neutral)
        pairs = (*positive.nonzero(as_tuple=True), *negative.nonzero(as_tuple=True))
        return self.loss(descriptors, labels, pairs)


class TripletLoss(PairLoss):
    """Triplet margin loss (Weinberger and Saul 2009) over all triplets that violate the margin."""

    def __init__(
        self, margin: Annotated[float, "a negative has to be farther than a positive by so much"] = 0.05
    ) -> None:
        super().__init__("TripletMarginLoss", margin=margin)


class LiftedStructureLoss(PairLoss):
    """Lifted structure loss (Song et al., CVPR 2016, eq. 4): each positive pair against all negatives of both."""

    def __init__(
        self,
        neg_margin: Annotated[float, "distance beyond which a negative hardly counts"] = 1.0,
        pos_margin: Annotated[float, "distance within which a positive is close enough"] = 0.0,
    ) -> None:
        super().__init__("LiftedStructureLoss", neg_margin=neg_margin, pos_margin=pos_margin)


class NTXentLoss(PairLoss):
    """NT-Xent, or InfoNCE (Oord et al. 2018; Chen et al., ICML 2020): each positive pair against the negatives."""

    def __init__(self, temperature: Annotated[float, "of the softmax"] = 0.07) -> None:
        super().__init__("NTXentLoss", temperature=temperature)


class SupConLoss(PairLoss):
    """Supervised contrastive loss (Khosla et al., NeurIPS 2020, eq. 2)."""

    def __init__(self, temperature: Annotated[float, "of the softmax"] = 0.1) -> None:
        super().__init__("SupConLoss", temperature=temperature)


class CircleLoss(PairLoss):
    """Circle loss (Sun et al., CVPR 2020, eqs. 4 to 6): pairs weigh by how far they are from where they should be."""

    def __init__(
        self,
        relaxation: Annotated[float, "m in the paper"] = 0.4,
        gamma: Annotated[float, "scale of the similarities"] = 80.0,
    ) -> None:
        super().__init__("CircleLoss", m=relaxation, gamma=gamma)


class LabelLoss(nn.Module):
    """A loss over labels alone: pairs that share ground are negatives."""

    def __init__(self, name: str, **settings: object) -> None:
        super().__init__()
        self.loss = library_loss(name, **settings)

    def forward(self, descriptors: Tensor, labels: Tensor, neutral: Tensor | None = None) -> Tensor:
        """descriptors (N, D), L2-normalised; labels (N,) -> scalar loss; neutral is not looked at."""
        return self.loss(descriptors, labels)


class FastAPLoss(LabelLoss):
    """FastAP (Cakir et al., CVPR 2019): average precision over a histogram of distances."""

    def __init__(self, num_bins: Annotated[int, "bins of the histogram"] = 10) -> None:
        super().__init__("FastAPLoss", num_bins=num_bins)


class ArcFaceLoss(LabelLoss):
    """ArcFace (Deng et al., CVPR 2019, eq. 3) over regions, each with weights of its own."""

    def __init__(
        self,
        num_regions: int,
        descriptor_dim: int,
        margin: Annotated[float, "angle to the own region's weights is taken as so many degrees more"] = 28.6,
        scale: Annotated[float, "of the cosines"] = 64.0,
    ) -> None:
        super().__init__(
            "ArcFaceLoss", num_classes=num_regions, embedding_size=descriptor_dim, margin=margin, scale=scale
        )


class CosFaceLoss(LabelLoss):
    """CosFace (Wang et al., CVPR 2018, eq. 4) over regions, each with weights of its own."""

    def __init__(
        self,
        num_regions: int,
        descriptor_dim: int,
        margin: Annotated[float, "cosine to the own region's weights is taken as so much less"] = 0.35,
        scale: Annotated[float, "of the cosines"] = 64.0,
    ) -> None:
        super().__init__(
            "CosFaceLoss", num_classes=num_regions, embedding_size=descriptor_dim, margin=margin, scale=scale
        )


class SphereFaceLoss(LabelLoss):
    """SphereFace (Liu et al., CVPR 2017, eq. 7) over regions, each with weights of its own.

    In the paper the length of a descriptor scales its cosines. Ours have length 1, so `scale` stands for it; the
    library's 1 would leave all regions about as likely.
    """

    def __init__(
        self,
        num_regions: int,
        descriptor_dim: int,
        margin: Annotated[float, "angle to the own region's weights is taken as so many times as large, whole"] = 4.0,
        scale: Annotated[float, "of the cosines"] = 64.0,
    ) -> None:
        if margin != int(margin) or margin < 1:
            raise ValueError(f"--margin {margin}: SphereFace takes a whole number of at least 1")
        super().__init__(
            "SphereFaceLoss", num_classes=num_regions, embedding_size=descriptor_dim, margin=margin, scale=scale
        )
