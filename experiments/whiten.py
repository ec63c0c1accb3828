"""Trained weights -> the same with whitened descriptors: python -m experiments.whiten WEIGHTS OUT --dataset_path FOLDER

Of the data set the images of 2021 are described. Training leaves descriptors in which few directions have most of the
variance; what tells places apart is in the others, too. The whitening goes into the model's last layer, so everything
that reads the weights has it: evaluation, the locator, an index of the Earth.
"""

import argparse
from pathlib import Path
from typing import Annotated

import torch
from torch import Tensor, nn

from datasets.sets import read_database
from models.earthloc import EarthLoc, load_model
from models.weights import save_safetensors
from models.whitening import whiten_outputs_
from retrieval.describe import Describer
from utils.flags import DEVICE, WORKERS, BatchSize, Device, Precision, Workers, command
from utils.precision import chosen_precision


def power_flag(text: str) -> float:
    """Type of a flag: a number from 0 to 0.5."""
    if not 0 <= float(text) <= 0.5:
        raise argparse.ArgumentTypeError(f"{text}: expected 0 to 0.5")
    return float(text)


class Unnormalised(nn.Module):
    """A model up to its last layer: (B, 3, H, W) -> (B, D), not of unit length."""

    def __init__(self, model: EarthLoc) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        features = self.model.aggregate(images)
        with torch.autocast(features.device.type, enabled=False):  # as EarthLoc.forward
            return self.model.fc(features)


def main(
    weights: Annotated[str, "checkpoint or weights"],
    output: Annotated[Path, "file to write, .safetensors, in half precision"],
    *,
    dataset_path: Annotated[str, "folder with database/: that of the training; a few thousand images are enough"],
    power: Annotated[
        float, "directions are divided by their variance to this power; 0.5: all are alike", {"type": power_flag}
    ] = 0.25,
    batch_size: BatchSize = 32,
    num_workers: Workers = WORKERS,
    device: Device = DEVICE,
    precision: Precision = "fp32",
) -> EarthLoc:
    """-> the model, written to its file."""
    if output.suffix != ".safetensors":
        raise ValueError(f"{output}: the name of a file that ends in .safetensors")
    model = load_model(weights).eval()
    if not isinstance(model, EarthLoc):
        raise ValueError(f"{weights}: several models in one file; whiten each, and put them together again")
    database = read_database(dataset_path)
    output.parent.mkdir(parents=True, exist_ok=True)
    how = model.config.image_size, batch_size, num_workers, device, chosen_precision(precision, device)
    describer = Describer(Unnormalised(model).to(device), *how)
    described, failures = describer([database.root / path for path in database.paths])
    outputs = torch.from_numpy(described[0])
    read = ~outputs.isnan().any(dim=1)
    whiten_outputs_(model.cpu(), outputs[read], power)
    save_safetensors(model, output)
    print(f"{output}: whitened by {int(read.sum()):,} images, {len(failures)} failed")
    return model


if __name__ == "__main__":
    command(main)
