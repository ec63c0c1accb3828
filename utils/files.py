"""Files that are written whole or not at all, and names that can be written down."""

import os
import secrets
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

GALLERY_PACKAGE = "geoclip"  # the PyPI package with GeoCLIP's published weights and gallery


def printable(text):
    """A file name, perhaps with bytes that are no text -> valid text, with such bytes as \\udcXX (XX: the byte)."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


@contextmanager
def replacing(path, sync=True):
    """Yields a binary file to write; what was written becomes `path` when the block ends well, else the old file stays.

    sync: wait until it is on the disk; not for thousands of files that can be made again. Safe with several processes
    at once: each writes a temporary of its own beside the path, and the last one stays.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        with open(temporary, "x+b") as file:
            yield file
            file.flush()
            if sync:
                os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def package_files(package, *parts):
    """Files of an installed PyPI package, found without running its code -> [Path, …], sorted; parts may be a pattern.

    Raises RuntimeError naming the package where there is none.
    """
    spec = find_spec(package.replace("-", "_"))
    folders = list(spec.submodule_search_locations or []) if spec else []
    found = [path for folder in folders for path in sorted(Path(folder).glob("/".join(parts)))]
    if not found:
        raise RuntimeError(
            f"{'/'.join((package, *parts))} not found: pip install --no-deps {package} brings it (only "
            f"its files are read)"
        )
    return found
