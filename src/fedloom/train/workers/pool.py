"""Who carries out the training of a cohort: this process, several local processes over one base in memory, or actors of Ray.

The numbers do not depend on it (law 9): a task is a function of its arguments, and results are put in the order of the tasks.
So the choice belongs to the execution of a run and is no part of what the run is.
"""

from __future__ import annotations

import importlib.util
import math
import re
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pickle import PicklingError
from weakref import ref

from fedloom.core.errors import Refused
from fedloom.core.policies import Answer, Trainer
from fedloom.core.types import Local, Result, Task
from fedloom.train.workers.shared_memory import dumps, loads
from fedloom.train.workers.worker import Answers, Crew, Divisible, Group, Worker

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


@dataclass(slots=True, eq=False, weakref_slot=True)
class Job:
    """A group on its way: the answers when they are there, or the error in their place. It is wanted as long as somebody holds it."""

    group: Group
    deaths: int = 0
    answers: Answers | Exception | None = None


@dataclass(slots=True)
class Cohorts:
    """A trainer that divides work over workers, and begins with a task before its answer is needed.

    They are started when a second group is there to be trained, so a run that trains one client at a time pays for none; such
    a single group is trained here. What is due first is trained first, each group when a worker is free, and what nobody waits
    for any more not at all. A worker that dies is replaced and its group trained again: nothing of it had counted.
    Nobody but the caller's thread hands out work: a worker that is done while that thread merges or scores rests until it is back.
    """

    inner: Divisible
    asked: Workers
    crew: Crew | None = None
    staff: list[Worker] = field(default_factory=list)
    free: deque[Worker] = field(default_factory=deque)
    todo: list[tuple[float, int, ref[Job]]] = field(default_factory=list)
    running: dict[Future[bytes], tuple[Job, Worker]] = field(default_factory=dict)
    made: int = 0

    def train(self, work: Sequence[tuple[Task, Local]]) -> list[tuple[Result, Local]]:
        """The cohort's results in its order."""
        if len(self.inner.groups(work)) < 2:
            return self.inner.train(work)
        return [answer() for answer in self.begin(work, [0.0] * len(work))]

    def least(self, task: Task) -> Result:
        """As the trainer itself."""
        return self.inner.least(task)

    def begin(self, work: Sequence[tuple[Task, Local]], due: Sequence[float]) -> Sequence[Answer]:
        """The cohort's answers; its groups are trained in the order in which all that is asked for is due."""
        times, jobs = iter(due), [Job(group) for group in self.inner.groups(work)]
        for job in jobs:
            self._put(min(islice(times, len(job.group))), job)
        self._collect(0.0)
        return [partial(self._answer, job, k) for job in jobs for k in range(len(job.group))]

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

    def _answer(self, job: Job, number: int) -> tuple[Result, Local]:
        while job.answers is None:
            if self.running:
                self._collect()
            else:
                job.answers = self.inner.train(job.group)
        if isinstance(job.answers, Exception):
            raise job.answers
        return job.answers[number]

    def _put(self, due: float, job: Job) -> None:
        self.todo.append((due, self.made, ref(job)))
        self.made += 1

    def _collect(self, seconds: float | None = None) -> None:
        """Take what is done, waiting so long for the first (None: for ever), and give the free workers what is due."""
        for future in wait(self.running, seconds, FIRST_COMPLETED).done:
            job, worker = self.running.pop(future)
            assert self.crew is not None
            try:
                job.answers = loads(future.result())
            except self.crew.died as error:
                worker, job.deaths = self._replaced(worker), job.deaths + 1
                if job.deaths == DEATHS:
                    job.answers = self._given_up(job.group, error)
                self._put(-math.inf, job)
            self.free.append(worker)
        self._hand_out()

    def _hand_out(self) -> None:
        wanted = [(job, entry) for entry in self.todo if (job := entry[2]()) and job.answers is None]
        self.todo = sorted(entry for _, entry in wanted)
        if not self.staff and len(wanted) < 2:
            return
        crew = self.crew = self.crew or _crew(self.inner, self.asked)
        while self.todo and (self.free or len(self.staff) < crew.size):
            job = self.todo.pop(0)[2]()
            assert job is not None  # `wanted` holds it
            group = dumps(job.group)
            if not self.free:
                self.staff.append(crew.hire())
                self.free.append(self.staff[-1])
            worker = self.free.popleft()
            self.running[worker.submit(group)] = job, worker

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


def _crew(trainer: Trainer, asked: Workers) -> Crew:
    try:
        if asked.ray is None:
            from fedloom.train.workers.local_processes import Processes

            return Processes(trainer, asked)
        from fedloom.train.workers.ray_actors import Actors

        return Actors(trainer, asked)
    except PicklingError as error:
        remedy = f"the run cannot be sent to another process ({error}); define its functions and classes in a module"
        raise Refused("workers", str(asked), remedy) from error
