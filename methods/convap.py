"""Conv-AP (Ali-bey et al., Neurocomputing 2022): ResNet-50 and means over 2 x 2 cells; trained on GSV-Cities.

Its files lie in a folder of a drive without addresses of their own: they are to be brought by hand.
"""

from torch import Tensor, nn

from methods.fetch import PUBLISHED, fill, not_had, state_of
from models import aggregators
from models.backbone import Backbone


class ConvAP(nn.Module):
    """Normalised images (B, 3, 320, 320) -> (B, 4096)."""

    image_size = 320
    source = "https://drive.google.com/drive/folders/1VYPw9uGD11NgiGFgfWueLt3noJYOIuhL (resnet50_ConvAP_1024_2x2.ckpt)"
    licence = "see github.com/amaralibey/gsv-cities"

    def __init__(self, weights: str = "published") -> None:
        super().__init__()
        if weights == PUBLISHED:
            raise not_had("Conv-AP", self.source, "a folder that a browser can open")
        self.backbone = Backbone("resnet50", "layer4")
        self.aggregator = aggregators.ConvAP(2048, 10, 10, descriptor_dim=4096)
        fill(self, state_of("Conv-AP", weights, self.source), "Conv-AP")

    def describe(self, images: Tensor) -> Tensor:
        return self.aggregator(self.backbone(images))
