"""What a training run is between two iterations, and how it is saved, found again and gone on with."""

import logging
import shlex
import shutil
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import nn

from utils import distributed
from utils.checkpoint import LAST, PREVIOUS, newest_checkpoint, save_checkpoint


def with_config(model: nn.Module) -> dict:
    """EarthLoc -> what a checkpoint holds of it."""
    return {"model": model.state_dict(), "model_config": asdict(model.config)}


Remembered = np.ndarray | torch.Tensor | list | None


@dataclass
class Run:
    """What a run is between two iterations, and all that a checkpoint has to hold.

    loss_fn: may have weights, too. best: highest validation score, -1 before the first one. validated: the iteration
    before which validation was done last, -1 before the first one. skipped: updates left out. memory: what the method
    keeps from iteration to iteration (clusters, a queue): arrays, lists of arrays, or None. content: model -> its part
    of a checkpoint. network: what an update calls, the model or what distributed.wrap puts around it; not in a
    checkpoint. What happens in an iteration depends on these, the seed and the iteration's number alone.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    loss_fn: nn.Module = field(default_factory=nn.Module)
    memory: dict = field(default_factory=dict)
    content: Callable[[nn.Module], dict] = with_config
    iteration: int = 0
    best: float = -1.0
    validated: int = -1
    skipped: int = 0
    network: nn.Module | None = None

    def __post_init__(self) -> None:
        self.network = self.network or self.model

    def save_weights(self, path: Path) -> None:
        """Of several processes the first one does, here and in `save`."""
        if distributed.rank() == 0:
            save_checkpoint(path, self.content(self.model))

    def save(self, path: Path, flags: dict) -> None:
        """Writes a checkpoint to go on from. Raises RuntimeError where weights are not finite."""
        if distributed.rank():
            return
        state = {**self.content(self.model), "loss": self.loss_fn.state_dict()}
        for name, value in (*state["model"].items(), *state["loss"].items()):
            if not torch.isfinite(value).all():
                raise RuntimeError(
                    f"iteration {self.iteration}: {name} is not finite; {path} is not written, the last good "
                    f"checkpoints stay. A smaller --lr or --precision fp32 may help"
                )
        state |= {name: getattr(self, name) for name in ("iteration", "best", "validated", "skipped")}
        state |= {name: as_tensors(value) for name, value in self.memory.items()}
        state |= {"optimizer": self.optimizer.state_dict(), "args": {key: str(value) for key, value in flags.items()}}
        save_checkpoint(path, state, PREVIOUS if path.name == LAST else None)

    def restore(self, checkpoint: dict) -> None:
        """Takes over a checkpoint's content, but for the model's weights, which it has already."""
        self.loss_fn.load_state_dict(checkpoint.get("loss", {}))
        optimizer = checkpoint["optimizer"]
        for group in optimizer["param_groups"]:  # GeoCLIP's older checkpoints say otherwise
            group["fused"] = True
        self.optimizer.load_state_dict(optimizer)
        # Older checkpoints lack what was not remembered then.
        self.memory = {name: as_arrays(checkpoint.get(name)) for name in self.memory}
        self.iteration, self.best = checkpoint["iteration"], checkpoint["best"]
        self.validated = checkpoint.get("validated", self.iteration)
        self.skipped = checkpoint.get("skipped", 0)


def as_tensors(value: Remembered) -> Remembered:
    """An array, a list of arrays or None -> the same with tensors, as checkpoints hold them."""
    if isinstance(value, list):
        return [torch.as_tensor(each) for each in value]
    return None if value is None else torch.as_tensor(value)


def as_arrays(value: Remembered) -> Remembered:
    """The inverse of `as_tensors`."""
    if isinstance(value, list):
        return [each.numpy() for each in value]
    return None if value is None else value.numpy()


def make_optimizer(
    model: nn.Module, lr: float, loss_fn: nn.Module | None = None, weight_decay: float = 0.0
) -> torch.optim.Adam:
    """Adam for all that is trained; fused, because that can leave an update out (see utils.loop.guarded_update)."""
    parameters = [*model.parameters(), *(loss_fn.parameters() if loss_fn else ())]
    return torch.optim.Adam(
        [each for each in parameters if each.requires_grad], lr=lr, weight_decay=weight_decay, fused=True
    )


# Flags that change nothing in what a run ends with.
FREE_FLAGS = set("resume log_dir log_every save_every keep_every num_workers traceback process_timeout".split())


def find_checkpoint(
    resume: str | None, log_dir: str, config: str, script: str
) -> tuple[Path, dict] | tuple[None, None]:
    """--resume -> path and content of the checkpoint to go on with; None, None without, or where "auto" finds nothing.

    Raises ValueError where it is none of the script's last.pt, with the model's `config`.
    """
    if not resume:
        return None, None
    place = Path("logs", log_dir) if resume == "auto" else resume
    try:
        path, checkpoint = newest_checkpoint(distributed.from_first(lambda: newest_checkpoint(place)[0]))
    except FileNotFoundError:
        if resume != "auto":
            raise
        logging.info(f"{place}: no checkpoint yet, starting from the beginning")
        return None, None
    if "optimizer" not in checkpoint or config not in checkpoint:
        what = "is another script's" if "optimizer" in checkpoint else "holds weights only"
        raise ValueError(f"{path}: {what}; --resume wants a last.pt of {script}, --weights takes weights")
    return path, checkpoint


def go_on(run: Run, path: Path, checkpoint: dict, folder: Path, flags: dict) -> None:
    """The run goes on from the checkpoint, with that run's best.pt taken over; flags that differ are named."""
    run.restore(checkpoint)
    logging.info(f"Resumed {path} at iteration {run.iteration}, best validation {run.best:.1f}")
    for flag, before in checkpoint.get("args", {}).items():
        now = str(flags.get(flag, before))
        if now != before and flag not in FREE_FLAGS:
            logging.warning(f"--{flag} is {now}, and was {before}: not the same run any more")
    for name in ("initial.pt", "best.pt"):
        if distributed.rank() == 0 and path.with_name(name).is_file():
            shutil.copy2(path.with_name(name), folder / name)


def how_to_go_on(folder: Path) -> str:
    """The command that was given, with --resume FOLDER."""
    given = iter(sys.argv)
    words = []
    for word in given:
        if word == "--resume":
            next(given, None)
        elif not word.startswith("--resume="):
            words.append(word)
    return shlex.join(["python", *words, "--resume", str(folder)])
