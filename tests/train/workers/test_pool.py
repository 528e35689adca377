"""Which group goes to whom and when, with workers that end when the test says so."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

import pytest

from fedloom.core.errors import Refused
from fedloom.core.policies import PendingResult
from fedloom.train.workers.pool import MOST_DEATHS, WorkerPool
from fedloom.train.workers.shared_memory import unpickle_object
from fedloom.train.workers.worker import TrainingWorker, Workers, train_pickled
from tests.support.hazards import Toy, toy_work


class Dead(Exception):
    """A worker died."""


@dataclass
class ManualWorker:
    """A worker whose groups end when the test says so."""

    factory: ManualFactory

    def submit(self, group: bytes) -> Future[bytes]:
        """Keep the group until the test ends it."""
        number = unpickle_object(group)[0][0].id
        self.factory.order.append(number)
        future: Future[bytes] = Future()
        self.factory.submitted[number] = future, group
        if early := self.factory.early.get(number):
            self.factory.end(number, early.pop(0))
        return future

    def stop(self) -> None:
        """Nothing runs."""


@dataclass
class ManualFactory:
    """A factory of such workers; `early` says how groups end at once that are submitted while the test waits."""

    most_workers: int = 2
    death_errors: tuple[type[BaseException], ...] = (Dead,)
    order: list[int] = field(default_factory=list)
    submitted: dict[int, tuple[Future[bytes], bytes]] = field(default_factory=dict)
    early: dict[int, list[bool]] = field(default_factory=dict)
    workers_started: int = 0
    has_room: bool = True

    def start_worker(self) -> TrainingWorker:
        """Start one more."""
        self.workers_started += 1
        return ManualWorker(self)

    def replace_worker(self) -> TrainingWorker | None:
        """Start one more, or make do with one fewer."""
        if self.has_room:
            return self.start_worker()
        self.most_workers -= 1
        return None

    def close(self) -> None:
        """Nothing is shared."""

    def end(self, number: int, alive: bool = True) -> None:
        """The group of this task is trained, or its worker dies."""
        future, group = self.submitted.pop(number)
        if alive:
            future.set_result(train_pickled(Toy(), group))
        else:
            future.set_exception(Dead("gone"))


def factory_and_pool() -> tuple[ManualFactory, WorkerPool]:
    factory = ManualFactory()
    return factory, WorkerPool(Toy(), Workers(2), factory)


def begin_one(pool: WorkerPool, number: int, due: float, **versions: int) -> PendingResult:
    (answer,) = pool.begin(toy_work(1, number, **versions), [due])
    return answer


def basis(answers: Sequence[PendingResult]) -> list[str]:
    return [answer()[1].basis for answer in answers]


def test_tasks_of_many_events_keep_all_workers_busy_in_the_order_in_which_they_are_due() -> None:
    factory, pool = factory_and_pool()
    held = [begin_one(pool, 1, 9.0)]
    assert factory.workers_started == 0
    held += [begin_one(pool, number, due) for number, due in ((2, 8.0), (3, 7.0), (4, 1.0), (5, 3.0))]
    assert factory.order == [2, 1]
    factory.end(1)
    held.append(begin_one(pool, 6, 2.0))
    assert factory.order == [2, 1, 4]
    factory.end(2)
    factory.end(4)
    factory.early = {number: [True] for number in (3, 5, 6)}
    assert basis(held) == [f"b{n}+{n}" for n in range(1, 7)]
    assert factory.order == [2, 1, 4, 6, 5, 3]
    assert factory.workers_started == 2


def test_what_nobody_holds_is_not_handed_out() -> None:
    factory, pool = factory_and_pool()
    held = {number: begin_one(pool, number, float(number)) for number in range(1, 6)}
    del held[1], held[3], held[4]  # the first is being trained
    factory.early = {5: [True]}
    factory.end(1)
    factory.end(2)
    assert held[5]()[1].basis == "b5+5"
    assert factory.order == [1, 2, 5]
    assert pool.todo == []
    assert not pool.running


def test_one_task_at_a_time_is_trained_here() -> None:
    factory, pool = factory_and_pool()
    for number in (1, 2):
        assert begin_one(pool, number, 0.0)()[1].basis == f"b{number}+{number}"
    assert factory.workers_started == 0


def test_an_error_waits_for_its_turn() -> None:
    factory, pool = factory_and_pool()
    factory.early = {1: [True], 2: [True], 3: [True]}
    held = [begin_one(pool, 1, 5.0, t1=-2), begin_one(pool, 2, 1.0), begin_one(pool, 3, 2.0)]
    assert basis(held[1:]) == ["b2+2", "b3+3"]
    with pytest.raises(ZeroDivisionError, match="by nought"):
        held[0]()


def test_a_task_whose_workers_die_goes_first_and_in_the_end_is_given_up() -> None:
    factory, pool = factory_and_pool()
    held = [begin_one(pool, number, float(number)) for number in (1, 2, 3)]
    factory.end(2, alive=False)
    factory.early = {2: [False] * (MOST_DEATHS - 1), 3: [True]}
    factory.end(1)
    with pytest.raises(Refused, match=f"{MOST_DEATHS} workers ended one after the other in task 2"):
        held[1]()
    assert basis([held[0], held[2]]) == ["b1+1", "b3+3"]
    assert factory.order[:3] == [1, 2, 2]
    assert factory.order.count(2) == MOST_DEATHS
    assert factory.workers_started == 2 + MOST_DEATHS


def test_where_there_is_no_room_for_another_worker_those_that_are_left_do_its_work() -> None:
    factory, pool = factory_and_pool()
    factory.has_room = False
    held = [begin_one(pool, number, float(number)) for number in (1, 2, 3)]
    factory.end(1, alive=False)
    factory.early = {number: [True] for number in (1, 3)}
    factory.end(2)
    assert basis(held) == [f"b{n}+{n}" for n in (1, 2, 3)]
    assert factory.order == [1, 2, 1, 3]
    assert factory.workers_started == 2


def test_when_all_workers_are_gone_this_process_trains() -> None:
    factory, pool = factory_and_pool()
    factory.has_room = False
    held = [begin_one(pool, number, float(number)) for number in (1, 2)]
    for number in (1, 2):
        factory.end(number, alive=False)
    assert basis(held) == ["b1+1", "b2+2"]
    assert factory.order == [1, 2]
