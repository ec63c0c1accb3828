"""NetVLAD (Arandjelovic et al., CVPR 2016): residuals of local features to learned centres, softly assigned."""

import math
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.normalise import l2_normalise
from utils.settings import require_at_least

RATIO = 100  # of the two largest assignments, on average, after start_from: as in the authors' code


class NetVLAD(nn.Module):
    """(B, C, H, W) -> (B, vlad_clusters * D), L2-normalised, float32; D: vlad_channels, or else C.

    Arandjelovic et al. 2016, eqs. 3 and 4, with their normalisation of features before and of each centre's sum after.
    The centres are random until `start_from` puts them where features are, which `--fc_init whitening` does.
    """

    def __init__(
        self,
        channels: int,
        height: int,
        width: int,
        vlad_clusters: Annotated[int, "centres"] = 64,
        vlad_channels: Annotated[int | None, "project features to so many values; default: as they are"] = None,
    ) -> None:
        super().__init__()
        require_at_least(2, vlad_clusters=vlad_clusters)
        require_at_least(1, vlad_channels=vlad_channels)
        dim = vlad_channels or channels
        self.out_dim = vlad_clusters * dim
        self.project = nn.Conv2d(channels, dim, 1) if vlad_channels else nn.Identity()
        self.assign = nn.Conv2d(dim, vlad_clusters, 1)
        self.centers = nn.Parameter(F.normalize(torch.randn(vlad_clusters, dim), dim=1))

    def local(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, D, H, W), at least float32, each position of unit length."""
        x = self.project(x)
        return F.normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.local(x)
        with torch.autocast(x.device.type, enabled=False):  # differences of nearly equal numbers
            shares = self.assign(x).flatten(2).softmax(dim=1)
            sums = torch.einsum("bkn,bdn->bkd", shares, x.flatten(2))
            residuals = sums - shares.sum(dim=2)[..., None] * self.centers
            return l2_normalise(F.normalize(residuals, dim=2).flatten(1))

    @torch.no_grad()
    def start_from(self, x: Tensor, seed: int = 0) -> None:
        """Centres by k-means of the features (B, C, H, W), and assignments to the nearest one (eq. 2), as hard as gives
        a share RATIO times the second's on average. ValueError with fewer positions than centres."""
        from sklearn.cluster import KMeans

        features = self.local(x).permute(0, 2, 3, 1).flatten(0, 2).cpu()
        count = len(self.centers)
        if len(features) < count:
            raise ValueError(f"--vlad_clusters {count}: more than the {len(features)} features to start from")
        found = KMeans(count, n_init=1, random_state=seed).fit(features.numpy())
        centers = torch.from_numpy(found.cluster_centers_).to(self.centers)
        nearest = torch.cdist(features.to(centers), centers).square().topk(2, dim=1, largest=False).values
        sharpness = math.log(RATIO) / (nearest[:, 1] - nearest[:, 0]).mean().clamp(min=1e-6)
        self.centers.copy_(centers)
        self.assign.weight.copy_((2 * sharpness * centers)[..., None, None])
        self.assign.bias.copy_(-sharpness * centers.square().sum(dim=1))
