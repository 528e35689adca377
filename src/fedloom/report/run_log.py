"""Run folders as values: the manifest and the lines of the metrics, whatever state the run was left in, and whoever made it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from types import NoneType
from typing import Any

from fedloom.core.errors import Refused, refuse_damaged
from fedloom.core.files import LOCKED, lock, open_regular, read_json, read_lines
from fedloom.core.schema import Decoder, Malformed
from fedloom.core.text import parse_json
from fedloom.report.line_table import BLOCK, Line, LineTable, TableBuilder

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
_NUMBER = float | None
_SECTION = dict[str, object]
_SECTIONS: Line = {
    **dict.fromkeys(("fedloom", "status", "status_reason", "run_hash", "name", "base_weights"), str),
    **dict.fromkeys(("run", "versions", "machine", "model", "baselines", "metrics"), _SECTION),
    "partition": _SECTION,
    "clients": dict[str, _SECTION],
    "groups": dict[str, list[str]],
    "extended": list[_SECTION],
    "notes": list[str],
}
"""The kinds of sections of a manifest that are read by name."""
_PARTS: Mapping[str, Line] = {
    "partition": {"label_names": list[str], "clients": dict[str, _SECTION]},
    "model": {"name": str, "labels": int | None, "lora_parameters_by_rank": dict[str, int]},
    "baselines": {"majority": _NUMBER},
    "metrics": {"majority_label": str},
}
"""The kinds of entries in some of these sections."""
_FIELDS: Line = {
    **dict.fromkeys(("client", "status"), str),
    **dict.fromkeys(("id", "version", "updates", "uploads", "outstanding", "example"), int),
    **dict.fromkeys(
        ("time", "sent", "loss", "work", "drift", "threshold", "accuracy", "base_accuracy", "kept"), _NUMBER
    ),
    **dict.fromkeys(
        ("arrived", "reported", "ended", "bytes_up", "bytes_down", "bytes_down_fold", "perplexity"), _NUMBER
    ),
    **dict.fromkeys(("edge", "to", "reason", "tier", "why"), str | None),
    **dict.fromkeys(("request", "context", "reference", "before", "after"), str | None),
    "rank": int | None,
    "depth": int | None,
    "members": int | None,
    "staleness": _NUMBER,
    "seconds": dict[str, float] | None,
    "energy": list[float] | None,
    "ranks": dict[str, int],
    "confusion": list[list[int]],
    "moves": list[dict[str, str]],
}
"""The kinds of fields of the metrics, whatever the kind of the line. A field that is missing was written by another version."""
_NEEDED: Mapping[str, tuple[str, ...]] = {
    "version": ("version", "time"),
    "score": ("version", "time"),
    "task": ("client", "id", "rank", "version"),
    "client": ("client",),
    "unscored": ("client", "reason"),
    "edge": ("edge",),
    "regroup": ("version", "time", "drift", "threshold", "moves"),
    "move": ("time", "client", "edge", "to"),
    "labels": ("version", "confusion"),
    "set_aside": ("time", "client", "id", "version", "reason"),
}
"""Fields that every version has written in lines of a kind."""
_PLAIN: Mapping[Any, set[type]] = {
    str: {str},
    int: {int},
    int | None: {int, NoneType},
    str | None: {str, NoneType},
    _NUMBER: {int, float, NoneType},
    dict[str, float] | None: {dict, NoneType},
    dict[str, int]: {dict},
}
"""Of which classes a value of these kinds can be. Other kinds are looked into one by one."""
_INNER: Mapping[Any, set[type]] = {dict[str, float] | None: {int, float}, dict[str, int]: {int}}
"""Of which classes the values in it can be, where it is an object."""
_TABLES = ("version", "task", "edge")
"""Kinds of which a run writes as many lines as it likes."""
_KINDS = Decoder(special={object: lambda data, context: data}, finite=True)


@dataclass(frozen=True, slots=True)
class RunLog:
    """Everything that a run has written so far.

    Fields:
        folder: the run folder.
        manifest: content of manifest.json; every section is present, an unwritten one is empty.
        versions, tasks, edges: lines of metrics.jsonl of these kinds, of which there may be millions.
        scores, clients, samples, unscored, regroups, moves, labels, set_aside: its other lines by kind. `clients` are the final
            scores of clients, `samples` texts that the model wrote, `unscored` clients without a final score, `labels` how well a
            version tells labels apart, `set_aside` answers that a canary kept out of the model.
        generation: figures of the texts that the model wrote; None if it wrote none.
    """

    folder: Path
    manifest: Line
    versions: LineTable = field(default_factory=LineTable)
    scores: tuple[Line, ...] = ()
    tasks: LineTable = field(default_factory=LineTable)
    clients: tuple[Line, ...] = ()
    edges: LineTable = field(default_factory=LineTable)
    samples: tuple[Line, ...] = ()
    unscored: tuple[Line, ...] = ()
    generation: Line | None = None
    regroups: tuple[Line, ...] = ()
    moves: tuple[Line, ...] = ()
    labels: tuple[Line, ...] = ()
    set_aside: tuple[Line, ...] = ()


def read_run_log(folder: Path) -> RunLog:
    """Read the run in `folder`; a last line that a killed run left half-written is ignored.

    The lines are read as a stream: at no time are more than a block of those of which there may be many in memory as dictionaries.
    """
    manifest = read_manifest(folder)
    tables, others = {kind: TableBuilder() for kind in _TABLES}, defaultdict[str, list[Line]](list)
    for kind, lines in _blocks(folder / "metrics.jsonl"):
        if kind in tables:
            tables[kind].add(lines)
        else:
            others[kind] += lines
    versions, tasks, edges = (tables[kind].table() for kind in _TABLES)
    scores, clients, samples, unscored, regroups, moves, labels, set_aside = (
        tuple(others[kind])
        for kind in ("score", "client", "sample", "unscored", "regroup", "move", "labels", "set_aside")
    )
    return RunLog(
        folder=folder,
        manifest=manifest,
        versions=versions,
        scores=scores,
        tasks=tasks,
        clients=clients,
        edges=edges,
        samples=samples,
        unscored=unscored,
        generation=next(reversed(others["generation"]), None),
        regroups=regroups,
        moves=moves,
        labels=labels,
        set_aside=set_aside,
    )


SWEEP_FILE = "sweep.json"
"""In the folder of a sweep: the names of its runs."""


def run_folders(folder: Path) -> list[Path]:
    """Return the folders of the runs of a sweep that have begun; of another folder itself."""
    if not (folder / SWEEP_FILE).is_file():
        return [folder]
    with refuse_damaged("folder", str(folder)):
        named = [folder / Path(name).name for name in read_json(folder / SWEEP_FILE)["runs"]]
    return [one for one in named if (one / "manifest.json").is_file()]


def read_manifest(folder: Path) -> Line:
    """Read the manifest of a run alone; the status of one that no process carries out any more is "killed"."""
    manifest = _manifest(folder)
    if manifest["status"] == "running" and is_abandoned(folder):
        return {**manifest, "status": "killed"}
    return manifest


def is_abandoned(folder: Path) -> bool:
    """Whether no process holds the folder's lock: the run was killed."""
    try:
        with open_regular(folder / LOCKED) as file:
            return lock(file, shared=True)
    except FileNotFoundError:
        return True


