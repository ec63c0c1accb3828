"""Several models as one: python -m experiments.ensemble OUT.safetensors WEIGHTS WEIGHTS …

Their descriptors stand side by side (`models.earthloc.Ensemble`). It takes the time of all of them, and finds more than
each where they err apart. Whatever evaluates or locates takes the file as it takes a model's; whiten them before
(experiments.whiten).
"""

from pathlib import Path
from typing import Annotated

from models.config import EnsembleConfig
from models.earthloc import Ensemble, load_model
from models.weights import save_safetensors
from utils.flags import command


def main(
    output: Annotated[Path, "file to write, .safetensors, half precision"],
    weights: Annotated[list[str], "of each model; all must take images of the same size"],
) -> Ensemble:
    """-> the model, written to its file. Raises ValueError where the models can't be put together."""
    if output.suffix != ".safetensors":
        raise ValueError(f"{output}: expected a name that ends in .safetensors")
    models = [load_model(path) for path in weights]
    for path, model in zip(weights, models):
        if isinstance(model, Ensemble):
            raise ValueError(f"{path}: is an ensemble itself; give its members' files")
    ensemble = Ensemble(EnsembleConfig(tuple(model.config for model in models)))
    for member, model in zip(ensemble.members, models):
        member.load_state_dict(model.state_dict())
    output.parent.mkdir(parents=True, exist_ok=True)
    save_safetensors(ensemble, output)
    print(f"{output}: {ensemble.config.name}, {output.stat().st_size / 1e6:.1f} MB")
    return ensemble


if __name__ == "__main__":
    command(main)
