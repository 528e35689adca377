"""What the edges of a hierarchy did of their tasks: a line a task in `metrics.jsonl`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from fedloom.core import message_size
from fedloom.core.events import (
    Cancel,
    ClientLost,
    Command,
    Dispatch,
    EdgeJoined,
    EdgeReported,
    Event,
    Move,
    Moved,
    Regroup,
    Reject,
    Report,
    Stop,
    TaskFailed,
    UpdateArrived,
    Within,
)
from fedloom.core.types import ClientId, Result, Task, Update
from fedloom.hierarchy.edge_model import narrowed


def answered(task: Task, event: UpdateArrived) -> Task:
    """The task as it was answered: an edge may leave out layers."""
    return narrowed(task, event.result) if isinstance(event, EdgeReported) else task


@dataclass(slots=True)
class Asked:
    """An outer task under way, and when it was answered with what."""

    edge: ClientId
    task: Task
    reported: float | None = None
    result: Result | None = None


@dataclass(slots=True)
class EdgeTasks:
    """Follows the tasks of edges. A line tells what an edge was asked for and what it did; `work` is the weight of `by_work`.

    `elsewhere` are those edges that are, whose tasks are dispatched as those of any client.
    """

    open: dict[int, Asked] = field(default_factory=dict)
    elsewhere: list[ClientId] = field(default_factory=list)

    def heard(self, now: float, event: Event, refused: bool) -> Iterator[dict[str, object]]:
        """The lines of tasks of edges elsewhere that end here without being merged."""
        match event:
            case EdgeJoined(profile) if not refused and profile.client not in self.elsewhere:
                self.elsewhere.append(profile.client)
            case EdgeReported(edge, number, result) if not refused and number in self.open:
                yield from self.follow(now, Within(edge, number, Report(result)))
            case TaskFailed(edge, number, reason) if not refused and edge in self.elsewhere:
                yield from self._ended(now, number, "failed", reason)
            case ClientLost(edge) if edge in self.elsewhere:
                lost = [n for n, asked in self.open.items() if asked.edge == edge and asked.reported is None]
                for number in lost:
                    yield from self._ended(now, number, "failed", "the edge was lost")

    def told(self, now: float, command: Command) -> Iterator[dict[str, object]]:
        """The same by what edges elsewhere are told."""
        match command:
            case Dispatch(task) if task.client in self.elsewhere:
                yield from self.follow(now, Within(task.client, task.id, command))
            case Cancel(number, edge) if edge in self.elsewhere:
                yield from self.follow(now, Within(edge, number, command))

    def follow(self, now: float, within: Within) -> Iterator[dict[str, object]]:
        """The line of a task that ends here without being merged."""
        match within.what:
            case Dispatch(task):
                self.open[task.id] = Asked(within.edge, task)
            case Report(result):
                self.open[within.task].reported, self.open[within.task].result = now, result
            case Cancel():
                yield from self._ended(now, within.task, "cancelled", "its answer no longer counts")
            case Reject(_, _, reason) | Stop(reason):
                yield from self._ended(now, within.task, "failed", reason)

    def merged(self, now: float, update: Update, behind: int) -> Iterator[dict[str, object]]:
        """The line of a task that is in a version for the first time, whose answer was so many versions `behind`."""
        took = {part: update.result.metrics.get(f"seconds_{part}", 0.0) for part in ("down", "train", "up")}
        for line in self._ended(now, update.task.id, "merged", ""):
            yield line | {"seconds": took, "staleness": behind}

    def left(self, now: float) -> Iterator[dict[str, object]]:
        """The lines of what the end of the run found reported and not merged."""
        for number in list(self.open):
            yield from self._ended(now, number, "unused", "the run ended before it was merged")

    def _ended(self, now: float, number: int, status: str, reason: str) -> Iterator[dict[str, object]]:
        asked = self.open.pop(number, None)
        if asked is None:
            return
        task, result = asked.task, asked.result
        line: dict[str, object] = {"kind": "edge", "id": number, "edge": asked.edge, "version": task.version}
        line |= {name: getattr(task.budget, name) for name in ("rank", "depth", "why")}
        line |= {"sent": task.sent, "reported": asked.reported, "ended": now}
        line |= {"status": status, "reason": reason, "bytes_down": message_size.down(task.start).total}
        if result is not None:
            line |= {name: result.metrics.get(name) for name in ("members", "rounds", "loss", "cut")}
            line |= {"examples": result.examples, "steps": result.steps, "work": result.examples * result.steps}
            line |= {"bytes_up": message_size.up(narrowed(task, result), result).total}
        yield line


def regrouped(now: float, command: Regroup | Moved) -> dict[str, object]:
    """The line of groups that were made again, or of a client that moved."""
    if isinstance(command, Moved):
        return {"kind": "move", "time": now, **_move(command.move)}
    line = {"kind": "regroup", "version": command.version, "time": now, "drift": command.drift}
    return {**line, "threshold": command.threshold, "moves": [_move(one) for one in command.moves]}


def _move(move: Move) -> dict[str, object]:
    return {"client": move.client, "edge": move.edge, "to": move.to}
