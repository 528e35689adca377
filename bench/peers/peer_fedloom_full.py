"""fedloom with all that it does of its own accord: the start and each client scored, the report drawn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bench.peers import peer_fedloom
from bench.peers.clock import Clock


def run(folder: Path, clock: Clock) -> dict[str, Any]:
    """The job in fedloom, with nothing left out."""
    return peer_fedloom.run(folder, clock, full=True)
