"""Reading weights: released EarthLoc checkpoints, our own, and classifiers' backbones."""

from __future__ import annotations

import json
import math
import os
import pickle
import re
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from models.backbone import LITE0_STAGES, RESNET_STAGES, RESNETS, Backbone, channels_and_stride, lite0_to_timm
from models.earthloc import EarthLoc, ModelConfig

# Blocks of layer1 .. layer4.
RESNET_BLOCKS = {
    "resnet18": (2, 2, 2, 2),
    "resnet34": (3, 4, 6, 3),
    "resnet50": (3, 4, 6, 3),
    "resnet101": (3, 4, 23, 3),
    "resnet152": (3, 8, 36, 3),
}
CHECKPOINT_KEYS = ("model", "state_dict", "model_state_dict")
LISTED = 20  # names listed of each kind of misfit


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """State dict of a .safetensors file or of one written by torch.save: bare, or under a checkpoint's key "model".

    Names come out as `EarthLoc(...).state_dict()` has them, see `our_names`. FileNotFoundError, or ValueError if the
    file is truncated, holds something else, or holds objects other than tensors (nothing in it is ever executed).
    """
    return _read(Path(path))[0]


def load_model(path: str | Path) -> EarthLoc:
    """A whole model from a file, with no flags: its shape is read from the file, see `read_config`. Errors as there."""
    state, config = _read(Path(path))
    config = config or infer_config(state)
    model = EarthLoc(config)
    fit_model_(model, state, str(path))
    return model


def read_config(path: str | Path) -> ModelConfig:
    """The config stored in a file by `save_safetensors` or under a checkpoint's key "model_config" (a dict of the
    fields of ModelConfig); else inferred from the shapes, see `infer_config`. Errors as `read_state_dict`."""
    state, config = _read(Path(path))
    return config or infer_config(state)


def save_safetensors(model: EarthLoc, path: str | Path, half: bool = True) -> None:
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
    temporary = path.with_name(f".{path.name}.tmp")
    save_file(state, temporary, metadata={"model_config": json.dumps(asdict(model.config))})
    os.replace(temporary, path)


def _read(path: Path) -> tuple[dict[str, Tensor], ModelConfig | None]:
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
    else:
        state = load_tensors(path)
        if isinstance(state, dict):
            config = state.get("model_config")
            state = next((state[key] for key in CHECKPOINT_KEYS if isinstance(state.get(key), dict)), state)
    if not isinstance(state, dict) or not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f'{path}: expected a state dict (names -> tensors), bare or under the key "model"')
    try:
        config = config and ModelConfig(**config)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: bad model_config ({error})") from error
    return our_names(state, str(path)), config


