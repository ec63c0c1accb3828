"""SALAD (Izquierdo and Civera, CVPR 2024): local features shared out to clusters by optimal transport."""

import math
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.normalise import l2_normalise
from utils.settings import require_at_least


def sinkhorn(scores: Tensor, dustbin: Tensor, iterations: int) -> Tensor:
    """scores (B, M, N) of N features for M < N clusters -> (B, M + 1, N) log of the share of each feature.

    The last row is the dustbin, of the score `dustbin` (0-d), which takes what no cluster wants. Each step scales rows
    to 1 a cluster and N - M for the dustbin, then columns to 1. Sarlin et al. 2020, sec. 3.2, on logarithms.
    """
    batch, clusters, count = scores.shape
    scores = torch.cat([scores, dustbin.expand(batch, 1, count)], dim=1)
    amounts = scores.new_zeros(clusters + 1)
    amounts[-1] = math.log(count - clusters)
    rows, columns = scores.new_zeros(batch, clusters + 1, 1), scores.new_zeros(batch, 1, count)
    for _ in range(iterations):
        rows = amounts[:, None] - (scores + columns).logsumexp(dim=2, keepdim=True)
        columns = -(scores + rows).logsumexp(dim=1, keepdim=True)
    return scores + rows + columns


class SALAD(nn.Module):
    """(B, C, H, W), token (B, C) -> (B, salad_token + salad_dim * salad_clusters), L2-normalised, float32.

    The paper's eqs. 4 to 7. What the dustbin takes is left out. The parameters have the published names.
    """

    def __init__(
        self,
        channels: int,
        height: int,
        width: int,
        salad_clusters: Annotated[int, "clusters"] = 64,
        salad_dim: Annotated[int, "values a cluster"] = 128,
        salad_token: Annotated[int, "values of the whole image's token"] = 256,
        salad_hidden: Annotated[int, "width of the projections' hidden layers"] = 512,
        salad_dropout: Annotated[float, "dropout in the projections"] = 0.3,
        sinkhorn_steps: Annotated[int, "steps of the optimal transport"] = 3,
    ) -> None:
        super().__init__()
        if not 1 <= salad_clusters < height * width:
            raise ValueError(
                f"--salad_clusters {salad_clusters}: must be at least 1 and fewer than the {height} x {width} "
                "features; use fewer, or a larger --image_size"
            )
        require_at_least(1, salad_dim=salad_dim, salad_token=salad_token)
        require_at_least(1, salad_hidden=salad_hidden, sinkhorn_steps=sinkhorn_steps)
        if not 0 <= salad_dropout < 1:
            raise ValueError(f"--salad_dropout {salad_dropout}: must be at least 0 and less than 1")
        self.clusters, self.steps = salad_clusters, sinkhorn_steps
        self.out_dim = salad_token + salad_dim * salad_clusters

        def local(out: int) -> nn.Sequential:
            return nn.Sequential(
                nn.Conv2d(channels, salad_hidden, 1),
                nn.Dropout(salad_dropout),
                nn.ReLU(),
                nn.Conv2d(salad_hidden, out, 1),
            )

        self.token_features = nn.Sequential(
            nn.Linear(channels, salad_hidden), nn.ReLU(), nn.Linear(salad_hidden, salad_token)
        )
        self.cluster_features, self.score = local(salad_dim), local(salad_clusters)
        self.dust_bin = nn.Parameter(torch.tensor(1.0))

    def forward(self, x: Tensor, token: Tensor) -> Tensor:
        if x.shape[2] * x.shape[3] <= self.clusters:
            raise ValueError(
                f"SALAD has {self.clusters} clusters and got features of {x.shape[2]} x {x.shape[3]}: images must "
                "have the size of the model's --image_size"
            )
        found = self.cluster_features(x).flatten(2), self.score(x).flatten(2), self.token_features(token)
        with torch.autocast(x.device.type, enabled=False):  # exponentials
            features, scores, token = (each.to(torch.promote_types(each.dtype, torch.float32)) for each in found)
            shares = sinkhorn(scores, self.dust_bin.to(scores), self.steps)[:, :-1].exp()
            clusters = torch.einsum("bdn,bkn->bdk", features, shares)
            return l2_normalise(torch.cat([F.normalize(token, dim=1), F.normalize(clusters, dim=1).flatten(1)], dim=1))
