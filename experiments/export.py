"""Weights -> files to share: python -m experiments.export logs/…/last.pt model.safetensors

Several at once: python -m experiments.export WEIGHTS OUT --format safetensors onnx torch_export writes OUT.safetensors
(half precision; eval.py --resume and train.py --weights read it as it is), OUT.onnx and OUT.pt2. --format hub makes OUT
a folder as the Hugging Face hub has them, with a card. WEIGHTS are any that eval.py --resume takes. docs/hub.md has
more.
"""

from pathlib import Path
from typing import Annotated

from models.earthloc import EarthLoc
from models.exporting import FORMATS, export
from models.weights import interface
from utils.flags import command


def main(
    weights: Annotated[str, "checkpoint, weights, or a folder with some"],
    output: Annotated[Path, "file to write; of several formats the name without its ending; of hub the folder"],
    formats: Annotated[
        list[str] | None,
        "default: by the output's ending",
        {"option": "--format", "nargs": "+", "type": str, "choices": (*FORMATS, "hub")},
    ] = None,
    run: Annotated[str | None, "folder of the training run, for the card of --format hub"] = None,
    results: Annotated[
        str | None, "folder of an evaluation with results.json, for that card; default: the run's"
    ] = None,
) -> list[Path]:
    """-> what was written."""
    model, written = EarthLoc.from_pretrained(weights), []
    for kind, path in targets(output, formats).items():
        if kind == "hub":
            model.save_pretrained(path, model_card_kwargs={"run": run, "results": results})
        else:
            export(model, path, kind)
        files = [path] if path.is_file() else sorted(path.iterdir())
        print(f"{path}: {sum(file.stat().st_size for file in files) / 1e6:.1f} MB")
        written.append(path)
    told = interface(model)
    print(f"{told['input']} -> {told['output']}; {told['normalisation']} (mean {told['mean']}, std {told['std']})")
    return written


def targets(output: Path, formats: list[str] | None) -> dict[str, Path]:
    """OUT and --format -> {format: file or folder}; without --format its ending says it. ValueError if not."""
    by_suffix = {suffix: kind for kind, suffix in FORMATS.items()}
    if formats is None:
        if output.suffix not in by_suffix:
            raise ValueError(f"{output}: say --format, or give a name that ends in {', '.join(by_suffix)}")
        formats = [by_suffix[output.suffix]]
    stem = output.with_suffix("") if output.suffix in by_suffix else output
    return {kind: stem if kind == "hub" else stem.with_name(stem.name + FORMATS[kind]) for kind in formats}


if __name__ == "__main__":
    command(main)
