"""SFRS (Ge et al., ECCV 2020): NetVLAD on VGG-16, trained on similarities of parts, whitened to 4,096."""

from methods.fetch import HubNetwork


class SFRS(HubNetwork):
    """Normalised images (B, 3, H, W) -> (B, 4096)."""

    image_size = 480
    mean = (0.48501960784313836, 0.4579568627450961, 0.4076039215686255)
    std = (1 / 255,) * 3
    source = "yxgeee/OpenIBL:dea9d4183822256d0b3e77af14a4f2ec961072b4"
    licence = "MIT"
    entry = "vgg16_netvlad"
    settings = {"pretrained": True}
