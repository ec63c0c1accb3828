"""What a data set was built from, kept beside it: a second run goes on with it, never with other parameters."""

import hashlib
import json
from pathlib import Path

from utils.files import replacing

FILE = "world.json"


def fingerprint(path):
    """File -> its name and sha256, as a plan holds them. Raises FileNotFoundError."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such file; it is what the data set is made from")
    with open(path, "rb") as file:
        return {"file": Path(path).name, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def read_plan(output, parameters, file=FILE, folders=("database", "queries")):
    """The folder's plan, a dict with "parameters", or None where there is none yet. folders: those that it fills.

    Raises ValueError where the folder holds a data set of other parameters, or one that was not made by such a plan.
    """
    path = Path(output) / file
    if not path.exists():
        if any((Path(output) / folder).exists() for folder in folders):
            raise ValueError(f"{output}: holds a data set of another kind (it has no {file}); choose another folder")
        return None
    try:
        plan = json.loads(path.read_text())
        found = dict(plan["parameters"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: cannot be read ({error}); delete the folder {output} and build again") from error
    parameters = json.loads(json.dumps(parameters))  # as they would be read again
    different = [
        f"{key}: {found.get(key)} there, {parameters.get(key)} now"
        for key in sorted({*found, *parameters})
        if found.get(key) != parameters.get(key)
    ]
    if different:
        raise ValueError(
            f"{output}: holds a world of other parameters ({'; '.join(different)}); "
            f"build into another folder, or delete this one first"
        )
    return plan


def write_plan(output, plan, file=FILE):
    """dict with "parameters" -> the folder's plan; the folder is made."""
    Path(output).mkdir(parents=True, exist_ok=True)
    with replacing(Path(output) / file) as stream:
        stream.write(json.dumps(plan).encode())
