"""The trace: every (time, event, commands) of a run as a line of JSON, with tensors by their sha256.

Two runs of one seed write the same trace, so comparing two files compares two runs.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from functools import cache
from typing import TextIO
from weakref import WeakKeyDictionary

import torch

from fedloom.lora import Adapter, tensors
from fedloom.types import Command, Event, Model, Update

_KNOWN: WeakKeyDictionary[Adapter, str] = WeakKeyDictionary()


def fingerprint(adapter: Adapter) -> str:
    """sha256 over names, shapes and bytes of all tensors, in order of name; taken once of each adapter, while it lives."""
    known = _KNOWN.get(adapter)
    if known is None:
        known = _KNOWN[adapter] = _digest(adapter)
    return known


def _digest(adapter: Adapter) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors(adapter).items()):
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        if tensor.dtype != torch.float32:
            tensor = tensor.reshape(-1).view(torch.uint8)  # numpy knows no bfloat16
        digest.update(tensor.contiguous().numpy(force=True).data)
    return digest.hexdigest()


def shallow(value: object) -> object:
    """What JSON has no word for, one level deep: dataclasses by their fields, adapters by their fingerprint."""
    kind = type(value)
    if isinstance(value, Adapter):
        return f"sha256:{fingerprint(value)}"
    if isinstance(value, Update):
        return value.task.id  # told in full when it arrived
    if isinstance(value, Model):  # of a wrapper's memory, an adapter a client maybe, one hash for all
        told = {name: getattr(value, name) for name in _fields(Model) or ()}
        return {"type": "Model", **told, "memory": _hashed(value.memory)}
    if (names := _fields(kind)) is not None:  # type: ignore[arg-type]  # mypy: a class is not hashable
        return {"type": kind.__name__, **{name: getattr(value, name) for name in names}}
    if isinstance(value, Mapping):
        return {str(key): item for key, item in value.items()}
    if isinstance(value, Sequence):
        return list(value)
    raise TypeError(f"{kind.__name__} has no place in a trace, a tensor only inside an adapter")


def _hashed(memory: Mapping[str, Adapter]) -> str | None:
    if not memory:
        return None
    told = "".join(f"{name}:{fingerprint(memory[name])};" for name in sorted(memory))
    return f"sha256:{hashlib.sha256(told.encode()).hexdigest()}"


@cache
def _fields(kind: type) -> tuple[str, ...] | None:
    return tuple(field.name for field in fields(kind)) if is_dataclass(kind) else None


def written(value: object) -> object:
    """A value as JSON would have it, all the way down."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)  # a client's NaN is refused by the server, and must not stop the trace that tells so
    if value is None or isinstance(value, str | int | float):
        return value
    inner = shallow(value)
    if isinstance(inner, dict):
        return {key: written(item) for key, item in inner.items()}
    return [written(item) for item in inner] if isinstance(inner, list) else inner


def line(now: float, event: Event, commands: Sequence[Command]) -> str:
    """One step of a run as a line of JSON."""
    step = {"time": now, "event": event, "commands": commands}
    try:
        return _ENCODER.encode(step)
    except (TypeError, ValueError):  # a NaN, or a name that is no text
        return _ENCODER.encode(written(step))


_ENCODER = json.JSONEncoder(separators=(",", ":"), allow_nan=False, check_circular=False, default=shallow)


class Trace:
    """An observer that writes each step to an open file."""

    def __init__(self, file: TextIO) -> None:
        self.file = file

    def __call__(self, now: float, event: Event, commands: list[Command]) -> None:
        """Append the step and flush, so that a killed run has a trace up to its end."""
        self.file.write(line(now, event, commands) + "\n")
        self.file.flush()
