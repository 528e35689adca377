"""One reading of what happens in a run: the life of each task and each version, from the events and commands of every step.

    sent -> answered -> merged | unused
       \\-> failed | lost | cancelled

A driver shows every step `(now, event, commands)` to its observers. Metrics, slot usage, the status of a deployment, the progress
bar and experiments do not interpret events themselves: each has a `RunObservation`, turns a step into facts with `read`, and asks
it for what was counted so far. So there is one answer to "when does a task end", and staleness is computed in one place.

With a hierarchy there are tasks on two levels. Tasks of clients are counted as in a flat run. Tasks of edges are followed beside
them: an edge in this process is observed through `InsideEdge`, one elsewhere is a client of the root that joined with `EdgeJoined`.
A task of an edge elsewhere therefore ends twice: as a task of a client, and as a task of an edge (`TaskEnded.by_edge`).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from fedloom.core.events import (
    CanaryScored,
    Cancel,
    CheckCanary,
    ClientJoined,
    ClientLost,
    Command,
    Discarded,
    Dispatch,
    EdgeJoined,
    EdgeReported,
    Evaluate,
    Event,
    InsideEdge,
    Moved,
    PartsReady,
    Publish,
    Regroup,
    Reject,
    Report,
    ScoresReady,
    SetAside,
    Stop,
    TaskFailed,
    UpdateArrived,
)
from fedloom.core.types import ClientId, Model, Result, Task, Update
from fedloom.hierarchy.edge import trained_part
from fedloom.hierarchy.tree_state import BLOCK

TaskStatus: TypeAlias = Literal["merged", "unused", "failed", "lost", "cancelled"]
"""How a task ended: in a version, answered in vain, given up by its client, with its client gone, or called off by the server."""


@dataclass(slots=True)
class OpenTask:
    """A task that has not ended.

    Fields:
        task: as it was sent.
        edge: the edge that does it, or whose member does it (None: there are no edges).
        answered: when its answer was accepted (None: not yet).
        result: the answer of an edge (None for a task of a client, whose answer nobody here needs again).
    """

    task: Task
    edge: ClientId | None = None
    answered: float | None = None
    result: Result | None = None


@dataclass(frozen=True, slots=True)
class TaskSent:
    """A task was sent to a client."""

    task: Task


@dataclass(frozen=True, slots=True)
class TaskAnswered:
    """An answer arrived.

    Fields:
        client, number: whose it is, and the number of its task.
        result: the answer (None: nobody sees it, it is only summed).
        task: its task, with the layers that were trained (None: it was sent before the observation began).
        refused: whether the server rejected it.
    """

    client: ClientId
    number: int
    result: Result | None
    task: Task | None
    refused: bool


@dataclass(frozen=True, slots=True)
class TaskEnded:
    """A task ended.

    Fields:
        open: what was known of it.
        status: how it ended.
        reason: why, in words; empty for a merged one.
        update: what was merged (None: nothing).
        staleness: versions made since the one that it started from, if it was merged.
        by_edge: whether it is a task of an edge, and not of a client.
    """

    open: OpenTask
    status: TaskStatus
    reason: str
    update: Update | None = None
    staleness: int = 0
    by_edge: bool = False


@dataclass(frozen=True, slots=True)
class VersionMade:
    """A global version was made.

    Fields:
        version, model: its number, and itself.
        updates: what it was made of; one that was retained counts in each version that it is in.
        staleness: of each of these updates.
        evaluated: whether it is to be evaluated.
    """

    version: int
    model: Model
    updates: tuple[Update, ...]
    staleness: tuple[int, ...]
    evaluated: bool


@dataclass(frozen=True, slots=True)
class CanaryChecked:
    """A model was scored on the canary examples.

    Fields:
        check: what was asked for.
        scores: one for each example.
    """

    check: CheckCanary
    scores: tuple[float, ...]


Fact: TypeAlias = (
    TaskSent
    | TaskAnswered
    | TaskEnded
    | VersionMade
    | ScoresReady
    | CanaryChecked
    | SetAside
    | ClientJoined
    | ClientLost
    | Evaluate
    | Regroup
    | Moved
    | Stop
)


def staleness_in(task: Task, version: int) -> int:
    """Versions made between the one that the task started from and `version`, which its update is merged into."""
    return version - 1 - task.version


@dataclass(slots=True)
class RunObservation:
    """Counts and facts of a run so far. It may begin in the middle of one: what it has not seen, it does not count.

    Fields:
        edge_names: edges in this process, by which the numbers of tasks are read (empty: there are none).
        version: the last version.
        sent: tasks of clients that are neither answered nor over, by number, oldest first.
        outstanding: by client, its task among these; it has at most one.
        answered: those that are answered and in no version yet, in the order of their answers.
        edge_tasks: tasks of edges that are not over.
        remote_edges: edges elsewhere that have joined.
        accepted, rejected: answers.
        failed, cancelled: tasks of clients.
        merged_updates: updates in all versions; one that was retained counts in each.
        total_staleness: sum over these.
        scores: the latest ones.
        check: canary score that is outstanding (None: none is).
        set_aside: by client, its answers that were set aside.
    """

    edge_names: tuple[ClientId, ...] = ()
    version: int = 0
    sent: dict[int, OpenTask] = field(default_factory=dict)
    outstanding: dict[ClientId, int] = field(default_factory=dict)
    answered: dict[int, OpenTask] = field(default_factory=dict)
    edge_tasks: dict[int, OpenTask] = field(default_factory=dict)
    remote_edges: list[ClientId] = field(default_factory=list)
    accepted: int = 0
    rejected: int = 0
    failed: int = 0
    cancelled: int = 0
    merged_updates: int = 0
    total_staleness: int = 0
    scores: Mapping[str, float] = field(default_factory=dict)
    check: CheckCanary | None = None
    set_aside: dict[ClientId, int] = field(default_factory=dict)

    @property
    def mean_staleness(self) -> float | None:
        """Mean over all updates in all versions (None: there are none)."""
        return self.total_staleness / self.merged_updates if self.merged_updates else None

    def read(self, now: float, event: Event, commands: Sequence[Command]) -> Iterator[Fact]:
        """Count one step and yield its facts in order: those of the event, then those of each command.

        Has to be read to the end. While a fact is handled, the fields stand as they stood then: a version's `cancelled` does not
        count tasks that the same step cancels after it.
        """
        refused = {command.task for command in commands if isinstance(command, Reject)}
        yield from self._read_event(now, event, refused)
        if self.remote_edges or isinstance(event, EdgeJoined):
            yield from self._read_remote(now, event, bool(refused))
        evaluated = {command.version for command in commands if isinstance(command, Evaluate)}
        last_publish = max((k for k, command in enumerate(commands) if isinstance(command, Publish)), default=0)
        for k, command in enumerate(commands):
            yield from self._read_command(now, command, evaluated, before_publish=k < last_publish)

    def _read_event(self, now: float, event: Event, refused: Collection[int]) -> Iterator[Fact]:
        match event:
            case UpdateArrived() | PartsReady():
                yield self._read_answer(now, event, event.task in refused)
            case TaskFailed(_, number, reason) if number not in refused:
                self.failed += 1
                yield from self._end(number, "failed", reason)
            case ClientLost(client):
                if client in self.outstanding:
                    yield from self._end(self.outstanding[client], "lost", "the client is gone")
                if not refused:
                    yield event
            case ClientJoined() if not refused:
                yield event
            case ScoresReady(_, metrics):
                self.scores = metrics
                yield event
            case CanaryScored(_, scores) if self.check is not None:
                check, self.check = self.check, None
                yield CanaryChecked(check, scores)

    def _read_answer(self, now: float, event: UpdateArrived | PartsReady, refused: bool) -> TaskAnswered:
        """An answer, or that there is one which is only summed."""
        open_task = self.sent.get(event.task) or self.answered.get(event.task)
        if not refused:
            self.accepted += 1
            if open_task is not None:
                open_task.answered = now
                self.answered[event.task] = self._take_sent(event.task) or open_task
        result, task = event.result if isinstance(event, UpdateArrived) else None, open_task.task if open_task else None
        if task is not None and isinstance(event, EdgeReported):
            task = trained_part(task, event.result)
        return TaskAnswered(event.client, event.task, result, task, refused)

    def _read_remote(self, now: float, event: Event, refused: bool) -> Iterator[Fact]:
        """An event as one of an edge elsewhere."""
        match event:
            case EdgeJoined(profile) if not refused and profile.client not in self.remote_edges:
                self.remote_edges.append(profile.client)
            case EdgeReported(_, number, result) if not refused and number in self.edge_tasks:
                self.edge_tasks[number].answered, self.edge_tasks[number].result = now, result
            case TaskFailed(edge, number, reason) if not refused and edge in self.remote_edges:
                yield from self._end_edge_task(number, "failed", reason)
            case ClientLost(edge) if edge in self.remote_edges:
                unanswered = [n for n, one in self.edge_tasks.items() if one.edge == edge and one.answered is None]
                for number in unanswered:
                    yield from self._end_edge_task(number, "failed", "the edge was lost")

    def _read_command(
        self, now: float, command: Command, evaluated: Collection[int], before_publish: bool
    ) -> Iterator[Fact]:
        match command:
            case Dispatch(task):
                edge = self.edge_names[(task.id - 1) // BLOCK] if self.edge_names else None
                self.sent[task.id], self.outstanding[task.client] = OpenTask(task, edge), task.id
                if task.client in self.remote_edges:
                    self.edge_tasks[task.id] = OpenTask(task, task.client)
                yield TaskSent(task)
            case Cancel():
                yield from self._cancel(command, before_publish)
            case Reject():
                self.rejected += 1
            case Publish(version, model, updates):
                yield from self._merge(updates, version)
                stale = tuple(staleness_in(update.task, version) for update in updates)
                self.version = version
                self.merged_updates += len(stale)
                self.total_staleness += sum(stale)
                yield VersionMade(version, model, updates, stale, version in evaluated)
            case InsideEdge():
                yield from self._read_inside(now, command)
            case Stop():
                yield from self._stop()
                yield command
            case CheckCanary():
                self.check = command
            case SetAside(client, number, reason):
                self.set_aside[client] = self.set_aside.get(client, 0) + 1
                yield from self._end(number, "unused", reason)
                yield from self._end_edge_task(number, "unused", reason)
                yield command
            case Evaluate() | Regroup() | Moved():
                yield command

    def _read_inside(self, now: float, inside: InsideEdge) -> Iterator[Fact]:
        """A command inside a tree: of an edge's own version, or about the task of an edge."""
        match inside.command:
            case Publish(version, _, updates):
                yield from self._merge(updates, version)
            case Discarded(number, _, reason):
                yield from self._end(number, "unused", reason)
            case Dispatch(task):
                self.edge_tasks[task.id] = OpenTask(task, inside.edge)
            case Report(result):
                open_task = self.edge_tasks[inside.task]
                open_task.answered, open_task.result = now, result
            case Cancel():
                yield from self._end_edge_task(inside.task, "cancelled", "its answer no longer counts")
            case Reject(_, _, reason) | Stop(reason):
                yield from self._end_edge_task(inside.task, "failed", reason)

    def _merge(self, updates: Sequence[Update], version: int) -> Iterator[Fact]:
        """Tasks whose update is in a version for the first time. A retained update has ended before."""
        for update in updates:
            staleness = staleness_in(update.task, version)
            yield from self._end(update.task.id, "merged", "", update, staleness)
            if self.edge_tasks:
                yield from self._end_edge_task(update.task.id, "merged", "", update, staleness)

    def _cancel(self, cancel: Cancel, before_publish: bool) -> Iterator[Fact]:
        if cancel.client in self.remote_edges:
            yield from self._end_edge_task(cancel.task, "cancelled", "its answer no longer counts")
        self.cancelled += 1
        if cancel.task in self.sent:
            yield from self._end(cancel.task, "cancelled", self._why_cancelled(cancel.task, before_publish))
        yield from self._end(cancel.task, "unused", "it was ready to be summed, and its sum was not opened")

    def _stop(self) -> Iterator[Fact]:
        reason = "the run ended before it was merged"
        for number in list(self.answered):
            yield from self._end(number, "unused", reason)
        for number in list(self.edge_tasks):
            yield from self._end_edge_task(number, "unused", reason)

    def _why_cancelled(self, number: int, before_publish: bool) -> str:
        """A merge cancels tasks before its version is published, the end of a run cancels them after the last one."""
        if self.edge_names:
            return "its edge does not wait for it any more"
        if not before_publish:
            return "the run ended before it was answered"
        # The version being made is the next one, so that this answer could be in the one after it at the earliest.
        behind = staleness_in(self.sent[number].task, self.version + 2)
        return "the round was closed without it" if behind == 1 else f"its answer would have been {behind} versions old"

    def _end(
        self, number: int, status: TaskStatus, reason: str, update: Update | None = None, staleness: int = 0
    ) -> Iterator[Fact]:
        open_task = self._take_sent(number) or self.answered.pop(number, None)
        if open_task is not None:
            yield TaskEnded(open_task, status, reason, update, staleness)

    def _take_sent(self, number: int) -> OpenTask | None:
        """Remove and return a task that was neither answered nor over; None if it is no such one."""
        open_task = self.sent.pop(number, None)
        if open_task is not None:
            self.outstanding.pop(open_task.task.client, None)
        return open_task

    def _end_edge_task(
        self, number: int, status: TaskStatus, reason: str, update: Update | None = None, staleness: int = 0
    ) -> Iterator[Fact]:
        open_task = self.edge_tasks.pop(number, None)
        if open_task is not None:
            yield TaskEnded(open_task, status, reason, update, staleness, by_edge=True)
