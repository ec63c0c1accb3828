"""BoQ, a bag of learned queries (Ali-bey et al., CVPR 2024)."""

from typing import Annotated

import torch
from torch import Tensor, nn

from models.normalise import l2_normalise
from utils.settings import require_at_least

HEAD_DIM = 64  # of the attentions, in the published models


class BoQBlock(nn.Module):
    """(B, N, D) -> the encoded features (B, N, D), and what the learned queries find in them (B, Q, D)."""

    def __init__(self, dim: int, queries: int) -> None:
        super().__init__()
        heads = max(1, dim // HEAD_DIM)
        self.encoder = nn.TransformerEncoderLayer(dim, heads, 4 * dim, dropout=0.0, batch_first=True)
        self.queries = nn.Parameter(torch.randn(1, queries, dim))
        self.self_attn = nn.MultiheadAttention(dim, heads, batch_first=True)
        self.norm_q = nn.LayerNorm(dim)
        self.cross_attn = nn.MultiheadAttention(dim, heads, batch_first=True)
        self.norm_out = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.encoder(x)
        queries = self.norm_q(self.queries + self.self_attn(self.queries, self.queries, self.queries)[0])
        queries = queries.expand(len(x), -1, -1)
        return x, self.norm_out(self.cross_attn(queries, x, x)[0])


class BoQ(nn.Module):
    """(B, C, H, W) -> (B, boq_channels * boq_rows), L2-normalised, float32. The parameters have the published names.

    Each block encodes the features of the one before and asks them `boq_queries` learned questions; the answers of all
    blocks are mixed into `boq_rows` (the paper's sec. 3). The flat output runs over rows fastest.
    """

    def __init__(
        self,
        channels: int,
        height: int,
        width: int,
        boq_channels: Annotated[int, "features are projected to so many values"] = 512,
        boq_queries: Annotated[int, "learned queries a block"] = 64,
        boq_blocks: Annotated[int, "blocks"] = 2,
        boq_rows: Annotated[int, "rows of the output"] = 32,
    ) -> None:
        super().__init__()
        require_at_least(1, boq_channels=boq_channels, boq_queries=boq_queries)
        require_at_least(1, boq_blocks=boq_blocks, boq_rows=boq_rows)
        if boq_channels > HEAD_DIM and boq_channels % (boq_channels // HEAD_DIM):
            raise ValueError(
                f"--boq_channels {boq_channels}: must be a multiple of its {boq_channels // HEAD_DIM} heads"
            )
        self.out_dim = boq_channels * boq_rows
        self.proj_c = nn.Conv2d(channels, boq_channels, 3, padding=1)
        self.norm_input = nn.LayerNorm(boq_channels)
        self.boqs = nn.ModuleList([BoQBlock(boq_channels, boq_queries) for _ in range(boq_blocks)])
        self.fc = nn.Linear(boq_blocks * boq_queries, boq_rows)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm_input(self.proj_c(x).flatten(2).transpose(1, 2))
        answers = []
        for block in self.boqs:
            x, found = block(x)
            answers.append(found)
        return l2_normalise(self.fc(torch.cat(answers, dim=1).transpose(1, 2)).flatten(1))
