"""Who carries out the training of a cohort: this process, several local processes over one base in memory, or actors of Ray.

The numbers do not depend on it (law 9): a task is a function of its arguments, and results are put in the order of the tasks.
So the choice belongs to the execution of a run and is no part of what the run is.
"""

from __future__ import annotations

import importlib.util
import re
import traceback
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from pickle import PicklingError
from typing import Protocol, TypeAlias

from fedloom.errors import Refused
from fedloom.train.ship import dumps, loads
from fedloom.types import Local, Result, Task, Trainer

Group: TypeAlias = Sequence[tuple[Task, Local]]
Answers: TypeAlias = list[tuple[Result, Local]]
DEATHS = 3
"""A group of tasks under which so many workers died, one after the other, is given up, and with it the run."""


@dataclass(frozen=True, slots=True)
class Workers:
    """Who trains: `count` local processes (1: this one), or actors of the Ray cluster at `ray` ("" starts one here).

    `count` None: as many actors as the cluster has processors, or GPUs, for.
    """

    count: int | None = 1
    ray: str | None = None

    @classmethod
    def of(cls, told: str | int) -> Workers:
        """From a command line: a number, "ray" or "ray:ADDRESS", with "4@" before it for four actors.

        Raises Refused, also where Ray is not installed.

        >>> Workers.of(2), str(Workers.of("2"))
        (Workers(count=2, ray=None), '2')
        """
        found = re.fullmatch(r"(?:(\d+)@)?ray(?::(.+))?|(\d+)", str(told))
        count = int(found[1] or found[3]) if found and (found[1] or found[3]) else None
        if not found or count == 0:
            raise Refused("workers", told, "say a number from 1, or ray, or ray:ADDRESS, or 4@ray for four actors")
        if found[3]:
            return cls(count)
        if importlib.util.find_spec("ray") is None:
            remedy = "Ray is not installed: pip install 'fedloom[ray]'; or give a number of local processes"
            raise Refused("workers", told, remedy)
        return cls(count, found[2] or "")

    def __str__(self) -> str:
        if self.ray is None:
            return str(self.count)
        return ("" if self.count is None else f"{self.count}@") + "ray" + (f":{self.ray}" if self.ray else "")

    @contextmanager
    def carrying_out(self, trainer: Divisible) -> Iterator[Trainer]:
        """A trainer that does what `trainer` does, with these workers; they are gone at the end of the block."""
        if self == Workers():
            yield trainer
            return
        with Cohorts(trainer, self).closing() as cohorts:
            yield cohorts


class Divisible(Trainer, Protocol):
    """A trainer that says which of a cohort's tasks it trains in one pass."""

    def groups(self, work: Sequence[tuple[Task, Local]]) -> Sequence[Group]:
        """The units of work, in order. They follow from the work alone, not from who will train."""
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


@dataclass(slots=True)
class Cohorts:
    """A trainer that divides each cohort over workers.

    They are started at the first cohort of more than one group, so a run that trains one client at a time pays for none; such
    a single group is trained here. A worker that dies is replaced and its group trained again: nothing of it had counted.
    Groups are started in the order of the cohort, each when a worker is free. A schedule that dispatches one task per event
    would need `train` to return futures, awaited when the virtual clock reaches their arrival; `Worker.submit` gives them.
    """

    inner: Divisible
    asked: Workers
    crew: Crew | None = None
    staff: list[Worker] = field(default_factory=list)

    def train(self, work: Sequence[tuple[Task, Local]]) -> list[tuple[Result, Local]]:
        """The cohort's results in its order."""
        parts = self.inner.groups(work)
        if len(parts) < 2:
            return self.inner.train(work)
        done = self._done(parts)
        return [pair for number in range(len(parts)) for pair in done[number]]

    @contextmanager
    def closing(self) -> Iterator[Cohorts]:
        """Stop all workers at the end, also of one by Ctrl-C."""
        try:
            yield self
        finally:
            for worker in self.staff:
                worker.stop()
            if self.crew is not None:
                self.crew.close()

    def _done(self, parts: Sequence[Group]) -> Mapping[int, Answers]:
        crew = self.crew = self.crew or _crew(self.inner, self.asked)
        while len(self.staff) < min(crew.size, len(parts)):
            self.staff.append(crew.hire())
        todo, free = deque(range(len(parts))), deque(self.staff)
        running: dict[Future[bytes], tuple[int, Worker]] = {}
        done, deaths = dict[int, Answers](), Counter[int]()
        while len(done) < len(parts):
            while todo and free:
                number, worker = todo.popleft(), free.popleft()
                running[worker.submit(dumps(parts[number]))] = number, worker
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                number, worker = running.pop(future)
                try:
                    done[number] = _answers(future.result())
                except crew.died as error:
                    deaths[number] += 1
                    if deaths[number] == DEATHS:
                        raise self._given_up(parts[number], error) from error
                    worker = self._replaced(worker)
                    todo.appendleft(number)
                free.append(worker)
        return done

    def _replaced(self, dead: Worker) -> Worker:
        assert self.crew is not None
        dead.stop()
        self.staff[self.staff.index(dead)] = new = self.crew.hire()
        return new

    def _given_up(self, group: Group, error: BaseException) -> Refused:
        names = ", ".join(f"task {task.id} of client {task.client}" for task, _ in group)
        last = str(error).strip().rpartition("\n")[2]
        remedy = f"{DEATHS} workers ended one after the other in {names} ({last}); if memory ran out, ask for fewer"
        return Refused("workers", str(self.asked), remedy)


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


def _answers(answer: bytes) -> Answers:
    made: Answers | Exception = loads(answer)
    if isinstance(made, Exception):
        raise made
    return made


def _crew(trainer: Trainer, asked: Workers) -> Crew:
    try:
        if asked.ray is None:
            from fedloom.train.processes import Processes

            return Processes(trainer, asked)
        from fedloom.train.ray_workers import Actors

        return Actors(trainer, asked)
    except PicklingError as error:
        remedy = f"the run cannot be sent to another process ({error}); define its functions and classes in a module"
        raise Refused("workers", str(asked), remedy) from error
