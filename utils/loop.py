"""The loop of train.py and train_geoclip.py: all that is not the method.

A trainer brings its objects, a step and a validation; the loop brings the guard against what is not finite, the look at
it an iteration later, checkpoints, signals, validation when it is due, scalars, and several processes.
"""

import argparse
import logging
import math
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter

from utils import distributed
from utils.checkpoint import LAST, save_checkpoint
from utils.logs import Meter, make_log_dir, own_folder, setup_logging
from utils.precision import deterministic, require_device
from utils.runs import Run, how_to_go_on
from utils.signals import EXIT_CODE, Stop, Stopped

T = TypeVar("T")
LOOP_FLAGS = ("iterations", "validate_every", "save_every", "keep_every", "log_every", "max_skips")  # of run_loop


def launch(train: Callable[[argparse.Namespace, Path, torch.device, Stop], bool], args: argparse.Namespace) -> Path:
    """The frame of a trainer's main: signals, processes, the log folder -> the run's folder.

    train(args, folder, device, stop) -> whether it came to its end. Leaves with exit code 75 after a signal.
    """
    with Stop() as stop, distributed.processes(require_device(args.device), args.process_timeout) as device:
        args.processes = distributed.world()
        folder = distributed.from_first(lambda: make_log_dir(args.log_dir))
        own_folder(folder).mkdir(parents=True, exist_ok=True)  # of another machine: nothing is there yet
        setup_logging(own_folder(folder), args)
        torch.manual_seed(args.seed)
        try:
            with deterministic(args.deterministic):
                finished = train(args, folder, device, stop)
        except Stopped as signal:
            logging.info(f"{signal}: stopped before the first iteration, start it again")
            finished = False
    if not finished:
        sys.exit(EXIT_CODE)
    (folder / "done").touch()
    return folder


def guarded_update(run: Run, lr: float, forward: Callable[[], tuple[Tensor, T]]) -> tuple[Tensor, Tensor, T]:
    """One step of the optimizer -> loss, norm of the gradient, both 0-d, and what else forward() returned.

    forward() -> the loss of all processes' batch (0-d, the same in each) and anything else. At a loss or norm that is
    not finite the step changes nothing but the iteration's number: neither weights, nor Adam's averages, nor
    BatchNorm's. The device decides that, so the host need not wait for it.
    """
    if not run.model.training:
        run.model.train()
    averages = [
        each
        for module in run.model.modules()
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)) and module.training
        for each in module.buffers(recurse=False)
    ]
    wide, counts = [each for each in averages if each.dim()], [each for each in averages if not each.dim()]
    packed = lambda: (torch.cat(wide), torch.stack(counts)) if averages else ()
    before = packed()
    loss, rest = forward()
    for group in run.optimizer.param_groups:
        group["lr"] = lr
    run.optimizer.zero_grad(set_to_none=True)
    loss.backward()
    parameters = [*run.model.parameters(), *run.loss_fn.parameters()]
    distributed.average_gradients(run.loss_fn.parameters())  # the model's are averaged by distributed.wrap
    norm = torch.nn.utils.get_total_norm([each.grad for each in parameters if each.grad is not None])
    finite = torch.isfinite(loss.detach() + norm)
    run.optimizer.found_inf = (~finite).float()  # as GradScaler tells a fused optimizer to do nothing
    run.optimizer.step()
    if averages:
        kept, counted = (torch.where(finite, now, then) for now, then in zip(packed(), before))
        torch._foreach_copy_(wide, kept.split([len(each) for each in wide]))
        torch._foreach_copy_(counts, counted.unbind())
    run.iteration += 1
    return loss.detach(), norm, rest


