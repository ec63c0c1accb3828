"""Aggregators: features (B, C, H, W) -> (B, out_dim). One file each, and a name for --aggregator here.

A class takes (channels, height, width, **its own settings) and has `out_dim`. Its settings are annotated keywords
(utils/settings.py): they become flags, and are kept in checkpoints. It gets two things more where it names them:
`descriptor_dim` in __init__, and `token` in forward, (B, C): a ViT's class token, else the mean of the features. One
that wants to see features before it is trained has `start_from(features, seed)`, which --fc_init whitening calls.
"""

from models.aggregators.boq import BoQ
from models.aggregators.convap import ConvAP
from models.aggregators.gem import GeM
from models.aggregators.mixvpr import MixVPR
from models.aggregators.netvlad import NetVLAD
from models.aggregators.salad import SALAD

AGGREGATORS = {"mixvpr": MixVPR, "gem": GeM, "netvlad": NetVLAD, "convap": ConvAP, "salad": SALAD, "boq": BoQ}
