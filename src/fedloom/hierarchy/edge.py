"""An edge: a server that is a client of another one. It gets a task, has its members do it together, and reports one answer.

Source: HierFedLoRA, arXiv 2503.21213, 2025: groups aggregate several times among themselves in one global round. What the paper
leaves open is our choice: an inner round is one version of the inner server, `Budget.rounds` of them answer one outer task, and
optimiser moments live through these rounds and begin anew with the next outer task. Nothing here knows a method: any schedule and any
aggregator may stand above an edge, and any in it.

State. `EdgeState` is all that changes: the state of the inner server, which belongs only to the edge, the outer task in
it (`State.outer`), and what has been counted for the report. Without an outer task the inner server is stopped; members that come
and go are written down. With a task it begins at version 0 with the task's model, and `Budget.rounds` is its limit of versions.

Callers. `Tree` (one process) and `RegionServer` (a process of its own) call `handle(now, event)` with the events of members and with
`TaskReceived`, and `drop_task`, `go_down` and `come_back` for what happens to the edge itself. They carry out the commands, and
call again by `EdgeState.due`. Whoever restores a checkpoint sets `edge.state`; each call attaches it to the inner server first.

What may fail. A member's answer may be refused, a member may be lost, all of them may be: then, and after too many failures, the edge
reports the versions that there are; without any it ends the task with `Stop(reason)`. The edge may go offline: `go_down` keeps its
last version, what came after it is dropped. A task that arrives meanwhile waits.

Promises. Each outer task ends with exactly one `Report` or `Stop`, or with `drop_task`. An answer counts once in the report, however
often a schedule merged it. With the report everything under way is cancelled, and each accepted answer that is in no version is
`Discarded`. A report has the task's rank; sides that must not change are as they were sent. Layers that no member trained are left
out, because they are no contribution.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch

from fedloom.aggregate.shared.wrapper import Wrapper
from fedloom.core.events import (
    ClientJoined,
    ClientLost,
    Command,
    Discarded,
    Evaluate,
    Event,
    Publish,
    Reject,
    Report,
    Stop,
    TaskFailed,
    TaskReceived,
    TimerFired,
    UpdateArrived,
)
from fedloom.core.lora import Adapter, Factor, pad, server_rank, stack_with_fold, truncate_sum
from fedloom.core.participation import place_client
from fedloom.core.policies import Aggregator, BudgetRule, Fleet, Merge
from fedloom.core.registration import register
from fedloom.core.server import Server
from fedloom.core.server_state import State
from fedloom.core.transfer import encode_answer
from fedloom.core.types import Budget, ClientId, ClientState, Model, Profile, Result, Task, TaskStart, Update
from fedloom.hierarchy.group_statistics import StatisticsCollector


@dataclass(frozen=True, slots=True)
class Contribution:
    """Counts of one accepted answer in the report of an edge."""

    client: ClientId
    examples: int
    steps: int
    tokens: int


@dataclass(slots=True)
class SumInProgress:
    """A round of a group whose answers are only summed (`secure_edge`).

    Fields:
        members: how many members the round began with.
        ready: tasks whose members hold their parts ready.
        asked: number of the sum that was asked for (0: none was).
        lost: members that were lost while their sum was opened.
    """

    members: int = 0
    ready: list[int] = field(default_factory=list)
    asked: int = 0
    lost: list[ClientId] = field(default_factory=list)


@dataclass(slots=True)
class EdgeState:
    """State of an edge: all that changes in it.

    Fields:
        server: state of the inner server; stopped while the edge has no task.
        contributions: by task of a member, what its answer added to the model.
        loss: mean loss of the answers in the last version (None: not reported).
        trained_layers: layers that some member trained in this task.
        statistics: statistics for the root's plan, so far.
        local: client state of the edge, which stays here between its tasks, as at any client.
        due: time by which the edge must be called again (s; None: not before another event).
        down: whether the edge is offline; it will come back.
        waiting_task: task that arrived while it was down (None: none).
        summing: the round under way, where answers are only summed.
    """

    server: State
    contributions: dict[int, Contribution] = field(default_factory=dict)
    loss: float | None = None
    trained_layers: list[str] = field(default_factory=list)
    statistics: StatisticsCollector = field(default_factory=StatisticsCollector)
    local: ClientState = field(default_factory=ClientState)
    due: float | None = None
    down: bool = False
    waiting_task: Task | None = None
    summing: SumInProgress = field(default_factory=SumInProgress)

    @property
    def empty(self) -> bool:
        """Whether no member can be reached."""
        return not self.server.idle and not self.server.working


class Edge:
    """Works on one outer task at a time with its members; answers events with commands to them, and with `Report` or `Stop`.

    An edge never evaluates: scoring is the root's business.
    """

    def __init__(self, server: Server, reports_layers: bool = False, reports_times: bool = False) -> None:
        """Take over `server`, whose policies are the edge's and whose model is replaced with each task.

        Args:
            server: the inner server, which has done nothing yet.
            reports_layers: report all statistics, because the root's plan learns from them.
            reports_times: report how long members take, and nothing that costs arithmetic.
        """
        self.reports_statistics, self.reports_layers = reports_layers or reports_times, reports_layers
        server.state.stopped = True
        server.aggregator = FrozenPhase(server.aggregator)
        self.server, self.state = server, EdgeState(server.state)

    def handle(self, now: float, event: Event) -> list[Command]:
        """Return what to do about `event`, in the order in which it is to be done."""
        state = self._attach_state()
        if isinstance(event, TaskReceived):
            commands = self._begin(now, event.task)
        elif state.server.stopped:
            commands = self._note_member(now, event)
        else:
            commands = self._translated(self.server.handle(now, event))
            if not state.server.stopped and state.empty:
                commands += self._translated(self.server.stop(self._why_empty()))
        state.due = self.server.wake()
        return commands

    def drop_task(self, now: float) -> list[Command]:
        """Give up the outer task, which was cancelled; returns a `Discarded` for each answer that is dropped."""
        state = self._attach_state()
        state.waiting_task = None
        if state.server.outer is None:
            return []
        commands = self._cancel_and_discard(now, "the edge's task was given up")
        self._clear_task()
        return commands

    def go_down(self, now: float) -> list[Command]:
        """Go offline and keep the last version; returns a `Discarded` for each answer that came after it."""
        state = self._attach_state()
        state.down, state.due = True, None
        if state.server.stopped:
            return []
        commands = self._cancel_and_discard(now, "its edge died before it was merged")
        del state.server.arrived[state.server.retained :]
        return commands

    def come_back(self, now: float) -> list[Command]:
        """Come back online: go on with the task, or begin with the one that waits."""
        state = self._attach_state()
        state.down = False
        waiting, state.waiting_task = state.waiting_task, None
        if waiting is not None:
            return self.handle(now, TaskReceived(waiting))
        if state.server.outer is None:
            return []
        state.server.stopped = False
        return self.handle(now, TimerFired())

    def _attach_state(self) -> EdgeState:
        """Attach the state, also one that was restored from a checkpoint, to the inner server, and return it."""
        server, outer = self.state.server, self.state.server.outer
        self.server.state = server
        self.server.limits = replace(self.server.limits, versions=outer.budget.rounds if outer else 1)
        return self.state

    def _begin(self, now: float, task: Task) -> list[Command]:
        """Begin at version 0 with the task's model; tables of the members stay. Raises ValueError if there is a task already."""
        state, before = self.state, self.state.server
        if before.outer is not None:
            raise ValueError(f"task {task.id} came to an edge that works on task {before.outer.id}")
        if state.down:
            state.waiting_task = task
            return []
        model = initial_model(self.server.aggregator, task.start)
        fresh = replace(before, model=model, first=model, now=now, version=0, has_new_clients=False, stopped=False)
        state.server = replace(fresh, last_evaluated=-1, failures=0, last_failure="", latest=None, outer=task)
        self._attach_state()
        if state.empty:
            return self._translated(self.server.stop(self._why_empty()))
        return self._translated(self.server.handle(now, TimerFired()))

    def _note_member(self, now: float, event: Event) -> list[Command]:
        """Record members that come and go while there is no task, or the edge is down: no answer is expected."""
        server = self.state.server
        server.now = now
        match event:
            case ClientJoined(joined):
                profile = register(server.registered, joined)
                place_client(self.server.participation, server, profile)
            case ClientLost(client):
                server.resting.pop(client, None)
                if client in server.idle:
                    server.idle.take(client)
            case UpdateArrived(client, number, _) | TaskFailed(client, number, _):
                return [Reject(client, number, f"task {number} is not outstanding at client {client!r}")]
        return []

    def _why_empty(self) -> str:
        """Return why nobody can be given a task."""
        rule = self.server.participation
        return (rule and rule.why_nobody_starts(self.state.server)) or "no member is left"

    def _translated(self, commands: Sequence[Command]) -> list[Command]:
        """Return the inner server's commands as the edge's: at the end of its versions it reports."""
        translated = list[Command]()
        for command in commands:
            match command:
                case Publish(_, model, updates):
                    self._count(model, updates)
                    translated.append(command)
                case Stop(reason):
                    translated += self._finish_task(reason)
                case Evaluate():
                    pass
                case _:
                    translated.append(command)
        return translated

    def _count(self, model: Model, updates: Sequence[Update]) -> None:
        """Count each answer in a new version once, however often it is merged."""
        state = self.state
        for update in [update for update in updates if update.task.id not in state.contributions]:
            result = update.result
            state.trained_layers += [name for name in result.adapter.factors if name not in state.trained_layers]
            if self.reports_statistics:
                state.statistics.add_answer(update)
            contribution = Contribution(update.task.client, result.examples, result.steps, result.tokens)
            state.contributions[update.task.id] = contribution
        losses = [update.result.metrics["loss"] for update in updates if "loss" in update.result.metrics]
        state.loss = sum(losses) / len(losses) if losses else None
        if self.reports_layers:
            state.statistics.add_version(model, updates)

    def _finish_task(self, reason: str) -> list[Command]:
        """End the task: report the versions that there are; without any, give it up."""
        end: Command = self._report() if self.state.server.version else Stop(reason)
        commands = [*self._discards("its edge reported before it was merged"), end]
        self._clear_task()
        return commands

    def _cancel_and_discard(self, now: float, reason: str) -> list[Command]:
        """Cancel what is under way and discard what waits to be merged."""
        self.state.server.now = now
        under_way = [] if self.state.server.stopped else self.server.stop(reason)
        return [c for c in under_way if not isinstance(c, Evaluate | Stop)] + self._discards(reason)

    def _discards(self, reason: str) -> list[Command]:
        """Return a `Discarded` for each accepted answer that is in no version."""
        server = self.state.server
        return [Discarded(one.task.id, one.task.client, reason) for one in server.arrived[server.retained :]]

    def _clear_task(self) -> None:
        """Clear the task and all that was counted for it."""
        server = self.state.server
        server.outer, server.stopped, server.arrived, server.retained = None, True, [], 0
        self.state.contributions, self.state.loss, self.state.due = {}, None, None
        self.state.trained_layers, self.state.statistics = [], StatisticsCollector()

    def _report(self) -> Report:
        """Return the answer to the outer task, with statistics for a plan that learns."""
        state, outer = self.state, self.state.server.outer
        assert outer is not None
        if not self.reports_statistics:
            return Report(self._result())
        statistics = state.statistics.summary(outer.budget, state.server.model, state.loss)
        return Report(self._result(), statistics)

    def _result(self) -> Result:
        """Return the answer to the outer task.

        `examples` is the sum over contributing members (n_g), `steps` the mean number of steps per example.
        """
        state, task = self.state, self.state.server.outer
        assert task is not None
        contributions = state.contributions.values()
        members = {one.client: one.examples for one in contributions}
        examples, work = sum(members.values()), sum(one.examples * one.steps for one in contributions)
        adapter, lost = model_as_answer(task.start, state.server.model)
        adapter = with_fixed_sides(task.start, adapter) if task.start.rules.unchanged else adapter
        metrics: dict[str, float] = {"members": len(members), "rounds": state.server.version, "cut": lost}
        metrics |= {} if state.loss is None else {"loss": state.loss}
        steps = max(1, min(task.budget.steps, round(work / examples)))
        result = Result(adapter, examples, sum(one.tokens for one in contributions), steps, metrics)
        result, state.local = encode_answer(task, state.local, result, ClientState(task.start.basis))
        trained = {name: factor for name, factor in result.adapter.factors.items() if name in state.trained_layers}
        if len(trained) == len(task.start.train.factors):
            return result
        return replace(result, adapter=Adapter(trained, result.adapter.dense))


