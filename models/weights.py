"""Reading weights: released EarthLoc checkpoints, our own, and classifiers' backbones."""

import hashlib
import json
import math
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from models.backbone import LITE_PACKAGES, RESNETS, Backbone, lite_to_timm, outline, stages_of, stride_of
from models.config import EnsembleConfig, ModelConfig, config_from_dict
from utils.checkpoint import load_tensors
from utils.files import replacing

CHECKPOINT_KEYS = ("model", "state_dict", "model_state_dict")
COUNTER = "num_batches_tracked"
LISTED = 20  # names listed of each kind of misfit
HUB_FILE, CONFIG_FILE = "model.safetensors", "config.json"  # what `save_pretrained` writes


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """State dict of a .safetensors file or of one written by torch.save: bare, or under a checkpoint's key "model".

    Names come out as `EarthLoc(...).state_dict()` has them, see `our_names`. FileNotFoundError, or ValueError if the
    file is truncated, holds something else, objects other than tensors (nothing in it is ever executed), or several
    models.
    """
    state = _read(Path(path))[0]
    if is_ensemble(state):
        raise ValueError(f"{path}: several models in one file; give the file of one of them")
    return state


def read_model(path: str | Path) -> tuple[dict[str, Tensor], ModelConfig | EnsembleConfig]:
    """State dict and config of a whole model's file. The config is what `save_safetensors` stored, what a checkpoint
    has under "model_config", or config.json beside model.safetensors; of a foreign file it is inferred, see
    `infer_config`. Errors as `read_state_dict`."""
    state, config = _read(Path(path))
    return state, config or infer_config(state)


def save_safetensors(model: nn.Module, path: str | Path, half: bool = True) -> None:
    """Writes state dict and config to a .safetensors file that `load_model` reads. `half`: matrices and kernels in
    float16; vectors (biases, BatchNorm statistics) stay in float32: they are small and some must cancel a mean."""
    state = {
        key: value.detach().to("cpu", torch.float16 if half and value.dim() > 1 else value.dtype).contiguous()
        for key, value in model.state_dict().items()
    }
    broken = [key for key, value in state.items() if not torch.isfinite(value).all()]
    if broken:
        raise ValueError(f"{path}: not written, nan, inf or too large for float16: {', '.join(broken[:LISTED])}")
    path = Path(path)
    told = {"model_config": json.dumps(asdict(model.config)), "interface": json.dumps(interface(model))}
    with replacing(path) as file:
        file.write(save(state, metadata=told))


def interface(model: nn.Module) -> dict:
    """What a user of a file has to know who has no code of ours: what goes in and what comes out."""
    size, dim = model.config.image_size, model.config.descriptor_dim
    return {
        "input": f"float32 (batch, 3, {size}, {size}), RGB in [0, 1], squashed to a square",
        "output": f"float32 (batch, {dim}), of unit length",
        "image_size": size,
        "descriptor_dim": dim,
        "mean": _statistic(model, "mean"),
        "std": _statistic(model, "std"),
        "normalisation": "(images - mean) / std is done inside the model",
    }


def _statistic(model: nn.Module, name: str) -> list:
    """What its images are normalised by, a value a channel; of an ensemble whose members differ a list of each."""
    members = getattr(model, "members", [model])
    found = [[round(each, 6) for each in getattr(member, name).flatten().tolist()] for member in members]
    return found[0] if all(each == found[0] for each in found) else found


def weights_fingerprint(model: nn.Module) -> str:
    """Config and all values -> 64 hexadecimal digits that are the same wherever these weights are loaded."""
    digest = hashlib.sha256(json.dumps(asdict(model.config), sort_keys=True).encode())
    for key, value in sorted(model.state_dict().items()):
        digest.update(key.encode())
        digest.update(value.detach().cpu().float().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _read(path: Path) -> tuple[dict[str, Tensor], ModelConfig | EnsembleConfig | None]:
    """State dict in our names, and the config if the file has one."""
    if not path.is_file():
        raise FileNotFoundError(f"no weights at {path}: give --weights or --resume the path of a file")
    config = None
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, framework="pt") as file:
                config = (file.metadata() or {}).get("model_config")
                state = {key: file.get_tensor(key) for key in file.keys()}
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path}: truncated, or no safetensors file ({error}); fetch or save it again") from error
        try:
            config = config and json.loads(config)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}: model_config in its metadata is no JSON ({error})") from error
        config = config or _config_beside(path)
    else:
        state = load_tensors(path)
        if isinstance(state, dict):
            config = state.get("model_config")
            state = next((state[key] for key in CHECKPOINT_KEYS if isinstance(state.get(key), dict)), state)
    if not isinstance(state, dict) or not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f'{path}: expected a state dict (names -> tensors), bare or under the key "model"')
    try:
        config = config and config_from_dict(config)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: bad model_config ({error})") from error
    return our_names(state, str(path)), config


