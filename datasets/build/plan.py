"""What a data set was built from, kept beside it: a second run goes on with it, never with other parameters."""

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path

from utils.files import replacing

FILE = "world.json"


def fingerprint(path: str | Path) -> dict:
    """File -> its name and sha256. Raises FileNotFoundError."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such file; it is what the data set is made from")
    with open(path, "rb") as file:
        return {"file": Path(path).name, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def kept_plan(
    output: Path,
    parameters: dict,
    make: Callable[[], dict] = dict,
    file: str = FILE,
    folders: Sequence[str] = ("database", "queries"),
) -> dict:
    """The folder's plan: "parameters" and what make() gave the first run, which writes it. folders: those it is for.

    Raises ValueError where the folder holds a data set of other parameters, or one that was not made by such a plan.
    """
    path = Path(output) / file
    parameters = json.loads(json.dumps(parameters))  # as they will be read again
    if not path.exists():
        if any((Path(output) / folder).exists() for folder in folders):
            raise ValueError(f"{output}: holds a data set of another kind (it has no {file}); choose another folder")
        text = json.dumps({"parameters": parameters, **make()})
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as stream:
            stream.write(text.encode())
        return json.loads(text)
    try:
        plan = json.loads(path.read_text())
        found = dict(plan["parameters"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: cannot be read ({error}); delete the folder {output} and build again") from error
    different = [
        f"{key}: {found.get(key)} there, {parameters.get(key)} now"
        for key in sorted({*found, *parameters})
        if found.get(key) != parameters.get(key)
    ]
    if different:
        raise ValueError(
            f"{output}: was made with other parameters ({'; '.join(different)}); "
            f"build into another folder, or delete this one first"
        )
    return plan
