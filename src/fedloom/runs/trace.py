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
from dataclasses import fields, replace
from functools import cache
from operator import attrgetter
from typing import Any, TextIO

from fedloom.core.events import Command, EdgeReported, Event, UpdateArrived
from fedloom.core.fingerprint import fingerprint
from fedloom.core.lora import Adapter
from fedloom.core.schema import Encoder, declared_fields
from fedloom.core.types import Model, Result, Update
from fedloom.privacy.sealing import keyed_digest


def encode_step(now: float, event: Event, commands: Sequence[Command], secret: bytes = b"") -> str:
    """Encode one step of a run as a line of JSON. Raises TypeError for a tensor outside an adapter.

    With a secret, which is that of a private run, answers are told by keyed digests.
    """
    encoder = private_encoder(secret) if secret else ENCODER
    return (
        f'{{"time":{encoder[type(now)](now)},"event":{encoder[type(event)](event)},"commands":{encoder.row(commands)}}}'
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


def _encoder() -> Encoder:
    encoder = Encoder(
        {
            Adapter: lambda adapter: f'"sha256:{fingerprint(adapter)}"',
            Update: lambda update: f"{update.task.id}",
        }
    )
    encoder[Model] = encoder.record(Model, _model_parts)
    return encoder


@cache
def private_encoder(secret: bytes) -> Encoder:
    """Return how a private run is written: as any other, and its exact answers by digests that are keyed with the secret.

    The digest is of the task's number too: a member that sends a guess of another's answer does not meet the other's digest.
    """
    encoder, of_result = _encoder(), [*declared_fields(Result)]

    def parts(event: UpdateArrived) -> tuple[object, ...]:
        values = (getattr(event, field.name) for field in fields(event))
        return tuple(with_digests(value, event.task) if isinstance(value, Result) else value for value in values)

    def with_digests(result: Result, task: int = 0) -> Result:
        digests: dict[str, Any] = {
            name: f"hmac:{keyed_digest(secret, 'trace', f'{task} {fingerprint(value)}')}"
            for name in of_result
            if isinstance(value := getattr(result, name), Adapter)
        }
        return replace(result, **digests)

    write = encoder.record(Result)
    encoder[Result] = lambda result: write(with_digests(result))  # reports inside a tree
    encoder[UpdateArrived] = encoder.record(UpdateArrived, parts)
    encoder[EdgeReported] = encoder.record(EdgeReported, parts)
    return encoder


_FIELDS = attrgetter(*declared_fields(Model))  # of which memory is the last
ENCODER = _encoder()
"""How the values of a run are written in its trace."""


class Trace:
    """An observer that writes each step to an open file; answers of a private run, which has a secret, by keyed digests."""

    def __init__(self, file: TextIO, secret: bytes = b"") -> None:
        self.file, self.secret = file, secret

    def __call__(self, now: float, event: Event, commands: list[Command]) -> None:
        """Append the step and flush, so that a killed run has a trace up to its end."""
        self.file.write(encode_step(now, event, commands, self.secret) + "\n")
        self.file.flush()
