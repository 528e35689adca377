"""The answers of a run, kept beside its trace: what a replay and a rollback feed to a server again.

The trace holds tensors by their sha256. So a run that is to be replayed keeps the first model and each answer, in `updates/`, in the
form of a checkpoint, which is read as strictly (`checkpoint`).

Answers can have a bound on their bytes. Each time that half of it has come in, the state of the server is written beside them, and
the answers from before the last such state but one go: the oldest versions first. So between half of the bound and the whole of it is
there, and at most two states of the server, each as large as its models and the answers that wait. A replay begins at the oldest
state from which all answers are kept.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedloom.core.coordinator import Coordinator
from fedloom.core.errors import UNREADABLE
from fedloom.core.events import Command, EdgeReported, Event, UpdateArrived
from fedloom.core.files import LOCKED, read_lines, sub_folder
from fedloom.core.schema import Decoder, Malformed
from fedloom.core.text import parse_json
from fedloom.core.types import GroupStatistics, Profile, Result
from fedloom.runs.checkpoint import read_checkpoint, write_checkpoint
from fedloom.runs.resume import restore_fields, saved_fields

UPDATES = "updates"
START = "start"
STATE = "state-"
"""Beginning of the name of a file with the state of a server; behind it stand the bytes of the trace until then."""
ANSWERS = (UpdateArrived.__name__, EdgeReported.__name__)
_EVENTS = Decoder()


@dataclass(slots=True)
class Archive:
    """An observer that keeps the answers as they arrived. It comes after the one that writes the trace.

    Fields:
        folder: where they are kept, one file per answer.
        server: the server of the run.
        most: bytes of answers that are kept (None: all).
        since: bytes of answers since the last state of the server.
    """

    folder: Path
    server: Coordinator
    most: int | None = None
    since: int = 0

    @classmethod
    def of(cls, folder: Path, server: Coordinator, most: int | None = None, resumed_at: int = 0) -> Archive:
        """Write what this server began with, and return the observer.

        Args:
            folder: where answers are kept.
            server: the server of the run.
            most: bytes of answers to keep (None: all).
            resumed_at: bytes of the trace with which the run goes on. States of a server beyond it, of a run that was killed, are
                removed.
        """
        sub_folder(folder)
        write_checkpoint(folder / f"{START}.safetensors", {"first": server.state.first, "shape": server.shape})
        states = stored_states(folder)
        for size in [size for size in states if size > resumed_at]:
            states.pop(size).unlink()
        trace = folder.parent / LOCKED
        files = (_file(folder, task) for task in _answered(trace, max(states, default=0), resumed_at))
        return cls(folder, server, most, sum(path.stat().st_size for path in files if path.is_file()))

    def __call__(self, now: float, event: Event, commands: list[Command]) -> None:
        """Keep the answer in a file, also one that is refused."""
        if isinstance(event, UpdateArrived):
            self.since += write_checkpoint(_file(self.folder, event.task), {"result": event.result})
        if self.most is not None and self.since > self.most // 2:
            self._shorten()

    def _shorten(self) -> None:
        """Write the state of the server, and remove the answers from before the last one."""
        trace, earlier = self.folder.parent / LOCKED, stored_states(self.folder)
        size = trace.stat().st_size
        parts = self.server.parts_to_save()
        values = {name: getattr(part, name.partition(".")[2]) for part in parts for name in saved_fields(type(part))}
        write_checkpoint(self.folder / f"{STATE}{size}.safetensors", values, {"version": self.server.state.version})
        self.since = 0
        if earlier:
            last = max(earlier)
            for old in [path for at, path in earlier.items() if at < last]:
                old.unlink()
            for task in _answered(trace, 0, last):
                _file(self.folder, task).unlink(missing_ok=True)


def first_kept(folder: Path) -> tuple[int, Path | None]:
    """Return from which byte of its trace a run can be repeated, and the file with the server's state there (None: version 0)."""
    updates = sub_folder(folder / UPDATES)
    first, states = next(_answered(folder / LOCKED, 0, None), None), stored_states(updates)
    if not states or first is None or _file(updates, first).is_file():
        return 0, None
    return min(states.items())


def restore_state(path: Path, server: Coordinator) -> int:
    """Put the state in a file back into a server; returns its version. Raises Malformed."""
    parts, stored = server.parts_to_save(), read_checkpoint(path)
    restore_fields(
        stored.read({name: hint for part in parts for name, hint in saved_fields(type(part)).items()}), parts
    )
    return server.state.version


def read_event(recorded: bytes, updates: Path) -> tuple[float, Event]:
    """Return time and event of a line of the trace, with the answer itself. Raises ValueError."""
    step = parse_json(recorded)
    if not isinstance(step, dict) or not isinstance(step.get("event"), dict):
        raise Malformed("it tells no event")
    now, event = _EVENTS.read(float, step.get("time")), dict(step["event"])
    if event.get("type") not in ANSWERS:
        return now, _EVENTS.read(Event, event)
    client, task = _EVENTS.read(str, event.get("client")), _EVENTS.read(int, event.get("task"))
    file = _file(updates, task)
    if not file.is_file():
        raise Malformed(f"the answer to task {task} was not kept")
    result: Result = read_checkpoint(file).read({"result": Result})["result"]
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
    at = begin
    for line in read_lines(trace, begin):
        at += len(line)
        if end is not None and at > end:
            return
        if any(f'"type":"{name}"'.encode() in line for name in ANSWERS):
            try:
                event: Any = parse_json(line)["event"]
                if event["type"] in ANSWERS:
                    yield _EVENTS.read(int, event["task"])
            except UNREADABLE:
                continue
