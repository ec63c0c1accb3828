"""MixVPR (Ali-bey et al., WACV 2023): ResNet-50 to layer3 and four mixers; trained on GSV-Cities."""

from torch import Tensor, nn

from methods.fetch import fill, state_of
from models import aggregators
from models.backbone import Backbone


class MixVPR(nn.Module):
    """Normalised images (B, 3, 320, 320) -> (B, 4096)."""

    image_size = 320
    source = "https://drive.usercontent.google.com/download?id=1vuz3PvnR7vxnDDLQrdHJaOA04SQrtk5L&confirm=t"
    licence = "see github.com/amaralibey/MixVPR"

    def __init__(self, weights: str = "published") -> None:
        super().__init__()
        self.backbone = Backbone("resnet50", "layer3")
        self.aggregator = aggregators.MixVPR(1024, 20, 20, descriptor_dim=4096)
        name = "resnet50_MixVPR_4096_channels(1024)_rows(4).ckpt"
        fill(self, state_of("MixVPR", weights, self.source, name=name), "MixVPR")

    def describe(self, images: Tensor) -> Tensor:
        return self.aggregator(self.backbone(images))
