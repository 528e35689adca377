"""Files that are never half written and never silently overwritten: run folders, atomic writes, locks, full disks.

A run folder holds `manifest.json`, `metrics.jsonl`, `trace.jsonl`, `adapter/`, `report.html`. It may come from somebody else, and so
may the folder of a deployment or of a site. What lies in it is opened by `open_regular`, and a folder inside it is entered by
`sub_folder`: no link is followed, and a pipe or a device is not opened. What stands there in one piece is written by `atomic_write`,
which puts a new file in the place of the old name. This protects from what lies in a folder, not from somebody who can write into
it at the same time: who shares a folder trusts the others.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import stat
import sys
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from io import BufferedReader
from pathlib import Path
from typing import IO, Any, BinaryIO, Literal, TypeAlias

from fedloom.core.errors import Refused
from fedloom.core.packed_log import MAGIC, UnpackedFile
from fedloom.core.text import parse_json

LOCKED = "trace.jsonl"
"""File of a run folder that is locked by the process which carries out the run."""
DRAFT = ".draft"
"""Suffix of a file that is being written."""
NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)
LARGEST_JSON = 2**28
"""Bytes of a JSON file that is read at once; the manifest of a run with 100,000 clients has a tenth of it."""
LONGEST_LINE = 2**26
"""Bytes of a line of a log."""

OpenMode: TypeAlias = Literal["rb", "r+b", "ab"]
_FLAGS: Mapping[OpenMode, int] = {
    "rb": os.O_RDONLY,
    "r+b": os.O_RDWR,
    "ab": os.O_RDWR | os.O_CREAT | os.O_APPEND,  # what was appended can be read back
}
_SAFELY = sum(getattr(os, name, 0) for name in ("O_NOFOLLOW", "O_NONBLOCK", "O_NOCTTY", "O_BINARY"))


def require_vacant(path: Path) -> Path:
    """Return the path if a run folder can be made there, else raise Refused. Call it before long work; `create_folder` does again."""
    if path.is_symlink() or (path.exists() and (not path.is_dir() or any(path.iterdir()))):
        raise Refused("--out", str(path), "it exists already; choose another name, or remove it first")
    above = next((parent for parent in (path, *path.absolute().parents) if parent.exists()), Path())
    if not above.is_dir():
        raise Refused("--out", str(path), f"{above} is not a folder; choose another folder")
    if not os.access(above, os.W_OK | os.X_OK):
        raise Refused("--out", str(path), f"you may not write to {above}; choose another folder")
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


def private_folder(path: Path) -> Path:
    """Make a folder that only its owner can enter, whatever the umask, and return it; one that is there becomes such.

    The folders above it that are missing are made in the same way. Raises Refused where a link lies in its place.
    """
    for part in (*reversed(path.parents), path):
        if not part.exists():
            part.mkdir(mode=0o700, exist_ok=True)
    _require_folder(path)
    if stat.S_IMODE(path.stat().st_mode) != 0o700:
        with suppress(PermissionError):  # it is another user's, who decides about it
            path.chmod(0o700)
    return path


def private_tree(path: Path) -> int:
    """Make a folder private, as `private_folder`, and all that lies in it; return how many files and folders others could enter."""
    private_folder(path)
    wide = 0
    for part in path.rglob("*"):  # which follows no links
        found = part.lstat()
        if found.st_mode & 0o077 and (stat.S_ISREG(found.st_mode) or stat.S_ISDIR(found.st_mode)):
            with suppress(PermissionError):  # it is another user's
                part.chmod(stat.S_IMODE(found.st_mode) & 0o700)
            wide += 1
    return wide


def sub_folder(path: Path) -> Path:
    """Make a folder in a run folder, as private as that one, and return it; or return the one that is there.

    Raises Refused where something else lies in its place, such as a link to another folder.
    """
    with suppress(FileExistsError):
        path.mkdir(mode=stat.S_IMODE(path.parent.stat().st_mode))
    _require_folder(path)
    return path


def _require_folder(path: Path) -> None:
    if not stat.S_ISDIR(path.lstat().st_mode):
        raise Refused("folder", str(path), "a link or a file lies where a folder belongs; remove it")


def open_regular(path: Path, mode: OpenMode = "rb") -> BinaryIO:
    """Open a file in a folder that may come from somebody else; "ab" makes it if it is missing, as private as its folder.

    A file that is going to be written must have one name only: with a second one (a hard link) it also stands somewhere else.

    Raises:
        FileNotFoundError: there is none.
        Refused: it is a link, a folder, a pipe, a device or a socket, has a second name, or may not be opened.
    """
    try:
        if os.path.lexists(path):
            _require_regular(path, path.lstat(), mode)  # before it is opened: that alone does something to a device
        descriptor = os.open(path, _FLAGS[mode] | _SAFELY, _file_mode(path.parent))
    except FileNotFoundError:
        raise
    except OSError as error:
        if error.errno in NO_ROOM:
            raise
        raise Refused("file", str(path), f"it cannot be opened ({error.strerror})") from error
    file: BinaryIO = open(path, mode, opener=lambda *_: descriptor)  # noqa: SIM115  # it has an opener, and the name
    try:
        _require_regular(path, os.fstat(descriptor), mode)
    except Refused:
        file.close()
        raise
    return file


def _require_regular(path: Path, found: os.stat_result, mode: OpenMode) -> None:
    if not stat.S_ISREG(found.st_mode):
        kind = "a link" if stat.S_ISLNK(found.st_mode) else "no regular file"
        raise Refused("file", str(path), f"it is {kind}, and is not opened; put the file itself there, or remove it")
    if mode != "rb" and found.st_nlink > 1:
        raise Refused("file", str(path), "it has a second name (a hard link), and is not written; copy the folder")


def _file_mode(folder: Path) -> int:
    """The mode of a new file: who can enter its folder may read it, as far as the umask lets them."""
    return 0o666 & stat.S_IMODE(folder.stat().st_mode)


@contextmanager
def opened_path(path: Path) -> Iterator[str]:
    """Open a file as `open_regular` does, and yield a path by which a library opens the same one, whatever its name leads to then."""
    with open_regular(path) as file:
        own = f"/proc/self/fd/{file.fileno()}"
        yield own if os.path.exists(own) else str(path)  # it is no path of ours


def read_regular(path: Path, most: int = LARGEST_JSON) -> bytes:
    """Return the content of a file, opened as `open_regular` does. Raises Refused where it has more than `most` bytes."""
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        data = file.read(size + 1) if size <= most else b""
    if size <= most and len(data) <= most:
        return data
    raise Refused("file", str(path), f"it is larger than the {most:,} bytes that are read of such a file")


def read_lines(path: Path, begin: int = 0, end: int | None = None) -> Iterator[bytes]:
    """Yield the lines of a log between two of its bytes, with their ends, opened as `open_regular` does; none without a file.

    A packed log is unpacked; the two bytes, where they are not its first and its last, have to be such that `log_size` gave.

    Raises Refused for a line of more than `LONGEST_LINE` bytes, and where it cannot be unpacked.
    """
    with suppress(FileNotFoundError), open_regular(path) as file:
        head = file.read(len(MAGIC))
        packed = bool(head) and MAGIC.startswith(head)  # one byte of it may be all that a killed process left
        file.seek(begin)
        left = None if end is None else max(0, end - begin)
        source = BufferedReader(UnpackedFile(file, left)) if packed else file
        try:
            while line := source.readline(LONGEST_LINE + 1):
                if len(line) > LONGEST_LINE:
                    raise Refused("file", str(path), f"it has a line of more than {LONGEST_LINE:,} bytes")
                if not packed and end is not None and file.tell() > end:
                    return
                yield line
        except zlib.error as error:
            raise Refused("file", str(path), "it is compressed and damaged; put back a copy of it") from error


def read_json(path: Path, most: int = LARGEST_JSON) -> dict[str, Any]:
    """Return the object in a JSON file. Raises FileNotFoundError, and Refused for what `open_regular` or `parse_json` refuse."""
    data = read_regular(path, most)
    try:
        found = parse_json(data)
    except ValueError as error:
        raise Refused("file", str(path), f"it is not JSON that can be read ({error})") from error
    if not isinstance(found, dict):
        raise Refused("file", str(path), "it holds no JSON object")
    return found


def clear_for_libraries(folder: Path) -> None:
    """Remove from a folder and those in it what a library must not write through or stumbles over.

    These are links, pipes, devices, files with a second name, and folders that are called like a file.
    """
    for path in list(folder.rglob("*")):  # which follows no links
        with suppress(FileNotFoundError):  # it lay in a folder that is gone
            found = path.lstat()
            if stat.S_ISDIR(found.st_mode) and path.suffix:
                shutil.rmtree(path)
            elif not stat.S_ISDIR(found.st_mode) and (not stat.S_ISREG(found.st_mode) or found.st_nlink > 1):
                path.unlink()


@contextmanager
def atomic_write(path: Path, synced: bool = True) -> Iterator[Path]:
    """Yield a draft to write, which then takes the place of `path`: whole or not at all, also where the power fails.

    Without `synced` a power cut may leave a damaged file, but no kill: whoever names the file later calls `sync_path` first.
    A link in the place of `path` is replaced, and what it leads to is left alone. Where the disk has no room for it, the error names
    `path` (see `disk_full_error`). Raises Refused where a folder lies in its place.
    """
    draft = path.with_suffix(DRAFT)
    for taken in (draft, path):
        if taken.is_dir() and not taken.is_symlink():
            raise Refused("file", str(taken), "it is a folder, and a file belongs there; remove it")
    draft.unlink(missing_ok=True)  # of a killed process; or a link, through which nothing may be written
    os.close(os.open(draft, os.O_CREAT | os.O_EXCL | os.O_WRONLY, _file_mode(path.parent)))
    try:
        yield draft
        # first the bytes, then the name, then the folder that holds the name: after a power cut there is the old file or the new one
        if synced:
            sync_path(draft)
        draft.replace(path)
        if synced:
            sync_path(path.parent)
    except Exception as error:
        draft.unlink(missing_ok=True)
        if (lack := _lack(error)) is None:
            raise
        raise OSError(lack.errno, lack.strerror, str(path)) from error


def sync_path(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


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

    `shared` is for a process that only looks whether the lock is free: such processes do not get into each other's way, and where it
    cannot be known, the lock counts as held. Raises Refused where the file system has no locks (some network file systems), since
    two processes could then write one folder. On Windows the answer is always True: nothing is locked there.
    """
    if sys.platform == "win32":
        return True
    import fcntl

    try:
        fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in NO_LOCKS and not shared:
            remedy = (
                "its file system has no locks (flock), which keep two processes apart; use a folder on a local disk"
            )
            raise Refused("folder", str(Path(file.name).parent), remedy) from error
        return False
    return True


def write_json(path: Path, value: Mapping[str, object]) -> None:
    """Write a JSON file, whole or not at all."""
    with atomic_write(path) as draft:
        draft.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
