"""fedloom with frozen layers through oneDNN, an option of `Run`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bench.peers import peer_fedloom
from bench.peers.clock import Clock


def run(folder: Path, clock: Clock) -> dict[str, Any]:
    """The job in fedloom, with the option on."""
    return peer_fedloom.run(folder, clock, onednn=True)
