"""EarthLoc's network (paper section 5.1): backbone -> aggregator -> linear -> L2-normalised descriptor."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from models.backbone import (
    Backbone,
    channels_and_stride,
    default_cut,
    default_freeze,
    imagenet_state_dict,
    kept_and_frozen,
    stage_names,
)
from models.gem import GeM
from models.mixvpr import MixVPR, l2_normalise

AGGREGATORS = ("mixvpr", "gem")


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a model; with the state dict all that is needed to rebuild it. Defaults are the paper's.

    None stands for a default that depends on other fields, see `with_defaults`. ValueError names the flag to change.
    """

    backbone: str = "resnet50"
    cut_after: str | None = None  # None: layer3 (ResNets) or blocks4 (efficientnet_lite0), stride 16
    freeze_until: str | None = None  # None: layer2 or blocks2 if pre-trained, else "none"
    aggregator: str = "mixvpr"
    descriptor_dim: int = 4096
    image_size: int = 320  # pixels, images are square
    mix_depth: int = 4
    mix_channels: int | None = None  # None: descriptor_dim / out_rows
    out_rows: int = 4
    gem_grid: int = 1

    def __post_init__(self):
        kept, _ = kept_and_frozen(self.backbone, self.cut_after, self.freeze_until or "none")
        if self.aggregator not in AGGREGATORS:
            raise ValueError(f"--aggregator {self.aggregator}: unknown; choose one of {', '.join(AGGREGATORS)}")
        for field in ("descriptor_dim", "image_size", "out_rows", "gem_grid"):
            if getattr(self, field) < 1:
                raise ValueError(f"--{field} {getattr(self, field)}: must be at least 1")
        if self.mix_depth < 0:
            raise ValueError(f"--mix_depth {self.mix_depth}: must be at least 0")
        if self.mix_channels is not None and self.mix_channels < 1:
            raise ValueError(f"--mix_channels {self.mix_channels}: must be at least 1")
        if self.aggregator == "mixvpr" and self.mix_channels is None and self.descriptor_dim % self.out_rows:
            raise ValueError(
                f"--descriptor_dim {self.descriptor_dim} is no multiple of --out_rows {self.out_rows}: "
                "change one of them or set --mix_channels"
            )
        positions = -(-self.image_size // channels_and_stride(self.backbone, kept[-1])[1])
        if self.aggregator == "gem" and self.gem_grid > positions:
            raise ValueError(
                f"--gem_grid {self.gem_grid} is finer than the {positions} x {positions} features of --image_size "
                f"{self.image_size}: use a smaller grid or larger images"
            )

    def with_defaults(self, pretrained: bool) -> ModelConfig:
        """The same config with every None filled in. Nothing that was never pre-trained is frozen.

        ValueError if stages are to be frozen that are not pre-trained.
        """
        if not pretrained and self.freeze_until not in (None, "none"):
            raise ValueError(
                f"--freeze_until {self.freeze_until} with --weights none would freeze stages that were never trained: "
                "leave --freeze_until out, or give --weights imagenet | FILE"
            )
        cut_after = self.cut_after or default_cut(self.backbone)
        freeze_until = self.freeze_until
        if freeze_until is None:
            names = stage_names(self.backbone)
            deepest = min(names.index(default_freeze(self.backbone)), names.index(cut_after))
            freeze_until = names[deepest] if pretrained else "none"
        mix_channels = self.mix_channels or max(1, self.descriptor_dim // self.out_rows)
        return replace(self, cut_after=cut_after, freeze_until=freeze_until, mix_channels=mix_channels)


class EarthLoc(nn.Module):
    """(B, 3, H, W) float RGB in [0, 1] -> (B, descriptor_dim) float32 descriptors of unit length.

    Builds the architecture with random weights and freezes what `config.freeze_until` says, as it should be for a
    state dict that is loaded next; `build_model` makes a model to train. `config` is kept with its defaults filled in.
    """

    def __init__(self, config: ModelConfig = ModelConfig()):
        super().__init__()
        self.config = config = config.with_defaults(pretrained=config.freeze_until is not None)
        self.backbone = Backbone(config.backbone, config.cut_after, config.freeze_until)
        channels = self.backbone.out_channels
        if config.aggregator == "mixvpr":
            size = self.backbone.feature_size(config.image_size)
            self.aggregator = MixVPR(
                channels, size, size, config.mix_channels, mix_depth=config.mix_depth, out_rows=config.out_rows
            )
        else:
            self.aggregator = GeM(channels, config.gem_grid)
        self.fc = nn.Linear(self.aggregator.out_dim, config.descriptor_dim)
        # Not persistent: the released checkpoints hold no such entries.
        self.register_buffer("mean", torch.tensor(self.backbone.mean).reshape(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(self.backbone.std).reshape(1, 3, 1, 1), persistent=False)

    def aggregate(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) float RGB in [0, 1] -> (B, F) float32 of unit length: what goes into `fc`."""
        if images.dim() != 4 or images.shape[1] != 3 or not images.is_floating_point():
            raise ValueError(
                f"images of shape {tuple(images.shape)} and type {images.dtype}: "
                "expected (B, 3, H, W) floating point RGB in [0, 1]"
            )
        return self.aggregator(self.backbone((images - self.mean) / self.std))

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


def build_model(config: ModelConfig = ModelConfig(), weights: str | Path = "imagenet") -> EarthLoc:
    """A model to train or to evaluate. `weights`: "imagenet" (backbone), "none", or a file with the state dict of a
    whole model or of a backbone.

    With "none" nothing is frozen: `model.config.freeze_until` is "none", and asking for more is a ValueError.
    RuntimeError if ImageNet weights can't be had, ValueError or FileNotFoundError if a file can't be read or not fit.
    """
    from models.weights import fit_backbone_, fit_model_, is_whole_model, read_state_dict  # it needs ModelConfig

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