def steps_of_a_round(outer: Budget) -> int:
    """Return the steps that each member does in one round of an outer task."""
    return max(1, outer.steps // outer.rounds)


@dataclass(frozen=True, slots=True)
class MemberBudget:
    """Budget rule of an edge: what `plan` gives a member, with rank and depth no larger than those of the outer task.

    The steps are not the plan's: in each round every member trains the outer task's steps divided by its rounds (at least 1).
    """

    plan: BudgetRule

    def __call__(self, profile: Profile, fleet: Fleet) -> Budget:
        """Return the budget of this member's next task."""
        budget, outer = self.plan(profile, fleet), fleet.outer
        if outer is None:
            return budget
        rank, steps = min(budget.rank, outer.budget.rank), steps_of_a_round(outer.budget)
        depths = [depth for depth in (budget.depth, outer.budget.depth) if depth is not None]
        return replace(budget, rank=rank, steps=steps, rounds=1, depth=min(depths, default=None))


# The outer task as a model, and the model as an answer ------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class FrozenPhase(Wrapper):
    """Keep the phase of an alternating method at that of the outer task, so that the other sides come back as sent."""

    inner: Aggregator

    @property
    def merges_all_depths(self) -> bool:
        """Whether the wrapped method divides answers of different depths itself."""
        return getattr(self.inner, "merges_all_depths", False)

    def merge(self, model: Model, merge: Merge) -> Model:
        """Merge as `inner` does, and keep the phase."""
        return replace(self.inner.merge(model, merge), phase=model.phase)


def initial_model(aggregator: Aggregator, start: TaskStart) -> Model:
    """Return the model with which an edge begins a task: all that it was sent, also layers that are only in the fold."""
    model = aggregator.init(start.train)
    if start.fold is not None:
        model = replace(model, fold=stack_with_fold(start.fold, model.fold))
    return replace(model, phase=matching_phase(aggregator, model, start) or 0)


def trained_part(task: Task, result: Result) -> Task:
    """Return an outer task as it was answered: without the layers that no member trained."""
    asked, answered = task.start.train, result.adapter.factors
    if asked.factors.keys() == answered.keys():
        return task
    train = Adapter({name: factor for name, factor in asked.factors.items() if name in answered}, asked.dense)
    return replace(task, start=replace(task.start, train=train))


def matching_phase(aggregator: Aggregator, model: Model, start: TaskStart) -> int | None:
    """Return the phase in which the method keeps the sides that must come back unchanged in the outer task (None: no phase does)."""
    budget = Budget(server_rank(start.train), 1)
    for phase in (0, 1):
        if start.rules.unchanged <= aggregator.start(replace(model, phase=phase), budget, 0).rules.unchanged:
            return phase
    return None


def model_as_answer(start: TaskStart, model: Model) -> tuple[Adapter, float]:
    """Return the model as an answer to this start, and the share of its energy that had to be cut.

    What an edge folded is added to the adapter, as far as the rank of the task reaches. Without such a fold the answer is the
    model's adapter itself.
    """
    asked, trained = start.train.factors, model.adapter.factors
    fold_now, fold_sent = (fold.factors if fold else {} for fold in (model.fold, start.fold))
    changed = {name for name in asked if fold_now.get(name) is not fold_sent.get(name)}
    if not changed and all(trained[name].rank == factor.rank for name, factor in asked.items()):
        return model.adapter, 0.0
    factors, before, after = {}, 0.0, 0.0
    for name, factor in asked.items():
        terms, folds = [(1.0, trained[name])], ((1.0, fold_now), (-1.0, fold_sent))
        terms += [(sign, fold[name]) for sign, fold in folds if name in changed and name in fold]
        truncated, energy = truncate_sum(terms, factor.rank)
        factors[name] = pad(truncated, factor.rank)
        before, after = before + (energy or 0.0), after + float(truncated.up.double().square().sum())
    return Adapter(factors, model.adapter.dense), max(0.0, 1.0 - after / before) if before > 0 else 0.0


def with_fixed_sides(start: TaskStart, answer: Adapter) -> Adapter:
    """Return the nearest answer whose fixed sides are as they were sent: a method may have rotated them inside the edge."""
    factors = dict(answer.factors)
    for name, asked in start.train.factors.items():
        factor = answer.factors[name]
        if "down" in start.rules.unchanged and not factor.down.equal(asked.down):
            up = factor.up.double() @ (factor.down.double() @ torch.linalg.pinv(asked.down.double()))
            factors[name] = Factor(asked.down, up.to(factor.up))
        elif "up" in start.rules.unchanged and not factor.up.equal(asked.up):
            down = (torch.linalg.pinv(asked.up.double()) @ factor.up.double()) @ factor.down.double()
            factors[name] = Factor(down.to(factor.down), asked.up)
    return Adapter(factors, answer.dense)
