"""An edge: a server that is someone's client. It gets a task, has it done by its members, and reports.

Source: HierFedLoRA, arXiv 2503.21213, 2025: groups aggregate several times among themselves in one global round. What the paper leaves
open is our choice: averages a round are counted (`Budget.rounds`), optimiser moments live through them and begin anew with the next
outer task. Nothing here knows a method: any schedule and any aggregator may stand above an edge, and any in it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from fedloom.aggregate.wrap import Around
from fedloom.lora import Adapter, Factor, pad, server_rank, stack, truncate_sum
from fedloom.server import Server, State
from fedloom.transfer import answered
from fedloom.types import (
    Aggregator,
    Assign,
    Budget,
    ClientId,
    ClientJoined,
    ClientLost,
    Command,
    Discard,
    Evaluate,
    Event,
    Fleet,
    Local,
    Merge,
    Model,
    Profile,
    Publish,
    Reject,
    Report,
    Result,
    Start,
    Stop,
    Task,
    TaskFailed,
    TaskReceived,
    TimerFired,
    Update,
    UpdateArrived,
)


@dataclass(frozen=True, slots=True)
class Share:
    """What one accepted answer added to an edge's task."""

    client: ClientId
    examples: int
    steps: int
    tokens: int


@dataclass(slots=True)
class EdgeState:
    """All that changes in an edge.

    `server` is stopped while the edge has no task. `shares` are those of the answers in the model, by task; `loss` is the members'
    mean of the last version. `local` stays here between the tasks of the edge, as it does at any client. `due` is when the edge has
    to look again. While it is `down`, a task that reaches it is `waiting`.
    """

    server: State
    shares: dict[int, Share] = field(default_factory=dict)
    loss: float | None = None
    local: Local = field(default_factory=Local)
    due: float | None = None
    down: bool = False
    waiting: Task | None = None

    @property
    def empty(self) -> bool:
        """Whether no member can be reached."""
        return not self.server.idle and not self.server.working


