"""BoQ (Ali-bey et al., CVPR 2024): DINOv2-B with a bag of learned queries; trained on GSV-Cities."""

from torch import Tensor, nn

from methods.fetch import from_hub


class BoQ(nn.Module):
    """Normalised images (B, 3, 322, 322) -> (B, 12288)."""

    image_size = 322
    source = "amaralibey/Bag-of-Queries:1a17a4d89506440e974c745baa584b47b40d6072"
    licence = "MIT"

    def __init__(self, weights: str = "published") -> None:
        super().__init__()
        self.net = from_hub("BoQ", self.source, "get_trained_boq", weights, backbone_name="dinov2", output_dim=12288)

    def describe(self, images: Tensor) -> Tensor:
        return self.net(images)[0]  # descriptors, attentions
