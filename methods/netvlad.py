"""NetVLAD (Arandjelovic et al., CVPR 2016): the authors' VGG-16 of Pittsburgh, with its whitening."""

from pathlib import Path

import numpy as np
import torch
import torchvision
from torch import Tensor, nn

from methods.fetch import NONE, PUBLISHED, fetched, fill
from models import aggregators

CLUSTERS, CHANNELS = 64, 512


class NetVLAD(nn.Module):
    """Images (B, 3, H, W), 0 to 255 less VGG's mean -> (B, 4096)."""

    image_size = 480
    mean = (123.68 / 255, 116.779 / 255, 103.939 / 255)
    std = (1 / 255,) * 3
    source = "https://cvg-data.inf.ethz.ch/hloc/netvlad/Pitts30K_struct.mat"
    licence = "MIT"

    def __init__(self, weights: str = "published", dim: int = 4096) -> None:
        super().__init__()
        self.backbone = torchvision.models.vgg16().features[:-2]  # without the last ReLU and pooling
        self.netvlad = aggregators.NetVLAD(CHANNELS, 1, 1, vlad_clusters=CLUSTERS)
        self.whiten = nn.Linear(CLUSTERS * CHANNELS, dim)
        if weights != NONE:
            path = fetched("NetVLAD", self.source) if weights == PUBLISHED else Path(weights)
            fill(self, from_matlab(read_matlab(path)), "NetVLAD")

    def describe(self, images: Tensor) -> Tensor:
        return self.whiten(self.netvlad(self.backbone(images)))


def read_matlab(path: Path) -> list[list[np.ndarray]]:
    """The file of a MatConvNet network -> the weights of its layers, [] for one without."""
    from scipy.io import loadmat

    if not path.is_file():
        raise FileNotFoundError(f"NetVLAD: no file {path}; --weights wants the one of {NetVLAD.source}")
    try:
        layers = loadmat(path, struct_as_record=False, squeeze_me=True)["net"].layers
        return [[*layer.weights] if hasattr(layer, "weights") else [] for layer in layers]
    except Exception as error:  # whatever scipy trips over in other bytes
        raise ValueError(f"{path}: no file of the NetVLAD authors ({error}); fetch it again") from error


def from_matlab(layers: list[list[np.ndarray]]) -> dict[str, Tensor]:
    """Weights of the layers -> our state dict. 0 to 29 are VGG-16's, 30 is NetVLAD's, 33 the whitening.

    There kernels are (height, width, in, out), centres (D, K) are stored as their negative, and what is whitened runs
    over centres fastest; ours runs over dimensions fastest.
    """
    state = {}
    for i, weights in enumerate(layers[:30]):
        if weights:
            state[f"backbone.{i}.weight"] = torch.from_numpy(np.ascontiguousarray(weights[0].transpose(3, 2, 0, 1)))
            state[f"backbone.{i}.bias"] = torch.from_numpy(weights[1])
    assign, negative = (torch.from_numpy(np.ascontiguousarray(each.T)) for each in layers[30][:2])
    matrix, bias = layers[33]
    matrix = torch.from_numpy(np.ascontiguousarray(matrix.reshape(-1, matrix.shape[-1]).T))
    clusters, channels = assign.shape
    matrix = matrix.reshape(len(matrix), channels, clusters).transpose(1, 2).flatten(1)
    state |= {
        "netvlad.assign.weight": assign[..., None, None],
        "netvlad.assign.bias": torch.zeros(clusters),
        "netvlad.centers": -negative,
        "whiten.weight": matrix,
        "whiten.bias": torch.from_numpy(bias.reshape(-1)),
    }
    return {key: value.float() for key, value in state.items()}
