"""Whitening: the last layers' start from what the model gets in training (docs/decisions.md, "Plateau"), and afterwards
that of a trained model's descriptors."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from tqdm import tqdm

from models.earthloc import EarthLoc
from utils.precision import autocast

POSITIONS = 16  # local features of a view that an aggregator starts from, drawn at random


def whiten(
    model: EarthLoc,
    batches: Callable[[], Iterable],
    augment: Callable,
    seed: int,
    std: float,
    regulariser: float,
    device: torch.device | str,
    precision: str,
) -> None:
    """Sets the model's fc to the whitening of augmented views, in the mode that training uses; before that the
    aggregator starts from the views' features, if it has `start_from`.

    batches() gives (rows, images uint8 (B, Y, 3, H, W), errors), from the loader. std, regulariser: see
    EarthLoc.whiten_.
    """

    def passed(describe: Callable[[Tensor], Tensor], label: str) -> Tensor:
        found = []
        state = {key: value.clone() for key, value in model.state_dict().items()}
        model.train()
        with torch.no_grad():
            for _, images, _ in tqdm(batches(), desc=label, leave=False):
                views = augment(images.to(device, non_blocking=True), generator).flatten(0, 1)
                with autocast(device, precision):
                    found.append(describe(views.contiguous(memory_format=torch.channels_last)).float())
        model.load_state_dict(state)  # the passes moved BatchNorm's running statistics
        return torch.cat(found)

    def some_positions(views: Tensor) -> Tensor:
        x = model.features(views)[0].flatten(2)
        chosen = torch.randperm(x.shape[2], generator=generator)[:POSITIONS]
        return x[..., chosen.to(x.device)]

    generator = torch.Generator().manual_seed(seed)
    if hasattr(model.aggregator, "start_from"):
        model.aggregator.start_from(passed(some_positions, "features")[..., None], seed)
        generator = torch.Generator().manual_seed(seed)
    features = passed(model.aggregate, "whitening")
    model.whiten_(features, std=std, regulariser=regulariser, generator=generator)


@torch.no_grad()
def whiten_outputs_(model: EarthLoc, outputs: Tensor, power: float) -> None:
    """Folds into the fc of a trained model a partial whitening of what it gives (Jégou and Chum, ECCV 2012), which
    costs nothing afterwards. outputs: (N, D) of `fc`, before they get unit length.

    The new outputs are centred and uncorrelated, the one of most variance first; each direction was divided by its
    variance to the given power: 0 only centres and turns, 0.5 gives all of them the same variance. ValueError where
    outputs are not finite, all the same, or no more than they have values: the directions they say nothing about would
    count most.
    """
    dim = model.fc.out_features
    if outputs.dim() != 2 or outputs.shape[1] != dim or len(outputs) <= dim:
        raise ValueError(
            f"whitening descriptors of {dim} values needs more than {dim} images, better ten times as many; got "
            f"outputs of shape {tuple(outputs.shape)}"
        )
    if not torch.isfinite(outputs).all():
        raise ValueError("whitening needs finite outputs, got nan or inf: has the model diverged?")
    x = outputs.double()
    mean = x.mean(0)
    variances, directions = torch.linalg.eigh((x - mean).T @ (x - mean) / len(x))
    variances, directions = variances.flip(0), directions.flip(1)
    if variances[0] <= 0:
        raise ValueError("whitening needs outputs that differ: all images have the same ones")
    # A direction without variance tells nothing: it must not be blown up.
    rows = (directions * (variances / variances[0]).clamp(min=1e-6) ** -power).T.to(model.fc.weight)
    model.fc.bias.copy_(rows @ (model.fc.bias - mean.to(rows)))
    model.fc.weight.copy_(rows @ model.fc.weight)
