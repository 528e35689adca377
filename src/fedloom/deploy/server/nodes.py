"""Who is where: nodes of the engine, the clients behind them, the messages under way. Plain state, no policy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from logging import getLogger

from fedloom.core.types import ClientId


@dataclass(slots=True)
class LinkTraffic:
    """What went over the link since the server started: messages and their bytes, each resend counted."""

    sent: int = 0
    resent: int = 0
    received: int = 0
    late: int = 0
    refused: int = 0
    bytes_down: int = 0
    bytes_up: int = 0


LOG = getLogger("fedloom.core.server")


@dataclass(slots=True)
class Node:
    """A node that can be reached: the name of its key, who it is once it has said so, until when it is left alone, and why; whether
    it has what follows from the seed (`seeded`).
    """

    name: str | None
    client: ClientId | None = None
    resting_until: float = 0.0
    why: str = ""
    seeded: bool = False


@dataclass(frozen=True, slots=True)
class SentMessage:
    """A message under way: to which node, the task that it carries (None: the question who is there), since when.

    `given_up`: nobody counts on a reply any more, because the node was gone in between or took too long; it may come all the same.
    """

    node: int
    task: int | None
    sent: float = 0.0
    given_up: bool = False


@dataclass(slots=True)
class ReachableNodes:
    """The nodes that can be reached now, the messages under way, since when each missing client is missing, and, when the run has
    ended, whose scores are still awaited.
    """

    nodes: dict[int, Node] = field(default_factory=dict)
    in_flight: dict[str, SentMessage] = field(default_factory=dict)
    missing: dict[ClientId, float] = field(default_factory=dict)
    scoring: tuple[ClientId, ...] = ()

    def seen(self, now: float, present: Mapping[int, str | None], clients: Mapping[ClientId, object]) -> None:
        """The nodes that the engine sees now; who of `clients` is behind none of them is missing."""
        for number in self.nodes.keys() - present.keys():
            del self.nodes[number]
            self.give_up(number)
        for number in present.keys() - self.nodes.keys():
            self.nodes[number] = Node(present[number])
        here = {node.client for node in self.nodes.values()}
        self.missing = {client: self.missing.get(client, now) for client in clients if client not in here}

    def give_up(self, node: int) -> None:
        """Count on no message to this node any more."""
        for message, sent in self.in_flight.items():
            if sent.node == node:
                self.in_flight[message] = replace(sent, given_up=True)

    def doubt(self, now: float, after: float) -> None:
        """Count no more on messages that were sent so many seconds ago, twice as many for each one that was doubted before."""
        for message, sent in self.in_flight.items():
            before = sum(one.node == sent.node and one.given_up for one in self.in_flight.values())
            if not sent.given_up and now > sent.sent + after * 2**before:
                self.in_flight[message] = replace(sent, given_up=True)

    def free(self, now: float) -> list[tuple[int, Node]]:
        """The nodes that have nothing to do and are not left alone, in order of their numbers."""
        busy = {sent.node for sent in self.in_flight.values() if not sent.given_up}
        return [
            (number, self.nodes[number])
            for number in sorted(self.nodes.keys() - busy)
            if self.nodes[number].resting_until <= now
        ]

    def rest(self, until: float, node: int, why: str) -> None:
        """Leave a node alone."""
        LOG.warning("node %s is left alone until %.0f s: %s", node, until, why)
        if node in self.nodes:
            self.nodes[node].resting_until, self.nodes[node].why = until, why

    def turn_away(self, until: float, client: ClientId, why: str) -> None:
        """Nobody counts on this client, who is asked later who it is."""
        if (number := self.of(client)) is not None:
            self.rest(until, number, why)
            self.nodes[number].client = None

    def ask_again(self, node: int, here: Mapping[ClientId, object]) -> None:
        """Who it is, and whether it may work: its last task is settled without it."""
        if node in self.nodes and self.nodes[node].client not in here:
            self.nodes[node].client = None

    def of(self, client: ClientId) -> int | None:
        """The node of this client."""
        return next((number for number, node in self.nodes.items() if node.client == client), None)
