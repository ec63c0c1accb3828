"""Checkpoints: written whole or not at all, read without executing anything, and the newest whole one of a run."""

import logging
import os
import pickle
import re
import zipfile
from pathlib import Path

import torch

from utils.files import replacing

LAST, PREVIOUS = "last.pt", "previous.pt"


def save_checkpoint(path: str | Path, state: dict, previous: str | None = None) -> None:
    """state: a dict of tensors and plain values. The old file stays until the new one is whole.

    previous: a name under which the old file is kept after that. Raises OSError naming the file where it cannot be
    written (a full disk); the old file is untouched then.
    """
    path = Path(path)
    try:
        with replacing(path) as file:
            torch.save(state, file)
            file.flush()
            if previous and path.exists():
                keep(path, path.with_name(previous))
    except (OSError, RuntimeError) as error:
        # torch wraps what the file says in errors of its own.
        cause = next((each for each in (error, error.__context__, error.__cause__) if isinstance(each, OSError)), error)
        raise OSError(
            f"{path}: not written ({cause}); the checkpoints from before are untouched. Free some space and "
            f"go on with --resume {path.parent}"
        ) from error


def keep(path: Path, copy: Path) -> None:
    """Gives the file a second name, in place of what had it. At no moment is either of them half a file."""
    temporary = copy.with_suffix(f"{copy.suffix}.tmp")
    temporary.unlink(missing_ok=True)
    try:
        os.link(path, temporary)
    except OSError:  # a file system without links: for a moment the copy has the only name
        os.replace(path, copy)
        return
    os.replace(temporary, copy)
    temporary.unlink(missing_ok=True)  # still there if both were the same file


def load_checkpoint(path: str | Path) -> dict:
    """File -> {"model": state dict, …}; a bare state dict is put under "model".

    Raises FileNotFoundError or ValueError naming the file: missing, truncated, changed, or holding more than tensors.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such checkpoint")
    loaded = load_tensors(path)
    if not isinstance(loaded, dict) or not loaded:
        raise ValueError(f"{path}: holds no state dict; is it a checkpoint of train.py?")
    require_checksums(path)
    return loaded if "model" in loaded else {"model": loaded}


def require_checksums(path: str | Path) -> None:
    """Raises ValueError where a part of the file is not what was written. torch.save writes checksums, but torch.load
    does not look at them: one flipped bit would be one wrong weight. Files in its older format have none."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as parts:
            damaged = parts.testzip()
        if damaged:
            raise ValueError(
                f"{path}: damaged, {damaged} in it does not fit its checksum; fetch it again, or use an older one"
            )


def newest_checkpoint(place: str | Path) -> tuple[Path, dict]:
    """A run's folder, a folder of runs, or a file -> path and content of the newest whole checkpoint to go on with.

    In a run's folder that is last.pt, or previous.pt where last.pt is damaged (a line says so); of several runs, named
    by their date, the newest with one. Raises FileNotFoundError where there is none, ValueError where none is whole.
    """
    place = Path(place)
    if place.is_dir():
        runs = [place, *sorted((each for each in place.iterdir() if each.is_dir()), reverse=True)]
        found = [run / name for run in runs for name in (LAST, PREVIOUS)]
    else:
        found = [place, place.with_name(PREVIOUS)] if place.name == LAST else [place]
    found = [path for path in found if path.is_file()]
    if not found:
        raise FileNotFoundError(f"{place}: no checkpoint to go on with; expected a run's {LAST}, or a folder with one")
    for path in found:
        try:
            return path, load_checkpoint(path)
        except ValueError as error:
            if path == found[-1]:
                raise
            logging.warning(f"{error}. Looking for an older one")


def load_tensors(path: str | Path) -> object:
    """What torch.save wrote to a file, on the CPU, if it holds only tensors and plain values. ValueError otherwise."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        # torch's own message goes on to recommend weights_only=False, which would run the code: it is not passed on.
        found = re.search(r"GLOBAL ([\w.]+)", str(error))
        found = f" ({found[1]})" if found else ""
        # An "unsupported operand" is a byte that means nothing: no pickle, or a cut one.
        if "unsupported operand" not in str(error).lower() and re.search("unsupported|unrecognized", str(error), re.I):
            raise ValueError(
                f"{path}: refused, because it holds more than tensors and plain values{found}, which could run code "
                "when loaded; nothing was run. Save only the state dict: torch.save(model.state_dict(), path)"
            ) from None
        raise ValueError(f"{path}: truncated, or not written by torch.save; fetch or save it again") from None
    except (PermissionError, MemoryError):
        raise
    except Exception as error:  # whatever the unpickler trips over in bytes that are no pickle
        raise ValueError(
            f"{path}: truncated, or not written by torch.save ({type(error).__name__}); fetch or save it again"
        ) from error
