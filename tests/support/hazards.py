"""Toy trainers for worker processes: `Toy` says where it ran, `Lethal` kills its process, `Unsendable` cannot be unpickled.

The module is light, since every worker process imports it.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from fedloom.core.lora import Adapter, Factor
from fedloom.core.types import Budget, ClientState, Result, Task, TaskStart
from fedloom.train.workers.worker import GroupedTrainer

Work = Sequence[tuple[Task, ClientState]]
Answers = list[tuple[Result, ClientState]]


class Unsendable(Exception):
    """Can be pickled, but not read back."""

    def __init__(self, one: str, two: str) -> None:
        super().__init__(one)


@dataclass(frozen=True)
class Toy:
    """Adds the sum of `weights` to what it got. A task whose version names an error raises it; `write` writes to the weights."""

    weights: Tensor = field(default_factory=lambda: torch.ones(3))
    seconds: float = 0.0
    write: bool = False

    def groups(self, work: Work) -> list[Work]:
        return [[one] for one in work]

    def unchanged_result(self, task: Task) -> Result:
        return Result(task.start.train, task.id, 1, 1)

    def train(self, work: Work) -> Answers:
        return [self._one(task, local) for task, local in work]

    def _one(self, task: Task, local: ClientState) -> tuple[Result, ClientState]:
        time.sleep(self.seconds)
        if task.version == -1:
            raise Unsendable("one", "two")
        if task.version == -2:
            raise ZeroDivisionError("by nought")
        if self.write:
            self.weights[: len(self.weights) // 2] += task.id
        total = self.weights.sum()
        factors = {n: Factor(f.down + total, f.up) for n, f in task.start.train.factors.items()}
        metrics = {"pid": os.getpid(), "threads": torch.get_num_threads()}
        return Result(Adapter(factors), task.id, 1, 1, metrics), ClientState(basis=f"{local.basis}+{task.id}")


@dataclass(frozen=True)
class Lethal:
    """Trains as `inner` does; then, before it answers `task`, its process is killed, the first `deaths` times."""

    inner: GroupedTrainer
    folder: Path
    task: int
    deaths: int = 1
    parent: int = field(default_factory=os.getpid)

    def groups(self, work: Work) -> Sequence[Work]:
        return self.inner.groups(work)

    def unchanged_result(self, task: Task) -> Result:
        return self.inner.unchanged_result(task)

    def train(self, work: Work) -> Answers:
        answers = self.inner.train(work)
        for task, _ in work:
            with (self.folder / "trained").open("a") as log:
                log.write(f"{task.id}\n")
            if task.id == self.task and self.parent != os.getpid():
                died = len(list(self.folder.glob("death-*")))
                if died < self.deaths:
                    (self.folder / f"death-{died}").touch()
                    os.kill(os.getpid(), signal.SIGKILL)
        return answers

    def trained(self) -> list[int]:
        """Tasks in the order in which their training ended, lost ones too."""
        return [int(line) for line in (self.folder / "trained").read_text().split()]


def toy_work(count: int, first: int = 1, **versions: int) -> list[tuple[Task, ClientState]]:
    """Tasks numbered from `first`, one for each of `count` clients; `t3=-1` gives task 3 the version -1."""
    numbers = range(first, first + count)
    starts = [
        TaskStart(Adapter({"only": Factor(torch.full((2, 4), float(n)), torch.ones(3, 2))}), "0") for n in numbers
    ]
    return [
        (Task(n, f"c{n}", versions.get(f"t{n}", 0), start, Budget(2, 1), 0.0), ClientState(basis=f"b{n}"))
        for n, start in zip(numbers, starts, strict=True)
    ]
