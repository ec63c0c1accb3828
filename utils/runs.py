"""What a training run is between two iterations, and how it is saved, found again and gone on with."""

import logging
import shlex
import shutil
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn

from models.config import ModelConfig
from models.earthloc import EarthLoc, build_model
from utils import distributed
from utils.arguments import model_config
from utils.checkpoint import LAST, PREVIOUS, newest_checkpoint, save_checkpoint


@dataclass
class Run:
    """What a run is between two iterations, and all that a checkpoint has to hold.

    clusters: arrays of region rows, None before the first ones. best: highest validation R@1, -1 before the first one.
    validated: the iteration before which validation was done last, -1 before the first one. skipped: updates left out.
    network: what an update calls, the model or what distributed.wrap puts around it; not in a checkpoint.
    What happens in an iteration depends on these, the seed and the iteration's number alone.
    """

    model: EarthLoc
    optimizer: torch.optim.Optimizer
    iteration: int = 0
    clusters: list | None = None
    best: float = -1.0
    validated: int = -1
    skipped: int = 0
    network: nn.Module | None = None

    def __post_init__(self):
        self.network = self.network or self.model

    def save_weights(self, path):
        """Of several processes the first one does, here and in `save`."""
        if distributed.rank() == 0:
            save_checkpoint(path, {"model": self.model.state_dict(), "model_config": asdict(self.model.config)})

    def save(self, path, args):
        """Writes a checkpoint to go on from. Raises RuntimeError where weights are not finite."""
        if distributed.rank():
            return
        state = self.model.state_dict()
        broken = [name for name, value in state.items() if not torch.isfinite(value).all()]
        if broken:
            raise RuntimeError(f"iteration {self.iteration}: {broken[0]} is not finite; {path} is not written, the "
                               f"last good checkpoints stay. A smaller --lr or --precision fp32 may help")
        save_checkpoint(path, {
            "model": state, "model_config": asdict(self.model.config),
            "optimizer": self.optimizer.state_dict(), "iteration": self.iteration, "best": self.best,
            "validated": self.validated, "skipped": self.skipped,
            "clusters": self.clusters and [torch.as_tensor(each) for each in self.clusters],
            "args": {key: str(value) for key, value in vars(args).items()}}, PREVIOUS if path.name == LAST else None)


def make_optimizer(model, lr):
    return torch.optim.Adam([each for each in model.parameters() if each.requires_grad], lr=lr, fused=True)


def fresh_run(args, device):
    """-> Run at iteration 0."""
    model = build_model(model_config(args), args.weights).to(device, memory_format=torch.channels_last)
    return Run(model, make_optimizer(model, args.lr))


def resume_run(checkpoint, path, lr, device):
    """Content and path of a checkpoint -> the Run it was saved from. Raises ValueError where it holds weights only."""
    if "optimizer" not in checkpoint:
        raise ValueError(f"{path}: holds weights only; --resume wants a last.pt of train.py, --weights takes this file")
    model = EarthLoc(ModelConfig.from_dict(checkpoint["model_config"]))
    model.load_state_dict(checkpoint["model"])
    model = model.to(device, memory_format=torch.channels_last)
    optimizer = make_optimizer(model, lr)
    optimizer.load_state_dict(checkpoint["optimizer"])
    clusters = checkpoint["clusters"] and [each.numpy() for each in checkpoint["clusters"]]
    return Run(model, optimizer, checkpoint["iteration"], clusters, checkpoint["best"],
               checkpoint.get("validated", checkpoint["iteration"]), checkpoint.get("skipped", 0))


# Flags that change nothing in what a run ends with.
FREE_FLAGS = {"resume", "log_dir", "log_every", "save_every", "keep_every", "num_workers", "traceback",
              "process_timeout"}


def find_run(args, folder, device):
    """--resume -> the Run to go on with, its best.pt taken over into the folder; None where "auto" finds nothing."""
    place = Path("logs", args.log_dir) if args.resume == "auto" else args.resume
    try:
        path, checkpoint = newest_checkpoint(distributed.from_first(lambda: newest_checkpoint(place)[0]))
    except FileNotFoundError:
        if args.resume != "auto":
            raise
        logging.info(f"{place}: no checkpoint yet, starting from the beginning")
        return None
    run = resume_run(checkpoint, path, args.lr, device)
    logging.info(f"Resumed {path} at iteration {run.iteration}, best validation R@1 {run.best:.1f}")
    for flag, before in checkpoint.get("args", {}).items():
        now = str(getattr(args, flag, before))
        if now != before and flag not in FREE_FLAGS:
            logging.warning(f"--{flag} is {now}, and was {before}: not the same run any more")
    for name in ("initial.pt", "best.pt"):
        if distributed.rank() == 0 and path.with_name(name).is_file():
            shutil.copy2(path.with_name(name), folder / name)
    return run


def how_to_go_on(folder):
    """The command that was given, with --resume FOLDER."""
    given = iter(sys.argv)
    words = []
    for word in given:
        if word == "--resume":
            next(given, None)
        elif not word.startswith("--resume="):
            words.append(word)
    return shlex.join(["python", *words, "--resume", str(folder)])
