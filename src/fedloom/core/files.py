"""Files that are never half written and never silently overwritten: run folders, atomic writes, locks, full disks.

A run folder holds `manifest.json`, `metrics.jsonl`, `trace.jsonl`, `adapter/`, `report.html`.
"""

from __future__ import annotations

import errno
import json
import os
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from fedloom.core.errors import Refused

LOCKED = "trace.jsonl"
"""File of a run folder that is locked by the process which carries out the run."""
DRAFT = ".draft"
"""Suffix of a file that is being written."""
NO_ROOM = (errno.ENOSPC, errno.EDQUOT)


def require_vacant(path: Path) -> Path:
    """Return the path if a run folder can be made there, else raise Refused. Call it before long work; `create_folder` does again."""
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise Refused("--out", str(path), "it exists already; choose another folder or remove it first")
    return path


def create_folder(path: Path) -> Path:
    """Make a new, empty run folder and return it. Raises Refused if there is something at `path` already."""
    require_vacant(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Refused("--out", str(path), f"it cannot be made ({error.strerror})") from error
    return path


def numbered_path(parent: Path, name: str) -> Path:
    """Return the first of parent/name-001, -002, ... that does not exist."""
    number = 1
    while (path := parent / f"{name}-{number:03d}").exists():
        number += 1
    return path


def latest_path(parent: Path, name: str) -> Path | None:
    """Return the one of parent/name-001, -002, ... with the highest number; None if there is none."""
    numbers = [path.name.removeprefix(f"{name}-") for path in parent.glob("*") if path.name.startswith(f"{name}-")]
    found = [number for number in numbers if number.isdecimal()]
    return parent / f"{name}-{max(found, key=int)}" if found else None


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a draft to write, which then takes the place of `path`: whole or not at all, also where the power fails.

    Where the disk has no room for it, the draft is removed and the error names `path` (see `disk_full_error`).
    """
    draft = path.with_suffix(DRAFT)
    try:
        yield draft
        # first the bytes, then the name, then the folder that holds the name: after a power cut there is the old file or the new one
        for target in (draft, path.parent):
            descriptor = os.open(target, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
            if target is draft:
                draft.replace(path)
    except Exception as error:
        if (lack := _lack(error)) is None:
            raise
        draft.unlink(missing_ok=True)
        raise OSError(lack.errno, lack.strerror, str(path)) from error


def disk_full_error(error: BaseException | None) -> OSError | None:
    """Return the error that a disk or a quota is full, among this one and its causes: the first that names a file."""
    full = None
    while error is not None:
        if (lack := _lack(error)) is not None and (full is None or lack.filename):
            full = lack
        error = error.__cause__ or error.__context__
    return full


def _lack(error: BaseException) -> OSError | None:
    """Return the error as an OSError, if it says that a disk is full; libraries in Rust say it in their text."""
    if isinstance(error, OSError):
        return error if error.errno in NO_ROOM else None
    match = re.search(r"\(os error (\d+)\)", str(error))
    number = int(match[1]) if match else 0
    return OSError(number, os.strerror(number)) if number in NO_ROOM else None


def lock(file: IO[Any], shared: bool = False) -> bool:
    """Take the lock of an open file until it is closed, and return True; False if another process holds it.

    `shared` is for a process that only looks whether the lock is free: such processes do not get into each other's way. Where the
    system has no such locks (Windows), the answer is always True.
    """
    if sys.platform == "win32":
        return True
    import fcntl

    try:
        fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def write_json(path: Path, value: Mapping[str, object]) -> None:
    """Write a JSON file, whole or not at all."""
    with atomic_write(path) as draft:
        draft.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
