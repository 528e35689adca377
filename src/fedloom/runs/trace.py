"""The trace: every (time, event, commands) of a run as a line of JSON, with tensors by their sha256.

Two runs of one seed write the same trace, so comparing two files compares two runs.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from math import isfinite
from types import NoneType
from typing import Any, TextIO, TypeAlias

from fedloom.core.events import Command, Event
from fedloom.core.fingerprint import fingerprint
from fedloom.core.lora import Adapter
from fedloom.core.types import Model, Update


def line(now: float, event: Event, commands: Sequence[Command]) -> str:
    """One step of a run as a line of JSON."""
    return f'{{"time":{written(now)},"event":{written(event)},"commands":{written(commands)}}}'


def written(value: object) -> str:
    """A value as JSON: dataclasses by their fields, adapters by their fingerprint, a number that JSON does not know in words.

    A client's NaN is refused by the server, and must not stop the trace that tells so.
    """
    return _WRITERS[type(value)](value)


Writer: TypeAlias = Callable[[Any], str]


class _Writers(dict[type, Writer]):
    """How values of a class are written; found once of each, for one step is some sixty values of a few classes."""

    def __missing__(self, kind: type) -> Writer:
        self[kind] = _writer(kind)
        return self[kind]


def _writer(kind: type) -> Writer:
    for known, write in _PLAIN.items():
        if issubclass(kind, known):
            return write
    if is_dataclass(kind):
        return _record(kind)
    if issubclass(kind, Mapping):
        return _table
    if issubclass(kind, Sequence):
        return _row
    raise TypeError(f"{kind.__name__} has no place in a trace, a tensor only inside an adapter")


def _record(kind: type) -> Writer:
    """A dataclass by its fields, after the name of its class: one expression, as a dataclass has an `__init__` of its own made."""
    names = [field.name for field in fields(kind)]
    places = {name: f"one.{name}" for name in names}
    if issubclass(kind, Model):
        places["memory"] = "hashed(one.memory)"
    told = "".join(f',"{name}":{{writers[type(part := {place})](part)}}' for name, place in places.items())
    source = f"""lambda one: f'{{{{"type":"{kind.__name__}"{told}}}}}'"""
    made: Writer = eval(source, {"writers": _WRITERS, "hashed": _hashed})
    return made


def _hashed(memory: Mapping[str, Adapter]) -> str | None:
    """Of a wrapper's memory, an adapter a client maybe, one hash for all."""
    if not memory:
        return None
    told = "".join(f"{name}:{fingerprint(memory[name])};" for name in sorted(memory))
    return f"sha256:{hashlib.sha256(told.encode()).hexdigest()}"


def _table(value: Mapping[object, object]) -> str:
    told = [f"{_text(str(key))}:{_WRITERS[type(item)](item)}" for key, item in value.items()]
    return f"{{{','.join(told)}}}"


def _row(value: Sequence[object]) -> str:
    return f"[{','.join([_WRITERS[type(item)](item) for item in value])}]"


_text = json.JSONEncoder().encode
_WRITERS = _Writers()
_PLAIN: Mapping[type, Writer] = {
    NoneType: lambda value: "null",
    str: _text,
    bool: lambda value: "true" if value else "false",
    int: int.__repr__,
    float: lambda value: float.__repr__(value) if isfinite(value) else f'"{value}"',
    Adapter: lambda value: f'"sha256:{fingerprint(value)}"',
    Update: lambda value: f"{value.task.id}",  # told in full when it arrived
}


class Trace:
    """An observer that writes each step to an open file."""

    def __init__(self, file: TextIO) -> None:
        self.file = file

    def __call__(self, now: float, event: Event, commands: list[Command]) -> None:
        """Append the step and flush, so that a killed run has a trace up to its end."""
        self.file.write(line(now, event, commands) + "\n")
        self.file.flush()
