"""The record of a site: what a server asked for and what was sent, as a chain of signed lines, `state/record.jsonl`.

Each thing that is asked or sent is one line of JSON, on the disk before the answer leaves. A line holds sizes, digests and counts of
rows, never a row, a text or a label. It names the sha256 of everything before it (`before`) and bears a signature of the site's
private key (ECDSA with SHA-256, FIPS 186-5), so that a changed, removed, inserted or moved line is found by whoever has the public
key. Lines removed from the end are found only by whoever noted the head, the sha256 of the whole. A site without a key writes the
chain alone, which anybody who can write the file can write anew.

A line that a power cut left half written stays as it is, inside the chain, and the next line says so. The limits of a day and of a
run count from the record (`SiteUsage`). The file is never shortened; it is read as a stream.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

from fedloom.core.errors import Refused
from fedloom.core.files import open_regular, sync_path
from fedloom.core.lora import server_rank
from fedloom.deploy.messages.checks import MAX_NAME
from fedloom.deploy.messages.messages import EvaluateRequest, Request, SumRequest, TaskRequest, encode_request
from fedloom.deploy.site.site_key import is_signed_by, sign

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey, EllipticCurvePublicKey

Kind: TypeAlias = Literal[
    "started",
    "terms seen",
    "accepted",
    "profile sent",
    "task asked",
    "task answered",
    "evaluation asked",
    "evaluation answered",
    "refused",
    "noise spent",
    "sum asked",
    "sum answered",
    "cut off",
    "run ended",
]
KINDS: tuple[str, ...] = get_args(Kind)
RECENT = 16
"""Tasks without an answer that are remembered by their digest: asked for again after a crash, they count once."""
LONGEST = 2**16
"""Bytes of a line."""
MOST_LINES = 100_000
"""Lines of a day (some 70 MB). A site that has written them refuses all else, and writes a line for each `FLOOD` refusals."""
FLOOD = 1000


@dataclass(frozen=True, slots=True)
class RecordEntry:
    """What a line says besides its place in the chain; a field at its default is not written.

    Fields:
        kind: what happened.
        run: name of the run.
        run_hash: hash of the run.
        terms: hash of the terms.
        task: number of the task (None: the request is none).
        request: digest of what is asked, the same whenever it is asked ("": not a valid message).
        again: whether the same was asked for before, so that it counts for no limit but that on bytes.
        rank: largest rank of the task.
        depth: layers that it trains (None: all).
        steps: optimiser steps.
        rows: rows that were trained on or scored.
        epochs: how often the task trains on each of its rows, on average.
        bytes_in: size of the message (bytes).
        bytes_out: size of the reply (bytes).
        asked: sha256 of the message.
        sent: sha256 of the reply.
        reason: why it was refused.
        seconds: limit that it did not keep (s).
        unit: what noise protects: the whole "answer", or each "record".
        clip: largest norm of the change that was sent, or of a record's gradient.
        multiplier: standard deviation of the noise relative to `clip`.
        key: fingerprint of the key that signs from here on.
    """

    kind: Kind
    run: str = ""
    run_hash: str = ""
    terms: str = ""
    task: int | None = None
    request: str = ""
    again: bool = False
    rank: int | None = None
    depth: int | None = None
    steps: int | None = None
    rows: int | None = None
    epochs: float = 0.0
    bytes_in: int = 0
    bytes_out: int = 0
    asked: str = ""
    sent: str = ""
    reason: str = ""
    seconds: float | None = None
    unit: str = ""
    clip: float | None = None
    multiplier: float | None = None
    key: str = ""

    def written(self) -> dict[str, object]:
        """Return the fields that are not at their defaults, `kind` first."""
        values = {one.name: getattr(self, one.name) for one in fields(self)}
        return {one.name: values[one.name] for one in fields(self) if values[one.name] != one.default}

    def asked_by(self, request: Request) -> RecordEntry:
        """Return the entry of a message with what it asks for; the hash of its terms is the caller's to give."""
        terms = request.terms
        entry = replace(self, run=terms.run[:MAX_NAME], run_hash=terms.run_hash, request=request_digest(request))
        if isinstance(request, SumRequest):
            return replace(entry, task=request.task)
        if isinstance(request, TaskRequest):
            budget = request.task.budget
            return replace(entry, task=request.task.id, rank=budget.rank, depth=budget.depth, steps=budget.steps)
        return replace(entry, rank=server_rank(request.start.train)) if isinstance(request, EvaluateRequest) else entry


