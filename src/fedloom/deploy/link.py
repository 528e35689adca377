"""What a deployment asks of the engine that carries its messages: who is there, send, collect. Bytes in, bytes out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class RawReply:
    """What became of a message to `node`: the body of the answer, or None and the engine's own word on why there is none."""

    message: str
    node: int
    body: bytes | None = None
    error: str = ""


class Transport(Protocol):
    """An engine, seen from the server. A node has at most one message at a time; whoever sends more waits in line there."""

    def nodes(self) -> Mapping[int, str | None]:
        """The nodes that can be reached now, each with the name that its key was registered under (None: it has no key)."""
        ...

    def send(self, node: int, body: bytes) -> str:
        """Hand over a message; returns its number. A node that is gone may be found out about later, by a reply with an error."""
        ...

    def collect(self) -> Sequence[RawReply]:
        """The replies that are there, each once. It does not wait."""
        ...
