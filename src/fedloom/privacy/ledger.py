"""The ledger: what was released about whom, one line of JSON a release, on the disk before the release leaves.

The file is never shortened, but for a last line that a crash left half written: `write` had not returned, so what it was about has
not left either. It outlives a run that is killed and goes on. A release that is made again to the same bytes has the same line,
which is written once; one that came out otherwise has another line, and both count. So what is counted is never less than what was
released.

The server keeps one in its run folder, with a line a version and clients as units. A site keeps one beside its record, with a line a
task and its records as the unit.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, TypeAlias

from fedloom.core.errors import UNREADABLE, Refused
from fedloom.core.files import lock, open_regular, read_lines, sync_path
from fedloom.core.schema import Decoder, Encoder
from fedloom.core.text import parse_json
from fedloom.privacy.accounting import Gaussian, PrivacyEvent, epsilon_of, merged_events

LEDGER = "privacy.jsonl"
"""Name of the server's ledger in a run folder."""

Words: TypeAlias = str | int | float | tuple[str, ...]
"""What a line says besides its events."""
Unit: TypeAlias = str
"""Who is protected: a client by its name, or the records of a site."""

_ENCODER = Encoder()
_DECODER = Decoder(finite=True)


@dataclass(frozen=True, slots=True)
class LedgerEntry:
    """One release.

    Fields:
        about: names the release: the same value, made again, has the same facts here, and any other has others.
        events: by unit, what was released about it.
    """

    about: Mapping[str, Words]
    events: Mapping[Unit, PrivacyEvent]


@dataclass(slots=True)
class Ledger:
    """An open ledger.

    Fields:
        path: its file.
        file: the file, to append to.
        spent: by unit, all events so far, merged.
        written: sha256 of each line.
    """

    path: Path
    file: BinaryIO
    spent: dict[Unit, tuple[PrivacyEvent, ...]] = field(default_factory=dict)
    written: set[bytes] = field(default_factory=set)

    @classmethod
    @contextmanager
    def opened(cls, path: Path) -> Iterator[Ledger]:
        """Open the ledger at this path, or begin one, until the end of the block; no other process can write it meanwhile.

        Raises Refused where the file is a link, in use, or damaged elsewhere than at its end.
        """
        with closing(open_regular(path, "ab")) as file:
            if not lock(file):
                raise Refused("ledger", str(path), "another process writes it; wait for its end or stop it")
            sync_path(path.parent)
            ledger, size = cls(path, file), 0
            for line in read_lines(path):
                if not line.endswith(b"\n"):  # the release that it is about has not left
                    file.truncate(size)
                    break
                ledger._count(line, _read_line(path, line))
                size += len(line)
            yield ledger

    def has(self, entry: LedgerEntry) -> bool:
        """Return whether the same release is there already."""
        return _digest(_encode(entry)) in self.written

    def write(self, entry: LedgerEntry) -> bool:
        """Append a release and wait until it is on the disk; False if the same one is there already.

        Whatever it is about may leave when this has returned, and not before. Raises OSError where the disk takes no more.
        """
        line = _encode(entry)
        if _digest(line) in self.written:
            return False
        descriptor, size = self.file.fileno(), os.fstat(self.file.fileno()).st_size
        try:
            left = memoryview(line)
            while left:
                left = left[os.write(descriptor, left) :]
            os.fsync(descriptor)
        except BaseException:
            os.ftruncate(descriptor, size)  # a half line in the middle would make the file unreadable
            raise
        self._count(line, entry)
        return True

    def epsilon(self, delta: float, unit: Unit | None = None) -> float:
        """Return the epsilon of this unit so far, or of the one that has spent most (None)."""
        if unit is not None:
            return epsilon_of(self.spent.get(unit, ()), delta)
        return _largest(self.spent, delta)[1]

    def after(self, entry: LedgerEntry, delta: float) -> float:
        """Return the largest epsilon of the units of a release, once that is written; a release that is there costs nothing."""
        new = {} if self.has(entry) else entry.events
        spent = {unit: merged_events((*self.spent.get(unit, ()), *_events(new, unit))) for unit in entry.events}
        return _largest(spent, delta)[1]

    def _count(self, line: bytes, entry: LedgerEntry) -> None:
        self.written.add(_digest(line))
        for unit, event in entry.events.items():
            self.spent[unit] = merged_events((*self.spent.get(unit, ()), event))


def read_ledger(path: Path, size: int = 0) -> Iterator[LedgerEntry]:
    """Yield the releases in a ledger behind its first `size` bytes; it may be in use, and without a file there are none.

    A last line without an end is passed over. Raises Refused where the ledger is damaged.
    """
    seen = set[bytes]()
    for line in read_lines(path, size):
        digest = _digest(line)
        if line.endswith(b"\n") and digest not in seen:
            seen.add(digest)
            yield _read_line(path, line)


def spent_by_unit(entries: Iterable[LedgerEntry]) -> dict[Unit, tuple[PrivacyEvent, ...]]:
    """Return, by unit, all events of these releases, merged."""
    events = dict[Unit, list[PrivacyEvent]]()
    for entry in entries:
        for unit, event in entry.events.items():
            events.setdefault(unit, []).append(event)
    return {unit: merged_events(found) for unit, found in events.items()}


def largest_epsilon(entries: Iterable[LedgerEntry], delta: float) -> tuple[Unit, float]:
    """Return the unit that has spent most, and its epsilon; ("", 0.0) without releases."""
    return _largest(spent_by_unit(entries), delta)


def _largest(spent: Mapping[Unit, tuple[PrivacyEvent, ...]], delta: float) -> tuple[Unit, float]:
    """The unit with the largest epsilon. Equal events are composed once, and of Gaussian ones alone only the largest."""
    others, largest = dict[tuple[PrivacyEvent, ...], Unit](), ("", 0.0)
    for unit in sorted(spent):
        match spent[unit]:
            case (Gaussian(mu),):
                largest = max(largest, (unit, mu), key=lambda one: one[1])
            case events:
                others.setdefault(events, unit)
    found = [(unit, epsilon_of(events, delta)) for events, unit in others.items()]
    if largest[0]:
        found.append((largest[0], epsilon_of([Gaussian(largest[1])], delta)))
    return max(found, key=lambda one: one[1], default=("", 0.0))


def _events(events: Mapping[Unit, PrivacyEvent], unit: Unit) -> tuple[PrivacyEvent, ...]:
    return (events[unit],) if unit in events else ()


def _encode(entry: LedgerEntry) -> bytes:
    return (_ENCODER.encode(entry) + "\n").encode()


def _digest(line: bytes) -> bytes:
    return hashlib.sha256(line).digest()


def _read_line(path: Path, line: bytes) -> LedgerEntry:
    try:
        entry: LedgerEntry = _DECODER.read(LedgerEntry, parse_json(line))
        return entry
    except UNREADABLE as error:
        remedy = (
            f"its ledger is damaged ({type(error).__name__}), so what was spent is not known; restore it from a backup"
        )
        raise Refused("ledger", str(path), remedy) from error
