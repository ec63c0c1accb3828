"""make demo's main job: train on the demo world, evaluate before and after, show the shipped model: one table.

python -m experiments.demo --dataset_path data/demo_world. What is done is skipped: remove logs/demo to train again.
"""

import shutil
from argparse import Namespace
from pathlib import Path

import train
from experiments.runs import evaluated, finished
from utils.arguments import add_shared, make_parser, run

PRESET = "presets/demo.args"
SHIPPED = Path("weights/demo_world.safetensors")


def main(args: Namespace) -> None:
    folder = finished("demo") or train.main(train.parse_arguments([f"@{PRESET}", "--dataset_path", args.dataset_path]))
    rows = [("before training", folder / "initial.pt"), ("after training", folder / "last.pt")]
    if SHIPPED.exists():
        rows.append(("shipped weights", SHIPPED))
    print(f"\n{'':16} {'R@1 of each set':42}    average R@1   R@10  R@100")
    for title, checkpoint in rows:
        results, place = evaluated(checkpoint, "demo_eval", "--dataset_path", args.dataset_path, "--batch_size", "64")
        sets = "  ".join(
            f"{name.split()[0]} {results['sets'][name]['recalls']['1']:.1f}" for name in results["average"]["over"]
        )
        mean = results["average"]["recalls"]
        print(f"{title:16} {sets}   {mean['1']:.1f}   {mean['10']:.1f}   {mean['100']:.1f}")
        if (place / "predictions.jpg").exists():
            shutil.copy(place / "predictions.jpg", folder / f"predictions_{title.split()[0]}.jpg")
    print(f"\nLogs, checkpoints and pictures: {folder}")


def parse_arguments(argv: list[str] | None = None) -> Namespace:
    parser = make_parser(__doc__)
    add_shared(parser, dataset_path="data/demo_world")
    return parser.parse_args(argv)


if __name__ == "__main__":
    run(main, parse_arguments())
