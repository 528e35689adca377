"""Roster of a server: whose key is accepted, and for which of Flower's nodes it acts. `fedloom serve` writes it, the gate reads it.

A site proves who it is as Flower has it: each request bears the site's public key, the time, and a signature over the time. That
authenticates the caller of a request, and not its body: the body is protected by TLS, up to the gate and behind it. Who can read
what a site sends, inside TLS, can use these headers for the minutes of Flower's window.
"""

from __future__ import annotations

import base64
import binascii
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import Any

from flwr.common.constant import SYSTEM_TIME_TOLERANCE, TIMESTAMP_HEADER, TIMESTAMP_TOLERANCE
from flwr.supercore.constant import FLEET_HTTP_PUBLIC_KEY_HEADER, FLEET_HTTP_SIGNATURE_HEADER
from flwr.supercore.primitives.asymmetric import bytes_to_public_key, verify_signature

from fedloom.core.files import write_json

ROSTER = "roster.json"
"""File of the roster, in Flower's part of the server's folder."""
HEADERS = tuple(
    name.lower().encode() for name in (FLEET_HTTP_PUBLIC_KEY_HEADER, TIMESTAMP_HEADER, FLEET_HTTP_SIGNATURE_HEADER)
)
LARGEST_KEY = 2**10
"""Bytes of a public key or a signature in a header, at most."""


@dataclass(frozen=True, slots=True)
class RosterEntry:
    """A key that is accepted.

    Fields:
        key: the public key as text (PEM).
        name: the name that it is registered under.
        node: Flower's number of the node that it acts for.
    """

    key: str
    name: str
    node: int


class NotAuthenticated(Exception):
    """A request without the proof that its caller holds a key of the roster; the text says what is wrong."""


class WrongTime(NotAuthenticated):
    """A request of a known key whose time is outside the window: the clocks of site and server differ."""


class WatchedFile:
    """A JSON object in a file that another process replaces; it is read again when it was. Without the file it is empty."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._stamp: tuple[int, int, int] | None = None
        self._value: Mapping[str, Any] = {}

    def changed(self) -> bool:
        """Whether the file was replaced since this was asked last; it is read then."""
        try:
            found = os.stat(self._path)
            stamp = (found.st_ino, found.st_mtime_ns, found.st_size)
            if stamp == self._stamp:
                return False
            self._value = json.loads(self._path.read_bytes())
        except FileNotFoundError:
            stamp, self._value = (0, 0, 0), {}
            if stamp == self._stamp:
                return False
        self._stamp = stamp
        return True

    @property
    def value(self) -> Mapping[str, Any]:
        """What was read last."""
        return self._value


def write_roster(path: Path, entries: Sequence[RosterEntry]) -> None:
    """Replace the roster."""
    write_json(path, {"keys": [asdict(entry) for entry in entries]})


def read_roster(path: Path) -> list[RosterEntry]:
    """Return the entries of a roster; none if there is no file."""
    file = WatchedFile(path)
    file.changed()
    return _entries(file)


def _entries(file: WatchedFile) -> list[RosterEntry]:
    return [RosterEntry(**one) for one in file.value.get("keys", [])]


class Roster:
    """The roster in a file, as it is now."""

    def __init__(self, path: Path) -> None:
        self._file = WatchedFile(path)
        self._entries = dict[str, RosterEntry]()

    def find(self, key: str) -> RosterEntry | None:
        """Return the entry of a public key."""
        if self._file.changed():
            self._entries = {entry.key: entry for entry in _entries(self._file)}
        return self._entries.get(key)

    def authenticate(self, headers: Sequence[tuple[bytes, bytes]], now: datetime | None = None) -> RosterEntry:
        """Return the caller of a request with these headers (names in lower case).

        Raises:
            NotAuthenticated: the headers prove none, or WrongTime.
        """
        values = [[value for name, value in headers if name == header] for header in HEADERS]
        if any(len(found) != 1 or len(found[0]) > LARGEST_KEY for found in values):
            raise NotAuthenticated("no key")
        (key_text,), (stamp,), (signature_text,) = values
        try:
            key, signature = (base64.b64decode(text, validate=True) for text in (key_text, signature_text))
            entry = self.find(key.decode("ascii"))
            if entry is None:
                raise NotAuthenticated("the server does not know this key")
            if not verify_signature(_public_key(key), stamp, signature):
                raise NotAuthenticated("the signature is not one of this key")
            age = ((now or datetime.now(UTC)) - datetime.fromisoformat(stamp.decode("ascii"))).total_seconds()
        except (ValueError, TypeError, OverflowError, binascii.Error) as error:
            raise NotAuthenticated("key, time or signature cannot be read") from error
        if not -SYSTEM_TIME_TOLERANCE < age < TIMESTAMP_TOLERANCE + SYSTEM_TIME_TOLERANCE:
            where = "behind" if age > 0 else "ahead of"
            raise WrongTime(f"the clock of this machine is {abs(age):.0f} s {where} the server's")
        return entry


@lru_cache(1024)
def _public_key(key: bytes) -> Any:
    """Parse a key of the roster."""
    return bytes_to_public_key(key)
