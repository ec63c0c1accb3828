"""The last layer's start as a whitening of what the model gets in training (README, "Plateau")."""

import numpy as np
import torch
from tqdm import tqdm

from datasets.batches import spares
from utils.precision import autocast


def whiten(model, loader, regions, augment, batch_size, seed, std, regulariser, device, precision):
    """Sets the model's fc to the whitening of augmented views of up to 512 regions, in the mode that training uses.

    regions: how many the loader has. std, regulariser: see EarthLoc.whiten_.
    """
    rows = np.random.default_rng([seed, 1]).permutation(regions)[:512]
    batches = rows[:len(rows) // batch_size * batch_size].reshape(-1, batch_size)
    generator = torch.Generator().manual_seed(seed)
    features = []
    state = {key: value.clone() for key, value in model.state_dict().items()}
    model.train()
    with torch.no_grad(), autocast(device, precision):
        substitutes = [spares(each, [np.arange(regions)], [seed, 6, k]) for k, each in enumerate(batches)]
        served = loader.serve(batches, substitutes.__getitem__)
        for _, images, _ in tqdm(served, total=len(batches), desc="whitening", leave=False):
            views = augment(images.to(device), generator).flatten(0, 1)
            features.append(model.aggregate(views.contiguous(memory_format=torch.channels_last)).float())
    model.load_state_dict(state)  # the passes moved BatchNorm's running statistics
    model.whiten_(torch.cat(features), std=std, regulariser=regulariser, generator=generator)
