"""A tree of servers in one process: a root, its edges, and the links between them. Towards a driver it is one server.

The driver tells it what happens to members and carries out what is for them; messages between root and edges take their time on a
link and are kept here, so `wake` speaks of them too. What happens inside is told by `Within`, and only the root's versions are
versions of the run. Tasks of all servers are numbered apart: edge k has the numbers from k * BLOCK + 1, the root those after the
last edge's, so that one edge of all clients numbers as a server without a tree.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import replace

from fedloom.core import message_size
from fedloom.core.events import (
    Cancel,
    ClientJoined,
    ClientLost,
    Command,
    Discard,
    Dispatch,
    EdgeLost,
    EdgeReturned,
    Event,
    Moved,
    Publish,
    Reject,
    Report,
    Scored,
    Stop,
    TaskFailed,
    TaskReceived,
    TimerFired,
    UpdateArrived,
    Within,
)
from fedloom.core.model_shape import Shape
from fedloom.core.policies import Fleet
from fedloom.core.server import Server, State
from fedloom.core.types import ClientId, GroupLog, GroupStatistics
from fedloom.hierarchy.edge import Edge
from fedloom.hierarchy.edge_model import narrowed
from fedloom.hierarchy.group_statistics import learnt, timed
from fedloom.hierarchy.regrouping import Regrouping, change, ready
from fedloom.hierarchy.tree_state import BLOCK, Branches, Down, Roster, Up, Whole


class Tree:
    """The root and its edges as one server."""

    def __init__(
        self, root: Server, edges: Mapping[ClientId, Edge], groups: Roster, regrouping: Regrouping | None = None
    ) -> None:
        """`root` and `edges` have done nothing yet; the order of the edges is that of their numbers. `groups` are the first ones."""
        self.root, self.groups, self.regrouping = root, groups, regrouping
        self._edges = dict(edges)
        of = {one.client: edge for edge, own in groups.members.items() for one in own}
        self.branches = Branches({name: edge.state for name, edge in edges.items()}, of)
        if regrouping is not None:
            self.branches.grouped = {one.client: one.seconds for one in regrouping.compared.members}
        for k, state in enumerate(self.branches.edges.values()):
            state.server.next_task = k * BLOCK + 1
        root.state.next_task = len(self._edges) * BLOCK + 1
        root.state.groups = {
            edge: GroupLog(groups.profile(edge, own), tuple(own)) for edge, own in groups.members.items()
        }
        self.state = Whole(root.state, self.branches)

    @property
    def edge_of(self) -> Mapping[ClientId, ClientId]:
        """The edge of each client, now."""
        return self.branches.edge_of

    @property
    def shape(self) -> Shape:
        """Sizes of the model."""
        return self.root.shape

    def fleet(self) -> Fleet:
        """The root's view, with what all members have answered so far."""
        own = self.state
        return replace(self.root.fleet(), seen=own.seen, dispatched=own.dispatched, worked=own.worked)

    def handle(self, now: float, event: Event) -> list[Command]:
        """What to do about `event`, in the order in which it is to be done. Raises ValueError if time runs backwards."""
        if not now >= self.branches.now:
            raise ValueError(
                f"event at {now} s after {self.branches.now} s: a driver must deliver events in order of time"
            )
        self.branches.now = now
        if self.root.state.stopped:
            return []
        commands = self._take(now, event)
        if commands and isinstance(commands[0], Reject):
            return commands
        return commands + self._deliver(now)

    def wake(self) -> float | None:
        """The latest time at which to call `handle` again: for the root, an edge, or a message that arrives."""
        if self.root.state.stopped:
            return None
        times = [self.root.wake(), *(edge.due for edge in self.branches.edges.values())]
        times += [self.branches.moving[0][0]] if self.branches.moving else []
        due = [time for time in times if time is not None]
        return max(min(due), self.branches.now) if due else None

    # What happens outside ------------------------------------------------------------------------------------------------

    def _take(self, now: float, event: Event) -> list[Command]:
        match event:
            case Scored():
                return self._root(now, event)
            case TimerFired():
                return self._timer(now)
            case EdgeLost(edge, kept):
                return self._lost(now, edge, kept)
            case EdgeReturned(edge):
                commands = self._inside(edge, self._edge(edge).rise(now), now)
                self._known(now, edge)
                return commands
            case ClientJoined(profile):
                return self._member(now, profile.client, event)
            case ClientLost(client):
                return self._member(now, client, event)
            case UpdateArrived(client, _, _) | TaskFailed(client, _, _):
                return self._member(now, client, event)
            case TaskReceived():
                raise ValueError("a tree is nobody's edge")

    def _member(self, now: float, client: ClientId, event: Event) -> list[Command]:
        """To the edge of this client."""
        if client not in self.edge_of:
            number = event.task if isinstance(event, UpdateArrived | TaskFailed) else 0
            return [Reject(client, number, f"client {client!r} is in no group")]
        edge = self.edge_of[client]
        commands = self._inside(edge, self._edge(edge).handle(now, event), now)
        self._known(now, edge)
        return commands

    def _timer(self, now: float) -> list[Command]:
        """Root and edges that wanted to look."""
        due, commands = self.root.wake(), list[Command]()
        if due is not None and due <= now:
            commands += self._root(now, TimerFired())
        for edge, state in self.branches.edges.items():
            if state.due is not None and state.due <= now and not self.root.state.stopped:
                commands += self._inside(edge, self._edge(edge).handle(now, TimerFired()), now)
        return commands

    def _lost(self, now: float, edge: ClientId, kept: bool) -> list[Command]:
        """With its last version kept, the root does not hear of it; else the edge is a client that is gone."""
        commands = self._inside(edge, self._edge(edge).fall(now), now)
        return commands if kept else commands + self._gone(now, edge, "the edge was lost")

    def _known(self, now: float, edge: ClientId) -> None:
        """An edge joins with its first member; one with other members is another client than before."""
        state, root = self.branches.edges[edge], self.root.state
        known = root.working[edge][0] if edge in root.working else root.idle.get(edge)
        if known != root.groups[edge].edge and (known or not (state.empty or state.down)):
            self.root.handle(now, ClientJoined(root.groups[edge].edge))

    # Between root and edges ----------------------------------------------------------------------------------------------

    def _deliver(self, now: float) -> list[Command]:
        """Messages that have arrived, in order, and what follows at once; members move before their edge's next task."""
        commands = self._move(now)
        while self.branches.moving and self.branches.moving[0][0] <= now and not self.root.state.stopped:
            time, _, message = heapq.heappop(self.branches.moving)
            match message:
                case Down(edge, task):
                    commands += self._inside(edge, self._edge(edge).handle(now, TaskReceived(task)), now)
                case Up(edge, number, result, told):
                    answer = self.groups.timed(self.root.state.busy[number], result, time)
                    if told is not None:
                        self._learn(edge, timed(told, answer.metrics))
                    commands += self._root(now, UpdateArrived(edge, number, answer))
            commands += self._move(now)
        return commands

    def _move(self, now: float) -> list[Command]:
        """Whoever is to be in another group and can leave now: for edges, a member that is lost here and joins there."""
        root, branches = self.root.state, self.branches
        moves = ready(root.groups, branches) if branches.leaving and not root.stopped else []
        for move in moves:
            here = branches.edges[move.edge].server.idle.get(move.client)
            self._edge(move.edge).handle(now, ClientLost(move.client))
            change(root, branches, self.groups, move)
            if here:
                self._edge(move.to).handle(now, ClientJoined(here))
        for edge in dict.fromkeys(edge for move in moves for edge in (move.edge, move.to)):
            self._known(now, edge)
        return [Moved(move, places(self)) for move in moves]

    def _inside(self, edge: ClientId, commands: Sequence[Command], now: float) -> list[Command]:
        """An edge's commands as the tree's: those for members as they are, the others told; its answer goes to the root."""
        number = self._number(edge)
        told = list[Command]()
        for command in commands:
            match command:
                case Report(result, learnt):
                    told.append(Within(edge, number, command))
                    task = self.root.state.busy[number] = narrowed(self.root.state.busy[number], result)
                    size = message_size.up(task, result).total
                    self._send(now + self.groups.seconds_up(size), Up(edge, number, result, learnt))
                case Stop(reason):
                    if self.branches.edges[edge].empty:
                        told += self._gone(now, edge, reason)
                    else:  # the members' failures are the run's
                        self.root.state.failures += max(0, self.branches.edges[edge].server.failures - 1)
                        told.append(Within(edge, number, command))
                        told += self._root(now, TaskFailed(edge, number, reason))
                case Publish() | Discard():
                    told.append(Within(edge, number, command))
                case _:
                    told.append(command)
        return told

    def _root(self, now: float, event: Event) -> list[Command]:
        """The root's commands as the tree's: what is for an edge goes there, the rest outside."""
        told = list[Command]()
        for command in self.root.handle(now, event):
            match command:
                case Dispatch(task):
                    told.append(Within(task.client, task.id, command))
                    size = message_size.down(task.start).total
                    self._send(now + self.groups.seconds_down(size), Down(task.client, task))
                case Cancel(number, edge):
                    told.append(Within(edge, number, command))
                    told += self._given_up(now, edge, number)
                case Reject(edge, number, reason):
                    told.append(Within(edge, number, command))
                    told += self._root(now, TaskFailed(edge, number, reason))
                case Publish(version):
                    told.append(command)
                    if self.regrouping and not self.root.state.stopped:
                        asked = self.regrouping.ask(self.root.state.groups, self.branches, version)
                        told += [asked] if asked else []
                case _:
                    told.append(command)
        return told

    def _gone(self, now: float, edge: ClientId, reason: str) -> list[Command]:
        """For the root the edge is lost, and with it its task."""
        told, number = list[Command](), self._number(edge)
        if number:
            told.append(Within(edge, number, Stop(reason)))
            told += self._given_up(now, edge, number)
        return told + self._root(now, ClientLost(edge))

    def _given_up(self, now: float, edge: ClientId, number: int) -> list[Command]:
        """Nothing more is heard of this outer task."""
        self.branches.moving = [entry for entry in self.branches.moving if entry[2].about != number]
        heapq.heapify(self.branches.moving)
        commands = self._edge(edge).give_up(now)
        return [Within(edge, number, one) if isinstance(one, Discard) else one for one in commands]

    def _send(self, arrives: float, message: Down | Up) -> None:
        heapq.heappush(self.branches.moving, (arrives, self.branches.made, message))
        self.branches.made += 1

    def _learn(self, edge: ClientId, told: GroupStatistics) -> None:
        self.root.state.groups[edge] = learnt(self.root.state.groups[edge], told)
        if self.regrouping is not None:
            self.regrouping.learn(self.root.state.groups, self.branches, edge, self.root.shape)

    def _number(self, edge: ClientId) -> int:
        """The root's task of this edge; 0: none."""
        working = self.root.state.working
        return working[edge][1] if edge in working else 0

    def places(self, edge: ClientId) -> int:
        """The most members of this edge that may be at work at once."""
        return min(len(self.root.state.groups[edge].members), self._edges[edge].server.schedule.max_in_flight)

    def _edge(self, name: ClientId) -> Edge:
        edge = self._edges[name]
        edge.state = self.branches.edges[name]  # a run that goes on brings another one
        return edge


def owners(server: Server | Tree) -> tuple[State | Branches, ...]:
    """All that changes in a server."""
    return (server.root.state, server.branches) if isinstance(server, Tree) else (server.state,)


def places(server: Server | Tree) -> int:
    """The most clients that may be at work at once: in a tree, in as many edges as the root lets work, the largest ones."""
    if not isinstance(server, Tree):
        return server.schedule.max_in_flight
    return sum(sorted(map(server.places, server.branches.edges), reverse=True)[: server.root.schedule.max_in_flight])