def request_digest(request: Request) -> str:
    """Return a digest of what is asked, the same whenever and by whichever start of the server it is asked."""
    return hashlib.sha256(encode_request(replace(request, incarnation=0))).hexdigest()


@dataclass(frozen=True, slots=True)
class SiteUsage:
    """What a site has done already, apart from the request that is judged.

    Fields:
        tasks_today: tasks that were begun today, by the date in UTC.
        bytes_today: bytes that were sent today.
        run_epochs: passes over the rows, in all tasks of the run.
        run_evaluations: evaluations of the run.
        scored: rows of each evaluation of any run.
    """

    tasks_today: int = 0
    bytes_today: int = 0
    run_epochs: float = 0.0
    run_evaluations: int = 0
    scored: frozenset[int] = frozenset()


class BrokenRecord(Exception):
    """A line of a record that cannot stand there.

    Fields:
        number: its number, from 1.
        reason: what is wrong, to be read after "line N".
    """

    def __init__(self, number: int, reason: str) -> None:
        super().__init__(f"line {number} {reason}")
        self.number, self.reason = number, reason


@dataclass(slots=True)
class RecordChain:
    """Reads a record line by line and checks that each follows upon those before it.

    Fields:
        keys: public keys, one of which must have made each signature (none: signatures are not checked).
        number: lines so far.
        head: sha256 over all of them ("": none).
        loose: number of the first line that is no whole line and that no later one accounts for (0: none).
        unsigned: lines at the end without a signature: no later signature covers them.
    """

    keys: Sequence[EllipticCurvePublicKey] = ()
    number: int = 0
    head: str = ""
    loose: int = 0
    unsigned: int = 0

    def lines(self, path: Path) -> Iterator[dict[str, Any]]:
        """Yield the whole lines of a record, oldest first.

        Raises:
            BrokenRecord: at a line that was changed, or before which one was removed, inserted or moved.
            FileNotFoundError: there is no record.
            Refused: the file cannot be read.
        """
        with open_regular(path) as file:
            while raw := file.readline(LONGEST):
                if (line := self.follow(raw.removesuffix(b"\n"))) is not None:
                    yield line

    def follow(self, raw: bytes) -> dict[str, Any] | None:
        """Take the next line and return it; None where it is no whole line. Raises BrokenRecord."""
        self.number += 1
        line = _parsed(raw)
        if line is None:
            self.loose = self.loose or self.number
        else:
            self._check(line)
        self.head = hashlib.sha256(self.head.encode() + b"\n" + raw).hexdigest()
        return line

    def _check(self, line: Mapping[str, Any]) -> None:
        if self.keys and "signature" in line and not self._is_signed(line):
            raise BrokenRecord(self.number, "was changed, or another key signed it: its signature does not fit")
        if line["number"] != self.number:
            number = f"is numbered {line['number']}"
            raise BrokenRecord(self.number, f"{number}: lines before it were removed, inserted or moved")
        if line["before"] != self.head:
            reason = "was changed, or one before it was: the line that follows knows another one"
            raise BrokenRecord(max(self.number - 1, 1), reason)
        if self.loose and line["kind"] != "cut off":
            raise BrokenRecord(self.loose, "was changed: it is no line of a record")
        self.loose = 0
        self.unsigned = 0 if "signature" in line else self.unsigned + 1

    def _is_signed(self, line: Mapping[str, Any]) -> bool:
        body = {name: value for name, value in line.items() if name != "signature"}
        return is_signed_by(self.keys, _encoded(body), line["signature"])


