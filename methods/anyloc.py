"""AnyLoc (Keetha et al., RA-L 2023): VLAD over the values of DINOv2's attention, the vocabulary from our database."""

from collections.abc import Iterable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from methods.fetch import NONE, PUBLISHED, fill, not_had
from models.backbone import timm_model
from models.weights import read_state_dict
from retrieval.clustering import faiss_kmeans

PATCHES = 64  # of an image that the vocabulary is made from, drawn at random


class AnyLoc(nn.Module):
    """Normalised images (B, 3, 322, 322) -> (B, 32 * 1536). The paper's sec. 3: values of block 31, hard assignment.

    `prepare` makes the vocabulary. The authors' own, of other aerial images, would be another method.
    """

    image_size = 322
    source = "timm vit_giant_patch14_dinov2.lvd142m (Hugging Face hub)"
    licence = "Apache-2.0 (DINOv2)"

    def __init__(
        self,
        weights: str = "published",
        backbone: str = "vit_giant_patch14_dinov2",
        block: int = 31,
        clusters: int = 32,
    ) -> None:
        super().__init__()
        options = {"num_classes": 0, "dynamic_img_size": True}
        try:
            self.vit = timm_model(backbone, pretrained=weights == PUBLISHED, **options)
        except Exception as error:  # whatever the hub's client or the network raise
            raise not_had("AnyLoc", self.source, error) from error
        if weights not in (PUBLISHED, NONE):
            fill(self.vit, read_state_dict(Path(weights)), "AnyLoc")
        self.vit.blocks = self.vit.blocks[: block + 1]
        self.register_buffer("centers", torch.full((clusters, self.vit.embed_dim), torch.nan))

    def values(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, N, D) float32: what the last block's attention sums, of unit length."""
        found = []
        hook = self.vit.blocks[-1].attn.qkv.register_forward_hook(lambda module, given, out: found.append(out))
        try:
            self.vit.forward_features(images)
        finally:
            hook.remove()
        values = found[0].chunk(3, dim=-1)[2][:, self.vit.num_prefix_tokens :]
        return F.normalize(values.float(), dim=-1)

    @torch.no_grad()
    def prepare(self, batches: Iterable[Tensor]) -> None:
        """The vocabulary, by k-means of some patches of each image (B, 3, H, W)."""
        generator, some = torch.Generator().manual_seed(0), []
        for images in batches:
            values = self.values(images)
            chosen = torch.randperm(values.shape[1], generator=generator)[:PATCHES].to(values.device)
            some.append(values[:, chosen].flatten(0, 1).cpu())
        features = torch.cat(some) if some else torch.empty(0)
        if len(features) < len(self.centers):
            raise ValueError(
                f"AnyLoc: {len(features)} patches of the database are too few for {len(self.centers)} words"
            )
        self.centers.copy_(torch.from_numpy(faiss_kmeans(features.numpy(), len(self.centers), 0)[1]))

    def describe(self, images: Tensor) -> Tensor:
        if self.centers[0, 0].isnan():
            raise ValueError("AnyLoc has no vocabulary yet: call `prepare` with images of the database first")
        values = self.values(images)
        nearest = (values @ F.normalize(self.centers, dim=1).T).argmax(dim=-1)
        shares = F.one_hot(nearest, len(self.centers)).to(values)
        sums = shares.transpose(1, 2) @ values - shares.sum(dim=1)[..., None] * self.centers
        return F.normalize(sums, dim=-1).flatten(1)
