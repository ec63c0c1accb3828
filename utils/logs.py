"""Log folders: logs/{log_dir}/{date_time}/ with info.log, debug.log and config.json."""

import json
import logging
import shlex
import sys
import warnings
from datetime import datetime
from pathlib import Path


def make_log_dir(log_dir, root="logs"):
    """Name of an experiment -> a new folder logs/{log_dir}/{YYYY-mm-dd_HH-MM-SS}."""
    stamp = datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    folder, copy = Path(root) / log_dir / stamp, 1
    while True:
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:  # two runs in the same second
            folder, copy = Path(root) / log_dir / f"{stamp}_{copy}", copy + 1


def setup_logging(folder, args):
    """Log to stdout and info.log (from INFO) and debug.log (all); writes config.json and the first three lines."""
    logger = logging.getLogger()
    for handler in list(logger.handlers):
        logger.removeHandler(handler)
        handler.close()
    logger.setLevel(logging.DEBUG)
    for handler, level in ((logging.StreamHandler(sys.stdout), logging.INFO),
                           (logging.FileHandler(folder / "info.log"), logging.INFO),
                           (logging.FileHandler(folder / "debug.log"), logging.DEBUG)):
        handler.setLevel(level)
        handler.setFormatter(logging.Formatter("%(asctime)s   %(message)s", "%Y-%m-%d %H:%M:%S"))
        logger.addHandler(handler)
    for noisy in ("PIL", "faiss", "matplotlib", "urllib3"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module="tensorboard")
    (folder / "config.json").write_text(json.dumps(vars(args), indent=2, default=str) + "\n")
    logging.info(shlex.join(["python", *sys.argv]))
    logging.info(f"Arguments: {vars(args)}")
    logging.info(f"The outputs are in {folder}")
