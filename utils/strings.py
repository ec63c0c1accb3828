"""Many short texts in one array, because 700,000 Python strings take time and memory, and fork cannot share them."""

import os
from collections.abc import Sequence

import numpy as np


class Strings(Sequence):
    """A sequence of str, kept as numpy bytes: array (N,), or (N, K) for tuples of K. Reads like a list.

    An integer gives a str (or a tuple of them), any other index Strings that share or copy the array as numpy does.
    """

    def __init__(self, texts=()):
        if not isinstance(texts, np.ndarray):
            texts = np.array([os.fsencode(text) for text in texts], dtype=np.bytes_)
        if texts.dtype.kind != "S":
            raise ValueError(f"Strings: an array of {texts.dtype}, expected bytes")
        self.array = texts

    def __len__(self):
        return len(self.array)

    def __getitem__(self, index):
        found = self.array[index]
        if isinstance(found, bytes):
            return os.fsdecode(found)
        if found.ndim < self.array.ndim and found.ndim == 1 and np.ndim(index) == 0:
            return tuple(map(os.fsdecode, found.tolist()))
        return Strings(found)

    def __iter__(self):
        for start in range(0, len(self), 4096):  # a block at a time, so that not all of them exist at once
            for each in self.array[start:start + 4096].tolist():
                yield os.fsdecode(each) if isinstance(each, bytes) else tuple(map(os.fsdecode, each))

    def __contains__(self, text):
        return isinstance(text, str) and bool((self.array == os.fsencode(text)).any())

    def __eq__(self, other):
        if isinstance(other, Strings):
            return np.array_equal(self.array, other.array)
        if isinstance(other, (list, tuple)):
            return len(self) == len(other) and all(a == b for a, b in zip(self, other))
        return NotImplemented

    __hash__ = None

    def __repr__(self):
        return f"Strings({list(self[:3])}{' …' if len(self) > 3 else ''}, {len(self)} in all)"


def find(texts, wanted):
    """Strings (N,) and (M,) -> (M,) int: where each wanted one stands in texts (the last of equals), -1 for nowhere."""
    if not len(texts):
        return np.full(len(wanted), -1)
    order = np.argsort(texts.array, kind="stable")
    ordered = texts.array[order]
    place = np.searchsorted(ordered, wanted.array, side="right") - 1
    return np.where((place >= 0) & (ordered[place] == wanted.array), order[place], -1)


def base_names(paths):
    """Strings of posix paths -> Strings of what follows the last slash."""
    return Strings(np.array([path.rsplit(b"/", 1)[-1] for path in paths.array.tolist()], dtype=np.bytes_))