@dataclass(slots=True)
class RequestCounts:
    """What limits need to know of a record, brought up to date by each line.

    Fields:
        day: the latest day (UTC) of a line. A clock that is set back opens no second quota.
        tasks: tasks that were begun on that day.
        sent: bytes that were sent on that day.
        lines: lines of that day.
        epochs: by run hash and by hash of terms.
        evaluated: by run hash and by hash of terms, the digests of its evaluations; True: answered.
        recent: tasks that were begun and not answered, by digest, with their day and epochs.
        too_long: requests that did not end in time, with the limit then (s).
        accepted: hashes of terms that were accepted.
        highest: by run hash, the highest number of a task that was begun, and the digest of the first that had it.
        scored: rows of each evaluation of any run.
        summed: tasks whose numbers were asked for in a sum, by run hash and number: they go into no other one.
        noised: digests of the requests whose answers got noise, which stand in the ledger too (`site_privacy`).
    """

    day: str = ""
    tasks: int = 0
    sent: int = 0
    lines: int = 0
    epochs: dict[str, float] = field(default_factory=dict)
    evaluated: dict[str, dict[str, bool]] = field(default_factory=dict)
    recent: OrderedDict[str, tuple[str, float]] = field(default_factory=OrderedDict)
    too_long: dict[str, float] = field(default_factory=dict)
    accepted: set[str] = field(default_factory=set)
    highest: dict[str, tuple[int, str]] = field(default_factory=dict)
    scored: set[int] = field(default_factory=set)
    summed: set[tuple[str, int]] = field(default_factory=set)
    noised: set[str] = field(default_factory=set)

    def turn_to(self, time: str) -> None:
        """Begin a new day if this time, as lines have it, is in a later one."""
        if time[:10] > self.day:
            self.day, self.tasks, self.sent, self.lines = time[:10], 0, 0, 0

    def add(self, line: Mapping[str, Any]) -> None:
        """Count a line."""
        self.turn_to(line["time"])
        self.sent += line.get("bytes_out", 0)
        self.lines += 1
        kind, request = line["kind"], line.get("request", "")
        runs = [run for run in (line.get("run_hash"), line.get("terms")) if run]
        if kind == "task asked" and line.get("task", 0) > self.highest.get(line.get("run_hash", ""), (0, ""))[0]:
            self.highest[line.get("run_hash", "")] = line["task"], request
        if kind == "task asked" and not line.get("again"):
            epochs = line.get("epochs", 0.0)
            self.tasks += 1
            self.epochs |= {run: self.epochs.get(run, 0.0) + epochs for run in runs}
            self.recent[request] = self.day, epochs
            while len(self.recent) > RECENT:
                self.recent.popitem(last=False)
        elif kind in ("evaluation asked", "evaluation answered"):
            self.scored |= {line["rows"]} if "rows" in line else set()
            for run in runs:
                digests = self.evaluated.setdefault(run, {})
                digests[request] = digests.get(request, False) or kind == "evaluation answered"
        elif kind == "refused" and "seconds" in line:
            self.too_long[request] = line["seconds"]
        elif kind == "task answered" or (kind == "refused" and "task" in line):
            self.recent.pop(
                request, None
            )  # answered, and stored elsewhere, or failed: to train it anew is another task
        elif kind == "noise spent" and line.get("unit") and line.get("multiplier"):  # clipping alone costs nothing
            self.noised.add(request)
        elif kind == "sum asked":
            self.summed.add((line.get("run_hash", ""), line.get("task", 0)))
        elif kind == "accepted":
            self.accepted.add(line.get("terms", ""))

    def usage(self, run_hash: str, terms: str, request: str) -> SiteUsage:
        """Return what counts besides this request: by the run or by its terms, whichever is more."""
        day, own = self.recent.get(request, ("", 0.0))
        runs = [run for run in (run_hash, terms) if run]
        epochs = max((self.epochs.get(run, 0.0) for run in runs), default=0.0)
        others = [len(self.evaluated.get(run, {}).keys() - {request}) for run in runs]
        tasks, evaluations = self.tasks - (day == self.day), max(others, default=0)
        return SiteUsage(tasks, self.sent, max(epochs - own, 0.0), evaluations, frozenset(self.scored))


def _now() -> datetime:
    return datetime.now(UTC)