def _manifest(folder: Path) -> Line:
    path = folder / "manifest.json"
    if not path.is_file():
        raise Refused("run folder", str(folder), "name a folder that a run has written; it holds a manifest.json")
    manifest = read_json(path)
    _check(_SECTIONS, manifest, path)
    for name, kinds in _PARTS.items():
        _check(kinds, manifest.get(name, {}), path, f"{name}.")
    return {**_EMPTY, "name": folder.resolve().name, **manifest}


def _blocks(path: Path) -> Iterator[tuple[str, list[Line]]]:
    """The lines of the metrics by kind, in blocks, each line of a known form. Raises Refused for another one."""
    blocks = defaultdict[str, list[tuple[int, Line]]](list)
    for number, line in _lines(path):
        block = blocks[line["kind"]]
        block.append((number, line))
        if len(block) == BLOCK:
            yield line["kind"], _checked(path, block)
            block.clear()
    for kind, block in blocks.items():
        yield kind, _checked(path, block)


def _lines(path: Path) -> Iterator[tuple[int, Line]]:
    """The metrics with the numbers of their lines: objects with a kind. Raises Refused for another one but an unfinished last one."""
    damaged = ""
    for number, text in enumerate(read_lines(path), 1):
        if damaged:
            raise Refused("metrics line", f"{path}:{number - 1}", f"{damaged}; delete this line")
        if not text.strip():
            continue
        try:
            line = parse_json(text)
        except ValueError as error:
            damaged = f"it is not JSON ({error})"
            continue
        if not isinstance(line, dict) or not isinstance(line.get("kind"), str):
            raise Refused("metrics line", f"{path}:{number}", "it is no JSON object with a kind; delete this line")
        if lacking := [name for name in _NEEDED.get(line["kind"], ()) if name not in line]:
            raise Refused("metrics line", f"{path}:{number}", f"it has no {', '.join(lacking)}; delete this line")
        yield number, line


def _checked(path: Path, block: Sequence[tuple[int, Line]]) -> list[Line]:
    """The lines of a block. Raises Refused for a field of another kind; all values of a plain field are looked at together."""
    lines = [line for _, line in block]
    for name in set(chain.from_iterable(lines)) & _FIELDS.keys():
        values, hint = [line[name] for line in lines if name in line], _FIELDS[name]
        inner = chain.from_iterable(value.values() for value in values if type(value) is dict)
        plain = set(map(type, values)) <= _PLAIN.get(hint, set()) and set(map(type, inner)) <= _INNER.get(hint, set())
        if not plain:
            for number, line in block:
                if name in line:
                    _check({name: _FIELDS[name]}, {name: line[name]}, Path(f"{path}:{number}"))
    return lines


def _check(kinds: Line, data: Line, path: Path, where: str = "") -> None:
    """Raise Refused for the first field of data that is of another kind."""
    for name, content in data.items():
        try:
            if name in kinds:
                _KINDS.read(kinds[name], content)
        except Malformed as error:
            raise Refused("run folder", str(path), f"{where}{name} is not what a run writes: {error}") from error
