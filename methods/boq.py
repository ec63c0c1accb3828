"""BoQ (Ali-bey et al., CVPR 2024): DINOv2-B with a bag of learned queries; trained on GSV-Cities."""

from torch import Tensor

from methods.fetch import HubNetwork


class BoQ(HubNetwork):
    """Normalised images (B, 3, 322, 322) -> (B, 12288)."""

    image_size = 322
    source = "amaralibey/Bag-of-Queries:1a17a4d89506440e974c745baa584b47b40d6072"
    licence = "MIT"
    entry = "get_trained_boq"
    settings = {"backbone_name": "dinov2", "output_dim": 12288}

    def describe(self, images: Tensor) -> Tensor:
        return self.net(images)[0]  # descriptors, attentions
