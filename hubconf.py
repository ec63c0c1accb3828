"""torch.hub.load("REPOSITORY_OR_FOLDER", "earthloc", source="local" | "github", weights=…), docs/hub.md."""

from pathlib import Path

from torch import nn

dependencies = ["torch", "timm", "safetensors", "huggingface_hub"]
SHIPPED = Path(__file__).resolve().parent / "weights" / "earth.safetensors"


def earthloc(weights: str | Path = SHIPPED, **download: object) -> nn.Module:
    """EarthLoc in eval mode: (B, 3, S, S) float RGB in [0, 1], S = model.config.image_size -> (B, D) of unit length.

    weights: a file, a folder or a hub repository's name, see `EarthLoc.from_pretrained`; default: those that ship.
    """
    from models.earthloc import EarthLoc

    return EarthLoc.from_pretrained(weights, **download)


def geoclip(weights: str | Path = "geoclip", clip: str | None = None) -> nn.Module:
    """GeoCLIP in eval mode, `embed_images` and `embed_points`. weights, clip: as `models.geoclip_weights.load_geoclip`
    takes them; default: those of the PyPI package geoclip, whose CLIP transformers fetches once."""
    from models.geoclip_weights import load_geoclip

    return load_geoclip(weights, clip)[0]
