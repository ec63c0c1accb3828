"""Losses over a batch's descriptors, by name: python train.py --loss NAME. Their settings are flags by themselves.

A loss is an nn.Module, (descriptors (N, D), labels (N,), neutral (N, N) bool or None) -> scalar; labels are the rows of
the regions in the data set. One with weights of its own may take `num_regions` and `descriptor_dim`; the optimizer
trains them, the checkpoint keeps them. `mined_shares`, with the same arguments, is logged where a loss has it.
"""

import torch
from torch import Tensor, nn

from losses.contrastive import ContrastiveLoss
from losses.joint import JointLoss
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
from losses.pairwise import PairwiseLoss

LOSSES = {
    "multi_similarity": MultiSimilarityLoss,
    "pairwise": PairwiseLoss,
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


@torch.no_grad()
def scalars(loss_fn: nn.Module, descriptors: Tensor, labels: Tensor, neutral: Tensor | None = None) -> dict:
    """What is logged besides the loss: each kind's, where there are several, and what was mined of the first."""
    joint = isinstance(loss_fn, JointLoss)
    parts = (loss_fn if joint else JointLoss({"all": loss_fn}, [len(labels)])).parts(descriptors, labels, neutral)
    logged = {f"loss/{kind}": loss(*own) for kind, (loss, *own) in parts.items()} if joint else {}
    first, *own = next(iter(parts.values()))
    if hasattr(first, "mined_shares"):
        logged["mined/anchors"], logged["mined/pairs"] = first.mined_shares(*own)
    return logged