class RequestRecord:
    """The record of a site, to be continued by one process at a time: the worker, which holds the folder's lock."""

    def __init__(
        self, path: Path, key: EllipticCurvePrivateKey | None = None, clock: Callable[[], datetime] = _now
    ) -> None:
        """Read the record at `path`, or begin one; `key` signs the lines (None: none does).

        Raises Refused where a line was changed: limits are counted from the record.
        """
        self._path, self._key, self._clock = path, key, clock
        self._lock = threading.Lock()  # messages that are too large are refused by the threads that read
        self._version, self._unwritten = version("fedloom"), 0
        self.counts, self._chain = RequestCounts(), RecordChain()
        with open_regular(path, "ab") as file:  # as private as its folder
            os.fchmod(file.fileno(), 0o600)
            self._size = os.fstat(file.fileno()).st_size
        sync_path(path.parent)
        try:
            for line in self._chain.lines(path):
                self.counts.add(line)
        except BrokenRecord as error:
            remedy = f"{error}; keep the file elsewhere and move it away to begin another one, and count from nothing"
            raise Refused("record", str(path), remedy) from None
        if self._chain.loose:
            reason = f"line {self._chain.loose} is not whole: a crash or a power cut"
            self._append(RecordEntry("cut off", reason=reason))

    @property
    def head(self) -> str:
        """The sha256 over all lines."""
        return self._chain.head

    def append(self, entry: RecordEntry) -> None:
        """Write a line; it is on the disk when this returns, unless it is a refusal, which the next other line brings along.

        Raises OSError where there is no room for it, Refused where another process wrote to the file.
        """
        with self._lock:
            self.counts.turn_to(_stamp(self._clock()))
            if entry.kind == "refused" and entry.seconds is None and self.counts.lines >= MOST_LINES:
                self._unwritten += 1
                if self._unwritten % FLOOD:
                    return
                entry = RecordEntry("refused", reason=f"{FLOOD} requests, the last of them: {entry.reason}")
            self._append(entry)

    def usage(self, entry: RecordEntry) -> SiteUsage:
        """Return what was done already, apart from the request of this entry."""
        with self._lock:
            self.counts.turn_to(_stamp(self._clock()))
            return self.counts.usage(entry.run_hash, entry.terms, entry.request)

    def is_full(self) -> bool:
        """Whether no more lines are written today but of refusals."""
        with self._lock:
            self.counts.turn_to(_stamp(self._clock()))
            return self.counts.lines >= MOST_LINES

    def was_asked(self, request: str) -> bool:
        """Whether this very task was begun before, counted, and not answered: the process ended in between."""
        return request in self.counts.recent

    def is_first(self, run_hash: str, task: int, request: str) -> bool:
        """Whether this task, which was begun, is the first of its number in the run and none of a higher one was begun."""
        return self.counts.highest.get(run_hash) == (task, request)

    def was_evaluated(self, run_hash: str, request: str) -> bool:
        """Whether this very evaluation was answered before."""
        return self.counts.evaluated.get(run_hash, {}).get(request, False)

    def evaluation_number(self, run_hash: str, request: str) -> int | None:
        """Return which evaluation of the run this very one was, from 1; None if it was not asked for before."""
        digests = [*self.counts.evaluated.get(run_hash, {})]
        return digests.index(request) + 1 if request in digests else None

    def _append(self, entry: RecordEntry) -> None:
        place = {"number": self._chain.number + 1, "time": _stamp(self._clock())}
        line = {**place, **entry.written(), "version": self._version, "before": self._chain.head}
        if self._key is not None:
            line["signature"] = sign(self._key, _encoded(line))
        raw = _encoded(line)
        with open_regular(self._path, "ab") as file:
            if os.fstat(file.fileno()).st_size != self._size:
                raise Refused("record", str(self._path), "another process wrote to it while this site was at work")
            # a refusal tells nothing, and a flood of them must not wear out the disk
            self._size = _append_whole(file.fileno(), raw, sync=entry.kind != "refused" or entry.seconds is not None)
        self._chain.follow(raw)
        self.counts.add(line)


# Lines and files -----------------------------------------------------------------------------------------------------


def _encoded(line: Mapping[str, Any]) -> bytes:
    """The one way to write a line: ASCII, without a line break."""
    return json.dumps(line, separators=(",", ":"), allow_nan=False).encode("ascii")


_TYPES: Mapping[str, tuple[type, ...]] = {
    **dict.fromkeys(("number", "task", "rank", "depth", "steps", "rows", "bytes_in", "bytes_out"), (int,)),
    **dict.fromkeys(("epochs", "seconds", "clip", "multiplier"), (int, float)),
    "again": (bool,),
}
"""Types of the fields of a line; all others are texts."""


def _parsed(raw: bytes) -> dict[str, Any] | None:
    """The line that these bytes are; None if no record writes such bytes."""
    try:
        line = json.loads(raw)
        whole = type(line) is dict and _encoded(line) == raw
    except (ValueError, RecursionError):
        return None
    if not whole or not {"number", "time", "kind", "version", "before"} <= line.keys() or line["kind"] not in KINDS:
        return None
    return line if all(type(value) in _TYPES.get(name, (str,)) for name, value in line.items()) else None


def _stamp(time: datetime) -> str:
    return time.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _append_whole(handle: int, line: bytes, sync: bool = True) -> int:
    """Append a line, with `sync` on the disk, and return the size of the file; a line before it that was cut off is ended first.

    Raises OSError, and the file is as it was.
    """
    size = os.fstat(handle).st_size
    data = (b"" if not size or os.pread(handle, 1, size - 1) == b"\n" else b"\n") + line + b"\n"
    after = size + len(data)
    try:
        while data:
            data = data[os.write(handle, data) :]
        if sync:
            os.fsync(handle)
    except OSError:
        os.ftruncate(handle, size)
        raise
    return after
