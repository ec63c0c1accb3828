"""The last layer's start as a whitening of what the model gets in training (docs/decisions.md, "Plateau")."""

import torch
from tqdm import tqdm

from utils.precision import autocast


def whiten(model, batches, augment, seed, std, regulariser, device, precision):
    """Sets the model's fc to the whitening of augmented views, in the mode that training uses.

    batches: of (rows, images uint8 (B, Y, 3, H, W), errors), from the loader. std, regulariser: see EarthLoc.whiten_.
    """
    generator = torch.Generator().manual_seed(seed)
    features = []
    state = {key: value.clone() for key, value in model.state_dict().items()}
    model.train()
    with torch.no_grad(), autocast(device, precision):
        for _, images, _ in tqdm(batches, desc="whitening", leave=False):
            views = augment(images.to(device, non_blocking=True), generator).flatten(0, 1)
            features.append(model.aggregate(views.contiguous(memory_format=torch.channels_last)).float())
    model.load_state_dict(state)  # the passes moved BatchNorm's running statistics
    model.whiten_(torch.cat(features), std=std, regulariser=regulariser, generator=generator)
