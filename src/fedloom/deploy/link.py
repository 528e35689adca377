"""Transport of a deployment, as the driver sees it: who is there, send, collect. Bytes in, bytes out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class RawReply:
    """Outcome of a message: the bytes of a reply, or an error.

    Fields:
        message: its number.
        node: where it was sent.
        body: the bytes of the reply (None: there is none).
        error: why there is no reply, in the transport's words.
    """

    message: str
    node: int
    body: bytes | None = None
    error: str = ""


class Transport(Protocol):
    """Carries messages between the server and nodes. A node has at most one message at a time; whoever sends more waits in
    line there.
    """

    def nodes(self) -> Mapping[int, str | None]:
        """Return the nodes that can be reached now, each with the name that its key was registered under (None: it has no key)."""
        ...

    def send(self, node: int, body: bytes, largest_reply: int) -> str:
        """Hand over a message; returns its number. That a node is gone may only show later, by a reply with an error.

        A reply of more than `largest_reply` bytes is an error.
        """
        ...

    def collect(self) -> Sequence[RawReply]:
        """Return the replies that are there, each once. It does not wait."""
        ...
