"""MegaLoc (Berton and Masone, CVPRW 2025): DINOv2-B with SALAD and a linear layer; trained on five data sets."""

from methods.fetch import HubNetwork


class MegaLoc(HubNetwork):
    """Normalised images (B, 3, 322, 322) -> (B, 8448)."""

    image_size = 322
    source = "gmberton/MegaLoc:5fe0dd697c4a70ba3e23607f6716ab3c606b16db"
    licence = "MIT"
    entry = "get_trained_model"
