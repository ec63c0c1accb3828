"""Log folders: logs/{log_dir}/{date_time}/ with info.log, debug.log and config.json."""

import json
import logging
import shlex
import sys
import time
import warnings
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from utils import distributed
from utils.files import printable


def make_log_dir(log_dir: str, root: str | Path = "logs") -> Path:
    """Name of an experiment -> a new folder logs/{log_dir}/{YYYY-mm-dd_HH-MM-SS}; of more in one second, _001 and so on
    follow, so that the newest is the last by name."""
    stamp = datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    folder, copy = Path(root) / log_dir / stamp, 1
    while True:
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:  # two runs in the same second
            folder, copy = Path(root) / log_dir / f"{stamp}_{copy:03d}", copy + 1


def own_folder(folder: Path) -> Path:
    """The run's folder -> where this one of several processes writes its logs: the first one there, others below it."""
    return folder / f"rank{distributed.rank()}" if distributed.rank() else folder


def setup_logging(folder: Path, args: Namespace) -> None:
    """Log to stdout and info.log (from INFO) and debug.log (all); writes config.json and the first three lines.

    Of several processes, only the first one tells stdout more than warnings.
    """
    logger = logging.getLogger()
    for handler in list(logger.handlers):
        logger.removeHandler(handler)
        handler.close()
    logger.setLevel(logging.DEBUG)
    told = logging.WARNING if distributed.rank() else logging.INFO
    for handler, level in (
        (logging.StreamHandler(sys.stdout), told),
        (logging.FileHandler(folder / "info.log"), logging.INFO),
        (logging.FileHandler(folder / "debug.log"), logging.DEBUG),
    ):
        handler.setLevel(level)
        handler.setFormatter(Formatter("%(asctime)s   %(message)s", "%Y-%m-%d %H:%M:%S"))
        logger.addHandler(handler)
    for noisy in ("PIL", "faiss", "matplotlib", "urllib3"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module="tensorboard")
    (folder / "config.json").write_text(json.dumps(vars(args), indent=2, default=str) + "\n")
    logging.info(shlex.join(["python", *sys.argv]))
    logging.info(f"Arguments: {vars(args)}")
    logging.info(f"The outputs are in {folder}")


class Formatter(logging.Formatter):
    """A file name may hold bytes that are no text: its line is written all the same."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


class Bar(tqdm):
    """A progress bar that tells the log, too, every so many seconds: of runs that nobody watches."""

    def __init__(self, *args: object, every: float = 60, **settings: object) -> None:
        super().__init__(*args, **settings)
        self.every, self.told = every, time.monotonic()

    def update(self, n: float = 1) -> None:
        super().update(n)
        if time.monotonic() - self.told > self.every:
            self.told, rate = time.monotonic(), self.format_dict["rate"] or self.n / self.format_dict["elapsed"]
            left = timedelta(seconds=round((self.total - self.n) / rate))
            unit = self.unit.strip()
            logging.info(f"{self.n} of {self.total} {unit}, {rate:.3g} {unit}/s, {left} left")


class Meter:
    """One run's progress bar, TensorBoard scalars and debug lines, with its rate and the share of time it waited."""

    def __init__(self, folder: Path, start: int, iterations: int) -> None:
        self.writer = SummaryWriter(folder)
        self.bar = tqdm(total=iterations, initial=start, desc="training", unit="it", disable=distributed.rank() > 0)
        self.restart()

    def restart(self) -> None:
        """Start a new stretch: what was done since the last one (validation, clustering) does not count as training."""
        self.clock, self.waited, self.images = time.perf_counter(), 0.0, 0

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Around what waits for data."""
        began = time.perf_counter()
        yield
        self.waited += time.perf_counter() - began

    def count(self, images: int) -> None:
        """One iteration with so many images is done."""
        self.images += images
        self.bar.update()

    def log(self, iteration: int, scalars: dict) -> None:
        """scalars: name -> number or 0-d tensor, of this iteration."""
        scalars = {name: float(value) for name, value in scalars.items()}
        seconds = time.perf_counter() - self.clock
        scalars |= {"images_per_second": self.images / seconds, "waiting_for_data": self.waited / seconds}
        for name, value in scalars.items():
            self.writer.add_scalar(name, value, iteration)
        self.bar.set_postfix(loss=f"{scalars['loss']:.3f}", images_s=f"{scalars['images_per_second']:.0f}")
        logging.debug(f"Iteration {iteration}: " + ", ".join(f"{name} {value:.4g}" for name, value in scalars.items()))
        self.restart()

    def close(self) -> None:
        self.bar.close()
        self.writer.close()
