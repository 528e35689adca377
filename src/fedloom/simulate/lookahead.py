"""Conservative look-ahead: a task's answer is waited for when the virtual clock reaches the first moment at which it can matter.

Until then its training may go on in other processes beside that of other tasks. The device model says how
long a task takes at least, for the least answer that can come, so the clock never passes a moment at which something should have
happened. Order numbers are reserved for a task's events when it is dispatched: ties in time are broken as if all had been known.
Source: the conservative synchronisation of Chandy and Misra 1979, lookahead in the words of Fujimoto 1990.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import TypeGuard

from fedloom.core.policies import BackgroundTrainer, PendingResult, Trainer
from fedloom.core.types import ClientState, Result, Task


@dataclass(frozen=True, slots=True)
class Pending:
    """A task whose answer is not known yet.

    Fields:
        task: the task.
        before: what was at its client when it was sent.
        turn: number of the client's earlier tasks.
        least: the seconds that it takes at least.
        answer: waits for the answer.
        back: it was dropped, and its answer is sent all the same when the client is back (virtual seconds; None: it was not dropped).
    """

    task: Task
    before: ClientState
    turn: int
    least: float
    answer: PendingResult
    back: float | None = None


def overlaps(trainer: Trainer) -> TypeGuard[BackgroundTrainer]:
    """Whether the trainer can train in the background. Asked once a class, since a protocol takes ten microseconds to answer."""
    return _overlaps(type(trainer))


@cache
def _overlaps(kind: type[Trainer]) -> bool:
    return issubclass(kind, BackgroundTrainer)


def start_training(
    trainer: Trainer, work: Sequence[tuple[Task, ClientState]], due: Sequence[float]
) -> Sequence[PendingResult]:
    """Start the training of a cohort; returns its answers. A trainer that cannot overlap trains it here and now."""
    if overlaps(trainer):
        return trainer.begin(work, due)
    return [partial(_itself, pair) for pair in trainer.train(work)]


def _itself(answer: tuple[Result, ClientState]) -> tuple[Result, ClientState]:
    return answer
