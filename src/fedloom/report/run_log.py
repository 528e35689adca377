"""A run folder as a value: its manifest and the lines of its metrics, whatever state the run was left in."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from fedloom.core.errors import Refused
from fedloom.core.files import LOCKED, lock

Line: TypeAlias = Mapping[str, Any]

_EMPTY: Line = {
    "fedloom": "unknown",
    "status": "unknown",
    "status_reason": "",
    "seed": "",
    "run_hash": "",
    "run": {},
    "versions": {},
    "machine": {},
    "model": {},
    "partition": {},
    "clients": {},
    "baselines": {},
    "notes": [],
}


@dataclass(frozen=True, slots=True)
class RunLog:
    """What a run has written down so far; every section of `manifest` is present, an unwritten one is empty.

    `samples` are answers that the model wrote, and `written` the figures of them. `unscored` are clients of a deployment that gave no
    score at the end.
    """

    folder: Path
    manifest: Line
    versions: tuple[Line, ...] = ()
    scores: tuple[Line, ...] = ()
    tasks: tuple[Line, ...] = ()
    clients: tuple[Line, ...] = ()
    edges: tuple[Line, ...] = ()
    samples: tuple[Line, ...] = ()
    unscored: tuple[Line, ...] = ()
    written: Line | None = None
    regroups: tuple[Line, ...] = ()
    moves: tuple[Line, ...] = ()


def read(folder: Path) -> RunLog:
    """The run in `folder`; a last line that a killed run left half-written is passed over."""
    manifest = _manifest(folder)
    if manifest["status"] == "running" and _left(folder):
        manifest = {**manifest, "status": "killed"}
    lines = tuple(_lines(folder / "metrics.jsonl"))

    def of(kind: str) -> tuple[Line, ...]:
        return tuple(line for line in lines if line.get("kind") == kind)

    parts = (of("version"), of("score"), of("task"), of("client"), of("edge"), of("sample"), of("unscored"))
    written = next(reversed(of("generation")), None)
    return RunLog(folder, manifest, *parts, written=written, regroups=of("regroup"), moves=of("move"))


def _left(folder: Path) -> bool:
    """Whether nobody carries out the run any more that was begun here."""
    try:
        with (folder / LOCKED).open("rb") as file:
            return lock(file, shared=True)
    except FileNotFoundError:
        return True


def _manifest(folder: Path) -> Line:
    path = folder / "manifest.json"
    if not path.is_file():
        raise Refused("run folder", str(folder), "name a folder that a run has written; it holds a manifest.json")
    try:
        manifest = json.loads(path.read_bytes())
    except ValueError as error:
        raise Refused("manifest", str(path), f"it is not JSON ({error}); run again into a new folder") from error
    if not isinstance(manifest, dict):
        raise Refused("manifest", str(path), "it holds no JSON object; name a folder that a run has written")
    return {**_EMPTY, "name": folder.resolve().name, **manifest}


def _lines(path: Path) -> Iterator[Line]:
    lines = path.read_bytes().splitlines() if path.is_file() else []
    for number, text in enumerate(lines, 1):
        if not text.strip():
            continue
        try:
            line = json.loads(text)
        except ValueError as error:
            if number == len(lines):
                return
            raise Refused("metrics line", f"{path}:{number}", f"it is not JSON ({error}); delete this line") from error
        if not isinstance(line, dict):
            raise Refused("metrics line", f"{path}:{number}", "it is no JSON object; delete this line")
        yield line
