"""Losses over a batch's descriptors, by name: python train.py --loss NAME. Their settings are flags by themselves.

A loss is an nn.Module, (descriptors (N, D), labels (N,), neutral (N, N) bool or None) -> scalar; labels are the rows of
the regions in the data set. One with weights of its own may take `num_regions` and `descriptor_dim`; the optimizer
trains them, the checkpoint keeps them. `mined_shares`, with the same arguments, is logged where a loss has it.
"""

from losses.contrastive import ContrastiveLoss
from losses.library import (
    ArcFaceLoss,
    CircleLoss,
    CosFaceLoss,
    FastAPLoss,
    LiftedStructureLoss,
    NTXentLoss,
    SphereFaceLoss,
    SupConLoss,
    TripletLoss,
)
from losses.multi_similarity import MultiSimilarityLoss

LOSSES = {
    "multi_similarity": MultiSimilarityLoss,
    "contrastive": ContrastiveLoss,
    "triplet": TripletLoss,
    "lifted_structure": LiftedStructureLoss,
    "ntxent": NTXentLoss,
    "supcon": SupConLoss,
    "circle": CircleLoss,
    "fastap": FastAPLoss,
    "arcface": ArcFaceLoss,
    "cosface": CosFaceLoss,
    "sphereface": SphereFaceLoss,
}
