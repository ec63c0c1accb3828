"""GeoCLIP's image encoders: frozen CLIP (paper, sec. 3.1), or one of our backbones with GeM pooling."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn

from models.aggregators import GeM
from models.backbone import Backbone
from models.location_encoder import EMBEDDING_DIM

CLIP = "openai/clip-vit-large-patch14"
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
HIDDEN_DIM = 768


def make_mlp(features: int) -> nn.Sequential:
    """The two trained layers after the features; names as published: `0.*`, `2.*`."""
    return nn.Sequential(nn.Linear(features, HIDDEN_DIM), nn.ReLU(), nn.Linear(HIDDEN_DIM, EMBEDDING_DIM))


class ClipEncoder(nn.Module):
    """(B, 3, H, W) float RGB in [0, 1] -> (B, 512). CLIP's vision tower and projection, frozen, then a trained MLP.

    `clip`: a Hugging Face id, or a folder with config.json and the weights. `image_size` and `fit` say how images are
    to be read: short side to image_size, then the middle, as CLIP's own preprocessing does.
    """

    fit = "crop"

    def __init__(self, clip: str = CLIP) -> None:
        super().__init__()
        self.clip = load_clip(clip)
        self.clip.requires_grad_(False)
        self.image_size = self.clip.config.image_size
        self.mlp = make_mlp(self.clip.config.projection_dim)
        self.register_buffer("mean", torch.tensor(CLIP_MEAN).reshape(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(CLIP_STD).reshape(1, 3, 1, 1), persistent=False)
        self.train(self.training)

    def train(self, mode: bool = True) -> ClipEncoder:
        super().train(mode)
        self.clip.eval()  # frozen: no dropout
        return self

    def forward(self, images: Tensor) -> Tensor:
        with torch.no_grad():
            features = self.clip(pixel_values=(images - self.mean) / self.std).image_embeds
        return self.mlp(features)


class BackboneEncoder(nn.Module):
    """(B, 3, H, W) float RGB in [0, 1] -> (B, 512). One of EarthLoc's backbones, GeM pooling, BatchNorm, MLP.

    BatchNorm takes away the large mean that pooled features share, which would keep fresh embeddings alike.
    Images are squashed to a square, as EarthLoc's are.
    """

    fit = "squash"

    def __init__(self, name: str, cut_after: str, freeze_until: str, image_size: int, gem_grid: int = 1) -> None:
        super().__init__()
        self.image_size = image_size
        self.backbone = Backbone(name, cut_after, freeze_until)
        size = self.backbone.feature_size(image_size)
        self.aggregator = GeM(self.backbone.out_channels, size, size, gem_grid)
        self.norm = nn.BatchNorm1d(self.aggregator.out_dim)
        self.mlp = make_mlp(self.aggregator.out_dim)
        self.register_buffer("mean", torch.tensor(self.backbone.mean).reshape(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(self.backbone.std).reshape(1, 3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        images = images.contiguous(memory_format=torch.channels_last)
        pooled = self.aggregator(self.backbone((images - self.mean) / self.std))
        # Float32: pooled features are small differences on a large mean.
        with torch.autocast(pooled.device.type, enabled=False):
            return self.mlp(self.norm(pooled))


def load_clip(clip: str) -> nn.Module:
    """CLIP's vision half from the Hugging Face hub, its cache, or a folder. RuntimeError says what to install."""
    try:
        from transformers import CLIPVisionModelWithProjection
        from transformers.utils import logging
    except ImportError as error:
        raise RuntimeError(
            "the CLIP image encoder needs transformers: pip install transformers (or train with "
            "--image_encoder efficientnet_lite0, which needs nothing more)"
        ) from error
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # the text half of the file is unused, which is no news
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return CLIPVisionModelWithProjection.from_pretrained(clip).float()
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise RuntimeError(
            f"CLIP {clip} could not be loaded ({reason}). It is fetched once from the Hugging Face hub; "
            "without a network give --clip FOLDER with its config.json and model.safetensors"
        ) from error
    finally:
        logging.set_verbosity(verbosity)
