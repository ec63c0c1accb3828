"""make demo's main job: train on the demo world, evaluate before and after, beside the shipped model, locate a photo.

python -m experiments.demo --dataset_path data/demo_world. What was done with these flags is skipped; remove logs/demo
to train again.
"""

import csv
import shutil
from pathlib import Path

import predict
import train
from datasets.names import ImageName
from experiments.runs import evaluated, trained
from utils import geo
from utils.flags import DatasetPath, command

PRESET = "presets/demo.args"
SHIPPED = Path("weights/demo_world.safetensors")


def main(*, dataset_path: DatasetPath = "data/demo_world") -> None:
    """Prints recalls, and where a photo was found; pictures go to the training's folder."""
    folder = trained(train.parse_arguments([f"@{PRESET}", "--dataset_path", dataset_path]))
    rows = [("before training", folder / "initial.pt"), ("after training", folder / "last.pt")]
    if SHIPPED.exists():
        rows.append(("shipped weights", SHIPPED))
    print(f"\n{'':16} {'R@1 of each set':42}    average R@1   R@10  R@100")
    for title, checkpoint in rows:
        results, place = evaluated(checkpoint, "demo_eval", "--dataset_path", dataset_path, "--batch_size", "64")
        sets = "  ".join(
            f"{name.split()[0]} {results['sets'][name]['recalls']['1']:.1f}" for name in results["average"]["over"]
        )
        mean = results["average"]["recalls"]
        print(f"{title:16} {sets}   {mean['1']:.1f}   {mean['10']:.1f}   {mean['100']:.1f}")
        if (place / "predictions.jpg").exists():
            shutil.copy(place / "predictions.jpg", folder / f"predictions_{title.split()[0]}.jpg")
        if checkpoint == folder / "last.pt":
            photo = Path(dataset_path) / surest(place / "predictions.csv")
    first, located = locate(photo, folder / "last.pt", dataset_path)
    shutil.copy(located / "map_0000.jpg", folder / "located_map.jpg")
    found = first["latitude"], first["longitude"]
    off = geo.distance_km(geo.centers(ImageName.parse(photo.name).footprint), found)
    print(f"\nWhere was this photo taken? {photo}")
    print(f"At {found[0]:.1f} {found[1]:.1f}, {off:.0f} km from the middle of its label")
    print(f"Map: {folder / 'located_map.jpg'}   Footprints: {located / 'predictions.geojson'}")
    print(f"\nLogs, checkpoints and pictures: {folder}")


def surest(table: Path) -> str:
    """predictions.csv of an evaluation -> the query whose first prediction has the highest score, right or wrong."""
    with open(table, newline="") as file:
        first = [row for row in csv.DictReader(file) if row["rank"] == "1"]
    return max(first, key=lambda row: float(row["score"]))["query"]


def locate(photo: Path, checkpoint: Path, dataset_path: str) -> tuple[dict, Path]:
    """What predict.py finds first, and the folder of its map and files."""
    flags = ["--resume", checkpoint, "--dataset_path", dataset_path, "--log_dir", "demo_located", "--num_workers", 0]
    first, *_ = predict.main(predict.parse_arguments([str(each) for each in (photo, *flags)]))
    return first, max(Path("logs", "demo_located").iterdir())


if __name__ == "__main__":
    command(main)
