"""A run that was killed goes on where its last checkpoint stands, and ends in the same bytes as if nothing had happened.

Between two events everything that a run has is in five values: the server's state, the simulation, who is away, the metrics'
observer and the scores so far; a tree of servers has its edges beside the root's state. All their fields are saved but those
named in `REBUILT`, so a new field needs no line here.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any, TextIO

from fedloom.core.errors import Refused
from fedloom.core.files import DRAFT, LOCKED, lock
from fedloom.core.policies import do_nothing
from fedloom.core.schema import Malformed, declared_fields, jsonable
from fedloom.core.server import State
from fedloom.hierarchy.tree_state import TreeState
from fedloom.report.run_log import read_run_log
from fedloom.runs import checkpoint, manifest
from fedloom.runs.metrics import Metrics
from fedloom.runs.run import Run
from fedloom.simulate.client_presence import Presence
from fedloom.simulate.simulation import Simulation
from fedloom.train.settings import Engine

CHECKPOINT = "checkpoint.safetensors"
LOGS = (LOCKED, "metrics.jsonl")
SHARE = 0.05
"""Of a run's time, that checkpoints may take."""
SECONDS = 30.0
"""Between two checkpoints, or more where they take more than their share."""
FIXED = ("computed", "model", "partition", "clients", "groups", "compared", "baselines")
"""Sections of the manifest that follow from the run and its data, and have to be the same when it goes on."""


@dataclass(slots=True)
class Progress:
    """What the driver of a job counts: the scores of all evaluations so far."""

    scores: list[Mapping[str, float]] = field(default_factory=list)


REBUILT: Mapping[type, frozenset[str]] = {
    State: frozenset(),
    TreeState: frozenset(),
    Simulation: frozenset(
        {"server", "trainer", "devices", "profiles", "evaluate", "observe", "seed", "presence", "after_step", "pending"}
    ),
    Presence: frozenset({"stays", "faults", "seed"}),
    Metrics: frozenset({"file"}),
    Progress: frozenset(),
}
"""Fields that follow from the run's value, are the program's own, or are empty when a checkpoint is written (`pending`).

Another driver than the simulation names its own in `rebuilt`.
"""

SIMULATED: tuple[type, ...] = (Simulation, Presence)


def saved_fields(kind: type) -> dict[str, Any]:
    """The fields of one of these types that a checkpoint holds, as "Type.field", with what they hold."""
    rebuilt: frozenset[str] = getattr(kind, "rebuilt", None) or REBUILT[kind]
    return {f"{kind.__name__}.{name}": hint for name, hint in declared_fields(kind).items() if name not in rebuilt}


def saved_types(run: Run, driver: Sequence[type] = SIMULATED) -> list[type]:
    """The types of the values that a run has, with those of its driver. Edges are simulated beside the root, or are elsewhere."""
    edges = [TreeState] if run.hierarchy and driver is SIMULATED else []
    return [State, *edges, *driver, Metrics, Progress]


def given(run: Run) -> dict[str, object]:
    """What a checkpoint only names, because the run's value brings it."""
    return {"transfer": run.transfer}


@dataclass(slots=True)
class CheckpointWriter:
    """Writes the checkpoint of a run, called between two events: every `seconds` and in at most 5 % of the time; 0: each time.

    `drain` is called before and waits for the answers of all tasks in training. They are needed anyway, so it does not count.
    """

    folder: Path
    given: Mapping[str, object]
    seconds: float = SECONDS
    owners: Sequence[object] = ()
    logs: Sequence[TextIO] = ()
    due: float | None = None
    drain: Callable[[], None] = do_nothing

    def __call__(self) -> None:
        """Write one if it is time."""
        now = time.monotonic()
        if self.due is None and self.seconds:
            self.due = now + self.seconds
        if self.due is None or now >= self.due:
            self.drain()
            now = time.monotonic()
            self.write()
            took = time.monotonic() - now
            self.due = now + took + (max(self.seconds, took / SHARE - took) if self.seconds else 0.0)

    def write(self) -> int:
        """Write it now; returns its bytes. The logs are safe on the disk before it speaks of them."""
        about: dict[str, int | float] = {}
        for log in self.logs:
            log.flush()
            os.fsync(log.fileno())
            about[Path(log.name).name] = os.fstat(log.fileno()).st_size
        values = {name: getattr(owner, _field(name)) for owner in self.owners for name in saved_fields(type(owner))}
        about |= {"version": values.get("State.version", 0), "time": values.get("State.now", 0.0)}
        return checkpoint.write_checkpoint(self.folder / CHECKPOINT, values, about, **self.given)


