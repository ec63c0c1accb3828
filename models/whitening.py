"""The last layers' start from what the model gets in training (docs/decisions.md, "Plateau")."""

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
