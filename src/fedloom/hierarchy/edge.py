"""An edge: a server that is someone's client. It gets a task, has it done by its members, and reports.

Source: HierFedLoRA, arXiv 2503.21213, 2025: groups aggregate several times among themselves in one global round. What the paper
leaves open is our choice: averages a round are counted (`Budget.rounds`), optimiser moments live through them and begin anew with
the next outer task. Nothing here knows a method: any schedule and any aggregator may stand above an edge, and any in it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from fedloom.core.events import (
    ClientJoined,
    ClientLost,
    Command,
    Discard,
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
from fedloom.core.lora import Adapter
from fedloom.core.policies import Assign, Fleet
from fedloom.core.server import Server, State
from fedloom.core.transfer import answered
from fedloom.core.types import Budget, ClientId, Local, Model, Profile, Result, Task, Update
from fedloom.hierarchy.edge_model import OneSided, first, onto, reported
from fedloom.hierarchy.group_statistics import Gathered


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
    mean of the last version, `trained` the layers that a member trained, `gathered` what the root's plan will want to know. `local`
    stays here between the tasks of the edge, as it does at any client. `due` is when the edge has to look again. While it is
    `down`, a task that reaches it is `waiting`.
    """

    server: State
    shares: dict[int, Share] = field(default_factory=dict)
    loss: float | None = None
    trained: list[str] = field(default_factory=list)
    gathered: Gathered = field(default_factory=Gathered)
    local: Local = field(default_factory=Local)
    due: float | None = None
    down: bool = False
    waiting: Task | None = None

    @property
    def empty(self) -> bool:
        """Whether no member can be reached."""
        return not self.server.idle and not self.server.working


class Edge:
    """Takes the events of its members, and `TaskReceived`; answers with commands to them, and with `Report`.

    `Stop` instead of a report says that it gives the task up. Scoring is nothing that an edge does. All answers of members belong to
    the outer task in which they were asked for: with the report everything that is under way is cancelled, whatever the schedule,
    and what came too late to be merged is discarded.
    """

    def __init__(self, server: Server, tells: bool = False, times: bool = False) -> None:
        """`server` is the policies of the edge; what it holds is replaced with each task.

        `tells`: the root's plan learns. `times`: the root wants to know how long members take, and no more.
        """
        self.tells, self.looks = tells or times, tells
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
        commands = self._halt(now, "the edge's task was given up")
        self._close()
        return commands

    def fall(self, now: float) -> list[Command]:
        """The edge dies and keeps its last version: what came after it is dropped, and said to be."""
        state = self._put()
        state.down, state.due = True, None
        if state.server.stopped:
            return []
        commands = self._halt(now, "its edge died before it was merged")
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
        """At version 0 with the task's model; what is known of the members stays. Raises ValueError if there is a task already."""
        state, before = self.state, self.state.server
        if before.outer is not None:
            raise ValueError(f"task {task.id} came to an edge that works on task {before.outer.id}")
        if state.down:
            state.waiting = task
            return []
        model = first(self.server.aggregator, task.start)
        fresh = replace(before, model=model, first=model, now=now, version=0, undecided=False, stopped=False)
        state.server = replace(fresh, asked=-1, failures=0, last_failure="", latest=None, outer=task)
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
                case Publish(_, model, updates):
                    self._count(model, updates)
                    told.append(command)
                case Stop(reason):
                    told += self._end(reason)
                case Evaluate():
                    pass
                case _:
                    told.append(command)
        return told

    def _count(self, model: Model, updates: Sequence[Update]) -> None:
        """Each answer once, however often it is merged."""
        known = self.state.shares.keys()
        for update in [update for update in updates if update.task.id not in known]:
            made = update.result
            self.state.trained += [name for name in made.adapter.factors if name not in self.state.trained]
            if self.tells:
                self.state.gathered.add(update)
            self.state.shares[update.task.id] = Share(update.task.client, made.examples, made.steps, made.tokens)
        losses = [update.result.metrics["loss"] for update in updates if "loss" in update.result.metrics]
        self.state.loss = sum(losses) / len(losses) if losses else None
        if self.looks:
            self.state.gathered.look(model, updates)

    def _end(self, reason: str) -> list[Command]:
        """Report what there is; without any version, give up."""
        done: Command = self._report() if self.state.server.version else Stop(reason)
        commands = [*self._discards("its edge reported before it was merged"), done]
        self._close()
        return commands

    def _halt(self, now: float, reason: str) -> list[Command]:
        """Nothing that is under way, or waits to be merged, counts any more."""
        self.state.server.now = now
        under_way = [] if self.state.server.stopped else self.server.stop(reason)
        return [c for c in under_way if not isinstance(c, Evaluate | Stop)] + self._discards(reason)

    def _discards(self, reason: str) -> list[Command]:
        """Accepted answers that are in no version."""
        server = self.state.server
        return [Discard(one.task.id, one.task.client, reason) for one in server.arrived[server.retained :]]

    def _close(self) -> None:
        """No task, and nothing of the last one left."""
        server = self.state.server
        server.outer, server.stopped, server.arrived, server.retained = None, True, [], 0
        self.state.shares, self.state.loss, self.state.due = {}, None, None
        self.state.trained, self.state.gathered = [], Gathered()

    def _report(self) -> Report:
        """The answer, and what a plan that learns is told."""
        state, outer = self.state, self.state.server.outer
        assert outer is not None
        told = state.gathered.told(outer.budget, state.server.model, state.loss) if self.tells else None
        return Report(self._result(), told)

    def _result(self) -> Result:
        """The answer to the outer task, and what it took: n_g, and the steps that an example was trained for.

        What no member trained is as it was sent and not in the answer: it is no contribution.
        """
        state, task = self.state, self.state.server.outer
        assert task is not None
        shares = state.shares.values()
        members = {share.client: share.examples for share in shares}
        examples, work = sum(members.values()), sum(share.examples * share.steps for share in shares)
        adapter, lost = reported(task.start, state.server.model)
        adapter = onto(task.start, adapter) if task.start.rules.kept else adapter
        metrics: dict[str, float] = {"members": len(members), "rounds": state.server.version, "cut": lost}
        metrics |= {} if state.loss is None else {"loss": state.loss}
        steps = max(1, min(task.budget.steps, round(work / examples)))
        result = Result(adapter, examples, sum(share.tokens for share in shares), steps, metrics)
        result, state.local = answered(task, state.local, result, Local(task.start.basis))
        held = {name: factor for name, factor in result.adapter.factors.items() if name in state.trained}
        return (
            replace(result, adapter=Adapter(held, result.adapter.dense))
            if len(held) < len(task.start.train.factors)
            else result
        )


@dataclass(frozen=True, slots=True)
class Below:
    """The plan of an edge: `plan` says what each member may do, and the outer task what all of them may at most.

    The steps of the outer task are shared out over its rounds; nobody trains deeper than the edge.
    """

    plan: Assign

    def __call__(self, profile: Profile, fleet: Fleet) -> Budget:
        """The budget of this member's next task."""
        own, outer = self.plan(profile, fleet), fleet.outer
        if outer is None:
            return own
        rank, steps = min(own.rank, outer.budget.rank), max(1, outer.budget.steps // outer.budget.rounds)
        depths = [depth for depth in (own.depth, outer.budget.depth) if depth is not None]
        return replace(own, rank=rank, steps=steps, rounds=1, depth=min(depths, default=None))
