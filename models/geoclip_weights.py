"""Reading GeoCLIP weights: our checkpoints, the PyPI package's .pth files, and the hub's safetensors folder."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from models.geoclip import GeoCLIP, GeoClipConfig
from models.location_encoder import SIGMAS, LocationEncoder
from utils.checkpoint import load_tensors
from utils.files import GALLERY_PACKAGE, package_files

# File of the package -> where its tensors belong.
PTH_FILES = {
    "location_encoder_weights.pth": "location_encoder.",
    "image_encoder_mlp_weights.pth": "image_encoder.mlp.",
    "logit_scale_weights.pth": "logit_scale",
}
HUB_FILE = "model.safetensors"


def load_geoclip(path: str | Path = GALLERY_PACKAGE, clip: str | None = None) -> tuple[GeoCLIP, Tensor | None]:
    """-> the model in eval mode, and the training coordinates (N, 2) that a checkpoint of ours carries, else None.

    path: a checkpoint of train_geoclip.py; "geoclip", the weights of the installed PyPI package; a folder with its
    three .pth files; or a hub release (folder or model.safetensors). clip: replaces the CLIP of the config. Raises
    FileNotFoundError, ValueError or RuntimeError naming the file and what to do.
    """
    state, config, gallery = read_geoclip(path)
    model = GeoCLIP(replace(config, clip=clip) if clip else config)
    model.load_own_state(state, str(path))
    return model.eval(), gallery


def load_location_encoder(path: str | Path = GALLERY_PACKAGE) -> LocationEncoder:
    """The location encoder alone, which needs no CLIP; path as for `load_geoclip`, or a release of just that part."""
    state, config, _ = read_geoclip(path)
    encoder = LocationEncoder(config.sigmas)
    prefix = "location_encoder."
    state = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    if set(state) != set(encoder.state_dict()):
        raise ValueError(f"{path}: holds no location encoder of {len(config.sigmas)} capsules")
    encoder.load_state_dict(state)
    return encoder.eval()


def read_geoclip(path: str | Path) -> tuple[dict[str, Tensor], GeoClipConfig, Tensor | None]:
    """-> state dict in our names, config, training coordinates or None. Nothing that a file holds is executed."""
    if str(path) == GALLERY_PACKAGE and not Path(path).exists():
        path = package_files(GALLERY_PACKAGE, "model", "weights")[0]
    path = Path(path)
    if path.is_dir():
        return _read_folder(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: no such weights; give a checkpoint of train_geoclip.py, a folder with the "
            f"published files, or {GALLERY_PACKAGE} for those of the installed package"
        )
    if path.suffix == ".safetensors":
        return _named(_load_safetensors(path), path), GeoClipConfig(sigmas=_sigmas_beside(path)), None
    loaded = load_tensors(path)
    if not isinstance(loaded, dict) or "geoclip_config" not in loaded:
        raise ValueError(f"{path}: no checkpoint of train_geoclip.py; published weights are given as their folder")
    try:
        config = GeoClipConfig(**loaded["geoclip_config"])
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: bad geoclip_config ({error})") from error
    return loaded["model"], config, loaded.get("gallery")


def _read_folder(folder: Path) -> tuple[dict[str, Tensor], GeoClipConfig, Tensor | None]:
    if (folder / HUB_FILE).is_file():
        return read_geoclip(folder / HUB_FILE)
    missing = [name for name in PTH_FILES if not (folder / name).is_file()]
    if missing:
        raise FileNotFoundError(f"{folder}: neither {HUB_FILE} nor {', '.join(missing)}; are these published weights?")
    state = {}
    for name, place in PTH_FILES.items():
        loaded = load_tensors(folder / name)
        state |= {place: loaded} if isinstance(loaded, Tensor) else {place + key: each for key, each in loaded.items()}
    return {key: value.detach().float() for key, value in state.items()}, GeoClipConfig(), None


def _load_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: truncated, or no safetensors file ({error}); fetch it again") from error


def _named(state: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """A release of the location encoder alone has bare names."""
    if any(key.startswith("LocEnc") for key in state):
        return {f"location_encoder.{key}": value for key, value in state.items()}
    if not any(key.startswith("location_encoder.") for key in state):
        raise ValueError(f"{path}: holds no location encoder; is it a GeoCLIP release?")
    return state


def _sigmas_beside(path: Path) -> tuple[float, ...]:
    file = path.with_name("config.json")
    try:
        return tuple(json.loads(file.read_text())["sigma"]) if file.is_file() else SIGMAS
    except (json.JSONDecodeError, KeyError, TypeError):
        return SIGMAS  # the fixed frequencies are in the state dict: only the number of capsules counts


def checkpoint_of(model: GeoCLIP, gallery: np.ndarray | Tensor, **more: object) -> dict:
    """What train_geoclip.py saves: the state without the frozen CLIP, the config, training coordinates, and `more`."""
    config = {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(model.config).items()}
    return {"model": model.own_state(), "geoclip_config": config, "gallery": torch.as_tensor(gallery), **more}
