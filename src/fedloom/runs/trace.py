"""The trace: every (time, event, commands) of a run as a line of JSON in `trace.jsonl`, with tensors by their sha256.

Two runs of one seed write the same trace, so comparing two files compares two runs. `replay` feeds its events to a fresh server,
`resume` cuts it at the length that the last checkpoint names, and the report reads it.

An adapter is written as the fingerprint of its numbers, an update as the number of its task (its result was written when it
arrived), and the memory of a model, which may hold an adapter a client, as one hash. A number that JSON does not have is written
in words: a client's NaN is refused by the server, and must not stop the trace that tells so.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from operator import attrgetter
from typing import TextIO

from fedloom.core.events import Command, Event
from fedloom.core.fingerprint import fingerprint
from fedloom.core.lora import Adapter
from fedloom.core.schema import Encoder, declared_fields
from fedloom.core.types import Model, Update


def encode_step(now: float, event: Event, commands: Sequence[Command]) -> str:
    """Encode one step of a run as a line of JSON. Raises TypeError for a tensor outside an adapter."""
    return (
        f'{{"time":{ENCODER[type(now)](now)},"event":{ENCODER[type(event)](event)},"commands":{ENCODER.row(commands)}}}'
    )


def _model_parts(model: Model) -> tuple[object, ...]:
    """The fields of a model, with one hash for the adapters in its memory."""
    *parts, memory = _FIELDS(model)
    return *parts, _memory_hash(memory)


def _memory_hash(memory: Mapping[str, Adapter]) -> str | None:
    if not memory:
        return None
    text = "".join(f"{name}:{fingerprint(memory[name])};" for name in sorted(memory))
    return f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"


ENCODER = Encoder(
    {
        Adapter: lambda adapter: f'"sha256:{fingerprint(adapter)}"',
        Update: lambda update: f"{update.task.id}",
    }
)
"""How the values of a run are written in its trace."""
_FIELDS = attrgetter(*declared_fields(Model))  # of which memory is the last
ENCODER[Model] = ENCODER.record(Model, _model_parts)


class Trace:
    """An observer that writes each step to an open file."""

    def __init__(self, file: TextIO) -> None:
        self.file = file

    def __call__(self, now: float, event: Event, commands: list[Command]) -> None:
        """Append the step and flush, so that a killed run has a trace up to its end."""
        self.file.write(encode_step(now, event, commands) + "\n")
        self.file.flush()
