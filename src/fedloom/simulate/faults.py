"""What goes wrong with tasks on the virtual clock: failures, drop-outs in the middle of work, answers that come too late."""

from __future__ import annotations

import math
from dataclasses import dataclass

from fedloom.core.errors import Refused
from fedloom.core.events import TaskFailed
from fedloom.core.seeds import rng
from fedloom.core.types import ClientId, Task


@dataclass(frozen=True, slots=True)
class Vanished:
    """A client is cut off in the middle of this task. The server does not know it yet."""

    client: ClientId
    task: int


@dataclass(frozen=True, slots=True)
class Faults:
    """Probabilities of what may go wrong with a task. Every draw is named after the run's seed, the client and the task.

    Fields:
        dropout: the client vanishes at a uniform moment of its work, and its work is lost (probability a task; 0.05).
        dropout_per_second: the same at a constant rate, so that long tasks are hit more often (a second of work; 0).
        fail: the client gives up at a uniform moment of its work, and says so (probability a task; 0.01).
        back_after: mean of the exponential time after which a vanished client is back (seconds; 60; None: never). One that is back
            before the server has noticed reconnects, and reports its task as failed.
        notice: how long after a client vanished the server learns of it (seconds; 0: at once).
        late: work whose answer no longer counts (the task was cancelled, the client lost) is still finished (probability; 0). Its
            answer is sent when it is ready and the client is back.
    """

    dropout: float = 0.05
    dropout_per_second: float = 0.0
    fail: float = 0.01
    back_after: float | None = 60.0
    notice: float = 0.0
    late: float = 0.0

    def __post_init__(self) -> None:
        for name in ("dropout", "fail", "late"):
            if not 0 <= getattr(self, name) <= 1:
                raise Refused(f"faults.{name}", getattr(self, name), "a probability, from 0 to 1")
        for name in ("dropout_per_second", "notice"):
            if not 0 <= getattr(self, name) < math.inf:
                raise Refused(f"faults.{name}", getattr(self, name), "0 or a positive number")
        if self.back_after is not None and not 0 < self.back_after < math.inf:
            raise Refused("faults.back_after", self.back_after, "mean seconds until a client is back, None for never")

    def interruption(self, task: Task, seconds: float, seed: int) -> tuple[float, TaskFailed | Vanished] | None:
        """Return what stops this task of so many seconds, and after how many (None: nothing does)."""
        draw = rng(seed, "fault", task.client, task.id)
        fails, failing, drops, dropping, never = (draw.random() for _ in range(5))
        moments = [failing * seconds if fails < self.fail else math.inf]
        moments += [dropping * seconds if drops < self.dropout else math.inf]
        moments += [-math.log1p(-never) / self.dropout_per_second if self.dropout_per_second else math.inf]
        if min(moments) > seconds:
            return None
        if moments[0] == min(moments):
            return moments[0], TaskFailed(task.client, task.id, "the device gave up")
        return min(moments), Vanished(task.client, task.id)

    def outage(self, client: ClientId, task: int, seed: int) -> float:
        """Return the seconds that a client is away that vanished in this task."""
        if not self.back_after:
            return math.inf if self.back_after is None else 0.0
        return rng(seed, "outage", client, task).expovariate(1 / self.back_after)

    def comes_late(self, client: ClientId, task: int, seed: int) -> bool:
        """Whether the answer is sent although the task was dropped."""
        return self.late > 0 and rng(seed, "late", client, task).random() < self.late
