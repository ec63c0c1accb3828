"""Recalls over the course of a run: python -m experiments.curve logs/demo_long/DATE_TIME --dataset_path data/demo_world

The run was trained with --keep_every. Evaluates initial.pt and each kept checkpoint on all sets, prints a table, writes
curve.json beside the checkpoints and a picture (--figure). Checkpoints in curve.json are not evaluated again.
"""

import json
from pathlib import Path
from typing import Annotated

import torch

from datasets.sets import VALIDATION, load_evaluation_data
from models.earthloc import load_model
from retrieval.describe import ROTATIONS, Describer
from retrieval.evaluation import evaluate
from utils import figures
from utils.files import replacing_text
from utils.flags import DEVICE, WORKERS, BatchSize, DatasetPath, Device, Workers, command
from utils.precision import default_precision, require_device


def checkpoints_of(folder: Path) -> dict[int, Path]:
    """Run folder -> {iteration: file}, initial.pt first. Raises ValueError where none was kept."""
    kept = {int(path.stem.removeprefix("iteration_")): path for path in sorted(folder.glob("iteration_*.pt"))}
    if not kept or not (folder / "initial.pt").exists():
        raise ValueError(f"{folder}: holds no iteration_*.pt beside an initial.pt; train with --keep_every N")
    return {0: folder / "initial.pt", **kept}


def main(
    folder: Annotated[Path, "of the run: logs/LOG_DIR/DATE_TIME"],
    *,
    dataset_path: DatasetPath,
    figure: Annotated[Path | None, "where the picture goes; default: curve.png in the folder"] = None,
    batch_size: BatchSize = 64,
    num_workers: Workers = WORKERS,
    device: Device = DEVICE,
) -> None:
    """Prints the table, and writes curve.json and the picture."""
    device = require_device(device)
    table = folder / "curve.json"
    recalls = json.loads(table.read_text()) if table.exists() else {}
    checkpoints, data = checkpoints_of(folder), load_evaluation_data(dataset_path)
    for iteration, path in checkpoints.items():
        if str(iteration) not in recalls:
            model = load_model(path).to(device, memory_format=torch.channels_last).eval()
            how = batch_size, num_workers, device, default_precision(device), ROTATIONS
            result = evaluate(Describer(model, model.config.image_size, *how), data)
            recalls[str(iteration)] = {each.set.name: each.recalls for each in result.results}
            recalls[str(iteration)]["average"] = result.average()
            with replacing_text(table) as file:
                file.write(json.dumps(recalls, indent=1))
    rows = sorted((int(iteration), sets) for iteration, sets in json.loads(table.read_text()).items())
    names = [name for name in rows[0][1] if name not in (VALIDATION, "average")]
    print("\n| iteration | " + " | ".join(names) + " | average R@1 | R@10 | R@100 |")
    print("| --- " * (len(names) + 4) + "|")
    for iteration, sets in rows:
        ours = [sets[name]["1"] for name in names] + [sets["average"][k] for k in ("1", "10", "100")]
        print(f"| {iteration} | " + " | ".join(f"{value:.1f}" for value in ours) + " |")
    curves = {f"R@{k}": [(iteration, sets["average"][k]) for iteration, sets in rows] for k in ("1", "5", "10", "20")}
    drawn = figures.curve_figure(curves, y_title="average over the sets, %")
    drawn.savefig(figure or folder / "curve.png", dpi=100)


if __name__ == "__main__":
    command(main)
