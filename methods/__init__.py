"""Methods of others, as published: python eval.py --method NAME. One small file each, and a line in METHODS here.

A method is an nn.Module with `image_size` (pixels a side of its square input) and
`describe(images (B, 3, H, W)) -> (B, D)`; images are RGB, (value in [0, 1] - mean) / std, by its `mean` and `std`
(default: ImageNet's). It may have:
- `weights` in __init__: "published", which it fetches; "none", random ones; or a file or folder that has them;
- `prepare(batches)`: sees a sample of the database's images before anything is described;
- `source`, `licence`: where the weights are published, and how.
One of your own is such a class alone in a file: python eval.py --method mine.py
"""

import importlib.util
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from methods.anyloc import AnyLoc
from methods.boq import BoQ
from methods.convap import ConvAP
from methods.cosplace import CosPlace
from methods.eigenplaces import EigenPlaces
from methods.megaloc import MegaLoc
from methods.mixvpr import MixVPR
from methods.netvlad import NetVLAD
from methods.salad import SALAD
from methods.sfrs import SFRS
from methods.torchgeo import GASSL, EarthLocOfTorchGeo, MoCo, SeCo
from methods.uav import MBEG, OGCLConvNeXt, OGCLViT
from models.normalise import l2_normalise
from utils.settings import make

METHODS = {
    "netvlad": NetVLAD,
    "sfrs": SFRS,
    "cosplace": CosPlace,
    "convap": ConvAP,
    "mixvpr": MixVPR,
    "eigenplaces": EigenPlaces,
    "anyloc": AnyLoc,
    "salad": SALAD,
    "boq": BoQ,
    "megaloc": MegaLoc,
    "torchgeo_moco": MoCo,
    "torchgeo_seco": SeCo,
    "torchgeo_gassl": GASSL,
    "torchgeo_earthloc": EarthLocOfTorchGeo,
    "ogcl_convnext": OGCLConvNeXt,
    "ogcl_vit": OGCLViT,
    "mbeg": MBEG,
}
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Described(nn.Module):
    """A method as all that describes and searches here takes it: (B, 3, H, W) float RGB in [0, 1] -> (B, D) float32 of
    unit length."""

    def __init__(self, method: nn.Module) -> None:
        super().__init__()
        for field in ("describe", "image_size"):
            if not isinstance(method, nn.Module) or not hasattr(method, field):
                raise ValueError(
                    f"{type(method).__name__}: a method is an nn.Module with `{field}` (methods/__init__.py)"
                )
        self.method, self.image_size = method, method.image_size
        for name, default in (("mean", IMAGENET_MEAN), ("std", IMAGENET_STD)):
            self.register_buffer(name, torch.tensor(getattr(method, name, default)).reshape(1, 3, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        return l2_normalise(self.method.describe((images - self.mean) / self.std))

    def prepare(self, batches: Iterator[Tensor]) -> None:
        """Shows it a sample of the database, batches (B, 3, H, W) float RGB in [0, 1], if it wants to see one."""
        if hasattr(self.method, "prepare"):
            self.method.prepare((images - self.mean) / self.std for images in batches)


def load_method(name: str, weights: str = "published") -> Described:
    """A name of METHODS, or a .py file with one class that has `describe` -> the method in eval mode.

    ValueError or FileNotFoundError names what is wrong; RuntimeError where published weights can't be had.
    """
    if name not in METHODS and not name.endswith(".py"):
        raise ValueError(f"--method {name}: unknown; choose of {', '.join(METHODS)}, or give a .py file")
    cls = METHODS.get(name) or _class_in(Path(name))
    return Described(make(cls, {}, weights=weights)).eval()


def _class_in(path: Path) -> type[nn.Module]:
    """The one class in a file of Python code that has `describe`."""
    if not path.is_file():
        raise FileNotFoundError(f"--method {path}: no such file")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found = [
        each
        for each in vars(module).values()
        if isinstance(each, type) and hasattr(each, "describe") and each.__module__ == path.stem
    ]
    if len(found) != 1:
        raise ValueError(f"--method {path}: has {len(found)} classes with `describe`, and should have one")
    return found[0]
