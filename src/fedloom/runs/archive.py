"""The answers of a run, kept beside its trace: what a replay and a rollback feed to a server again.

The trace holds tensors by their sha256. So a run that is to be replayed keeps the first model and each answer, in `updates/`, in the
form of a checkpoint, which is read as strictly (`checkpoint`).

Answers can have a bound on their bytes. Each time that half of it has come in, the state of the server is written beside them, and
the answers from before the last such state but one go: the oldest versions first. So between half of the bound and the whole of it is
there, and at most two states of the server, each as large as its models and the answers that wait. A replay begins at the oldest
state from which all answers are kept.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from fedloom.core.coordinator import Coordinator
from fedloom.core.errors import UNREADABLE
from fedloom.core.events import (
    Command,
    EdgeReported,
    Event,
    InsideEdge,
    Publish,
    Release,
    SlotBlock,
    SumOpened,
    UpdateArrived,
)
from fedloom.core.files import LOCKED, read_lines, sub_folder
from fedloom.core.lora import Adapter
from fedloom.core.packed_log import log_size
from fedloom.core.schema import Decoder, Malformed
from fedloom.core.text import parse_json
from fedloom.core.types import GroupStatistics, Model, Profile, Result
from fedloom.runs.checkpoint import read_checkpoint, write_checkpoint
from fedloom.runs.resume import restore_fields, saved_fields

UPDATES = "updates"
START = "start"
STATE = "state-"
"""Beginning of the name of a file with the state of a server; behind it stand the bytes of the trace until then."""
RELEASE = "release-"
"""Beginning of the name of a file with a version that a private run released."""
ANSWERS = (UpdateArrived.__name__, EdgeReported.__name__, SumOpened.__name__)
_EVENTS = Decoder()


@dataclass(slots=True)
class Archive:
    """An observer that keeps the answers as they arrived. It comes after the one that writes the trace.

    Fields:
        folder: where they are kept, one file per answer.
        server: the server of the run.
        most: bytes of answers that are kept (None: all).
        since: bytes of answers since the last state of the server.
        secret: seals the answers of a private run (empty: it is none).
        trace: the open trace, which has the step before it is shown here (None: what is in the file ends with a step).
    """

    folder: Path
    server: Coordinator
    most: int | None = None
    since: int = 0
    secret: bytes = field(default=b"", repr=False)
    trace: TextIO | None = field(default=None, repr=False)

    @classmethod
    def of(
        cls,
        folder: Path,
        server: Coordinator,
        most: int | None = None,
        resumed_at: int = 0,
        secret: bytes = b"",
        trace: TextIO | None = None,
    ) -> Archive:
        """Write what this server began with, and return the observer.

        Args:
            folder: where answers are kept.
            server: the server of the run.
            most: bytes of answers to keep (None: all).
            resumed_at: bytes of the trace with which the run goes on. States of a server beyond it, of a run that was killed, are
                removed.
            secret: that of a private run: its answers are sealed, and its versions are kept beside them, as readers may see them.
            trace: the open trace.
        """
        sub_folder(folder)
        write_checkpoint(folder / f"{START}.safetensors", {"first": server.state.first, "shape": server.shape})
        states = stored_states(folder)
        for size in [size for size in states if size > resumed_at]:
            states.pop(size).unlink()
        answered = _answered(folder.parent / LOCKED, max(states, default=0), resumed_at)
        files = (_file(folder, task) for task in answered)
        return cls(folder, server, most, sum(path.stat().st_size for path in files if path.is_file()), secret, trace)

    def __call__(self, now: float, event: Event, commands: list[Command]) -> None:
        """Keep the answer in a file, also one that is refused; of answers that are only summed, the sum."""
        if isinstance(event, UpdateArrived):
            # sealing is a function of what is sealed: the number keeps equal answers to two tasks apart
            about, values = {"task": event.task} if self.secret else None, {"result": event.result}
            self.since += write_checkpoint(_file(self.folder, event.task), values, about, self.secret)
        for release, model in _released_models(commands) if self.secret else ():
            self.since += write_checkpoint(release_file(self.folder, release.task, release.version), {"model": model})
        if isinstance(event, SumOpened):
            self.since += write_checkpoint(_file(self.folder, event.task), {"sums": event.sums})
        if self.most is not None and self.since > self.most // 2:
            self._shorten()

    def _shorten(self) -> None:
        """Write the state of the server, and remove the answers from before the last one."""
        trace, earlier = self.folder.parent / LOCKED, stored_states(self.folder)
        size = log_size(self.trace) if self.trace else trace.stat().st_size
        parts = self.server.parts_to_save()
        values = {name: getattr(part, name.partition(".")[2]) for part in parts for name in saved_fields(type(part))}
        path, about = self.folder / f"{STATE}{size}.safetensors", {"version": self.server.state.version}
        write_checkpoint(path, values, about, self.secret)
        self.since = 0
        if earlier:
            last = max(earlier)
            for old in [path for at, path in earlier.items() if at < last]:
                old.unlink()
            for task in _answered(trace, 0, last):
                _file(self.folder, task).unlink(missing_ok=True)
            for task, version in _released(trace, last) if self.secret else ():
                release_file(self.folder, task, version).unlink(missing_ok=True)


def release_file(folder: Path, task: int, version: int) -> Path:
    """Return the file of a version that a private run released; `task` is the outer task of the edge that made it (0: none did)."""
    return folder / f"{RELEASE}{task}-{version}.safetensors"


def _released_models(commands: Iterable[Command]) -> Iterator[tuple[Release, Model]]:
    """The releases among these commands, each with the model that was published right after it, by the same server."""
    last: Release | None = None
    for command in commands:
        match command.command if isinstance(command, InsideEdge) else command:
            case Release() as last:
                pass
            case Publish(_, model, _) if last is not None:
                yield last, model
                last = None


def first_kept(folder: Path) -> tuple[int, Path | None]:
    """Return from which byte of its trace a run can be repeated, and the file with the server's state there (None: version 0)."""
    updates = sub_folder(folder / UPDATES)
    first, states = next(_answered(folder / LOCKED, 0, None), None), stored_states(updates)
    if not states or first is None or _file(updates, first).is_file():
        return 0, None
    return min(states.items())


