"""Freed memory is used again."""

import resource
import subprocess
import sys

import pytest

SCRIPT = """
import resource, sys, numpy
from utils.memory import keep_freed_blocks
if sys.argv[1] == "kept":
    keep_freed_blocks()
numpy.ones(100_000_000 // 8)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    numpy.ones(100_000_000 // 8)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(way):
    done = subprocess.run([sys.executable, "-c", SCRIPT, way], capture_output=True, text=True, check=True)
    return int(done.stdout)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's malloc")
def test_blocks_that_are_kept_need_no_new_pages():
    pages = 10 * 100_000_000 // resource.getpagesize()
    huge = pages // 512  # a system may hand out pages of 2 MB
    assert faults("given back") >= huge
    assert faults("kept") < max(huge // 10, 20)