class Outcome:
    """What an iteration came to, on its way to the host: a look at it waits for that iteration, not for later ones.

    loss, norm of the gradient: 0-d tensors. images: how many there were. scalars() -> what to log besides the loss,
    batch() -> "views" and "paths" of the batch, in case it is to be saved.
    """

    def __init__(
        self,
        iteration: int,
        loss: Tensor,
        norm: Tensor,
        images: int,
        scalars: Callable[[], dict],
        batch: Callable[[], dict],
    ) -> None:
        self.iteration, self.loss, self.norm = iteration, loss, norm
        self.images, self.scalars, self.batch = images, scalars, batch
        self.values = torch.stack([loss, norm]).to("cpu", non_blocking=True)
        self.copied = torch.cuda.Event() if loss.is_cuda else None
        if self.copied:
            self.copied.record()

    def problem(self) -> str | None:
        """-> what was not finite, so that nothing was updated; None if all is well."""
        if self.copied:
            self.copied.synchronize()
        if torch.isfinite(self.values.sum()):
            return None
        loss, norm = self.values.tolist()
        what = f"the gradient's norm is {norm}" if math.isfinite(loss) else f"the loss is {loss}"
        return f"iteration {self.iteration}: {what}"


def settle(run: Run, outcome: Outcome, folder: Path, max_skips: int) -> None:
    """Looks at an iteration's outcome. Of one without an update, the batch goes to a file.

    Raises RuntimeError where this is more often than max_skips.
    """
    problem = outcome.problem()
    if problem is None:
        return
    file = folder / f"bad_batch_{outcome.iteration}.pt"
    batch = outcome.batch()
    save_checkpoint(file, {"reason": problem, "iteration": outcome.iteration, **batch, "views": batch["views"].cpu()})
    logging.warning(f"{problem}; its images and views are in {file}")
    if run.skipped >= max_skips:
        raise RuntimeError(
            f"{problem}; it updated nothing, the last good checkpoints stay, the batch is in {file}. "
            f"A smaller --lr or --precision fp32 may help, --max_skips leaves out a few updates"
        )
    run.skipped += 1


def run_loop(
    run: Run,
    step: Callable[[Meter], Outcome],
    validate: Callable[[SummaryWriter], float | None],
    folder: Path,
    stop: Stop,
    flags: dict,
    *,
    iterations: int,
    validate_every: int,
    save_every: int | None = None,
    keep_every: int | None = None,
    pause_every: int | None = None,
    log_every: int = 50,
    max_skips: int = 0,
) -> bool:
    """From where the run stands to the last iteration -> False where a signal stopped it before that.

    step(meter) does one iteration by `guarded_update`. validate(writer) -> score, None without data. flags: what
    checkpoints keep of them. pause_every: iterations between other work that wants all updates looked at. The host is
    one iteration ahead of the device.
    """
    own, outcomes, save_every = own_folder(folder), [], save_every or validate_every
    every = [each for each in (validate_every, save_every, keep_every, pause_every) if each]
    due = lambda number: run.iteration % number == 0 or run.iteration == iterations

    def settle_all_but(count: int):
        while len(outcomes) > count:
            settle(run, outcomes.pop(0), own, max_skips)

    def before_an_iteration(meter: Meter):
        """What is due: weights to keep, validation with best.pt and last.pt, or last.pt alone."""
        if keep_every and run.iteration and run.iteration % keep_every == 0:
            run.save_weights(folder / f"iteration_{run.iteration:06d}.pt")
        if not due(validate_every):
            if run.iteration % save_every == 0:
                run.save(folder / LAST, flags)
        elif run.validated != run.iteration:  # else resumed right after it
            with stop.at_once():
                score = validate(meter.writer)
            run.validated = run.iteration
            if run.iteration:
                if score is None or score > run.best:
                    run.best = run.best if score is None else score
                    run.save(folder / "best.pt", flags)
                run.save(folder / LAST, flags)
            meter.restart()

    with closing(Meter(own, run.iteration, iterations)) as meter:
        try:
            while True:
                if any(map(due, every)):
                    settle_all_but(0)
                    before_an_iteration(meter)
                if run.iteration == iterations:
                    return True
                stop.check()
                outcome = step(meter)
                outcomes.append(outcome)
                meter.count(outcome.images)
                if due(log_every) and torch.isfinite(outcome.loss + outcome.norm):
                    meter.log(run.iteration, {"loss": outcome.loss, **outcome.scalars()})
                settle_all_but(1)  # also bounds how far ahead the host is, so that the loader's slots hold long enough
        except Stopped as signal:
            settle_all_but(0)
            run.save(folder / LAST, flags)
            logging.info(
                f"{signal}: stopped before iteration {run.iteration + 1} of {iterations}, all is saved. "
                f"Go on with: {how_to_go_on(folder)}"
            )
            return False
