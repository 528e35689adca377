"""The trace: every (time, event, commands) of a run as a line of JSON, with tensors by their sha256.

Two runs of one seed write the same trace, so comparing two files compares two runs.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import TextIO

import torch
from torch import Tensor

from fedloom.lora import Adapter, tensors
from fedloom.types import Command, Event, Update


def fingerprint(adapter: Adapter) -> str:
    """sha256 over names, shapes and bytes of all tensors, in order of name."""
    digest = hashlib.sha256()
    flat = tensors(adapter)
    for name in sorted(flat):
        tensor = flat[name].detach().cpu().contiguous()
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())  # as bytes: numpy knows no bfloat16
    return digest.hexdigest()


def written(value: object) -> object:
    """A value as JSON would have it: dataclasses by their fields under their type's name, adapters by their fingerprint."""
    match value:
        case Adapter():
            return f"sha256:{fingerprint(value)}"
        case Update():
            return {"type": "Update", "task": value.task.id}  # told in full when it arrived
        case Tensor():
            raise TypeError("a tensor outside an adapter has no place in a trace")
        case float() if not math.isfinite(value):
            return str(value)  # a client's NaN is refused by the server, and must not stop the trace that tells so
        case str() | int() | float() | bool() | None:
            return value
        case Mapping():
            return {str(key): written(item) for key, item in value.items()}
        case Sequence():
            return [written(item) for item in value]
    if is_dataclass(value) and not isinstance(value, type):
        return {"type": type(value).__name__} | {f.name: written(getattr(value, f.name)) for f in fields(value)}
    raise TypeError(f"{type(value).__name__} has no place in a trace")


def line(now: float, event: Event, commands: Sequence[Command]) -> str:
    """One step of a run as a line of JSON."""
    step = {"time": now, "event": written(event), "commands": written(commands)}
    return json.dumps(step, separators=(",", ":"), allow_nan=False)


class Trace:
    """An observer that writes each step to an open file."""

    def __init__(self, file: TextIO) -> None:
        self.file = file

    def __call__(self, now: float, event: Event, commands: list[Command]) -> None:
        """Append the step and flush, so that a killed run has a trace up to its end."""
        self.file.write(line(now, event, commands) + "\n")
        self.file.flush()
