"""OGCL (Deuser et al. 2023) and MBEG (Zhu et al. 2023), for views of drones: backbones of timm, without a head.

OGCL's weights are published nowhere that we know; MBEG's lie on a Baidu disk, which wants a login. So these want
--weights FILE, a state dict of the backbone in timm's names (a prefix such as `model.` is taken off).
"""

from pathlib import Path

import timm
from torch import Tensor, nn

from methods.fetch import NONE, PUBLISHED, fill, not_had
from models.weights import read_state_dict

PREFIXES = ("module.", "model.", "backbone.model.")


class TimmBackbone(nn.Module):
    """Normalised images (B, 3, H, W) -> (B, D): the features that timm pools."""

    name: str
    source: str
    licence = "not said"
    image_size: int

    def __init__(self, weights: str = "published") -> None:
        super().__init__()
        what = type(self).__name__
        if weights == PUBLISHED:
            raise not_had(what, self.source, "not to be fetched by a program")
        self.net = timm.create_model(self.name, num_classes=0)
        config = self.net.pretrained_cfg
        self.mean, self.std = config["mean"], config["std"]
        if weights != NONE:
            own = self.net.state_dict()
            state = {unprefixed(key): value for key, value in read_state_dict(Path(weights)).items()}
            fill(self.net, {key: value for key, value in state.items() if key in own}, what)

    def describe(self, images: Tensor) -> Tensor:
        return self.net(images)


def unprefixed(key: str) -> str:
    """A name in a state dict without what wrappers put before it."""
    while key.startswith(PREFIXES):
        key = next(key.removeprefix(prefix) for prefix in PREFIXES if key.startswith(prefix))
    return key


class OGCLConvNeXt(TimmBackbone):
    """OGCL with ConvNeXt-XXLarge."""

    name, image_size = "convnext_xxlarge.clip_laion2b_soup", 256
    source = "its authors (no public address is known)"


class OGCLViT(TimmBackbone):
    """OGCL with ViT-L/14."""

    name, image_size = "vit_large_patch14_clip_224.laion2b", 224
    source = OGCLConvNeXt.source


class MBEG(TimmBackbone):
    """MBEG with ViT-L/14."""

    name, image_size = "vit_large_patch14_clip_224.openai", 224
    source = "https://pan.baidu.com/s/1k1z90EyLaL85PqeSxxlWOw (github.com/Reza-Zhu/ACMMM23-Solution-MBEG)"
