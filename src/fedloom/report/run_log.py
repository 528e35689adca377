"""Run folders as values: the manifest and the lines of the metrics, whatever state the run was left in."""

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
    "metrics": {},
    "notes": [],
}


@dataclass(frozen=True, slots=True)
class RunLog:
    """Everything that a run has written so far.

    Fields:
        folder: the run folder.
        manifest: content of manifest.json; every section is present, an unwritten one is empty.
        versions, scores, tasks, clients, edges, samples, unscored, regroups, moves, labels: lines of metrics.jsonl by kind. `clients`
            are the final scores of clients, `samples` texts that the model wrote, `unscored` clients without a final score, `labels`
            how well a version tells labels apart.
        generation: figures of the texts that the model wrote; None if it wrote none.
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
    generation: Line | None = None
    regroups: tuple[Line, ...] = ()
    moves: tuple[Line, ...] = ()
    labels: tuple[Line, ...] = ()


def read_run_log(folder: Path) -> RunLog:
    """Read the run in `folder`; a last line that a killed run left half-written is ignored."""
    manifest = _manifest(folder)
    if manifest["status"] == "running" and _abandoned(folder):
        manifest = {**manifest, "status": "killed"}
    lines = tuple(_lines(folder / "metrics.jsonl"))

    def of(kind: str) -> tuple[Line, ...]:
        return tuple(line for line in lines if line.get("kind") == kind)

    parts = (of("version"), of("score"), of("task"), of("client"), of("edge"), of("sample"), of("unscored"))
    generation = next(reversed(of("generation")), None)
    more = {"regroups": of("regroup"), "moves": of("move"), "labels": of("labels")}
    return RunLog(folder, manifest, *parts, generation=generation, **more)


def _abandoned(folder: Path) -> bool:
    """Whether no process holds the folder's lock: the run was killed."""
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
