"""make demo's main job: train on the demo world, evaluate before and after, show the shipped model: one table.

python -m experiments.demo --dataset_path data/demo_world. What is done is skipped: remove logs/demo to train again.
"""

import json
import shutil
from pathlib import Path

import eval as evaluation
import train
from utils.arguments import make_parser

PRESET = "presets/demo.args"
SHIPPED = Path("weights/demo_world.safetensors")


def newest_finished(log_dir):
    """The newest run of logs/log_dir that was trained to its end -> folder or None."""
    runs = sorted(Path("logs", log_dir).glob("*/last.pt"))
    finished = [each.parent for each in runs if (each.parent / "done").exists()]
    return finished[-1] if finished else None


def results_of(checkpoint, dataset_path, log_dir):
    """Evaluates a checkpoint, or reads the results of having done so -> the dict of results.json, its folder."""
    done = sorted(Path("logs", log_dir).glob("*/results.json"))
    for path in reversed(done):
        results = json.loads(path.read_text())
        if results["checkpoint"] == str(checkpoint):
            return results, path.parent
    argv = ["--resume", str(checkpoint), "--dataset_path", dataset_path, "--log_dir", log_dir, "--batch_size", "64"]
    evaluation.main(evaluation.parse_arguments(argv))
    path = sorted(Path("logs", log_dir).glob("*/results.json"))[-1]
    return json.loads(path.read_text()), path.parent


def main():
    parser = make_parser(__doc__)
    parser.add_argument("--dataset_path", default="data/demo_world")
    args = parser.parse_args()
    folder = newest_finished("demo")
    if folder is None:
        folder = train.main(train.parse_arguments([f"@{PRESET}", "--dataset_path", args.dataset_path]))
    rows = [("before training", folder / "initial.pt"), ("after training", folder / "last.pt")]
    if SHIPPED.exists():
        rows.append(("shipped weights", SHIPPED))
    print(f"\n{'':16} {'R@1 of each set':42}    average R@1   R@10  R@100")
    for title, checkpoint in rows:
        results, place = results_of(checkpoint, args.dataset_path, "demo_eval")
        sets = "  ".join(f"{name.split()[0]} {results['sets'][name]['recalls']['1']:.1f}"
                         for name in results["average"]["over"])
        mean = results["average"]["recalls"]
        print(f"{title:16} {sets}   {mean['1']:.1f}   {mean['10']:.1f}   {mean['100']:.1f}")
        if (place / "predictions.jpg").exists():
            shutil.copy(place / "predictions.jpg", folder / f"predictions_{title.split()[0]}.jpg")
    print(f"\nLogs, checkpoints and pictures: {folder}")


if __name__ == "__main__":
    main()
