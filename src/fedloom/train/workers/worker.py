"""(to be written)"""

from __future__ import annotations

import traceback
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Protocol, TypeAlias

from fedloom.core.policies import Trainer
from fedloom.core.types import Local, Result, Task
from fedloom.train.workers.shared_memory import dumps, loads

Group: TypeAlias = Sequence[tuple[Task, Local]]
Answers: TypeAlias = list[tuple[Result, Local]]


class Divisible(Trainer, Protocol):
    """A trainer that says which of a cohort's tasks it trains in one pass."""

    def groups(self, work: Sequence[tuple[Task, Local]]) -> Sequence[Group]:
        """The units of work, in order. They follow from the work alone, not from who will train."""
        ...

    def least(self, task: Task) -> Result:
        """The answer if training changed nothing, see `Overlapping`."""
        ...


class Worker(Protocol):
    """One place where groups are trained, one after the other, with the base already there."""

    def submit(self, group: bytes) -> Future[bytes]:
        """Begin to train a group, which is `dumps` of it; the future holds `carry_out`'s answer, or that the worker died."""
        ...

    def stop(self) -> None:
        """End it, whatever it is doing, and do not wait."""
        ...


class Crew(Protocol):
    """Where workers come from."""

    @property
    def size(self) -> int:
        """The most workers that are of use."""
        ...

    @property
    def died(self) -> tuple[type[BaseException], ...]:
        """The errors by which a future says that its worker is no more."""
        ...

    def hire(self) -> Worker:
        """A new worker; it may still be starting."""
        ...

    def close(self) -> None:
        """Wait for the end of all workers, which are stopped, and free what they shared."""
        ...


def carry_out(trainer: Trainer, group: bytes) -> bytes:
    """What a worker does with a group: its answers, or the error as a value, which ends a run but no worker."""
    try:
        return dumps(trainer.train(loads(group)))
    except Exception as error:
        error.add_note("".join(traceback.format_exception(error)))
        try:
            loads(answer := dumps(error))
        except Exception:  # it does not survive the way; its words do
            return dumps(RuntimeError(f"{type(error).__name__}: {error}"))
        return answer
