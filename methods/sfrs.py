"""SFRS (Ge et al., ECCV 2020): NetVLAD on VGG-16, trained on similarities of parts, whitened to 4,096."""

from torch import Tensor, nn

from methods.fetch import from_hub


class SFRS(nn.Module):
    """Normalised images (B, 3, H, W) -> (B, 4096)."""

    image_size = 480
    mean = (0.48501960784313836, 0.4579568627450961, 0.4076039215686255)
    std = (1 / 255,) * 3
    source = "yxgeee/OpenIBL:dea9d4183822256d0b3e77af14a4f2ec961072b4"
    licence = "MIT"

    def __init__(self, weights: str = "published") -> None:
        super().__init__()
        self.net = from_hub("SFRS", self.source, "vgg16_netvlad", weights, pretrained=True)

    def describe(self, images: Tensor) -> Tensor:
        return self.net(images)
