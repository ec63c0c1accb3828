"""GeoCLIP: images and coordinates in one embedding (Vivanco et al., NeurIPS 2023, arXiv 2309.16020)."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.backbone import choose_stages, imagenet_state_dict, kept_and_frozen, stage_names
from models.image_encoder import CLIP, BackboneEncoder, ClipEncoder
from models.location_encoder import SIGMAS, LocationEncoder
from models.weights import fit_backbone_, is_whole_model, read_state_dict
from utils.settings import require_at_least

MAX_LOGIT_SCALE = 100.0
FROZEN_PREFIX = "image_encoder.clip."  # 1.2 GB that never change: not in our checkpoints


@dataclass(frozen=True)
class GeoClipConfig:
    """The shape of a GeoCLIP. None: a default that depends on other fields. ValueError names the flag to change.

    `clip` counts for the image encoder "clip"; the other fields but `sigmas` for a backbone.
    """

    image_encoder: str = "clip"
    clip: str = CLIP
    cut_after: str | None = None  # None: the backbone's last stage
    freeze_until: str | None = None  # None: as EarthLoc if pre-trained, else "none"
    image_size: int | None = None  # pixels, squares; None: 128, or CLIP's own
    gem_grid: int = 1
    sigmas: tuple[float, ...] = SIGMAS

    def __post_init__(self) -> None:
        object.__setattr__(self, "sigmas", tuple(float(sigma) for sigma in self.sigmas))
        if not self.sigmas or min(self.sigmas) <= 0 or not all(map(math.isfinite, self.sigmas)):
            raise ValueError(f"--sigmas {self.sigmas}: give one or more positive numbers")
        if self.image_encoder == "clip":
            if self.image_size is not None:
                raise ValueError("--image_size: CLIP's own preprocessing sets the size; leave it out")
            return
        try:
            last = stage_names(self.image_encoder)[-1]
        except ValueError as error:
            raise ValueError(f"--image_encoder {self.image_encoder}: neither clip nor a backbone ({error})") from None
        kept_and_frozen(self.image_encoder, self.cut_after or last, self.freeze_until or "none")
        require_at_least(1, image_size=self.image_size, gem_grid=self.gem_grid)

    def with_defaults(self, pretrained: bool) -> GeoClipConfig:
        """The same config with every None filled in. Nothing that was never pre-trained is frozen."""
        if self.image_encoder == "clip":
            return self
        cut_after, freeze_until = choose_stages(
            self.image_encoder, self.cut_after or stage_names(self.image_encoder)[-1], self.freeze_until, pretrained
        )
        return replace(self, cut_after=cut_after, freeze_until=freeze_until, image_size=self.image_size or 128)


class GeoCLIP(nn.Module):
    """Image encoder, location encoder and temperature. Embeddings are of unit length and float32.

    State dict as the published hub files: `image_encoder.mlp.*`, `location_encoder.LocEnc*`, `logit_scale`, and the
    rest of the image encoder. `config` is kept with its defaults filled in.
    """

    def __init__(self, config: GeoClipConfig = GeoClipConfig()) -> None:
        super().__init__()
        self.config = config = config.with_defaults(pretrained=config.freeze_until is not None)
        if config.image_encoder == "clip":
            self.image_encoder = ClipEncoder(config.clip)
        else:
            self.image_encoder = BackboneEncoder(
                config.image_encoder, config.cut_after, config.freeze_until, config.image_size, config.gem_grid
            )
        self.location_encoder = LocationEncoder(config.sigmas)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    @property
    def scale(self) -> Tensor:
        """The learned inverse temperature, at most 100 (as CLIP's)."""
        return self.logit_scale.exp().clamp(max=MAX_LOGIT_SCALE)

    @torch.no_grad()
    def clamp_scale_(self) -> None:
        """To be called after each update: a parameter beyond the clamp would have no gradient to come back with."""
        self.logit_scale.clamp_(max=math.log(MAX_LOGIT_SCALE))

    def embed_images(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) float RGB in [0, 1] -> (B, 512)."""
        return F.normalize(self.image_encoder(images).float(), dim=1)

    def embed_points(self, points: Tensor) -> Tensor:
        """(N, 2) latitude, longitude in degrees -> (N, 512)."""
        return F.normalize(self.location_encoder(points), dim=1)

    def forward(self, images: Tensor, points: Tensor) -> Tensor:
        """(B, 3, H, W), (N, 2) -> logits (B, N) float32."""
        return self.logits(self.embed_images(images), self.embed_points(points))

    def logits(self, images: Tensor, points: Tensor) -> Tensor:
        """Embeddings (B, 512), (N, 512) -> (B, N), in float32 whatever autocast says: at scale 100 it matters."""
        with torch.autocast(images.device.type, enabled=False):
            return self.scale * (images.float() @ points.float().T)

    def own_state(self) -> dict[str, Tensor]:
        """State dict without the frozen CLIP: what a checkpoint holds."""
        return {key: value for key, value in self.state_dict().items() if not key.startswith(FROZEN_PREFIX)}

    def load_own_state(self, state: dict[str, Tensor], source: str = "state dict") -> None:
        """Strictly, but for the frozen CLIP. ValueError lists what does not fit."""
        own = self.own_state()
        misfits = [
            f"{kind}: {', '.join(sorted(keys)[:10])}"
            for kind, keys in (
                ("missing", own.keys() - state.keys()),
                ("unexpected", state.keys() - own.keys()),
                ("of another shape", {key for key in own.keys() & state.keys() if own[key].shape != state[key].shape}),
            )
            if keys
        ]
        if misfits:
            raise ValueError(
                f"{source} does not fit this GeoCLIP ({'; '.join(misfits)}); is it a checkpoint of "
                "train_geoclip.py, with the same --image_encoder?"
            )
        self.load_state_dict(self.state_dict() | state)


def build_geoclip(config: GeoClipConfig, weights: str | Path = "imagenet") -> GeoCLIP:
    """A model to train. `weights` fill a backbone: "imagenet", "none", or a file: a classifier's or EarthLoc's.

    The CLIP encoder comes with its own. RuntimeError or ValueError where weights can't be had or don't fit.
    """
    if config.image_encoder == "clip":
        return GeoCLIP(config)
    model = GeoCLIP(config.with_defaults(pretrained=str(weights) != "none"))
    if str(weights) == "imagenet":
        fit_backbone_(model.image_encoder.backbone, imagenet_state_dict(config.image_encoder), "ImageNet weights")
    elif str(weights) != "none":
        state = read_state_dict(weights)
        if is_whole_model(state):  # of a trained EarthLoc only the backbone is of use
            prefix = "backbone.model."
            state = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
        fit_backbone_(model.image_encoder.backbone, state, str(weights))
    return model
