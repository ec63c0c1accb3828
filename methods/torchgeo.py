"""TorchGeo's published networks (Stewart et al., 2022): self-supervised ResNet-50s, and its copy of EarthLoc.

The ResNets see what they have been trained on as nearly as 8-bit photos allow: in [0, 1], normalised as in their
training. TorchGeo's own transforms want raw Sentinel-2 values for MoCo and SeCo, which these photos do not have.
"""

import timm
from torch import Tensor, nn

from methods.fetch import NONE, PUBLISHED, fetched, fill, state_of
from models.config import ModelConfig
from models.earthloc import EarthLoc, load_model

HUB = "https://huggingface.co/torchgeo"


class ResNet50(nn.Module):
    """Normalised images (B, 3, H, W) -> (B, 2048), the mean of the last features."""

    image_size = 224
    source: str
    sha: str
    licence = "CC BY 4.0"

    def __init__(self, weights: str = "published") -> None:
        super().__init__()
        self.net = timm.create_model("resnet50", num_classes=0)
        name = type(self).__name__
        state = state_of(name, weights, self.source, sha=self.sha)
        if state is not None:
            state = {key: value for key, value in state.items() if not key.startswith("fc.")}
        fill(self.net, state, name)

    def describe(self, images: Tensor) -> Tensor:
        return self.net(images)


class MoCo(ResNet50):
    """MoCo on Sentinel-2 (SSL4EO-S12, Wang et al. 2023)."""

    mean, std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    sha = "2b57ba8b"
    source = (
        f"{HUB}/resnet50_sentinel2_rgb_moco/resolve/efd9723b59a88e9dc1420dc1e96afb25b0630a3c/"
        "resnet50_sentinel2_rgb_moco-2b57ba8b.pth"
    )


class SeCo(ResNet50):
    """Seasonal contrast on Sentinel-2 (Manas et al., ICCV 2021)."""

    sha = "018bf397"
    licence = "see huggingface.co/torchgeo/resnet50_sentinel2_rgb_seco"
    source = (
        f"{HUB}/resnet50_sentinel2_rgb_seco/resolve/fbd07b02a8edb8fc1035f7957160deed4321c145/"
        "resnet50_sentinel2_rgb_seco-018bf397.pth"
    )


class GASSL(ResNet50):
    """Geography-aware self-supervision on fMoW (Ayush et al., ICCV 2021)."""

    sha = "da43d987"
    source = (
        f"{HUB}/resnet50_fmow_rgb_gassl/resolve/fe8a91026cf9104f1e884316b8e8772d7af9052c/"
        "resnet50_fmow_rgb_gassl-da43d987.pth"
    )


class EarthLocOfTorchGeo(nn.Module):
    """EarthLoc as released, with the names that TorchGeo gives its weights: images in [0, 1] -> (B, 4096)."""

    image_size = 320
    mean, std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)  # the network normalises by itself
    source = f"{HUB}/earthloc/resolve/53a4bb90a7754b12f44986521ac7a711b4795959/earthloc-8b632e30.pth"
    licence = "see huggingface.co/torchgeo/earthloc"

    def __init__(self, weights: str = "published") -> None:
        super().__init__()
        if weights == PUBLISHED:
            weights = fetched("TorchGeo's EarthLoc", self.source, sha="8b632e30")
        self.net = EarthLoc(ModelConfig()) if weights == NONE else load_model(weights)

    def describe(self, images: Tensor) -> Tensor:
        return self.net(images)
