"""CosPlace (Berton et al., CVPR 2022): ResNet-50, GeM, one linear layer; trained on San Francisco eXtra Large."""

import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F

from methods.fetch import fill, state_of


class GeMPower(nn.Module):
    """(B, C, H, W) -> (B, C): generalised mean of features of unit length, not normalised after it."""

    def __init__(self) -> None:
        super().__init__()
        self.p = nn.Parameter(torch.full((1,), 3.0))

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(x, dim=1).clamp(min=1e-6).pow(self.p).mean(dim=(2, 3)).pow(1 / self.p)


class CosPlace(nn.Module):
    """Normalised images (B, 3, H, W) -> (B, 2048)."""

    image_size = 512
    source = "https://github.com/gmberton/CosPlace/releases/download/v1.0/ResNet50_2048_cosplace.pth"
    licence = "MIT"

    def __init__(self, weights: str = "published") -> None:
        super().__init__()
        layers = [*torchvision.models.resnet50().children()]
        self.backbone = nn.Sequential(*layers[:-2])
        self.aggregation = nn.Sequential(nn.Identity(), GeMPower(), nn.Identity(), nn.Linear(2048, 2048))
        fill(self, state_of(type(self).__name__, weights, self.source), type(self).__name__)

    def describe(self, images: Tensor) -> Tensor:
        return self.aggregation(self.backbone(images))
