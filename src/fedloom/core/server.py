"""The server as a pure state machine: events in, commands out. No clock, no network, no threads, no global randomness.

A driver (the virtual clock, or real machines) calls `handle(now, event)`, carries out the commands, and calls again no later
than `wake()`. Everything a schedule may decide on is in `Fleet`, everything that must survive a restart in `State`.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Protocol

from fedloom.core.codec import Codec
from fedloom.core.errors import Refused
from fedloom.core.events import (
    Cancel,
    ClientJoined,
    ClientLost,
    Command,
    Dispatch,
    Evaluate,
    Event,
    Publish,
    Reject,
    Stop,
    TaskFailed,
    UpdateArrived,
)
from fedloom.core.indexed_dict import IndexedTable
from fedloom.core.lora import server_rank
from fedloom.core.model_shape import Shape
from fedloom.core.partial_depth import merged, started
from fedloom.core.policies import Aggregator, Assign, Fleet, Merge, Schedule, need_fresh_answers
from fedloom.core.seeds import derive
from fedloom.core.transfer import handed
from fedloom.core.types import Budget, ClientId, GroupLog, Model, Profile, Start, Task, Update, within
from fedloom.core.validate_answer import fault


def inside(start: Start, outer: Task | None) -> Start:
    """What a member receives of an edge that works on this outer task: moments live through its rounds, and no longer."""
    return start if outer is None else replace(start, basis=f"{outer.id}:{start.basis}")


class Driven(Protocol):
    """What is driven: a server, or an edge in the place of one."""

    @property
    def state(self) -> State:
        """Of the server."""
        ...

    def handle(self, now: float, event: Event) -> list[Command]:
        """As `Server.handle`."""
        ...

    def wake(self) -> float | None:
        """As `Server.wake`."""
        ...


@dataclass(slots=True)
class State:
    """All that changes in a server.

    `bases` are the models that the outstanding tasks were cut from, `pruned` the rank to which a client pruned itself, above which
    it is asked for nothing. `outer` is an edge's own task, `groups` what the root of a tree knows of those of its edges.
    """

    model: Model
    first: Model
    now: float = 0.0
    version: int = 0
    next_task: int = 1
    undecided: bool = False
    stopped: bool = False
    asked: int = -1
    failures: int = 0
    last_failure: str = ""
    idle: IndexedTable[ClientId, Profile] = field(default_factory=IndexedTable)
    working: dict[ClientId, tuple[Profile, int]] = field(default_factory=dict)
    busy: dict[int, Task] = field(default_factory=dict)
    bases: dict[int, Model] = field(default_factory=dict)
    arrived: list[Update] = field(default_factory=list)
    retained: int = 0
    latest: ClientId | None = None
    seen: dict[ClientId, int] = field(default_factory=dict)
    dispatched: dict[ClientId, int] = field(default_factory=dict)
    worked: dict[ClientId, float] = field(default_factory=dict)
    pruned: dict[ClientId, int] = field(default_factory=dict)
    outer: Task | None = None
    groups: dict[ClientId, GroupLog] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Limits:
    """When a run ends and how often it is scored.

    It ends after `versions` global versions or at `seconds`, whichever is first, and if `failures` tasks in a row failed or were
    lost: when every answer is refused (training diverged, say), waiting longer helps nobody. `evaluate_every`: score the start,
    every so many versions and the last one; with 0 the last one alone.
    """

    versions: int = 10
    seconds: float | None = None
    failures: int = 100
    evaluate_every: int = 1

    def __post_init__(self) -> None:
        if self.versions < 1:
            raise Refused("limits.versions", self.versions, "a run makes at least 1 global version")
        if self.seconds is not None and not self.seconds > 0:
            raise Refused("limits.seconds", self.seconds, "give positive virtual seconds, or None for no limit")
        if self.failures < 1:
            raise Refused("limits.failures", self.failures, "how many tasks may fail in a row: at least 1")
        if self.evaluate_every < 0:
            raise Refused("limits.evaluate_every", self.evaluate_every, "score every 1, 2, ... versions; 0: the last")


class Server:
    """Holds the global model; asks the schedule when, the assign rule how much, the aggregator how."""

    def __init__(
        self,
        model: Model,
        aggregator: Aggregator,
        schedule: Schedule,
        assign: Assign,
        *,
        shape: Shape,
        limits: Limits,
        seed: int = 0,
        transfer: Codec | None = None,
    ) -> None:
        need_fresh_answers(aggregator, schedule)
        self.state = State(model, model)
        self.aggregator, self.schedule, self.assign = aggregator, schedule, assign
        self.shape, self.limits, self.seed, self.transfer = shape, limits, seed, transfer

    def handle(self, now: float, event: Event) -> list[Command]:
        """What to do about `event`, in the order in which it is to be done.

        Raises ValueError if time runs backwards: that is the driver's mistake, while a bad answer of a client is a `Reject`.
        """
        state = self.state
        if not now >= state.now:
            raise ValueError(f"event at {now} s after {state.now} s: a driver must deliver events in order of time")
        state.now = now
        if state.stopped:
            return []
        rejected = self._take(event)
        if rejected:
            return [rejected]
        state.latest = event.client if isinstance(event, UpdateArrived) else None
        if isinstance(event, ClientJoined):
            state.undecided = True
            return []
        state.undecided = False
        return self._decide()

    def wake(self) -> float | None:
        """The latest time at which to call `handle` again, with `TimerFired` if nothing else happens. Never in the past.

        Clients who join are only written down, and the wake time is then now: so a hundred that join together are all there
        when the first cohort is drawn.
        """
        state = self.state
        if state.stopped:
            return None
        if state.undecided:
            return state.now
        times = [self.schedule.wake(self.fleet()), self.limits.seconds]
        due = [max(time, state.now) for time in times if time is not None]
        return min(due) if due else None

    def fleet(self) -> Fleet:
        """The read-only view that policies get; O(1)."""
        state = self.state
        return Fleet(
            now=state.now,
            version=state.version,
            seed=self.seed,
            tasks=state.next_task - 1,
            idle=state.idle,
            busy=MappingProxyType(state.busy),
            arrived=state.arrived,
            shape=self.shape,
            seen=MappingProxyType(state.seen),
            dispatched=MappingProxyType(state.dispatched),
            worked=MappingProxyType(state.worked),
            latest=state.latest,
            retained=state.retained,
            first=state.first,
            outer=state.outer,
            groups=MappingProxyType(state.groups),
        )

    def start(self, budget: Budget, seed: int) -> Start:
        """What a client with this budget would receive now, to the bit."""
        model = self.state.model
        below = self.shape.below(model.adapter.factors, budget.depth)
        start = inside(started(self.aggregator, model, budget, seed, below), self.state.outer)
        return handed(start, self.transfer)

    def stop(self, reason: str) -> list[Command]:
        """End it here: nothing that is under way counts any more."""
        state = self.state
        commands: list[Command] = [self._cancel(number) for number in tuple(state.busy)]
        if state.asked < state.version:
            commands.append(self._evaluate())
        state.stopped = True
        return [*commands, Stop(reason)]

    def _take(self, event: Event) -> Reject | None:
        """Write the event into the state, or refuse it and leave the state as it was."""
        state = self.state
        match event:
            case ClientJoined(profile):
                if profile.client in state.working:
                    state.working[profile.client] = (profile, state.working[profile.client][1])
                else:
                    state.idle.put(profile.client, profile)
            case ClientLost(client):
                if client in state.working:
                    self._release(state.working[client][1])
                    state.failures, state.last_failure = state.failures + 1, f"client {client!r} was lost"
                if client in state.idle:
                    state.idle.take(client)
            case UpdateArrived(client, number) | TaskFailed(client, number) if (
                client not in state.working or state.working[client][1] != number
            ):
                return Reject(client, number, f"task {number} is not outstanding at client {client!r}")
            case UpdateArrived(client, number, result):
                task = state.busy[number]
                reason = fault(task, result)
                if reason:
                    return Reject(client, number, reason)
                state.arrived.append(Update(task, result, state.bases[number]))
                self._release(number)
                state.failures = 0
                if task.start.rules.pruning and (rank := server_rank(result.adapter)) < task.budget.rank:
                    state.pruned[client] = rank
                state.seen[client] = result.examples
            case TaskFailed(_, number, reason):
                self._release(number)
                state.failures, state.last_failure = state.failures + 1, reason
        return None

    def _release(self, number: int) -> Task:
        """Close a task; its client is idle again."""
        task = self.state.busy.pop(number)
        del self.state.bases[number]
        self.state.worked[task.client] = self.state.worked.get(task.client, 0.0) + self.state.now - task.sent
        self.state.idle.put(task.client, self.state.working.pop(task.client)[0])
        return task

    def _decide(self) -> list[Command]:
        """Merge while the schedule finds something to merge, then stop or start clients."""
        state, commands = self.state, list[Command]()
        if state.asked < 0 and self.limits.evaluate_every:
            commands.append(self._evaluate())
        fleet = self.fleet()
        while state.version < self.limits.versions and (merge := self.schedule.merge(fleet)):
            commands += self._merge(merge)
            fleet = self.fleet()
        if reason := self._finished():
            return commands + self.stop(reason)
        return commands + [self._dispatch(client, fleet) for client in self.schedule.start(fleet)]

    def _merge(self, merge: Merge) -> list[Command]:
        state = self.state
        commands: list[Command] = [self._cancel(number) for number in merge.cancel]
        state.model = merged(self.aggregator, state.model, merge)
        state.version += 1
        state.arrived, state.retained = list(merge.retain), len(merge.retain)
        commands.append(Publish(state.version, state.model, tuple(update for _, update in merge.parts)))
        every = self.limits.evaluate_every or self.limits.versions
        if state.version % every == 0 or state.version == self.limits.versions:
            commands.append(self._evaluate())
        return commands

    def _evaluate(self) -> Evaluate:
        self.state.asked = self.state.version
        return Evaluate(self.state.version, self.state.model)

    def _finished(self) -> str | None:
        if self.state.version >= self.limits.versions:
            return f"{self.state.version} versions made"
        if self.limits.seconds is not None and self.state.now >= self.limits.seconds:
            return f"{self.limits.seconds:g} s are over"
        if self.state.failures >= self.limits.failures:
            return f"{self.state.failures} tasks failed in a row, the last one: {self.state.last_failure}"
        return None

    def _cancel(self, number: int) -> Cancel:
        return Cancel(number, self._release(number).client)

    def _dispatch(self, client: ClientId, fleet: Fleet) -> Dispatch:
        state = self.state
        budget = within(self.assign(state.idle[client], fleet), state.idle[client].most)
        budget = replace(budget, rank=min(budget.rank, state.pruned.get(client, budget.rank)))
        number, state.next_task = state.next_task, state.next_task + 1
        start, seed = self.start(budget, derive(self.seed, "start", number)), derive(self.seed, "task", number)
        task = Task(number, client, state.version, start, budget, seed, state.now)
        state.busy[number], state.bases[number] = task, state.model
        state.working[client] = (state.idle.take(client), number)
        state.dispatched[client] = state.dispatched.get(client, 0) + 1
        return Dispatch(task)
