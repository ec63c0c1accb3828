"""Turns and mirrors of single images, by whole pixels."""

import torch
from torch import Tensor


def turn_and_flip(images: Tensor, generator: torch.Generator, turns: bool, flip: bool) -> Tensor:
    """uint8 (B, 3, S, S): each image turned by a random multiple of 90 degrees and mirrored, where that is on."""
    images = images.clone()
    quarters = torch.randint(4, (len(images),), generator=generator) if turns else torch.zeros(len(images))
    mirrored = torch.rand(len(images), generator=generator) < 0.5 if flip else torch.zeros(len(images))
    for i in range(len(images)):
        image = torch.rot90(images[i], int(quarters[i]), dims=(-2, -1))
        images[i] = image.flip(-1) if mirrored[i] else image
    return images
