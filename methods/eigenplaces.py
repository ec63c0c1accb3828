"""EigenPlaces (Berton et al., ICCV 2023): CosPlace's network, trained on places seen from different sides."""

from methods.cosplace import CosPlace


class EigenPlaces(CosPlace):
    """Normalised images (B, 3, H, W) -> (B, 2048)."""

    source = "https://github.com/gmberton/EigenPlaces/releases/download/v1.0/ResNet50_2048_eigenplaces.pth"
