"""Who carries out the training of a cohort: this process, several local processes over one base in memory, or actors of Ray.

The numbers do not depend on it (law 9): a task is a function of its arguments, and results are put in the order of the tasks.
So the choice belongs to the execution of a run and is no part of what the run is.
"""

from __future__ import annotations

import math
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
from fedloom.core.policies import PendingResult, Trainer
from fedloom.core.types import ClientState, Result, Task
from fedloom.train.workers.shared_memory import pickle_object, unpickle_object
from fedloom.train.workers.worker import Answers, WorkerFactory, GroupedTrainer, TaskGroup, TrainingWorker, Workers

MOST_DEATHS = 3
"""A group of tasks under which so many workers died, one after the other, is given up, and with it the run."""


@contextmanager
def open_pool(trainer: GroupedTrainer, workers: Workers) -> Iterator[Trainer]:
    """A trainer that does what `trainer` does, with these workers; they are gone at the end of the block."""
    if workers == Workers():
        yield trainer
        return
    with WorkerPool(trainer, workers).closing() as cohorts:
        yield cohorts


@dataclass(slots=True, eq=False, weakref_slot=True)
class PendingGroup:
    """A group on its way: the answers when they are there, or the error in their place. It is wanted as long as somebody holds it."""

    group: TaskGroup
    deaths: int = 0
    answers: Answers | Exception | None = None


@dataclass(slots=True)
class WorkerPool:
    """A trainer that divides work over workers, and begins with a task before its answer is needed.

    They are started when a second group is there to be trained, so a run that trains one client at a time pays for none; such
    a single group is trained here. What is due first is trained first, each group when a worker is free, and what nobody waits
    for any more not at all. A worker that dies is replaced and its group trained again: nothing of it had counted.
    Nobody but the caller's thread hands out work: a worker that is done while that thread merges or scores rests until it is back.
    """

    inner: GroupedTrainer
    workers: Workers
    factory: WorkerFactory | None = None
    started: list[TrainingWorker] = field(default_factory=list)
    free: deque[TrainingWorker] = field(default_factory=deque)
    todo: list[tuple[float, int, ref[PendingGroup]]] = field(default_factory=list)
    running: dict[Future[bytes], tuple[PendingGroup, TrainingWorker]] = field(default_factory=dict)
    queued: int = 0

    def train(self, work: Sequence[tuple[Task, ClientState]]) -> list[tuple[Result, ClientState]]:
        """The cohort's results in its order."""
        if len(self.inner.groups(work)) < 2:
            return self.inner.train(work)
        return [answer() for answer in self.begin(work, [0.0] * len(work))]

    def unchanged_result(self, task: Task) -> Result:
        """As the trainer itself."""
        return self.inner.unchanged_result(task)

    def begin(self, work: Sequence[tuple[Task, ClientState]], due: Sequence[float]) -> Sequence[PendingResult]:
        """The cohort's answers; its groups are trained in the order in which all that is asked for is due."""
        times, jobs = iter(due), [PendingGroup(group) for group in self.inner.groups(work)]
        for job in jobs:
            self._enqueue(min(islice(times, len(job.group))), job)
        self._collect(0.0)
        return [partial(self._answer, job, k) for job in jobs for k in range(len(job.group))]

    @contextmanager
    def closing(self) -> Iterator[WorkerPool]:
        """Stop all workers at the end, also of one by Ctrl-C."""
        try:
            yield self
        finally:
            for worker in self.started:
                worker.stop()
            if self.factory is not None:
                self.factory.close()

    def _answer(self, job: PendingGroup, number: int) -> tuple[Result, ClientState]:
        while job.answers is None:
            if self.running:
                self._collect()
            else:
                job.answers = self.inner.train(job.group)
        if isinstance(job.answers, Exception):
            raise job.answers
        return job.answers[number]

    def _enqueue(self, due: float, job: PendingGroup) -> None:
        self.todo.append((due, self.queued, ref(job)))
        self.queued += 1

    def _collect(self, seconds: float | None = None) -> None:
        """Take what is done, waiting so long for the first (None: for ever), and give the free workers what is due."""
        for future in wait(self.running, seconds, FIRST_COMPLETED).done:
            job, worker = self.running.pop(future)
            assert self.factory is not None
            try:
                job.answers = unpickle_object(future.result())
            except self.factory.death_errors as error:
                worker, job.deaths = self._replace(worker), job.deaths + 1
                if job.deaths == MOST_DEATHS:
                    job.answers = self._give_up(job.group, error)
                self._enqueue(-math.inf, job)
            self.free.append(worker)
        self._hand_out()

    def _hand_out(self) -> None:
        wanted = [(job, entry) for entry in self.todo if (job := entry[2]()) and job.answers is None]
        self.todo = sorted(entry for _, entry in wanted)
        if not self.started and len(wanted) < 2:
            return
        factory = self.factory = self.factory or _worker_factory(self.inner, self.workers)
        while self.todo and (self.free or len(self.started) < factory.most_workers):
            job = self.todo.pop(0)[2]()
            assert job is not None  # `wanted` holds it
            group = pickle_object(job.group)
            if not self.free:
                self.started.append(factory.start_worker())
                self.free.append(self.started[-1])
            worker = self.free.popleft()
            self.running[worker.submit(group)] = job, worker

    def _replace(self, dead: TrainingWorker) -> TrainingWorker:
        assert self.factory is not None
        dead.stop()
        self.started[self.started.index(dead)] = new = self.factory.start_worker()
        return new

    def _give_up(self, group: TaskGroup, error: BaseException) -> Refused:
        names = ", ".join(f"task {task.id} of client {task.client}" for task, _ in group)
        last = str(error).strip().rpartition("\n")[2]
        remedy = f"{MOST_DEATHS} workers ended one after the other in {names} ({last}); if memory ran out, ask for fewer"
        return Refused("workers", str(self.workers), remedy)


def _worker_factory(trainer: Trainer, workers: Workers) -> WorkerFactory:
    try:
        if workers.ray is None:
            from fedloom.train.workers.local_processes import LocalProcesses

            return LocalProcesses(trainer, workers)
        from fedloom.train.workers.ray_actors import RayActors

        return RayActors(trainer, workers)
    except PicklingError as error:
        remedy = f"the run cannot be sent to another process ({error}); define its functions and classes in a module"
        raise Refused("workers", str(workers), remedy) from error
