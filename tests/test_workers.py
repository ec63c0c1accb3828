"""How many workers there are, and the shared memory that their batches need."""

import os

import joblib
import pytest

from utils import workers
from utils.workers import default_workers, free_shared_memory


def test_workers_are_as_many_as_the_cores_that_may_be_used(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {5}, raising=False)
    assert default_workers() == 1
    for processes, cores, wanted in ((1, 1, 1), (1, 3, 3), (1, 64, 8), (16, 64, 4), (16, 2, 1)):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))  # torchrun's
        monkeypatch.setattr(joblib, "cpu_count", lambda cores=cores: cores)
        assert default_workers() == wanted


def test_processes_of_one_machine_share_its_memory(monkeypatch):
    alone = free_shared_memory()
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert alone is None or free_shared_memory() == pytest.approx(alone / 4, rel=0.1)
    monkeypatch.setattr(workers, "SHARED_MEMORY", "/no/such/place")
    assert free_shared_memory() is None
