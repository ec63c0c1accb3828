"""MegaLoc (Berton and Masone, CVPRW 2025): DINOv2-B with SALAD and a linear layer; trained on five data sets."""

from torch import Tensor, nn

from methods.fetch import from_hub


class MegaLoc(nn.Module):
    """Normalised images (B, 3, 322, 322) -> (B, 8448)."""

    image_size = 322
    source = "gmberton/MegaLoc:5fe0dd697c4a70ba3e23607f6716ab3c606b16db"
    licence = "MIT"

    def __init__(self, weights: str = "published") -> None:
        super().__init__()
        self.net = from_hub("MegaLoc", self.source, "get_trained_model", weights)

    def describe(self, images: Tensor) -> Tensor:
        return self.net(images)
