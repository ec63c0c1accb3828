"""Checkpoints: written whole or not at all, read without executing anything."""

import os
from pathlib import Path

import torch

from models.weights import load_tensors


def save_checkpoint(path, state):
    """state: a dict of tensors and plain values. The old file stays until the new one is whole."""
    path = Path(path)
    temporary = path.with_suffix(f"{path.suffix}.tmp")
    with open(temporary, "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def load_checkpoint(path):
    """File -> {"model": state dict, …}; a bare state dict is put under "model".

    Raises FileNotFoundError or ValueError naming the file: missing, truncated, or holding more than tensors.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such checkpoint")
    loaded = load_tensors(path)
    if not isinstance(loaded, dict) or not loaded:
        raise ValueError(f"{path}: holds no state dict; is it a checkpoint of train.py?")
    return loaded if "model" in loaded else {"model": loaded}