class Edge:
    """Takes the events of its members, and `TaskReceived`; answers with commands to them, with `Report`, or, where it gives up, `Stop`.

    `Evaluate` is nothing that an edge does. All answers of members belong to the outer task in which they were asked for: with the
    report everything that is under way is cancelled, whatever the schedule, and what came too late to be merged is discarded.
    """

    def __init__(self, server: Server) -> None:
        """`server` is the policies of the edge; what it holds is replaced with each task."""
        server.state.stopped = True
        server.aggregator = OneSided(server.aggregator)
        self.server, self.state = server, EdgeState(server.state)

    def handle(self, now: float, event: Event) -> list[Command]:
        """What to do about `event`, in the order in which it is to be done."""
        state = self._put()
        if isinstance(event, TaskReceived):
            commands = self._begin(now, event.task)
        elif state.server.stopped:
            commands = self._rest(now, event)
        else:
            commands = self._told(self.server.handle(now, event))
            if not state.server.stopped and state.empty:
                commands += self._told(self.server.stop("no member is left"))
        state.due = self.server.wake()
        return commands

    def give_up(self, now: float) -> list[Command]:
        """The outer task is worth nothing any more: what was done for it is dropped, and said to be."""
        state = self._put()
        state.waiting = None
        if state.server.outer is None:
            return []
        state.server.now = now
        commands = [] if state.server.stopped else [c for c in self.server.stop("") if not isinstance(c, Evaluate | Stop)]
        commands += self._discards("the edge's task was given up")
        self._close()
        return commands

    def fall(self, now: float) -> list[Command]:
        """The edge dies and keeps its last version: what came after it is dropped, and said to be."""
        state = self._put()
        state.down, state.due = True, None
        if state.server.stopped:
            return []
        state.server.now = now
        commands = [command for command in self.server.stop("") if not isinstance(command, Evaluate | Stop)]
        commands += self._discards("its edge died before it was merged")
        del state.server.arrived[state.server.retained :]
        return commands

    def rise(self, now: float) -> list[Command]:
        """The edge is there again and goes on where it was, or begins with the task that waited for it."""
        state = self._put()
        state.down = False
        waiting, state.waiting = state.waiting, None
        if waiting is not None:
            return self.handle(now, TaskReceived(waiting))
        if state.server.outer is None:
            return []
        state.server.stopped = False
        return self.handle(now, TimerFired())

    def _put(self) -> EdgeState:
        """The state onto the server, also one that was restored."""
        server, outer = self.state.server, self.state.server.outer
        self.server.state = server
        self.server.limits = replace(self.server.limits, versions=outer.budget.rounds if outer else 1)
        return self.state

    def _begin(self, now: float, task: Task) -> list[Command]:
        """A fresh model of the outer task; what is known of the members stays. Raises ValueError if there is a task already."""
        state, before = self.state, self.state.server
        if before.outer is not None:
            raise ValueError(f"task {task.id} came to an edge that works on task {before.outer.id}")
        if state.down:
            state.waiting = task
            return []
        model = first(self.server.aggregator, task)
        known = {"idle": before.idle, "seen": before.seen, "dispatched": before.dispatched, "pruned": before.pruned}
        state.server = State(model, model, now=now, next_task=before.next_task, outer=task, **known)  # type: ignore[arg-type]
        self._put()
        if state.empty:
            return self._told(self.server.stop("no member is left"))
        return self._told(self.server.handle(now, TimerFired()))

    def _rest(self, now: float, event: Event) -> list[Command]:
        """Without a task, or down: who is there is written down, and nothing is expected from anybody."""
        server = self.state.server
        server.now = now
        match event:
            case ClientJoined(profile):
                server.idle.put(profile.client, profile)
            case ClientLost(client) if client in server.idle:
                server.idle.take(client)
            case UpdateArrived(client, number, _) | TaskFailed(client, number, _):
                return [Reject(client, number, f"task {number} is not outstanding at client {client!r}")]
        return []

    def _told(self, commands: Sequence[Command]) -> list[Command]:
        """The server's commands as the edge's: at the end of its versions it reports."""
        told = list[Command]()
        for command in commands:
            match command:
                case Publish(_, _, updates):
                    self._count(updates)
                    told.append(command)
                case Stop(reason):
                    told += self._end(reason)
                case Evaluate():
                    pass
                case _:
                    told.append(command)
        return told

    def _count(self, updates: Sequence[Update]) -> None:
        """Each answer once, however often it is merged."""
        for update in updates:
            made = update.result
            self.state.shares[update.task.id] = Share(update.task.client, made.examples, made.steps, made.tokens)
        losses = [update.result.metrics["loss"] for update in updates if "loss" in update.result.metrics]
        self.state.loss = sum(losses) / len(losses) if losses else None

    def _end(self, reason: str) -> list[Command]:
        """Report what there is; without any version, give up."""
        done: Command = Report(self._result()) if self.state.server.version else Stop(reason)
        commands = [*self._discards("its edge reported before it was merged"), done]
        self._close()
        return commands

    def _discards(self, reason: str) -> list[Command]:
        server = self.state.server
        return [Discard(one.task.id, one.task.client, reason) for one in server.arrived[server.retained :]]

    def _close(self) -> None:
        """No task, and nothing of the last one left."""
        server = self.state.server
        server.outer, server.stopped, server.arrived, server.retained = None, True, [], 0
        self.state.shares, self.state.loss, self.state.due = {}, None, None

    def _result(self) -> Result:
        """The answer to the outer task, and what it took: n_g, and the steps that an example was trained for."""
        state, task = self.state, self.state.server.outer
        assert task is not None
        shares = state.shares.values()
        members = {share.client: share.examples for share in shares}
        examples, work = sum(members.values()), sum(share.examples * share.steps for share in shares)
        adapter, lost = reported(task.start, state.server.model)
        adapter = _onto(task.start, adapter) if task.start.rules.kept else adapter
        metrics: dict[str, float] = {"members": len(members), "rounds": state.server.version, "cut": lost}
        metrics |= {} if state.loss is None else {"loss": state.loss}
        steps = max(1, min(task.budget.steps, round(work / examples)))
        result = Result(adapter, examples, sum(share.tokens for share in shares), steps, metrics)
        result, state.local = answered(task, state.local, result, Local(task.start.basis))
        return result


