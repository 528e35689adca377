"""What the edges of a hierarchy did of their tasks: a line a task in `metrics.jsonl`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from fedloom import payload
from fedloom.edgemodel import narrowed
from fedloom.types import Cancel, ClientId, Dispatch, Reject, Report, Result, Stop, Task, Update, Within


@dataclass(slots=True)
class Asked:
    """An outer task under way, and when it was answered with what."""

    edge: ClientId
    task: Task
    reported: float | None = None
    result: Result | None = None


@dataclass(slots=True)
class EdgeTasks:
    """Follows the tasks of edges. A line tells what an edge was asked for and what it did; `work` is the weight of `by_work`."""

    open: dict[int, Asked] = field(default_factory=dict)

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
        line |= {"status": status, "reason": reason, "bytes_down": payload.down(task.start).total}
        if result is not None:
            line |= {name: result.metrics.get(name) for name in ("members", "rounds", "loss", "cut")}
            line |= {"examples": result.examples, "steps": result.steps, "work": result.examples * result.steps}
            line |= {"bytes_up": payload.up(narrowed(task, result), result).total}
        yield line
