"""A folder that is followed while a run writes it: its logs become the parts of a page, and what changes gets a revision."""

from __future__ import annotations

import json
import math
import secrets
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedloom.core.errors import UNREADABLE, Refused
from fedloom.core.files import LOCKED
from fedloom.core.text import parse_json
from fedloom.report.facts import is_deployed
from fedloom.report.live.fleet import LAST_EVENTS
from fedloom.report.live.live_state import LiveState, clock_text, read_deployment_status
from fedloom.report.live.log_tail import LogReplaced, LogTail
from fedloom.report.numbers import plural, to_float
from fedloom.report.run_log import RunLog, is_abandoned, read_manifest

STATUS = "status.json"
DEPLOYMENT_FILES = ("deployment.json", STATUS)
RUN_FOLDER, SERVER_FOLDER = "run", "server"
"""Files of a deployment's server, the run folder in its folder, and its own in that of `fedloom up`."""
SLICE = 2**18
"""Bytes of a log that are read at once, so that a page is served meanwhile."""
TRACE_TAIL = 2**23
"""Last bytes of a trace that a page begins with: who is at work, and the events. Totals are in the metrics, which are read whole."""
CATCH_UP_SECONDS = 0.5
"""Seconds between two revisions while logs are read that were there before."""
SPARING = 20
"""Times the CPU time of a revision until the next one: with very many clients a page is made less often, for 5 % of a core."""
LOCK_SECONDS = 3.0
"""Seconds without a new line after which it is looked whether a process still carries the run out."""
PACES = 32
"""Last versions by whose pace the time left is estimated."""


