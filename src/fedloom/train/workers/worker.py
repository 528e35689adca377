"""Workers that train tasks: the setting `Workers`, and the protocols that every kind of worker follows.

A pool asks a `WorkerFactory` for workers and submits to each a group of tasks as bytes. Inside the worker `train_pickled` trains the
group and returns the results as bytes. Groups are given by the trainer: they follow from the tasks alone.
"""

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
    """Workers of a run: the processes that train its tasks.

    Fields:
        count: number of local processes (1: this one), or of Ray actors (None: as many as the cluster has processors, or GPUs, for).
        ray: address of a Ray cluster whose actors train ("": start one on this machine; None: local processes).
    """

    count: int | None = 1
    ray: str | None = None

    @classmethod
    def parse(cls, setting: str | int) -> Workers:
        """Read the setting of a command line: a number, "ray" or "ray:ADDRESS", with "4@" before it for four actors.

        Raises Refused, also where Ray is not installed.

        >>> Workers.parse(2), str(Workers.parse("2"))
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

    @property
    def processes(self) -> int:
        """Number of processes that share this machine's cores; what Ray does is Ray's."""
        return self.count or 1 if self.ray is None else 1

    def __str__(self) -> str:
        if self.ray is None:
            return str(self.count)
        return ("" if self.count is None else f"{self.count}@") + "ray" + (f":{self.ray}" if self.ray else "")


class GroupedTrainer(Trainer, Protocol):
    """A trainer that divides tasks into the groups that it trains in one pass."""

    def groups(self, work: Sequence[tuple[Task, ClientState]]) -> Sequence[TaskGroup]:
        """Divide the work, in its order, into groups. They follow from the work alone, not from who will train."""
        ...

    def unchanged_result(self, task: Task) -> Result:
        """Return the result if training changed nothing, see `Overlapping`."""
        ...


class TrainingWorker(Protocol):
    """A process or actor that trains groups one after the other, with the base model already in its memory."""

    def submit(self, group: bytes) -> Future[bytes]:
        """Begin to train a pickled group; the future holds what `train_pickled` returns, or raises if the worker died."""
        ...

    def stop(self) -> None:
        """End the worker, whatever it is doing, and do not wait."""
        ...


class WorkerFactory(Protocol):
    """A kind of worker, set up for one trainer."""

    @property
    def most_workers(self) -> int:
        """Return the largest useful number of workers."""
        ...

    @property
    def death_errors(self) -> tuple[type[BaseException], ...]:
        """Return the errors that a future raises when its worker died."""
        ...

    def start_worker(self) -> TrainingWorker:
        """Start a worker; it may still be starting on return."""
        ...

    def replace_worker(self) -> TrainingWorker | None:
        """Start a worker in the place of one that died; None where there is no room any more, and `most_workers` is less by then."""
        ...

    def close(self) -> None:
        """Wait for the end of all workers, which have been stopped, and free what they shared."""
        ...


def train_pickled(trainer: Trainer, group: bytes) -> bytes:
    """Train a pickled group in a worker; return its pickled results, or the error as a value, which ends the run but no worker."""
    try:
        return pickle_object(trainer.train(unpickle_object(group)))
    except Exception as error:
        error.add_note("".join(traceback.format_exception(error)))
        try:
            unpickle_object(answer := pickle_object(error))
        except Exception:  # it cannot be unpickled; its words can
            return pickle_object(RuntimeError(f"{type(error).__name__}: {error}"))
        return answer
