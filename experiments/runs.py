"""Runs that an experiment needs: trained and evaluated once; what is there is read."""

import json
from pathlib import Path

import numpy as np

import eval as evaluation
import train


def evaluated(checkpoint, log_dir, *flags):
    """Evaluates a checkpoint by eval.py's flags under logs/log_dir, or finds that this was done for the data set.

    -> what results.json holds, its folder.
    """
    args = evaluation.parse_arguments(["--resume", str(checkpoint), "--log_dir", log_dir, *flags])
    for done in (False, True):
        for path in sorted(Path("logs", log_dir).glob("*/results.json"), reverse=True):
            results = json.loads(path.read_text())
            if (results["checkpoint"], results["dataset"]) == (args.resume, args.dataset_path):
                return results, path.parent
        if not done:
            evaluation.main(args)
    raise RuntimeError(f"logs/{log_dir}: the evaluation of {checkpoint} left no results.json")


def finished(log_dir):
    """The newest run under logs/log_dir that was trained to its end -> its folder, or None."""
    return max((each.parent for each in Path("logs", log_dir).glob("*/done")), default=None)


def trained_and_evaluated(name, flags, *evaluation_flags):
    """Trains under logs/name by train.py's flags and evaluates last.pt, each once -> {"1": average R@1, …}."""
    args = train.parse_arguments([*flags, "--log_dir", name])
    folder = finished(name) or train.main(args)
    results, _ = evaluated(
        folder / "last.pt",
        f"{name}_eval",
        "--dataset_path",
        args.dataset_path,
        "--num_workers",
        str(args.num_workers),
        "--device",
        args.device,
        "--precision",
        args.precision,
        *evaluation_flags,
    )
    return results["average"]["recalls"]


def mean_and_deviation(values):
    """(S,) of S seeds -> "28.4 ± 1.2", the standard deviation over them; of one seed "28.4", of a set that was skipped
    "-"."""
    values = np.asarray(values)
    if np.isnan(values).any():
        return "-"
    return f"{values.mean():.1f}" + (f" ± {values.std(ddof=1):.1f}" if len(values) > 1 else "")
