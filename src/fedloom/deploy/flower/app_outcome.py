"""Outcome of a ServerApp, which it leaves for the server that submitted it: that it lives, and how it ended."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

from fedloom.core.files import atomic_write, disk_full_error, open_regular, read_json
from fedloom.core.schema import Decoder

SIZE = 4096
"""Bytes of an outcome at least, so that the last one fits into the place of the first where the disk has become full."""

LONGEST = 12
"""Digits of the number of an attempt."""


@dataclass(frozen=True, slots=True)
class AppOutcome:
    """The process, and at its end one of: why the run ended, why the run file cannot be carried out, what went wrong, what could not
    be written because the disk is full.
    """

    pid: int
    reason: str = ""
    refused: str = ""
    failed: str = ""
    full: str = ""

    @property
    def ended(self) -> bool:
        """Whether it said how."""
        return bool(self.reason or self.refused or self.failed or self.full)

    @property
    def lives(self) -> bool:
        """Whether the process is there (Linux: and is a ServerApp, since numbers of processes come again)."""
        try:
            os.kill(self.pid, 0)
            return b"serverapp" in Path(f"/proc/{self.pid}/cmdline").read_bytes()
        except FileNotFoundError:
            return not Path("/proc").is_dir()
        except OSError:
            return False


def write_outcome(folder: Path, attempt: int, outcome: AppOutcome) -> None:
    """Write the outcome of the deployment's n-th attempt. Raises OSError."""
    place, text = _place(folder, attempt), json.dumps(asdict(outcome)).encode().ljust(SIZE)
    try:
        with atomic_write(place) as draft:
            draft.write_bytes(text)
    except OSError as error:
        if not disk_full_error(error) or not place.exists() or place.stat().st_size < len(text):
            raise
        with open_regular(place, "r+b") as file:
            file.write(text.ljust(place.stat().st_size))


def read_outcome(folder: Path, attempt: int) -> AppOutcome | None:
    """The outcome of an attempt, or None while it has not begun, or is just being written."""
    try:
        told = read_json(_place(folder, attempt))
        outcome: AppOutcome = Decoder().read(AppOutcome, {"type": AppOutcome.__name__, **told})
    except (FileNotFoundError, ValueError):
        return None
    return outcome


def last_attempt(folder: Path) -> int:
    """The number of the latest attempt, 0 before the first."""
    numbers = (path.stem.partition("-")[2] for path in (folder / "flower").glob("attempt-*.json"))
    return max((int(number) for number in numbers if number.isdecimal() and len(number) < LONGEST), default=0)


def _place(folder: Path, attempt: int) -> Path:
    return folder / "flower" / f"attempt-{attempt}.json"
