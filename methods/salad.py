"""SALAD (Izquierdo and Civera, CVPR 2024): DINOv2-B with optimal transport; trained on GSV-Cities."""

from torch import Tensor, nn

from methods.fetch import from_hub


class SALAD(nn.Module):
    """Normalised images (B, 3, 322, 322) -> (B, 8448)."""

    image_size = 322
    source = "serizba/salad:07d713f542641faeecae14e305f19a79466f4211"
    licence = "GPL-3.0"

    def __init__(self, weights: str = "published") -> None:
        super().__init__()
        self.net = from_hub("SALAD", self.source, "dinov2_salad", weights)

    def describe(self, images: Tensor) -> Tensor:
        return self.net(images)
