"""EarthLoc's network (paper section 5.1): backbone -> aggregator -> linear -> L2-normalised descriptor; and several of
them as one model."""

import math
from inspect import signature
from pathlib import Path

import torch
from torch import Tensor, nn

from models.aggregators import AGGREGATORS
from models.backbone import Backbone, imagenet_state_dict
from models.config import EnsembleConfig, ModelConfig
from models.hub import HubMixin
from models.normalise import l2_normalise
from models.weights import fit_backbone_, fit_model_, is_whole_model, read_model, read_state_dict


class EarthLoc(nn.Module, HubMixin):
    """(B, 3, H, W) float RGB in [0, 1] -> (B, descriptor_dim) float32 descriptors of unit length.

    Builds the architecture with random weights and freezes what `config.freeze_until` says, as it should be for a
    state dict that is loaded next; `build_model` makes a model to train. `config` is kept with its defaults filled in.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config = config.with_defaults(pretrained=config.freeze_until is not None)
        self.backbone = Backbone(config.backbone, config.cut_after, config.freeze_until, config.frozen_batchnorm)
        size = self.backbone.feature_size(config.image_size)
        aggregator = AGGREGATORS[config.aggregator]
        more = {"descriptor_dim": config.descriptor_dim} if "descriptor_dim" in signature(aggregator).parameters else {}
        self.aggregator = aggregator(self.backbone.out_channels, size, size, **more, **config.aggregator_settings)
        self._takes_token = "token" in signature(self.aggregator.forward).parameters
        self.fc = nn.Linear(self.aggregator.out_dim, config.descriptor_dim)
        # Not persistent: the released checkpoints hold no such entries.
        self.register_buffer("mean", torch.tensor(self.backbone.mean).reshape(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(self.backbone.std).reshape(1, 3, 1, 1), persistent=False)

    def features(self, images: Tensor) -> tuple[Tensor, ...]:
        """(B, 3, H, W) float RGB in [0, 1] -> what the aggregator takes: features (B, C, h, w), perhaps a token."""
        if images.dim() != 4 or images.shape[1] != 3 or not images.is_floating_point():
            raise ValueError(
                f"images of shape {tuple(images.shape)} and type {images.dtype}: "
                "expected (B, 3, H, W) floating point RGB in [0, 1]"
            )
        images = (images - self.mean) / self.std
        return self.backbone.features_and_token(images) if self._takes_token else (self.backbone(images),)

    def aggregate(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) float RGB in [0, 1] -> (B, F) float32 of unit length: what goes into `fc`."""
        return self.aggregator(*self.features(images))

    def forward(self, images: Tensor) -> Tensor:
        features = self.aggregate(images)
        # In float32 whatever autocast does: features share a large mean that `fc` must cancel, and a bfloat16 product
        # keeps few digits for that. For the paper's model it is a hundredth of the work.
        with torch.autocast(features.device.type, enabled=False):
            return l2_normalise(self.fc(features))

    @torch.no_grad()
    def whiten_(
        self,
        features: Tensor,
        power: float = 1.0,
        regulariser: float = 1e-3,
        std: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> int:
        """Sets `fc` to the PCA-whitening of features (N, F), as `aggregate` returns them; returns the directions used.
        generator: a CPU torch.Generator.

        Row i is the i-th principal direction divided by (variance_i + regulariser * mean variance) ** (power / 2),
        the bias removes the mean: outputs are centred, uncorrelated and, at power 1 and regulariser 0, of standard
        deviation `std`. Power 0 only centres and rotates. `std` does not change descriptors, which are normalised,
        but how fast `fc` learns beside its size.
        Rows beyond the rank of the features (at most N - 1) are random directions orthogonal to the others, as short as
        the shortest of them: they add little noise, yet learn, which zeros could not: their gradient would be zero.
        """
        if features.dim() != 2 or features.shape[1] != self.fc.in_features or len(features) < 2:
            raise ValueError(f"whitening needs features (N >= 2, {self.fc.in_features}), got {tuple(features.shape)}")
        if not torch.isfinite(features).all():
            raise ValueError("whitening needs finite features, got nan or inf")
        x = features.double()
        mean = x.mean(0)
        variances, directions = _principal_directions(x - mean)
        if not len(variances):
            raise ValueError("whitening needs features that differ: all images have the same ones")
        # The mean over all F directions, seen or not, so that it does not depend on descriptor_dim.
        floor = regulariser * variances.sum() / x.shape[1]
        variances, directions = variances[: self.fc.out_features], directions[: self.fc.out_features]
        scales = std * (variances + floor) ** (-power / 2)
        rows = directions * scales[:, None]
        missing = self.fc.out_features - len(rows)
        if missing:
            # Drawn on the CPU, where the generator is, so that a GPU has the same directions.
            fill = torch.randn(missing, x.shape[1], dtype=x.dtype, generator=generator).to(x.device)
            fill = _orthogonal_to(fill, directions)
            rows = torch.cat([rows, fill * scales.min()])
        self.fc.weight.copy_(rows)
        self.fc.bias.copy_(-rows @ mean)
        return len(directions)


def _principal_directions(centred: Tensor) -> tuple[Tensor, Tensor]:
    """(N, F) centred float64 -> variances (K,), largest first, and directions (K, F) of unit length, K the rank."""
    n, f = centred.shape
    # The smaller of the two Gram matrices has the same non-zero eigenvalues.
    gram = centred.T @ centred if f <= n else centred @ centred.T
    values, vectors = torch.linalg.eigh(gram / (n - 1))
    values, vectors = values.flip(0), vectors.flip(1)
    kept = values > max(n, f) * torch.finfo(torch.float32).eps ** 2 * centred.abs().max() ** 2
    kept &= values > 1e-10 * values[0]
    values, vectors = values[kept], vectors[:, kept]
    directions = vectors.T if f <= n else nn.functional.normalize((centred.T @ vectors).T, dim=1)
    return values, directions


def _orthogonal_to(fill: Tensor, directions: Tensor) -> Tensor:
    """Rows of unit length (M, F) without their part along orthonormal directions (K, F); orthogonal if K + M <= F."""
    free = fill.shape[1] - len(directions)
    if free:
        fill = fill - fill @ directions.T @ directions
    if len(fill) <= free:
        fill = torch.linalg.qr(fill.T).Q.T
    return nn.functional.normalize(fill, dim=1)


class Ensemble(nn.Module, HubMixin):
    """(B, 3, H, W) float RGB in [0, 1] -> (B, sum of the members' descriptor_dims) float32 of unit length: the members'
    descriptors side by side, so that a cosine similarity is the mean of theirs.

    Its members are trained, and whitened, one by one; python -m experiments.ensemble makes one of their files.
    """

    def __init__(self, config: EnsembleConfig) -> None:
        super().__init__()
        self.members = nn.ModuleList(map(EarthLoc, config.members))
        self.config = EnsembleConfig(tuple(member.config for member in self.members))

    def forward(self, images: Tensor) -> Tensor:
        return torch.cat([member(images) for member in self.members], dim=1) / math.sqrt(len(self.members))


def build_model(config: ModelConfig, weights: str | Path = "imagenet") -> EarthLoc:
    """A model to train or to evaluate. `weights`: "imagenet" (backbone), "none", or a file with the state dict of a
    whole model or of a backbone.

    With "none" nothing is frozen: `model.config.freeze_until` is "none", and asking for more is a ValueError.
    RuntimeError if ImageNet weights can't be had, ValueError or FileNotFoundError if a file can't be read or not fit.
    """
    model = EarthLoc(config.with_defaults(pretrained=str(weights) != "none"))
    if str(weights) == "none":
        return model
    if str(weights) == "imagenet":
        fit_backbone_(model.backbone, imagenet_state_dict(config.backbone), f"ImageNet weights of {config.backbone}")
        return model
    state = read_state_dict(weights)
    if is_whole_model(state):
        fit_model_(model, state, str(weights))
    else:
        fit_backbone_(model.backbone, state, str(weights))
    return model


def load_model(path: str | Path) -> EarthLoc | Ensemble:
    """A whole model from a file, with no flags: see `weights.read_model`, whose errors it raises too."""
    state, config = read_model(path)
    model = Ensemble(config) if isinstance(config, EnsembleConfig) else EarthLoc(config)
    fit_model_(model, state, str(path))
    return model