def restore_state(path: Path, server: Coordinator, secret: bytes = b"") -> int:
    """Put the state in a file back into a server; returns its version. Raises Malformed."""
    parts, stored = server.parts_to_save(), read_checkpoint(path, secret)
    restore_fields(
        stored.read({name: hint for part in parts for name, hint in saved_fields(type(part)).items()}), parts
    )
    return server.state.version


def read_event(recorded: bytes, updates: Path, secret: bytes = b"") -> tuple[float, Event]:
    """Return time and event of a line of the trace, with the answer, which `secret` opens in a private run. Raises ValueError."""
    step = parse_json(recorded)
    if not isinstance(step, dict) or not isinstance(step.get("event"), dict):
        raise Malformed("it tells no event")
    now, event = _EVENTS.read(float, step.get("time")), dict(step["event"])
    if event.get("type") not in ANSWERS:
        return now, _EVENTS.read(Event, event)
    task = _EVENTS.read(int, event.get("task"))
    file = _file(updates, task)
    if not file.is_file():
        raise Malformed(f"the answer to task {task} was not kept")
    if event["type"] == SumOpened.__name__:
        sums: Adapter = read_checkpoint(file).read({"sums": Adapter})["sums"]
        return now, SumOpened(task, _EVENTS.read(tuple[SlotBlock, ...], event.get("blocks")), sums)
    client = _EVENTS.read(str, event.get("client"))
    result: Result = read_checkpoint(file, secret).read({"result": Result})["result"]
    if event["type"] == UpdateArrived.__name__:
        return now, UpdateArrived(client, task, result)
    statistics = _EVENTS.read(GroupStatistics | None, event.get("statistics"))
    return now, EdgeReported(client, task, result, statistics, _EVENTS.read(tuple[Profile, ...], event.get("members")))


def stored_states(folder: Path) -> dict[int, Path]:
    """Return the files with states of a server, by the bytes of the trace until each."""
    names = {path.stem.removeprefix(STATE): path for path in folder.glob(f"{STATE}*.safetensors")}
    return {int(size): path for size, path in names.items() if size.isdecimal() and size.isascii()}


def _file(folder: Path, task: int) -> Path:
    return folder / f"{task}.safetensors"


def _answered(trace: Path, begin: int, end: int | None) -> Iterator[int]:
    """Yield the numbers of the tasks that were answered between two bytes of a trace (None: its end)."""
    for step in _steps(trace, begin, end, ANSWERS):
        with suppress(*UNREADABLE):
            if step["event"]["type"] in ANSWERS:
                yield _EVENTS.read(int, step["event"]["task"])


def _released(trace: Path, end: int) -> Iterator[tuple[int, int]]:
    """Yield outer task and version of each release in the first bytes of a trace."""
    for step in _steps(trace, 0, end, (Release.__name__,)):
        with suppress(*UNREADABLE):
            for command in step["commands"]:
                told = command.get("command", command)
                if told["type"] == Release.__name__:
                    yield _EVENTS.read(int, told["task"]), _EVENTS.read(int, told["version"])


def _steps(trace: Path, begin: int, end: int | None, types: Iterable[str]) -> Iterator[Any]:
    """Yield the steps between two bytes of a trace in which one of these types is named."""
    marks = [f'"type":"{name}"'.encode() for name in types]
    for line in read_lines(trace, begin, end):
        if any(mark in line for mark in marks):
            with suppress(*UNREADABLE):
                yield parse_json(line)
