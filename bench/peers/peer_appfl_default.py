"""APPFL as it is shipped: see `peer_appfl.py`."""

from __future__ import annotations

from pathlib import Path

from bench.peers import job, peer_appfl
from bench.peers.clock import Clock


def run(folder: Path, clock: Clock) -> job.Report:
    """The job in APPFL, with nothing tuned."""
    return peer_appfl.run(folder, clock, lean=False)
