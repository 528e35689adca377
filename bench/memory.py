"""Resident memory of this process, from /proc (Linux)."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path

# The allocator hands large blocks back at once instead of keeping them for reuse; without this a method would pay
# nothing for memory that an earlier step had freed. To be set before a process starts.
HONEST_MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536"}


def extra_peak(call: Callable[[], object]) -> int:
    """Bytes by which the resident set rose above its level before the call, at the highest point of the call."""
    before, highest = peak(call)
    return max(highest - before, 0)


def peak(call: Callable[[], object]) -> tuple[int, int]:
    """Bytes of the resident set before the call and at the highest point of it."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # sets the high-water mark to the present resident set
    before = resident()
    call()
    return before, _status("VmHWM")


def resident() -> int:
    """Bytes of the resident set, after a garbage collection."""
    gc.collect()
    return _status("VmRSS")


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field + ":")) * 1024
