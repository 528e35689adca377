"""The run folder: `manifest.json`, `metrics.jsonl`, `trace.jsonl`, `adapter/`, `report.html`. Never overwritten silently."""

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
"""The file that the process which carries out a run holds a lock of."""
DRAFT = ".draft"
"""How the name of a file ends that is not written to its end."""
NO_ROOM = (errno.ENOSPC, errno.EDQUOT)


def require_vacant(path: Path) -> Path:
    """The path, if a run folder can be made there: asked before long work, and again when it is made."""
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise Refused("--out", str(path), "it exists already; choose another folder or remove it first")
    return path


def create_folder(path: Path) -> Path:
    """A new, empty run folder. Raises Refused if there is something at `path` already."""
    require_vacant(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Refused("--out", str(path), f"it cannot be made ({error.strerror})") from error
    return path


def numbered_path(parent: Path, name: str) -> Path:
    """The first of parent/name-001, -002, ... that does not exist."""
    number = 1
    while (path := parent / f"{name}-{number:03d}").exists():
        number += 1
    return path


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """A draft to write, which then takes the place of `path`, whole or not at all, also where the power fails.

    Where the disk has no room for it, the draft is removed and the error names `path` (`full`).
    """
    draft = path.with_suffix(DRAFT)
    try:
        yield draft
        for place in (draft, path.parent):
            opened = os.open(place, os.O_RDONLY)
            try:
                os.fsync(opened)
            finally:
                os.close(opened)
            if place is draft:
                draft.replace(path)
    except Exception as error:
        if (lack := _lack(error)) is None:
            raise
        draft.unlink(missing_ok=True)
        raise OSError(lack.errno, lack.strerror, str(path)) from error


def disk_full_error(error: BaseException | None) -> OSError | None:
    """That a disk or a quota is full, if this error or one that it came from says so: the first one that names a file."""
    found = None
    while error is not None:
        if (lack := _lack(error)) is not None and (found is None or lack.filename):
            found = lack
        error = error.__cause__ or error.__context__
    return found


def _lack(error: BaseException) -> OSError | None:
    """The error itself, if it says that a disk is full; libraries in Rust say it in their text."""
    if isinstance(error, OSError):
        return error if error.errno in NO_ROOM else None
    told = re.search(r"\(os error (\d+)\)", str(error))
    number = int(told[1]) if told else 0
    return OSError(number, os.strerror(number)) if number in NO_ROOM else None


def lock(file: IO[Any], shared: bool = False) -> bool:
    """Take the lock of an open file until it is closed; False if another holds it. Who only asks shares it with others who ask.

    Where the system has no such locks, nobody holds one.
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
    """Write at once or not at all."""
    with atomic_write(path) as draft:
        draft.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
