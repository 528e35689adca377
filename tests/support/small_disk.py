"""A disk of its own that is soon full. The kernel says no here."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def small_disk(place: Path, megabytes: int = 2) -> Iterator[Path]:
    """Inside, this folder is a disk of so many megabytes. Skips the test where this process is not root."""
    if os.geteuid():
        pytest.skip("a disk of its own needs root")
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", place], check=True)
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", place], check=True)


def crowd(place: Path, left: int) -> Path:
    """So many bytes are left, about, until the file is removed."""
    ballast, free = place / "ballast", os.statvfs(place)
    ballast.write_bytes(bytes(free.f_bavail * free.f_frsize - left))
    return ballast