@dataclass(frozen=True, slots=True)
class Below:
    """The plan of an edge: `plan` says what each member may do, and the outer task what all of them may at most.

    The steps of the outer task are shared out over its rounds.
    """

    plan: Assign

    def __call__(self, profile: Profile, fleet: Fleet) -> Budget:
        """The budget of this member's next task."""
        own, outer = self.plan(profile, fleet), fleet.outer
        if outer is None:
            return own
        rank, steps = min(own.rank, outer.budget.rank), max(1, outer.budget.steps // outer.budget.rounds)
        return replace(own, rank=rank, steps=steps, rounds=1)


@dataclass(frozen=True, slots=True)
class OneSided(Around):
    """`inner`, but a method that trains its sides in turn stays at the side of the outer task: the other one has to come back as it was."""

    inner: Aggregator

    def merge(self, model: Model, merge: Merge) -> Model:
        """The wrapped merge; it is nobody else's turn yet."""
        return replace(self.inner.merge(model, merge), phase=model.phase)


def first(aggregator: Aggregator, task: Task) -> Model:
    """The model with which an edge begins this task: all that the task holds."""
    start = task.start
    model = aggregator.init(start.train)
    if start.fold is not None:
        model = replace(model, fold=start.fold if model.fold is None else _beside(start.fold, model.fold))
    return replace(model, phase=phase(aggregator, model, start) or 0)


def phase(aggregator: Aggregator, model: Model, start: Start) -> int | None:
    """In which turn the method leaves alone what the outer task wants back as it was; None: in none."""
    budget = Budget(server_rank(start.train), 1)
    for turn in (0, 1):
        if start.rules.kept <= aggregator.start(replace(model, phase=turn), budget, 0).rules.kept:
            return turn
    return None


def reported(start: Start, model: Model) -> tuple[Adapter, float]:
    """The model as an answer to this start, and the share of its energy that had to be cut.

    What an edge folded is put into the adapter, as far as the rank of the task reaches; as long as nothing was, that is the adapter.
    """
    asked, given = start.train.factors, model.adapter.factors
    if model.fold is start.fold and all(given[name].rank == factor.rank for name, factor in asked.items()):
        return model.adapter, 0.0
    factors, before, after = {}, 0.0, 0.0
    for name, factor in asked.items():
        terms = [(1.0, given[name])]
        terms += [
            (sign, fold.factors[name])
            for sign, fold in ((1.0, model.fold), (-1.0, start.fold))
            if fold is not None and name in fold.factors and model.fold is not start.fold
        ]
        kept, energy = truncate_sum(terms, factor.rank)
        factors[name] = pad(kept, factor.rank)
        before, after = before + energy, after + float(kept.up.double().square().sum())
    return Adapter(factors, model.adapter.dense), max(0.0, 1.0 - after / before) if before > 0 else 0.0


def _onto(start: Start, given: Adapter) -> Adapter:
    """The nearest answer that has the sides as they were sent that are to come back so: a method may have turned them inside."""
    factors = dict(given.factors)
    for name, asked in start.train.factors.items():
        own = given.factors[name]
        if "down" in start.rules.kept and not own.down.equal(asked.down):
            up = own.up.double() @ (own.down.double() @ torch.linalg.pinv(asked.down.double()))
            factors[name] = Factor(asked.down, up.to(own.up))
        elif "up" in start.rules.kept and not own.up.equal(asked.up):
            down = (torch.linalg.pinv(asked.up.double()) @ own.up.double()) @ own.down.double()
            factors[name] = Factor(down.to(own.down), asked.up)
    return Adapter(factors, given.dense)


def _beside(one: Adapter, other: Adapter) -> Adapter:
    """Two folds as one."""
    both: dict[str, Factor] = {**one.factors, **other.factors}
    for name in one.factors.keys() & other.factors.keys():
        both[name] = stack([(1.0, one.factors[name]), (1.0, other.factors[name])])
    return Adapter({name: both[name] for name in sorted(both)})