def _config_beside(path: Path) -> dict | None:
    """config.json of a model.safetensors that lost its metadata; None where it is another library's."""
    try:
        config = json.loads(path.with_name(CONFIG_FILE).read_text()) if path.name == HUB_FILE else {}
    except (FileNotFoundError, ValueError):
        return None
    if not {"backbone", "members"} & set(config):
        return None
    return {key: each for key, each in config.items() if key != "interface"}


def our_names(state: dict[str, Tensor], source: str = "state dict") -> dict[str, Tensor]:
    """Names as `EarthLoc(...).state_dict()` has them: without the prefixes of DataParallel and torch.compile, and
    `backbone.model.conv1.weight` where other libraries say `backbone.conv1.weight`."""
    renamed = {}
    for key, value in state.items():
        name = key.replace("_orig_mod.", "")
        while name.startswith("module."):
            name = name.removeprefix("module.")
        if name.startswith("backbone.") and not name.startswith("backbone.model."):
            name = name.replace("backbone.", "backbone.model.", 1)
        if name in renamed:
            raise ValueError(f"{source}: {name} is there twice, the second time as {key}")
        renamed[name] = value
    return renamed


def is_whole_model(state: dict[str, Tensor]) -> bool:
    """Whether a state dict is that of an EarthLoc model rather than of a classifier."""
    return any(key.startswith(("backbone.", "aggregator.")) for key in state)


def is_ensemble(state: dict[str, Tensor]) -> bool:
    """Whether a state dict is that of several EarthLoc models in one."""
    return any(key.startswith("members.") for key in state)


def fit_model_(model: nn.Module, state: dict[str, Tensor], source: str) -> None:
    """A whole model's state dict (see `read_state_dict`) into it, strictly; `source` is named in errors.

    ValueError lists what is missing, unexpected or of another shape, and the flags with which it would fit.
    """
    state = our_names(state, source)
    misfits = _misfits(model.state_dict(), state)
    if misfits:
        raise ValueError("\n".join([f"{source} does not fit the model:", *misfits, _flags_that_fit(model, state)]))
    _copy(model, state)


def fit_backbone_(backbone: Backbone, state: dict[str, Tensor], source: str) -> None:
    """A classifier's state dict into a backbone, by timm's names (of a ResNet torchvision's, too) or, for the
    EfficientNet-Lites of LITE_PACKAGES, EfficientNet-PyTorch's; `source` is named in errors. The classifier and the
    stages that are cut off are ignored; otherwise strict, ValueError."""
    if backbone.name in LITE_PACKAGES and "_conv_stem.weight" in state:
        state = lite_to_timm(state, backbone.name)
    own = backbone.model.state_dict()
    unused = outline(backbone.name).state_dict().keys() - own.keys()
    state = {key: value for key, value in state.items() if key not in unused}
    misfits = _misfits(own, state)
    if misfits:
        head = f"{source} does not fit the backbone {backbone.name}:"
        raise ValueError("\n".join([head, *misfits, "Change --backbone, or give --weights another file."]))
    _copy(backbone.model, state)


def fit_(module: nn.Module, state: dict[str, Tensor], source: str) -> None:
    """A state dict into any network, strictly. ValueError lists what does not fit; `source` is named there."""
    misfits = _misfits(module.state_dict(), state)
    if misfits:
        raise ValueError("\n".join([f"{source} does not fit {type(module).__name__}:", *misfits]))
    _copy(module, state)


def _misfits(own: dict[str, Tensor], given: dict[str, Tensor]) -> list[str]:
    """One line for each kind of difference between two state dicts; [] if they fit."""
    # Counters that older files lack: with a fixed momentum BatchNorm never reads them.
    missing = [key for key in own if key not in given and not key.endswith(COUNTER)]
    unexpected = [key for key in given if key not in own]
    shapes = [
        f"{key} {tuple(given[key].shape)} instead of {tuple(own[key].shape)}"
        for key in own
        if key in given and given[key].shape != own[key].shape
    ]
    kinds = (("missing", missing), ("unexpected", unexpected), ("of another shape", shapes))
    return [
        f"  {len(names)} {kind}: {', '.join(names[:LISTED])}{', ...' if len(names) > LISTED else ''}"
        for kind, names in kinds
        if names
    ]


