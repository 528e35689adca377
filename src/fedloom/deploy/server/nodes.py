"""Nodes of the transport, the clients behind them and the messages in flight: plain state, no policy.

A node is an address of the transport, a client a participant of the run. Which client is behind a node is known once it has
answered a `JoinRequest`. Only the driver changes this state; none of it is saved, since a server that was restarted asks
everybody anew.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Container, Iterable, Mapping
from dataclasses import dataclass, field, replace
from logging import getLogger

from fedloom.core.types import ClientId, Profile
from fedloom.deploy.messages.messages import EvaluateRequest, SumRequest
from fedloom.deploy.server.key_facts import KeyFacts
from fedloom.deploy.server.reply_events import REGION

LOG = getLogger("fedloom.deploy.server")
MAX_FAILURES = 8
"""After so many failed tasks in a row a client is given a task only now and then: it could else end the run, which ends after many
failures in a row, while the others still train.
"""


@dataclass(slots=True)
class LinkTraffic:
    """Messages and bytes over the transport since the server started; each resend counts.

    Fields:
        sent: requests sent.
        resent: task requests among them that were sent before.
        received: replies that came with a body.
        late: answers to tasks that were no longer outstanding.
        refused: refusals.
        bytes_down: bytes of all requests.
        bytes_up: bytes of all replies.
    """

    sent: int = 0
    resent: int = 0
    received: int = 0
    late: int = 0
    refused: int = 0
    bytes_down: int = 0
    bytes_up: int = 0


@dataclass(slots=True)
class Node:
    """A node that can be reached.

    Fields:
        name: the name that its key is registered under (None: it has no key).
        client: the client behind it, once it has said who it is.
        resting_until: nothing is sent to it before this time (s of the run).
        why: the reason why it rests ("": none).
        seeded: whether its site drew the run's first adapter itself.
    """

    name: str | None
    client: ClientId | None = None
    resting_until: float = 0.0
    why: str = ""
    seeded: bool = False


@dataclass(frozen=True, slots=True)
class SentMessage:
    """A request in flight. Without `task`, `evaluate` and `summed` it is a `JoinRequest`.

    Fields:
        node: where it was sent.
        task: the task that it carries.
        sent: when (s of the run).
        given_up: no reply is expected any more, because the node was gone in between or took too long; one may come all the same.
        evaluate: the evaluate request that it is.
        summed: the step of a sum that it is.
    """

    node: int
    task: int | None = None
    sent: float = 0.0
    given_up: bool = False
    evaluate: EvaluateRequest | None = None
    summed: SumRequest | None = None


@dataclass(slots=True)
class NodeTable:
    """Table of all nodes, and of the requests in flight to them. What is asked for each message is a look-up.

    Fields:
        reachable: nodes that can be reached now, by number.
        in_flight: requests whose reply has not come, by number of the message.
        missing: since when each client whose node cannot be reached is missing (s of the run).
        failed: how many tasks each client has failed in a row, without a pause between them.
        last_node: the node that each client was last behind.
        copies: requests in flight that carry a task, by its number.
        none_old_until: no message in flight is old before this time (s of the run).
    """

    reachable: dict[int, Node] = field(default_factory=dict)
    in_flight: dict[str, SentMessage] = field(default_factory=dict)
    missing: dict[ClientId, float] = field(default_factory=dict)
    failed: dict[ClientId, int] = field(default_factory=dict)
    last_node: dict[ClientId, int] = field(default_factory=dict)
    copies: Counter[int] = field(default_factory=Counter)
    none_old_until: float = -math.inf

    def add(self, message: str, sent: SentMessage) -> None:
        """Add a request that was sent."""
        self.in_flight[message] = sent
        if sent.task is not None:
            self.copies[sent.task] += 1

    def take(self, message: str) -> SentMessage | None:
        """Remove and return the request whose reply has come; None: it is not known, as after a restart."""
        sent = self.in_flight.pop(message, None)
        if sent is None:
            return None
        if sent.task is not None:
            self.copies[sent.task] -= 1
            if not self.copies[sent.task]:
                del self.copies[sent.task]
        if sent.given_up:  # the next one to its node is old earlier than was reckoned
            self.none_old_until = -math.inf
        return sent

    def update(self, now: float, present: Mapping[int, str | None], clients: Iterable[ClientId]) -> None:
        """Set the nodes that the transport reaches now; those of `clients` that are behind none of them are missing."""
        gone = self.reachable.keys() - present.keys()
        self.give_up(gone)
        for number in gone:
            del self.reachable[number]
        for number in present.keys() - self.reachable.keys():
            self.reachable[number] = Node(present[number])
        behind = {node.client for node in self.reachable.values()}
        self.missing = {client: self.missing.get(client, now) for client in clients if client not in behind}

    def give_up(self, nodes: Collection[int]) -> None:
        """Give up the messages to these nodes: no reply to them is expected any more."""
        for message, sent in self.in_flight.items() if nodes else ():
            if sent.node in nodes:
                self.in_flight[message] = replace(sent, given_up=True)

    def give_up_old(self, now: float, after: float) -> None:
        """Give up messages that were sent `after` seconds ago; twice as many for each one that was given up before."""
        if now <= self.none_old_until:
            return
        given_up = Counter(sent.node for sent in self.in_flight.values() if sent.given_up)
        self.none_old_until = now + after
        for message, sent in self.in_flight.items():
            old = math.inf if sent.given_up else sent.sent + after * 2 ** given_up[sent.node]
            if now > old:
                self.in_flight[message] = replace(sent, given_up=True)
            else:
                self.none_old_until = min(self.none_old_until, old)

    def free(self, now: float) -> list[tuple[int, Node]]:
        """Return the nodes that have nothing to do and do not rest, in order of their numbers."""
        busy = {sent.node for sent in self.in_flight.values() if not sent.given_up}
        free = sorted(self.reachable.keys() - busy)
        return [(number, self.reachable[number]) for number in free if self.reachable[number].resting_until <= now]

    def rest(self, until: float, number: int, why: str) -> None:
        """Send nothing to a node until this time."""
        LOG.warning("node %s is paused until %.0f s: %s", number, until, why)
        if number in self.reachable:
            self.reachable[number].resting_until, self.reachable[number].why = until, why

    def count_failure(self, until: float, client: ClientId, why: str) -> None:
        """Count a task that a client failed; one that has failed `MAX_FAILURES` in a row rests after each of them."""
        self.failed[client] = self.failed.get(client, 0) + 1
        if self.failed[client] >= MAX_FAILURES and (number := self.node_of(client)) is not None:
            self.rest(until, number, why)

    def turn_away(self, until: float, client: ClientId, why: str) -> None:
        """Drop this client; its node rests and is then asked who it is."""
        if (number := self.node_of(client)) is not None:
            self.rest(until, number, why)
        self.let_go(client)

    def let_go(self, client: ClientId) -> None:
        """Count on this client no more; its node is asked who it is."""
        self.missing.pop(client, None)
        if (number := self.node_of(client)) is not None:
            self.reachable[number].client = None

    def ask_again(self, number: int, clients: Container[ClientId | None]) -> None:
        """Ask a node again who it is, unless the client behind it is one of these."""
        if number in self.reachable and self.reachable[number].client not in clients:
            self.reachable[number].client = None

    def node_of(self, client: ClientId) -> int | None:
        """Return the number of this client's node."""
        number = self.last_node.get(client)
        node = None if number is None else self.reachable.get(number)
        return number if node is not None and node.client == client else None

    def let_in(self, number: int, client: ClientId, seeded: bool) -> None:
        """Note the client behind a node."""
        node = self.reachable[number]
        node.client, node.why, node.seeded = client, "", seeded
        self.last_node[client] = number
        self.missing.pop(client, None)

    def why_not_let_in(self, number: int, node: Node, profile: Profile, facts: KeyFacts) -> str | None:
        """Return why this client may not be the one behind a node; None: it may. Without keys anybody may be anybody."""
        client, region = profile.client, profile.tier == REGION
        if node.name not in (None, client):
            return f"it calls itself {client!r}, but its key is that of {node.name!r}"
        if node.name is not None and region != facts.region:
            says, has = ("region", "site") if region else ("site", "region")
            return f"it calls itself a {says}, but its key is that of a {has}; see `fedloom keys add --region`"
        return f"another site called {client!r} is connected" if self.node_of(client) not in (None, number) else None