def load_tensors(path: str | Path) -> object:
    """What torch.save wrote to a file, on the CPU, if it holds only tensors and plain values. ValueError otherwise."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        # torch's own message goes on to recommend weights_only=False, which would run the code: it is not passed on.
        found = re.search(r"GLOBAL ([\w.]+)", str(error))
        found = f" ({found[1]})" if found else ""
        # An "unsupported operand" is a byte that means nothing: no pickle, or a cut one.
        if "unsupported operand" not in str(error).lower() and re.search("unsupported|unrecognized", str(error), re.I):
            raise ValueError(
                f"{path}: refused, because it holds more than tensors and plain values{found}, which could run code "
                "when loaded; nothing was run. Save only the state dict: torch.save(model.state_dict(), path)"
            ) from None
        raise ValueError(f"{path}: truncated, or not written by torch.save; fetch or save it again") from None
    except (PermissionError, MemoryError):
        raise
    except Exception as error:  # whatever the unpickler trips over in bytes that are no pickle
        raise ValueError(
            f"{path}: truncated, or not written by torch.save ({type(error).__name__}); fetch or save it again"
        ) from error


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


def load_weights(model: EarthLoc, path: str | Path) -> None:
    """Loads a whole model's state dict (see `read_state_dict`) strictly.

    ValueError lists what is missing, unexpected or of another shape, and the flags with which it would fit.
    """
    fit_model_(model, read_state_dict(path), str(path))


def fit_model_(model: EarthLoc, state: dict[str, Tensor], source: str) -> None:
    """As `load_weights`, from a state dict already read; `source` is named in errors."""
    state = our_names(state, source)
    misfits = _misfits(model.state_dict(), state)
    if misfits:
        raise ValueError("\n".join([f"{source} does not fit the model:", *misfits, _flags_that_fit(model, state)]))
    _copy(model, state)


def load_backbone_weights(backbone: Backbone, path: str | Path) -> None:
    """Loads a classifier's state dict into a backbone: torchvision's names (ResNets), timm's or EfficientNet-PyTorch's
    (EfficientNet-Lite0). The classifier and the stages that are cut off are ignored; otherwise strict, ValueError."""
    fit_backbone_(backbone, read_state_dict(path), str(path))


def fit_backbone_(backbone: Backbone, state: dict[str, Tensor], source: str) -> None:
    """As `load_backbone_weights`, from a state dict already read; `source` is named in errors."""
    if backbone.name in RESNETS:
        parts, head = RESNET_STAGES, ["fc"]
    else:
        parts, head = LITE0_STAGES, ["conv_head", "bn2", "classifier"]
        if "_conv_stem.weight" in state:
            state = lite0_to_timm(state)
    cut_off = [part for stage, names in parts.items() if stage not in backbone.stages for part in names]
    unused = tuple(f"{part}." for part in cut_off + head)
    own = backbone.model.state_dict()
    state = {key: value for key, value in state.items() if not key.startswith(unused)}
    misfits = _misfits(own, state)
    if misfits:
        raise ValueError("\n".join([
            f"{source} does not fit the backbone {backbone.name}:",
            *misfits,
            "Change --backbone, or give --weights another file.",
        ]))
    _copy(backbone.model, state)


def _misfits(own: dict[str, Tensor], given: dict[str, Tensor]) -> list[str]:
    """One line for each kind of difference between two state dicts; [] if they fit."""
    # Counters that older files lack: with a fixed momentum BatchNorm never reads them.
    missing = [key for key in own if key not in given and not key.endswith("num_batches_tracked")]
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


def _copy(module: torch.nn.Module, state: dict[str, Tensor]) -> None:
    module.load_state_dict(module.state_dict() | state)


def _flags_that_fit(model: EarthLoc, state: dict[str, Tensor]) -> str:
    own = asdict(model.config)
    try:
        fitting = asdict(infer_config(state).with_defaults(pretrained=True))
    except ValueError:
        return "Is it an EarthLoc checkpoint? Check --backbone, --cut_after, --aggregator, --descriptor_dim."
    if fitting["aggregator"] == "gem":
        fitting["image_size"] = own["image_size"]  # any size fits
    of_one_aggregator = {"mixvpr": ("mix_depth", "mix_channels", "out_rows"), "gem": ("gem_grid",)}
    if all(c["mix_channels"] == c["descriptor_dim"] // c["out_rows"] for c in (own, fitting)):
        fitting["mix_channels"] = own["mix_channels"]  # it follows from the others
    others = [field for name, fields in of_one_aggregator.items() if name != fitting["aggregator"] for field in fields]
    flags = [
        f"--{field} {value}"
        for field, value in fitting.items()
        if value != own[field] and field not in ("freeze_until", *others)
    ]
    return f"It would fit with {' '.join(flags)}" if flags else "No flag makes it fit."


def infer_config(state: dict[str, Tensor]) -> ModelConfig:
    """The config of a bare state dict of a whole model, read from its names and shapes, so that it needs no flags.

    Not in it are `freeze_until`, and `image_size` with the aggregator "gem", which fits every size: both are left at
    their defaults. ValueError if it is not the state dict of an EarthLoc model.
    """
    state = our_names(state)
    try:
        backbone, cut_after = _infer_backbone(state)
        channels, stride = channels_and_stride(backbone, cut_after)
        descriptor_dim, features = state["fc.weight"].shape
        if "aggregator.p" in state:
            grid = math.isqrt(features // channels)
            return ModelConfig(backbone, cut_after, aggregator="gem", descriptor_dim=descriptor_dim, gem_grid=grid)
        out_rows, positions = state["aggregator.row_proj.weight"].shape
        depths = {key.split(".")[2] for key in state if key.startswith("aggregator.mix.")}
        return ModelConfig(
            backbone,
            cut_after,
            descriptor_dim=descriptor_dim,
            image_size=math.isqrt(positions) * stride,
            mix_depth=len(depths),
            mix_channels=state["aggregator.channel_proj.weight"].shape[0],
            out_rows=out_rows,
        )
    except KeyError as error:
        raise ValueError(f"not the state dict of an EarthLoc model: it has no {error.args[0]}") from error


def _infer_backbone(state: dict[str, Tensor]) -> tuple[str, str]:
    """Name and last stage of the backbone of a whole model's state dict. Depths that agree up to the cut: the first."""
    names = [key.split(".")[2:] for key in state if key.startswith("backbone.model.")]
    if "backbone.model.conv_stem.weight" in state:
        groups = {int(name[1]) for name in names if name[0] == "blocks"}
        return "efficientnet_lite0", f"blocks{max(groups)}" if groups else "stem"
    state["backbone.model.conv1.weight"]  # its absence is the error to report
    blocks = [len({name[1] for name in names if name[0] == f"layer{i}"}) for i in (1, 2, 3, 4)]
    kept = sum(1 for count in blocks if count)
    bottleneck = "backbone.model.layer1.0.conv3.weight" in state
    for name, depths in RESNET_BLOCKS.items():
        if depths[:kept] == tuple(blocks[:kept]) and bottleneck == (name not in ("resnet18", "resnet34")):
            return name, f"layer{kept}" if kept else "conv1"
    raise ValueError(f"not a known ResNet: it has {blocks} blocks in layer1 .. layer4")