def _copy(module: nn.Module, state: dict[str, Tensor]) -> None:
    module.load_state_dict(module.state_dict() | state)


def _flags_that_fit(model: nn.Module, state: dict[str, Tensor]) -> str:
    if isinstance(model.config, EnsembleConfig):
        return "Make it again of its members' files: python -m experiments.ensemble"
    own = _flags(model.config)
    try:
        fitting = _flags(infer_config(state).with_defaults(pretrained=True))
    except ValueError:
        return "Is it an EarthLoc checkpoint? Check --backbone, --cut_after, --aggregator, --descriptor_dim."
    ignored = ["freeze_until", "frozen_batchnorm"] + ["image_size"] * (fitting["aggregator"] == "gem")  # any size fits
    flags = [
        f"--{flag} {value}"
        for flag, value in fitting.items()
        if flag not in ignored and value is not None and value != own.get(flag)
    ]
    return f"It would fit with {' '.join(flags)}" if flags else "No flag makes it fit."


def _flags(config: ModelConfig) -> dict:
    fields = asdict(config)
    return fields | fields.pop("aggregator_settings")


def infer_config(state: dict[str, Tensor]) -> ModelConfig:
    """The config of a foreign file, a bare state dict of a whole model, read from its names and shapes: a ResNet or
    an EfficientNet-Lite of LITE_PACKAGES with MixVPR or GeM, so that it needs no flags.

    Not in it are `freeze_until`, and `image_size` with the aggregator "gem", which fits every size: both are left at
    their defaults. ValueError if it is not the state dict of such a model.
    """
    state = our_names(state)
    if is_ensemble(state):
        raise ValueError("several models in one, without their config; make it again by python -m experiments.ensemble")
    try:
        backbone, cut_after = _infer_backbone(state)
        descriptor_dim, features = state["fc.weight"].shape
        shape = {"backbone": backbone, "cut_after": cut_after, "descriptor_dim": descriptor_dim}
        if "aggregator.p" in state:
            grid = math.isqrt(features // stages_of(backbone)[cut_after].channels)
            return ModelConfig(**shape, aggregator="gem", aggregator_settings={"gem_grid": grid})
        out_rows, positions = state["aggregator.row_proj.weight"].shape
        depths = {key.split(".")[2] for key in state if key.startswith("aggregator.mix.")}
        channels = state["aggregator.channel_proj.weight"].shape[0]
        settings = {"mix_depth": len(depths), "out_rows": out_rows}
        if channels * out_rows != descriptor_dim:
            settings["mix_channels"] = channels
        return ModelConfig(
            **shape, image_size=math.isqrt(positions) * stride_of(backbone, cut_after), aggregator_settings=settings
        )
    except KeyError as error:
        raise ValueError(f"not the state dict of an EarthLoc model: it has no {error.args[0]}") from error


def _infer_backbone(state: dict[str, Tensor]) -> tuple[str, str]:
    """Name and last stage of a whole model's backbone. Of those that agree up to the cut: the first."""
    prefix = "backbone.model."
    given = {
        key.removeprefix(prefix): value.shape
        for key, value in state.items()
        if key.startswith(prefix) and not key.endswith(COUNTER)
    }
    if not given:
        raise KeyError(f"{prefix}conv1.weight")
    for name in (*RESNETS, *LITE_PACKAGES):
        whole = {key: value.shape for key, value in outline(name).state_dict().items()}
        own, last = {}, None
        for stage, (parts, _, _) in stages_of(name).items():
            inside = tuple(f"{part}." for part in parts)
            if any(key.startswith(inside) for key in given):
                last = stage
                own |= {
                    key: shape for key, shape in whole.items() if key.startswith(inside) and not key.endswith(COUNTER)
                }
        if own == given:
            return name, last
    raise ValueError(
        f"its backbone is no ResNet and none of {', '.join(LITE_PACKAGES)}, whole up to a stage; a model of another "
        "backbone is read from a file with its config, as train.py and experiments/export.py write it"
    )
