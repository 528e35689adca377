"""State of a tree of servers besides its root's: edges, messages under way, and a view of all of it as the state of one server."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import TypeVar

from fedloom.core import message_size
from fedloom.core.errors import Refused
from fedloom.core.server_state import State
from fedloom.core.types import ClientId, GroupStatistics, Model, Profile, Result, Task
from fedloom.hierarchy.edge import EdgeState

BLOCK = 1_000_000_000
"""Size of the block of task numbers that each server of a tree has for itself."""


@dataclass(frozen=True, slots=True)
class Link:
    """Link between an edge and the root.

    Fields:
        up_bps: from the edge to the root (bits per second; default 100 Mbit/s).
        down_bps: from the root to the edge (bits per second; default 100 Mbit/s).
    """

    up_bps: float = 1e8
    down_bps: float = 1e8

    def __post_init__(self) -> None:
        for name in ("up_bps", "down_bps"):
            if not getattr(self, name) > 0:
                raise Refused(f"hierarchy.link.{name}", getattr(self, name), "give positive bits per second")


@dataclass(frozen=True, slots=True)
class Topology:
    """Members of each edge at the beginning, and the link of the edges.

    Fields:
        members: profiles of the members, by edge.
        link: link of each edge to the root (None: the edges live where the root does, and nothing travels).
    """

    members: Mapping[ClientId, Sequence[Profile]]
    link: Link | None = None

    @property
    def names(self) -> dict[ClientId, list[ClientId]]:
        """Clients of each edge."""
        return {edge: [profile.client for profile in profiles] for edge, profiles in self.members.items()}

    def profile(self, edge: ClientId, members: Sequence[Profile]) -> Profile:
        """Return an edge of these members as the root sees it: the examples of all, the smallest speed and memory."""
        link = self.link
        up, down = (link.up_bps, link.down_bps) if link else (math.inf, math.inf)
        flops, memory = min(one.flops for one in members), min(one.memory for one in members)
        return Profile(edge, sum(one.examples for one in members), flops, up, down, memory, "edge")

    def seconds_down(self, size: int) -> float:
        """Return the seconds that this many bytes take to an edge."""
        return 8.0 * size / self.link.down_bps if self.link else 0.0

    def seconds_up(self, size: int) -> float:
        """Return the seconds that this many bytes take from an edge."""
        return 8.0 * size / self.link.up_bps if self.link else 0.0

    def with_seconds(self, task: Task, result: Result, arrives: float) -> Result:
        """Return an edge's answer with the seconds that it took, as a client reports them."""
        down = self.seconds_down(message_size.download_size(task.start).total)
        up = self.seconds_up(message_size.upload_size(task, result).total)
        total = arrives - task.sent
        return result.with_seconds(total, down, max(0.0, total - down - up), up)


@dataclass(frozen=True, slots=True)
class TaskMessage:
    """Task on its way to an edge."""

    edge: ClientId
    task: Task

    @property
    def task_id(self) -> int:
        """The number of the outer task."""
        return self.task.id


@dataclass(frozen=True, slots=True)
class ReportMessage:
    """Answer of an edge on its way to the root, with statistics for a plan that learns."""

    edge: ClientId
    task_id: int
    result: Result
    statistics: GroupStatistics | None = None


@dataclass(slots=True)
class TreeState:
    """State of a tree without that of the root: all else that changes.

    Fields:
        edges: state of each edge, by name.
        edge_of: edge of each client, now.
        now: time of the last event (s).
        sent: messages sent so far, which numbers them.
        messages: (time of arrival, number, message) of those under way, a heap.
        leaving: edge to which a client is to move, where groups are made again.
        grouped: seconds of each client by which the groups were made last.
        seconds: seconds of each client as measured since.
    """

    edges: dict[ClientId, EdgeState]
    edge_of: dict[ClientId, ClientId]
    now: float = 0.0
    sent: int = 0
    messages: list[tuple[float, int, TaskMessage | ReportMessage]] = field(default_factory=list)
    leaving: dict[ClientId, ClientId] = field(default_factory=dict)
    grouped: dict[ClientId, float] = field(default_factory=dict)
    seconds: dict[ClientId, float] = field(default_factory=dict)


K = TypeVar("K")
V = TypeVar("V")


class RoutedTable(Mapping[K, V]):
    """Tables of all edges as one read-only table. A look-up costs as much as in one table."""

    def __init__(
        self,
        at: Callable[[K], Mapping[K, V] | None],
        every: Callable[[], Iterable[Mapping[K, V]]],
    ) -> None:
        """Combine tables: `at` gives the table that has a key (None: no table has it), `every` all of them."""
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


class TreeView:
    """State of a tree as its driver sees it (`StateView`): the model is the root's, the clients are those of all edges."""

    def __init__(self, root: State, below: TreeState) -> None:
        """Look at these two, without copying anything."""
        self._root, self._below = root, below

    @property
    def model(self) -> Model:
        """The root's model."""
        return self._root.model

    @property
    def first(self) -> Model:
        """The root's model of version 0."""
        return self._root.first

    @property
    def now(self) -> float:
        """The time of the last event."""
        return self._below.now

    @property
    def version(self) -> int:
        """The number of the root's version."""
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
        edges = list(self._below.edges.values())

        def at(number: int) -> Mapping[int, Task] | None:
            edge = (number - 1) // BLOCK
            return edges[edge].server.busy if 0 <= edge < len(edges) else None

        return RoutedTable(at, lambda: (edge.server.busy for edge in edges))

    @property
    def idle(self) -> Mapping[ClientId, Profile]:
        """Members without a task."""
        return self._by_client(lambda server: server.idle)

    @property
    def resting(self) -> Mapping[ClientId, Profile]:
        """Members without a task that may not be given one now."""
        return self._by_client(lambda server: server.resting)

    @property
    def working(self) -> Mapping[ClientId, tuple[Profile, int]]:
        """Members with a task, and its number."""
        return self._by_client(lambda server: server.working)

    @property
    def dispatched(self) -> Mapping[ClientId, int]:
        """Tasks sent to each member so far."""
        return self._by_client(lambda server: server.dispatched)

    @property
    def work_seconds(self) -> Mapping[ClientId, float]:
        """Seconds of each member's tasks so far."""
        return self._by_client(lambda server: server.work_seconds)

    @property
    def registered(self) -> Mapping[ClientId, int]:
        """Examples with which each member joined."""
        return self._by_client(lambda server: server.registered)

    @property
    def reported_examples(self) -> Mapping[ClientId, int]:
        """Examples that counted for each member's last answer."""
        return self._by_client(lambda server: server.reported_examples)

    @property
    def pruned(self) -> Mapping[ClientId, int]:
        """The rank to which a member pruned itself."""
        return self._by_client(lambda server: server.pruned)

    def _by_client(self, table: Callable[[State], Mapping[ClientId, V]]) -> Mapping[ClientId, V]:
        edges, of = self._below.edges, self._below.edge_of

        def at(client: ClientId) -> Mapping[ClientId, V] | None:
            return table(edges[of[client]].server) if client in of else None

        return RoutedTable(at, lambda: (table(edge.server) for edge in edges.values()))
