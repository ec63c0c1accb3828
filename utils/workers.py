"""Workers, the processes that read images: how many, and the shared memory in which their batches come."""

import os
import shutil

MOST = 8  # a step of 25 ms with 128 images, 1.4 ms of a core each (docs/speed.md), wants no more
PREFETCH = 2  # batches that a worker is ahead
SHARED_MEMORY = "/dev/shm"
SPARE_BYTES = 1_000_000  # of it, for what workers send besides images


def usable_cores() -> int:
    """How many this process may use: its affinity and its container's quota count."""
    import joblib

    return joblib.cpu_count()


def default_workers() -> int:
    """The cores of this one of the machine's processes (torchrun starts several), from 1 to MOST."""
    return min(MOST, max(1, usable_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))


def slots_for(workers: int) -> int:
    """Batches in memory at once: those under way, the one in use, and the one before it."""
    return PREFETCH * workers + 2


def fitting_workers(workers: int, batch_bytes: int, free: int | None) -> tuple[int, str]:
    """-> how many of the workers have room for their batches, and where it is not all of them, a line that says so and
    what to do. free: bytes of shared memory that this process may take, None: unknown.

    Without room, writing there ends the process by SIGBUS. No workers need none: the main process reads.
    """
    needed = slots_for(workers) * batch_bytes
    if not workers or free is None or needed + SPARE_BYTES <= free:
        return workers, ""
    fitting = max(0, (free - SPARE_BYTES) // batch_bytes - slots_for(0)) // PREFETCH
    fewer = f"--num_workers {fitting}" + ("" if fitting else " (the main process decodes, and needs none)")
    return fitting, (
        f"--num_workers {workers}: batches need {needed / 1e6:.0f} MB of shared memory, {SHARED_MEMORY} has "
        f"{free / 1e6:.0f} MB for this process. Give the container more (docker run --shm-size "
        f"{-(-2 * needed // 10**9)}g), or {fewer}"
    )


def free_shared_memory() -> int | None:
    """Bytes for this one of the machine's processes (torchrun starts several); None where there is no such place."""
    try:
        return shutil.disk_usage(SHARED_MEMORY).free // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    except OSError:
        return None
