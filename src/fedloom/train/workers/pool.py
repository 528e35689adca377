"""The worker pool: divides tasks over local processes or Ray actors, or leaves them to this process.

The results do not depend on who trains (law 9): a task is a function of its arguments, and results are put in the order of the
tasks. So the choice belongs to the execution of a run and is no part of its settings.
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
from fedloom.core.text import last_line
from fedloom.core.types import ClientState, Result, Task
from fedloom.train.workers.shared_memory import pickle_object, unpickle_object
from fedloom.train.workers.worker import Answers, GroupedTrainer, TaskGroup, TrainingWorker, WorkerFactory, Workers

MOST_DEATHS = 3
"""Worker deaths, one after the other, after which a group of tasks is given up, and with it the run."""


@contextmanager
def open_pool(trainer: GroupedTrainer, workers: Workers) -> Iterator[Trainer]:
    """Give a trainer that does what `trainer` does, with these workers; they are stopped at the end of the block."""
    if workers == Workers():
        yield trainer
        return
    with WorkerPool(trainer, workers).closing() as cohorts:
        yield cohorts


@dataclass(slots=True, eq=False, weakref_slot=True)
class PendingGroup:
    """A group of tasks to be trained; it is wanted as long as somebody holds a reference to it.

    Fields:
        group: the tasks.
        deaths: workers that died under it.
        answers: its results, or the error in their place (None: not yet trained).
    """

    group: TaskGroup
    deaths: int = 0
    answers: Answers | Exception | None = None


@dataclass(slots=True)
class WorkerPool:
    """A trainer that divides work over workers, and begins with a task before its result is needed.

    Workers are started when a second group is there to be trained, so a run that trains one client at a time pays for none; such a
    single group is trained in this process. The group that is due first is trained first, each when a worker is free; a group that
    nobody waits for any more is not trained. A worker that dies is replaced, where there is room, and its group trained again:
    none of it had counted.
    Only the caller's thread submits work: a worker that is done while that thread merges or scores rests until it is back.

    Fields:
        inner: the trainer whose work is divided.
        workers: the setting.
        factory: where workers come from (None: none was needed yet).
        started: the workers, `free` those that are idle.
        todo: (time at which it is due, number, weak reference) of each group that waits.
        running: the group and the worker of each future.
        queued: groups queued so far, which breaks ties between due times.
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
        """Train the tasks and return their results in their order."""
        if len(self.inner.groups(work)) < 2:
            return self.inner.train(work)
        return [answer() for answer in self.begin(work, [0.0] * len(work))]

    def unchanged_result(self, task: Task) -> Result:
        """Return the result if training changed nothing."""
        return self.inner.unchanged_result(task)

    def begin(self, work: Sequence[tuple[Task, ClientState]], due: Sequence[float]) -> Sequence[PendingResult]:
        """Begin to train the tasks, in the order in which they and all earlier ones are due; return a call for each result."""
        times, pending_groups = iter(due), [PendingGroup(group) for group in self.inner.groups(work)]
        for pending in pending_groups:
            self._enqueue(min(islice(times, len(pending.group))), pending)
        self._collect(0.0)
        return [partial(self._answer, pending, k) for pending in pending_groups for k in range(len(pending.group))]

    @contextmanager
    def closing(self) -> Iterator[WorkerPool]:
        """Stop all workers at the end of the block, also when it ends by Ctrl-C."""
        try:
            yield self
        finally:
            for worker in self.started:
                worker.stop()
            if self.factory is not None:
                self.factory.close()

    def _answer(self, pending: PendingGroup, number: int) -> tuple[Result, ClientState]:
        while pending.answers is None:
            if self.running:
                self._collect()
            else:
                pending.answers = self.inner.train(pending.group)
        if isinstance(pending.answers, Exception):
            raise pending.answers
        return pending.answers[number]

    def _enqueue(self, due: float, pending: PendingGroup) -> None:
        self.todo.append((due, self.queued, ref(pending)))
        self.queued += 1

    def _collect(self, seconds: float | None = None) -> None:
        """Take the results that are there, waiting `seconds` for the first (None: for ever), and give free workers new groups."""
        for future in wait(self.running, seconds, FIRST_COMPLETED).done:
            pending, worker = self.running.pop(future)
            assert self.factory is not None
            try:
                pending.answers = unpickle_object(future.result())
            except self.factory.death_errors as error:
                pending.deaths += 1
                if pending.deaths == MOST_DEATHS:
                    pending.answers = self._give_up(pending.group, error)
                self._enqueue(-math.inf, pending)
                self._replace(worker)
            else:
                self.free.append(worker)
        self._hand_out()

    def _hand_out(self) -> None:
        wanted = [(pending, entry) for entry in self.todo if (pending := entry[2]()) and pending.answers is None]
        self.todo = sorted(entry for _, entry in wanted)
        if not self.started and len(wanted) < 2:
            return
        factory = self.factory = self.factory or _worker_factory(self.inner, self.workers)
        while self.todo and (self.free or len(self.started) < factory.most_workers):
            pending = self.todo.pop(0)[2]()
            assert pending is not None  # `wanted` holds it
            group = pickle_object(pending.group)
            if not self.free:
                self.started.append(factory.start_worker())
                self.free.append(self.started[-1])
            worker = self.free.popleft()
            self.running[worker.submit(group)] = pending, worker

    def _replace(self, dead: TrainingWorker) -> None:
        assert self.factory is not None
        dead.stop()
        self.started.remove(dead)
        if new := self.factory.replace_worker():
            self.started.append(new)
            self.free.append(new)

    def _give_up(self, group: TaskGroup, error: BaseException) -> Refused:
        names = ", ".join(f"task {task.id} of client {task.client}" for task, _ in group)
        remedy = f"{MOST_DEATHS} workers ended one after the other in {names} ({last_line(error)}); if memory ran out, ask for fewer"
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
