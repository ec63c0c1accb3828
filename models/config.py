"""The shape of an EarthLoc model. With the state dict it is all that is needed to rebuild it."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from dataclasses import dataclass, field, replace

from models.aggregators import AGGREGATORS
from models.backbone import FROZEN_BATCHNORM, choose_stages, kept_and_frozen
from utils.arguments import positive
from utils.settings import add_settings, chosen_settings, require_at_least, settings_of

FLAT_SETTINGS = ("mix_depth", "mix_channels", "out_rows", "gem_grid")  # fields of their own in older checkpoints


@dataclass(frozen=True)
class ModelConfig:
    """Defaults are the paper's. None: a default that depends on other fields. ValueError names the flag to change."""

    backbone: str = "resnet50"  # any of timm's CNNs and ViTs, see models/backbone.py
    cut_after: str | None = None  # None: the deepest stage of stride 16, layer3 of a ResNet; a ViT's last
    freeze_until: str | None = None  # None: if pre-trained up to stride 8, layer2, of a ViT all but four blocks
    aggregator: str = "mixvpr"
    descriptor_dim: int = 4096
    image_size: int = 320  # pixels, images are square
    aggregator_settings: dict = field(default_factory=dict)  # what is not in it is filled in
    frozen_batchnorm: str = "fixed"

    def __post_init__(self) -> None:
        kept_and_frozen(self.backbone, self.cut_after, self.freeze_until or "none")
        for flag, choices in (("aggregator", AGGREGATORS), ("frozen_batchnorm", FROZEN_BATCHNORM)):
            if getattr(self, flag) not in choices:
                raise ValueError(f"--{flag} {getattr(self, flag)}: unknown; choose one of {', '.join(choices)}")
        require_at_least(1, descriptor_dim=self.descriptor_dim, image_size=self.image_size)
        defaults = {name: default for name, (_, default, _) in settings_of(AGGREGATORS[self.aggregator]).items()}
        unknown = self.aggregator_settings.keys() - defaults.keys()
        if unknown:
            raise ValueError(f"--{', --'.join(sorted(unknown))}: no setting of --aggregator {self.aggregator}")
        object.__setattr__(self, "aggregator_settings", defaults | self.aggregator_settings)

    @property
    def name(self) -> str:
        return f"{self.backbone} {self.aggregator} {self.descriptor_dim}"

    @classmethod
    def from_dict(cls, fields: dict) -> ModelConfig:
        """From what `asdict` made, in this version or an older one. TypeError or ValueError if it is something else."""
        fields = dict(fields)
        flat = {name: fields.pop(name) for name in FLAT_SETTINGS if name in fields}
        if flat:
            own = settings_of(AGGREGATORS[fields.get("aggregator", "mixvpr")])
            fields["aggregator_settings"] = {name: value for name, value in flat.items() if name in own}
        return cls(**fields)

    def with_defaults(self, pretrained: bool) -> ModelConfig:
        """The same config with every None filled in. Nothing that was never pre-trained is frozen.

        ValueError if stages are to be frozen that are not pre-trained.
        """
        cut_after, freeze_until = choose_stages(self.backbone, self.cut_after, self.freeze_until, pretrained)
        return replace(self, cut_after=cut_after, freeze_until=freeze_until)


@dataclass(frozen=True)
class EnsembleConfig:
    """Models whose descriptors stand side by side. ValueError where they are fewer than two, or want images of
    different sizes."""

    members: tuple[ModelConfig, ...]

    def __post_init__(self) -> None:
        if len(self.members) < 2:
            raise ValueError(f"an ensemble of {len(self.members)}: give two models or more")
        sizes = [each.image_size for each in self.members]
        if len(set(sizes)) > 1:
            raise ValueError(f"an ensemble of models for images of {sizes} px: all must see the same size")

    @property
    def image_size(self) -> int:
        return self.members[0].image_size

    @property
    def descriptor_dim(self) -> int:
        return sum(each.descriptor_dim for each in self.members)

    @property
    def name(self) -> str:
        return " + ".join(each.name for each in self.members)


def config_from_dict(fields: dict) -> ModelConfig | EnsembleConfig:
    """From what `asdict` made of one of them. TypeError or ValueError if it is something else."""
    if "members" in fields:
        return EnsembleConfig(tuple(map(ModelConfig.from_dict, fields["members"])))
    return ModelConfig.from_dict(fields)


def add_model_arguments(parser: ArgumentParser) -> None:
    """One flag for each field of ModelConfig and each setting of an aggregator, and --weights."""
    group = parser.add_argument_group("model (paper, sec. 5.1)")
    add = group.add_argument
    add("--backbone", default="resnet50", help="any of timm's ResNets, EfficientNets, ConvNeXts, ViTs … by name")
    add("--weights", default="imagenet", help="imagenet (the backbone's own), none (from scratch), or a state dict")
    add("--cut_after", help="last kept stage; default: the deepest of stride 16, as layer3 or blocks4; a ViT's last")
    add(
        "--freeze_until",
        help="last frozen stage, or none (blocks9 leaves a ViT-S or -B two blocks); default: the deepest "
        "of stride 8, of a ViT all but four blocks; none with --weights none",
    )
    add("--frozen_batchnorm", choices=FROZEN_BATCHNORM, default="fixed", help="adapt: as in the released code")
    add("--aggregator", choices=list(AGGREGATORS), default="mixvpr")
    add("--descriptor_dim", type=positive, default=4096)
    add("--image_size", type=positive, default=320, help="pixels a side, in training and in evaluation")
    add_settings(group, AGGREGATORS)


def model_config(args: Namespace) -> ModelConfig:
    """Parsed flags -> ModelConfig. Raises ValueError naming the flag that does not fit."""
    return ModelConfig(
        args.backbone,
        args.cut_after,
        args.freeze_until,
        args.aggregator,
        args.descriptor_dim,
        args.image_size,
        chosen_settings(args, AGGREGATORS[args.aggregator]),
        args.frozen_batchnorm,
    )
