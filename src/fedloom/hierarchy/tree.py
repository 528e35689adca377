"""A tree of servers in one process: a root, its edges, and the links between them. Towards a driver it is one server.

The driver tells it what happens to members and carries out what is for them. Messages between root and edges take their time on a
link and are kept here, so `wake` speaks of them too. What happens inside is shown by `InsideEdge`, and only the root's versions are
versions of the run. Tasks of all servers are numbered apart: edge k has the numbers from k * BLOCK + 1, the root those after the
last edge's, so that one edge of all clients numbers as a server without a tree.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from fedloom.core import message_size
from fedloom.core.events import (
    CanaryScored,
    Cancel,
    ClientJoined,
    ClientLost,
    Command,
    Discarded,
    Dispatch,
    EdgeJoined,
    EdgeLost,
    EdgeReported,
    EdgeReturned,
    Event,
    InsideEdge,
    Moved,
    PartsReady,
    Publish,
    Reject,
    Release,
    ReleasesCounted,
    Report,
    ScoresReady,
    Stop,
    SumFailed,
    SumOpened,
    TaskFailed,
    TaskReceived,
    TimerFired,
    UpdateArrived,
)
from fedloom.core.model_shape import Shape
from fedloom.core.policies import Fleet
from fedloom.core.schema import jsonable
from fedloom.core.server import Server
from fedloom.core.server_state import State
from fedloom.core.types import ClientId, GroupHistory
from fedloom.hierarchy.edge import Edge, trained_part
from fedloom.hierarchy.group_statistics import with_task_seconds
from fedloom.hierarchy.regrouping import Regrouping, move_member, possible_moves
from fedloom.hierarchy.root_server import RootServer
from fedloom.hierarchy.tree_state import BLOCK, ReportMessage, TaskMessage, Topology, TreeState, TreeView


class Tree:
    """A root and its edges, as one `Coordinator`."""

    def __init__(
        self, root: Server, edges: Mapping[ClientId, Edge], topology: Topology, regrouping: Regrouping | None = None
    ) -> None:
        """Put the edges below the root. Neither has done anything yet.

        Args:
            root: the server that holds the global model.
            edges: by name, in the order of their blocks of task numbers.
            topology: members of each edge at the beginning, and the edges' link.
            regrouping: when and how groups are made again (None: they stay).
        """
        self.root = RootServer(root, trusted=True, learned=self._regroup_learns)
        self.topology, self.regrouping, self._edges = topology, regrouping, dict(edges)
        edge_of = {profile.client: edge for edge, members in topology.members.items() for profile in members}
        self.below = TreeState({name: edge.state for name, edge in edges.items()}, edge_of)
        if regrouping is not None:
            self.below.grouped = {member.client: member.seconds for member in regrouping.compared.members}
        for k, edge in enumerate(edges.values()):
            edge.server.number_tasks_from(k * BLOCK + 1)
        root.number_tasks_from(len(edges) * BLOCK + 1)
        for name, members in topology.members.items():
            root.set_group(name, GroupHistory(topology.profile(name, members), tuple(members)))
        self.state = TreeView(root.state, self.below)

    @property
    def edge_of(self) -> Mapping[ClientId, ClientId]:
        """The edge of each client, now."""
        return self.below.edge_of

    @property
    def shape(self) -> Shape:
        """Sizes of the model."""
        return self.root.shape

    @property
    def max_in_flight(self) -> int:
        """The most members that may be at work at once: in as many edges as the root lets work, the largest ones."""
        most = sorted(map(self._max_in_flight, self.below.edges), reverse=True)
        return sum(most[: self.root.max_in_flight])

    @property
    def edges(self) -> tuple[ClientId, ...]:
        """The edges, in the order of their blocks of task numbers."""
        return tuple(self.below.edges)

    def fleet(self) -> Fleet:
        """Return the root's view, with what all members have answered so far."""
        state = self.state
        return replace(
            self.root.fleet(),
            reported_examples=state.reported_examples,
            dispatched=state.dispatched,
            work_seconds=state.work_seconds,
        )

    def parts_to_save(self) -> tuple[State, TreeState]:
        """Return the root's state, and that of the rest of the tree."""
        return (self.root.state, self.below)

    def manifest_sections(self) -> dict[str, Any]:
        """Return the groups at the beginning, and by what clients are compared where groups are made again."""
        compared = {"compared": jsonable(self.regrouping.compared)} if self.regrouping else {}
        return {"groups": self.topology.names, **compared}

    def handle(self, now: float, event: Event) -> list[Command]:
        """Return what to do about `event`, in the order in which it is to be done. Raises ValueError if time runs backwards."""
        if not now >= self.below.now:
            raise ValueError(
                f"event at {now} s after {self.below.now} s: a driver must deliver events in order of time"
            )
        self.below.now = now
        if self.root.state.stopped:
            return []
        commands = self._take(now, event)
        if commands and isinstance(commands[0], Reject):
            return commands
        commands += self._deliver(now)
        return commands + self._stop_if_spent()

    def wake(self) -> float | None:
        """Return the latest time at which to call `handle` again: for the root, an edge, or a message that arrives."""
        if self.root.state.stopped:
            return None
        times = [self.root.wake(), *(edge.due for edge in self.below.edges.values())]
        times += [self.below.messages[0][0]] if self.below.messages and not self._scoring else []
        due = [time for time in times if time is not None]
        return max(min(due), self.below.now) if due else None

    # What happens outside ------------------------------------------------------------------------------------------------

    def _take(self, now: float, event: Event) -> list[Command]:
        match event:
            case ScoresReady() | CanaryScored():
                return self._tell_root(now, event)
            case TimerFired():
                return self._timer(now)
            case EdgeLost(edge, resumes):
                return self._lost(now, edge, resumes)
            case EdgeReturned(edge):
                commands = self._from_edge(edge, self._edge(edge).come_back(now), now)
                self._announce(now, edge)
                return commands
            case ClientJoined(profile):
                return self._member(now, profile.client, event)
            case ClientLost(client):
                return self._member(now, client, event)
            case UpdateArrived(client, _, _) | TaskFailed(client, _, _) | PartsReady(client, _):
                return self._member(now, client, event)
            case SumOpened(task) | SumFailed(task):
                edge = self.edges[(task - 1) // BLOCK]
                return self._from_edge(edge, self._edge(edge).handle(now, event), now)
            case TaskReceived():
                raise ValueError("a tree is nobody's edge")
            case ReleasesCounted():
                raise ValueError("a tree is simulated: it makes its versions again, and has none to count")

    def _member(self, now: float, client: ClientId, event: Event) -> list[Command]:
        """Pass an event on to the edge of this client."""
        if client not in self.edge_of:
            number = event.task if isinstance(event, UpdateArrived | TaskFailed | PartsReady) else 0
            return [Reject(client, number, f"client {client!r} is in no group")]
        edge = self.edge_of[client]
        commands = self._from_edge(edge, self._edge(edge).handle(now, event), now)
        self._announce(now, edge)
        return commands

    def _timer(self, now: float) -> list[Command]:
        """Call root and edges that are due."""
        due, commands = self.root.wake(), list[Command]()
        if due is not None and due <= now:
            commands += self._tell_root(now, TimerFired())
        for edge, state in self.below.edges.items():
            if state.due is not None and state.due <= now and not self.root.state.stopped:
                commands += self._from_edge(edge, self._edge(edge).handle(now, TimerFired()), now)
        return commands

    def _lost(self, now: float, edge: ClientId, resumes: bool) -> list[Command]:
        """Take an edge offline. The root gets no event if it resumes with its last version; any other is a client that is lost."""
        commands = self._from_edge(edge, self._edge(edge).go_down(now), now)
        return commands if resumes else commands + self._gone(now, edge, "the edge was lost")

    def _announce(self, now: float, edge: ClientId) -> None:
        """Let an edge join the root with its first member; one with other members joins again, as another client than before."""
        state, root, group = self.below.edges[edge], self.root.state, self.root.state.groups[edge]
        before = root.working[edge][0] if edge in root.working else root.idle.get(edge)
        if before != group.edge and (before or not (state.empty or state.down)):
            self.root.handle(now, EdgeJoined(group.edge, group.members))

    def _stop_if_spent(self) -> list[Command]:
        """End the run where no edge can be given a task, because every member has taken part as often as it may."""
        root, rule = self.root.state, next(iter(self._edges.values())).server.participation
        if rule is None or root.stopped or root.idle or root.working:
            return []
        reasons = [rule.why_nobody_starts(edge.server) for edge in self.below.edges.values()]
        return [] if not all(reasons) else self.root.server.stop(str(reasons[0]))

    # Between root and edges ----------------------------------------------------------------------------------------------

    def _deliver(self, now: float) -> list[Command]:
        """Deliver messages that have arrived, in order, and do what follows at once; members move before their edge's next task.

        While the root waits for a canary score they wait too, so that it decides about one answer after the other.
        """
        commands, below, root = self._move(now), self.below, self.root.state
        while below.messages and below.messages[0][0] <= now and not root.stopped and not self._scoring:
            time, _, message = heapq.heappop(self.below.messages)
            match message:
                case TaskMessage(edge, task):
                    commands += self._from_edge(edge, self._edge(edge).handle(now, TaskReceived(task)), now)
                case ReportMessage():
                    commands += self._tell_root(now, self._reported(message, time))
            commands += self._move(now)
        return commands

    def _reported(self, message: ReportMessage, time: float) -> EdgeReported:
        """Return the report that arrived at this time as an event for the root."""
        task = trained_part(self.root.state.busy[message.task_id], message.result)
        result, statistics = self.topology.with_seconds(task, message.result, time), message.statistics
        timed = None if statistics is None else with_task_seconds(statistics, result.metrics)
        return EdgeReported(message.edge, message.task_id, result, timed)

    def _move(self, now: float) -> list[Command]:
        """Move clients that are to be in another group and can leave now: for edges, a member that is lost here and joins there."""
        root, below = self.root.state, self.below
        moves = possible_moves(root.groups, below) if below.leaving and not root.stopped else []
        for move in moves:
            reachable = below.edges[move.edge].server.idle.get(move.client)
            self._edge(move.edge).handle(now, ClientLost(move.client))
            self._set_groups(move_member(root.groups, below, self.topology, move))
            if reachable:
                self._edge(move.to).handle(now, ClientJoined(reachable))
        for edge in dict.fromkeys(edge for move in moves for edge in (move.edge, move.to)):
            self._announce(now, edge)
        return [Moved(move, self.max_in_flight) for move in moves]

    def _from_edge(self, edge: ClientId, commands: Sequence[Command], now: float) -> list[Command]:
        """Return an edge's commands as the tree's, and send its answer on its way to the root.

        Commands for members stay as they are; what happens inside is shown by `InsideEdge`.
        """
        number, outside = self.root.task_of(edge), list[Command]()
        for command in commands:
            match command:
                case Report(result, statistics):
                    outside.append(InsideEdge(edge, number, command))
                    task = trained_part(self.root.state.busy[number], result)
                    size = message_size.upload_size(task, result).total
                    message = ReportMessage(edge, number, result, statistics)
                    self._send(now + self.topology.seconds_up(size), message)
                case Stop(reason):
                    if self.below.edges[edge].empty:
                        outside += self._gone(now, edge, reason)
                    else:  # members' failures end the run as any others; the root counts one itself, for the edge's task
                        self.root.server.add_failures(max(0, self.below.edges[edge].server.failures - 1))
                        outside.append(InsideEdge(edge, number, command))
                        outside += self._tell_root(now, TaskFailed(edge, number, reason))
                case Release() | Publish() | Discarded():
                    outside.append(InsideEdge(edge, number, command))
                case _:
                    outside.append(command)
        return outside

    def _tell_root(self, now: float, event: Event) -> list[Command]:
        """Return the root's commands about an event as the tree's, and carry out those that are for an edge."""
        outside = list[Command]()
        for command in self.root.handle(now, event):
            match command:
                case Dispatch(task):
                    outside.append(InsideEdge(task.client, task.id, command))
                    size = message_size.download_size(task.start).total
                    self._send(now + self.topology.seconds_down(size), TaskMessage(task.client, task))
                case Cancel(number, edge):
                    outside.append(InsideEdge(edge, number, command))
                    outside += self._drop_task(now, edge, number)
                case Reject(edge, number, reason):
                    outside.append(InsideEdge(edge, number, command))
                    outside += self._tell_root(now, TaskFailed(edge, number, reason))
                case Publish(version):
                    outside.append(command)
                    if self.regrouping and not self.root.state.stopped:
                        regroup = self.regrouping.ask(self.below, version)
                        outside += [regroup] if regroup else []
                case _:
                    outside.append(command)
        return outside

    def _gone(self, now: float, edge: ClientId, reason: str) -> list[Command]:
        """Tell the root that the edge is lost, and with it its task."""
        outside, number = list[Command](), self.root.task_of(edge)
        if number:
            outside.append(InsideEdge(edge, number, Stop(reason)))
            outside += self._drop_task(now, edge, number)
        return outside + self._tell_root(now, ClientLost(edge))

    def _drop_task(self, now: float, edge: ClientId, number: int) -> list[Command]:
        """Forget an outer task that the root wants no answer to, its messages included."""
        self.below.messages = [entry for entry in self.below.messages if entry[2].task_id != number]
        heapq.heapify(self.below.messages)
        commands = self._edge(edge).drop_task(now)
        return [InsideEdge(edge, number, one) if isinstance(one, Discarded) else one for one in commands]

    def _send(self, arrives: float, message: TaskMessage | ReportMessage) -> None:
        heapq.heappush(self.below.messages, (arrives, self.below.sent, message))
        self.below.sent += 1

    def _regroup_learns(self, edge: ClientId) -> None:
        """Take the edge's new statistics into account where groups are made again."""
        if self.regrouping is not None:
            self._set_groups(self.regrouping.learn(self.root.state.groups, self.below, edge, self.root.shape))

    def _set_groups(self, groups: Mapping[ClientId, GroupHistory]) -> None:
        for edge, history in groups.items():
            self.root.server.set_group(edge, history)

    def _max_in_flight(self, edge: ClientId) -> int:
        """Return the largest number of members of this edge that may be at work at once."""
        return min(len(self.root.state.groups[edge].members), self._edges[edge].server.max_in_flight)

    @property
    def _scoring(self) -> bool:
        """Whether the root waits for a canary score."""
        return self.root.state.canary.trial is not None

    def _edge(self, name: ClientId) -> Edge:
        edge = self._edges[name]
        edge.state = self.below.edges[name]  # a run that goes on brings another one
        return edge
