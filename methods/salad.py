"""SALAD (Izquierdo and Civera, CVPR 2024): DINOv2-B with optimal transport; trained on GSV-Cities."""

from methods.fetch import HubNetwork


class SALAD(HubNetwork):
    """Normalised images (B, 3, 322, 322) -> (B, 8448)."""

    image_size = 322
    source = "serizba/salad:07d713f542641faeecae14e305f19a79466f4211"
    licence = "GPL-3.0"
    entry = "dinov2_salad"
