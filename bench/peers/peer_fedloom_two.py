"""fedloom with two local workers: the numbers are the same, both processors train."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bench.peers import peer_fedloom
from bench.peers.clock import Clock


def run(folder: Path, clock: Clock) -> dict[str, Any]:
    """The job in fedloom, the cohort divided over two processes."""
    return peer_fedloom.run(folder, clock, workers=2)
