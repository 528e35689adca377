"""What a tree of servers holds beside its root, and how a driver sees it: as the state of one server."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import TypeVar

from fedloom.core import message_size
from fedloom.core.errors import Refused
from fedloom.core.server import State
from fedloom.core.types import ClientId, Model, Profile, Result, Task, GroupStatistics
from fedloom.hierarchy.edge import EdgeState

BLOCK = 1_000_000_000
"""Numbers of tasks that each server of a tree has for itself."""


@dataclass(frozen=True, slots=True)
class Link:
    """Between an edge and the root, in bits per second."""

    up_bps: float = 1e8
    down_bps: float = 1e8

    def __post_init__(self) -> None:
        for name in ("up_bps", "down_bps"):
            if not getattr(self, name) > 0:
                raise Refused(f"hierarchy.link.{name}", getattr(self, name), "give positive bits per second")


@dataclass(frozen=True, slots=True)
class Roster:
    """Who belongs to which edge at first: the profiles of its members by its name. No `link`: the edges live where the root does."""

    members: Mapping[ClientId, Sequence[Profile]]
    link: Link | None = None

    @property
    def names(self) -> dict[ClientId, list[ClientId]]:
        """The clients of each edge."""
        return {edge: [one.client for one in own] for edge, own in self.members.items()}

    def profile(self, edge: ClientId, own: Sequence[Profile]) -> Profile:
        """An edge of these members as the root sees it: the examples of all, the speed and the memory of the least of them."""
        link = self.link
        up, down = (link.up_bps, link.down_bps) if link else (math.inf, math.inf)
        flops, memory = min(one.flops for one in own), min(one.memory for one in own)
        return Profile(edge, sum(one.examples for one in own), flops, up, down, memory, "edge")

    def seconds_down(self, size: int) -> float:
        """Of so many bytes to an edge."""
        return 8.0 * size / self.link.down_bps if self.link else 0.0

    def seconds_up(self, size: int) -> float:
        """Of so many bytes from an edge."""
        return 8.0 * size / self.link.up_bps if self.link else 0.0

    def timed(self, task: Task, result: Result, arrives: float) -> Result:
        """An edge's answer with the seconds that it took, as a client reports them."""
        down = self.seconds_down(message_size.down(task.start).total)
        up = self.seconds_up(message_size.up(task, result).total)
        seconds = arrives - task.sent
        parts = {"seconds_down": down, "seconds_train": max(0.0, seconds - down - up), "seconds_up": up}
        return replace(result, metrics={**result.metrics, "seconds": seconds, **parts})


@dataclass(frozen=True, slots=True)
class Down:
    """A task on its way to an edge."""

    edge: ClientId
    task: Task

    @property
    def about(self) -> int:
        """The outer task."""
        return self.task.id


@dataclass(frozen=True, slots=True)
class Up:
    """An edge's answer on its way to the root, and what it told."""

    edge: ClientId
    about: int
    result: Result
    told: GroupStatistics | None = None


@dataclass(slots=True)
class Branches:
    """All that changes in a tree beside the root's state: its edges by name, and `moving`, messages by their time of arrival.

    `edge_of` names the edge of each client. Where groups are made anew, `leaving` names the edge to which a client is to move,
    `grouped` the times of all clients by which the groups were made last, `seconds` those measured since.
    """

    edges: dict[ClientId, EdgeState]
    edge_of: dict[ClientId, ClientId]
    now: float = 0.0
    made: int = 0
    moving: list[tuple[float, int, Down | Up]] = field(default_factory=list)
    leaving: dict[ClientId, ClientId] = field(default_factory=dict)
    grouped: dict[ClientId, float] = field(default_factory=dict)
    seconds: dict[ClientId, float] = field(default_factory=dict)


K = TypeVar("K")
V = TypeVar("V")


class Routed(Mapping[K, V]):
    """The tables of all edges as one: `at` is the table that has a key, if any has it. One look costs what it costs in a table."""

    def __init__(
        self,
        at: Callable[[K], Mapping[K, V] | None],
        every: Callable[[], Iterable[Mapping[K, V]]],
    ) -> None:
        """`every` are all tables."""
        self._at, self._every = at, every

    def __getitem__(self, key: K) -> V:
        table = self._at(key)
        if table is None:
            raise KeyError(key)
        return table[key]

    def __iter__(self) -> Iterator[K]:
        return chain.from_iterable(self._every())

    def __len__(self) -> int:
        return sum(map(len, self._every()))


class Whole:
    """The state of a tree as its driver sees it: the model is the root's, the clients are those of all edges."""

    def __init__(self, root: State, branches: Branches) -> None:
        """All of it."""
        self._root, self._branches = root, branches

    @property
    def model(self) -> Model:
        """The root's."""
        return self._root.model

    @property
    def first(self) -> Model:
        """The root's model of version 0."""
        return self._root.first

    @property
    def now(self) -> float:
        """The time of the last event."""
        return self._branches.now

    @property
    def version(self) -> int:
        """The root's."""
        return self._root.version

    @property
    def stopped(self) -> bool:
        """Whether the run is over."""
        return self._root.stopped

    @property
    def failures(self) -> int:
        """Tasks that failed in a row: members' in an edge that gave up, and the edges'."""
        return self._root.failures

    @property
    def busy(self) -> Mapping[int, Task]:
        """Tasks of members."""
        edges = list(self._branches.edges.values())

        def at(number: int) -> Mapping[int, Task] | None:
            edge = (number - 1) // BLOCK
            return edges[edge].server.busy if 0 <= edge < len(edges) else None

        return Routed(at, lambda: (edge.server.busy for edge in edges))

    @property
    def idle(self) -> Mapping[ClientId, Profile]:
        """Members without a task."""
        return self._by_client(lambda server: server.idle)

    @property
    def working(self) -> Mapping[ClientId, tuple[Profile, int]]:
        """Members with a task, and its number."""
        return self._by_client(lambda server: server.working)

    @property
    def dispatched(self) -> Mapping[ClientId, int]:
        """Tasks sent to each member so far."""
        return self._by_client(lambda server: server.dispatched)

    @property
    def worked(self) -> Mapping[ClientId, float]:
        """Seconds of each member's tasks so far."""
        return self._by_client(lambda server: server.worked)

    @property
    def seen(self) -> Mapping[ClientId, int]:
        """Examples that each member reported last."""
        return self._by_client(lambda server: server.seen)

    @property
    def pruned(self) -> Mapping[ClientId, int]:
        """The rank to which a member pruned itself."""
        return self._by_client(lambda server: server.pruned)

    def _by_client(self, table: Callable[[State], Mapping[ClientId, V]]) -> Mapping[ClientId, V]:
        edges, of = self._branches.edges, self._branches.edge_of

        def at(client: ClientId) -> Mapping[ClientId, V] | None:
            return table(edges[of[client]].server) if client in of else None

        return Routed(at, lambda: (table(edge.server) for edge in edges.values()))