@dataclass(slots=True)
class FolderFeed:
    """The parts of a page about the run in a folder.

    Fields:
        folder: a run folder, that of a deployment with the run in `run/`, or that of `fedloom up`; it need not exist yet.
        name: a word of this feed; revisions of another one mean nothing here.
        revision: of the latest change.
        parts: by name, the revision of its last change and its content as JSON.
        events: the last events of the run, each with its revision, as JSON.
        damaged: lines that could not be read, and were left out.
    """

    folder: Path
    name: str = field(default_factory=lambda: secrets.token_hex(4))
    revision: int = 0
    parts: dict[str, tuple[int, str]] = field(default_factory=dict)
    events: deque[tuple[int, str]] = field(default_factory=lambda: deque(maxlen=LAST_EVENTS))
    damaged: int = 0
    _state: LiveState = field(default_factory=lambda: LiveState(Path()))
    _metrics: LogTail = field(default_factory=lambda: LogTail(Path()))
    _trace: LogTail = field(default_factory=lambda: LogTail(Path()))
    _first: int = 1
    _stamps: dict[Path, tuple[int, int]] = field(default_factory=dict)
    _paces: deque[tuple[float, float]] = field(default_factory=lambda: deque(maxlen=PACES))
    _looked: float = 0.0
    _due: tuple[float, float] = (0.0, 0.0)
    _changed: bool = True
    _refusal: str = ""

    def __post_init__(self) -> None:
        self._begin()

    def _begin(self) -> None:
        """Begin with an empty page."""
        self._state = LiveState(self.run_folder)
        self._metrics = LogTail(self.run_folder / "metrics.jsonl")
        self._trace = LogTail(self.run_folder / LOCKED, most=TRACE_TAIL)
        self._stamps.clear()
        self._paces.clear()
        self.events.clear()
        self.parts.clear()
        self._first, self._changed = self.revision + 1, True

    @property
    def run_folder(self) -> Path:
        """The run's own folder."""
        above = self.deployment_folder
        return self.folder if above is None else above / RUN_FOLDER

    @property
    def deployment_folder(self) -> Path | None:
        """The folder of the deployment's server; None where this is no deployment."""
        for folder in (self.folder, self.folder / SERVER_FOLDER, self.folder.parent):
            if any((folder / name).exists() for name in DEPLOYMENT_FILES):
                return None if folder == self.folder.parent and self.folder.name != RUN_FOLDER else folder
        return None

    def refresh(self, last: bool = False) -> bool:
        """Read what is new, at most a slice of each log; return whether there is more to read.

        A revision is spared where the one before was costly and not long ago, but for the `last` one.
        """
        try:
            self._read_files()
            self._read_log(self._metrics, self._state.take_metrics)
            self._read_log(self._trace, self._state.fleet.take_step)
        except LogReplaced:
            self._begin()
            return True
        behind, now = self._behind() > 0, time.monotonic()
        if self._changed and (now >= self._due[behind] or (last and not behind)):
            begin, self._changed = time.process_time(), False
            self._publish()
            rest = SPARING * (time.process_time() - begin)
            self._due = (now + rest, now + max(CATCH_UP_SECONDS, rest))
        return behind

    def message(self, after: int) -> str:
        """Return as JSON what has changed after a revision; `full` where a page is to forget what it had."""
        full = after < self._first
        after = 0 if full else after
        parts = ",".join(f'"{name}":{text}' for name, (revision, text) in self.parts.items() if revision > after)
        events = ",".join(text for revision, text in self.events if revision > after)
        return f'{{"full":{json.dumps(full)},"parts":{{{parts}}},"events":[{events}]}}'

    def _behind(self) -> float:
        """The share of the logs that is not read yet."""
        left = self._metrics.behind + self._trace.behind
        return left / (self._metrics.size + self._trace.size) if left else 0.0

    def _read_files(self) -> None:
        """Read the manifest and the status of a deployment, where they have changed. Raises LogReplaced for another run folder."""
        state, run = self._state, self.run_folder
        if run != state.folder:
            raise LogReplaced
        if self._is_new(run / "manifest.json"):
            state.manifest = self._manifest(run)
            state.fleet.add(list(state.manifest.get("clients", ())))
        if (above := self.deployment_folder) is not None and self._is_new(above / STATUS):
            state.status = read_deployment_status(above / STATUS)
            state.fleet.add(list(state.status.get("clients", ())))
        self._look_for_process(run)

    def _manifest(self, run: Path) -> dict[str, Any]:
        try:
            self._refusal = ""
            return dict(read_manifest(run))
        except Refused as error:
            self._refusal = str(error)
            return {}

    def _is_new(self, path: Path) -> bool:
        """Whether a file has changed since it was last looked at."""
        try:
            found = path.lstat()
        except OSError:
            return False
        stamp = (found.st_mtime_ns, found.st_size)
        new = self._stamps.get(path) != stamp
        self._stamps[path] = stamp
        self._changed = self._changed or new
        return new

    def _look_for_process(self, run: Path) -> None:
        """Notice a run that was killed: now and then, and only while nothing is written."""
        now = time.monotonic()
        if now < self._looked + LOCK_SECONDS or self._state.manifest.get("status") != "running":
            return
        self._looked = now
        if is_abandoned(run):
            self._state.manifest, self._changed = {**self._state.manifest, "status": "killed"}, True

    def _read_log(self, log: LogTail, take: Callable[[Any], None]) -> None:
        """Follow the next lines of a log. A damaged line is left out and counted."""
        try:
            lines = log.read(SLICE)
        except Refused as error:
            self._changed = self._changed or self._refusal != str(error)
            self._refusal = str(error)
            return
        for line in lines:
            try:
                take(parse_json(line))
            except UNREADABLE:
                self.damaged += 1
        if lines:
            self._looked, self._changed = time.monotonic(), True

    def _time_left(self, log: RunLog) -> float:
        """Seconds until the run ends at the pace of its last versions; NaN where that is not known."""
        state, done = self._state, self._state.done()
        seconds = to_float(state.version.get("time"))
        if not 0 < done < 1 or self._behind():
            return math.nan
        if is_deployed(log):
            return seconds * (1 - done) / done
        if not self._paces or self._paces[-1][1] != done:
            self._paces.append((time.monotonic(), done))
        (begin, first), (end, last) = self._paces[0], self._paces[-1]
        return (1 - done) * (end - begin) / (last - first) if last > first else math.nan

    def _publish(self) -> None:
        """Give what has changed the next revision."""
        revision, state = self.revision + 1, self._state
        head = RunLog(state.folder, state.manifest)
        try:
            parts = state.parts(self._time_left(head), self._behind())
            contents = {name: json.dumps(part, allow_nan=False, separators=(",", ":")) for name, part in parts.items()}
        except UNREADABLE as error:  # what the folder says does not fit together
            contents, self._refusal = {}, f"The run folder cannot be shown ({type(error).__name__})."
        contents["problems"] = json.dumps({"rows": self._problems()})
        for name, text in contents.items():
            if name not in self.parts or self.parts[name][1] != text:
                self.parts[name], self.revision = (revision, text), revision
        new = list(state.fleet.events)
        state.fleet.events.clear()
        for number, event in enumerate(new, state.fleet.counted - len(new) + 1):
            self.events.append((revision, json.dumps([number, clock_text(head, event.time), event.kind, event.text])))
            self.revision = revision

    def _problems(self) -> list[str]:
        """What of the folder cannot be shown."""
        omitted = self.damaged + self._metrics.omitted + self._trace.omitted
        lines = f"{plural(omitted, 'line')} of the logs left out: damaged, or too long." if omitted else ""
        return [problem for problem in (self._refusal, lines) if problem]