def restore(values: Mapping[str, Any], owners: Sequence[object]) -> None:
    """Put what a checkpoint held into these values; of one that there never was, nothing."""
    for owner in owners if values else ():
        for name in saved_fields(type(owner)):
            setattr(owner, _field(name), values[name])


def _field(name: str) -> str:
    return name.partition(".")[2]


@dataclass(frozen=True, slots=True)
class UnfinishedRun:
    """An unfinished run: its folder, its manifest, and what its last checkpoint held (nothing: it begins again)."""

    folder: Path
    manifest: Mapping[str, Any]
    sizes: Mapping[str, int]
    values: Mapping[str, Any]

    @property
    def version(self) -> int:
        """The last one that was made."""
        return int(self.values.get("State.version", 0))

    @property
    def where(self) -> str:
        """Where it goes on."""
        if not self.values:
            return "at version 0: it had written no checkpoint"
        return f"at version {self.version}, {self.values['State.now']:,.0f} virtual s"

    def engine(self, engine: Engine) -> Engine:
        """With the kernel that was chosen when the run was begun: another one has other last digits."""
        return replace(engine, kernel=self.manifest["computed"]["kernel"])

    def notes(self, own: list[str], fedloom: str) -> list[str]:
        """The run's, and that `fedloom`'s version, the libraries or the processor are others than at the beginning."""
        there = {**self.manifest["versions"], **self.manifest["machine"], "fedloom": self.manifest["fedloom"]}
        here = {**manifest.library_versions(), **manifest.machine_kind(), "fedloom": fedloom}
        changed = [f"{name} {there.get(name)} -> {here[name]}" for name in here if there.get(name) != here[name]]
        told = (
            f"Resumed on other ground ({', '.join(changed)}): the last digits may not be those of an undisturbed run."
        )
        return list(dict.fromkeys([*own, *self.manifest["notes"], *([told] if changed else [])]))

    def check(self, about: Mapping[str, object], sections: Sequence[str] = FIXED) -> None:
        """Raise Refused where the data or the model are not what they were when the run was begun."""
        now = manifest.as_json({name: about.get(name) for name in sections})
        changed = _changed({name: self.manifest.get(name) for name in sections}, now)
        if changed:
            remedy = f"its data or its model are not what they were when it was begun: {changed}"
            raise Refused("--resume", str(self.folder), remedy)


def unfinished_run(folder: Path, run: Run, driver: Sequence[type] = SIMULATED) -> UnfinishedRun:
    """The unfinished run in `folder`, which such a driver began. Raises Refused if there is none, if it was another run, or if its
    checkpoint is damaged.
    """
    about = read_run_log(folder).manifest
    if about["status"] == "finished":
        raise Refused("--resume", str(folder), f"its run is finished ({about['status_reason']}); nothing is left to do")
    settings = jsonable(run)
    if manifest.settings_hash(settings) != about.get("run_hash"):
        changed = _changed(about["run"], manifest.as_json(settings))
        raise Refused("--resume", str(folder), f"the run is not the one that was begun there: {changed}")
    if not (folder / CHECKPOINT).exists():
        return UnfinishedRun(folder, about, dict.fromkeys(LOGS, 0), {})
    try:
        stored = checkpoint.read_checkpoint(folder / CHECKPOINT)
        sizes = {name: stored.about[name] for name in LOGS}
        for name, size in sizes.items():
            if not (folder / name).is_file() or (folder / name).stat().st_size < size:
                raise Malformed(f"{name} is shorter than when it was written")
        hints = {name: hint for kind in saved_types(run, driver) for name, hint in saved_fields(kind).items()}
        return UnfinishedRun(folder, about, sizes, stored.read(hints, **given(run)))
    except Malformed as error:
        remedy = f"{CHECKPOINT} cannot be used: {error}; remove it to begin again at version 0 in the same folder"
        raise Refused("--resume", str(folder), remedy) from error


def _changed(there: object, here: object) -> str:
    """The first differences of two plain settings; what is off, and where files lie, does not count."""
    found = manifest.json_differences(manifest.short_paths(there), manifest.short_paths(here), off=True)
    return "; ".join(islice(found, 5))


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Inside, no other process can carry out the run of this folder. Raises Refused where one does; a lock ends with its process."""
    with (folder / LOCKED).open("ab") as file:
        if not lock(file):
            remedy = "its run is still going on, in another process; wait for its end or stop it"
            raise Refused("--resume", str(folder), remedy)
        for draft in folder.rglob(f"*{DRAFT}"):
            draft.unlink()
        yield


def open_log(path: Path, size: int) -> TextIO:
    """A log to write on after its first `size` bytes; the rest will be written again."""
    file = path.open("a", encoding="utf-8")
    file.truncate(size)
    return file
