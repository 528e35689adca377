"""(to be written)"""

from __future__ import annotations

import importlib.util
import re
import traceback
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Protocol, TypeAlias

from fedloom.core.errors import Refused
from fedloom.core.policies import Trainer
from fedloom.core.types import ClientState, Result, Task
from fedloom.train.workers.shared_memory import pickle_object, unpickle_object

TaskGroup: TypeAlias = Sequence[tuple[Task, ClientState]]
Answers: TypeAlias = list[tuple[Result, ClientState]]


@dataclass(frozen=True, slots=True)
class Workers:
    """Who trains: `count` local processes (1: this one), or actors of the Ray cluster at `ray` ("" starts one here).

    `count` None: as many actors as the cluster has processors, or GPUs, for.
    """

    count: int | None = 1
    ray: str | None = None

    @classmethod
    def parse(cls, setting: str | int) -> Workers:
        """From a command line: a number, "ray" or "ray:ADDRESS", with "4@" before it for four actors.

        Raises Refused, also where Ray is not installed.

        >>> Workers.of(2), str(Workers.of("2"))
        (Workers(count=2, ray=None), '2')
        """
        match = re.fullmatch(r"(?:(\d+)@)?ray(?::(.+))?|(\d+)", str(setting))
        count = int(match[1] or match[3]) if match and (match[1] or match[3]) else None
        if not match or count == 0:
            raise Refused("workers", setting, "say a number from 1, or ray, or ray:ADDRESS, or 4@ray for four actors")
        if match[3]:
            return cls(count)
        if importlib.util.find_spec("ray") is None:
            remedy = "Ray is not installed: pip install 'fedloom[ray]'; or give a number of local processes"
            raise Refused("workers", setting, remedy)
        return cls(count, match[2] or "")

    def __str__(self) -> str:
        if self.ray is None:
            return str(self.count)
        return ("" if self.count is None else f"{self.count}@") + "ray" + (f":{self.ray}" if self.ray else "")


class GroupedTrainer(Trainer, Protocol):
    """A trainer that says which of a cohort's tasks it trains in one pass."""

    def groups(self, work: Sequence[tuple[Task, ClientState]]) -> Sequence[TaskGroup]:
        """The units of work, in order. They follow from the work alone, not from who will train."""
        ...

    def unchanged_result(self, task: Task) -> Result:
        """The answer if training changed nothing, see `Overlapping`."""
        ...


class TrainingWorker(Protocol):
    """One place where groups are trained, one after the other, with the base already there."""

    def submit(self, group: bytes) -> Future[bytes]:
        """Begin to train a group, which is `dumps` of it; the future holds `carry_out`'s answer, or that the worker died."""
        ...

    def stop(self) -> None:
        """End it, whatever it is doing, and do not wait."""
        ...


class WorkerFactory(Protocol):
    """Where workers come from."""

    @property
    def most_workers(self) -> int:
        """The most workers that are of use."""
        ...

    @property
    def death_errors(self) -> tuple[type[BaseException], ...]:
        """The errors by which a future says that its worker is no more."""
        ...

    def start_worker(self) -> TrainingWorker:
        """A new worker; it may still be starting."""
        ...

    def close(self) -> None:
        """Wait for the end of all workers, which are stopped, and free what they shared."""
        ...


def train_pickled(trainer: Trainer, group: bytes) -> bytes:
    """What a worker does with a group: its answers, or the error as a value, which ends a run but no worker."""
    try:
        return pickle_object(trainer.train(unpickle_object(group)))
    except Exception as error:
        error.add_note("".join(traceback.format_exception(error)))
        try:
            unpickle_object(answer := pickle_object(error))
        except Exception:  # it does not survive the way; its words do
            return pickle_object(RuntimeError(f"{type(error).__name__}: {error}"))
        return answer
