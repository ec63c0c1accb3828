"""Runs that an experiment needs: trained and evaluated once; what is there is read."""

import json
import os
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

import numpy as np

import eval as evaluation
import train
from models.earthloc import load_model
from models.weights import weights_fingerprint
from utils.runs import FREE_FLAGS

# Flags that change nothing in what an evaluation finds; --resume is what it evaluates.
FREE_IN_EVALUATION = FREE_FLAGS - {"resume"} | {"batch_size", "results", "forget_descriptors"}


def evaluated(checkpoint: Path, log_dir: str, *flags: str) -> tuple[dict, Path]:
    """Evaluates a checkpoint by eval.py's flags under logs/log_dir, or finds that this was done with the same flags and
    weights: a file may be made anew under its old name.

    -> what results.json holds, its folder.
    """
    args = evaluation.parse_arguments(["--resume", str(checkpoint), "--log_dir", log_dir, *flags])
    defaults = evaluation.parse_arguments(["--dataset_path", ""])
    fingerprint = weights_fingerprint(load_model(checkpoint))
    for done in (False, True):
        for path in sorted(Path("logs", log_dir).glob("*/results.json"), reverse=True):
            if differing(path.parent, args, defaults, FREE_IN_EVALUATION):
                continue
            results = json.loads(path.read_text())
            if results.get("fingerprint") == fingerprint:  # older ones do not tell theirs: not known to be these
                return results, path.parent
        if not done:
            evaluation.main(args)
    raise RuntimeError(f"logs/{log_dir}: the evaluation of {checkpoint} left no results.json")


def trained(args: Namespace) -> Path:
    """Trains by train.py's flags, or finds that this was done with the same ones -> the run's folder."""
    for done in sorted(Path("logs", args.log_dir).glob("*/done"), reverse=True):
        others = differing(done.parent, args, train.parse_arguments([]), FREE_FLAGS)
        if not others:
            return done.parent
        verb = "differs" if len(others) == 1 else "differ"
        print(f"{done.parent}: not what is asked for, --{', --'.join(others)} {verb}")
    return train.main(args)


def differing(folder: Path, args: Namespace, defaults: Namespace, free: set[str]) -> list[str]:
    """Names of the flags, but for the free ones, that the run in the folder had otherwise; a flag that there was not
    yet had its default. All of them where the folder says nothing."""
    config = folder / "config.json"
    before = vars(defaults) | json.loads(config.read_text()) if config.is_file() else {}
    now = json.loads(json.dumps(vars(args), default=str))
    place = lambda flags: os.path.abspath(flags.get("dataset_path", ""))
    names = [name for name in now if name not in free | {"dataset_path"} and now[name] != before.get(name)]
    return names + ["dataset_path"] * (place(now) != place(before))


def trained_and_evaluated(name: str, flags: list[str], *evaluation_flags: str) -> dict[str, float]:
    """Trains under logs/name by train.py's flags and evaluates last.pt, each once -> {"1": average R@1, …}."""
    args = train.parse_arguments([*flags, "--log_dir", name])
    folder = trained(args)
    shared = [f"--{flag}={getattr(args, flag)}" for flag in ("dataset_path", "num_workers", "device", "precision")]
    results, _ = evaluated(folder / "last.pt", f"{name}_eval", *shared, *evaluation_flags)
    return results["average"]["recalls"]


def recalls_over_seeds(
    name: str, flags: list[str], seeds: Sequence[int], *evaluation_flags: str
) -> dict[str, np.ndarray]:
    """`trained_and_evaluated` with each seed, under logs/NAME_SEED -> {"1": average R@1 (S,), …}."""
    runs = [trained_and_evaluated(f"{name}_{seed}", [*flags, f"--seed={seed}"], *evaluation_flags) for seed in seeds]
    return {k: np.array([recalls[k] for recalls in runs]) for k in runs[0]}


def mean_and_deviation(values: Sequence[float] | np.ndarray) -> str:
    """(S,) of S seeds -> "28.4 ± 1.2", the standard deviation over them; of one seed "28.4", of a set that was skipped
    "-"."""
    values = np.asarray(values)
    if np.isnan(values).any():
        return "-"
    return f"{values.mean():.1f}" + (f" ± {values.std(ddof=1):.1f}" if len(values) > 1 else "")
