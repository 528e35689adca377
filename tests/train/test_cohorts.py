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
    """Of a worker."""


@dataclass
class Hand:
    """A worker that holds what it was given."""

    crew: Hands

    def submit(self, group: bytes) -> Future[bytes]:
        """Told to the crew."""
        number = unpickle_object(group)[0][0].id
        self.crew.order.append(number)
        future: Future[bytes] = Future()
        self.crew.given[number] = future, group
        if early := self.crew.early.get(number):
            self.crew.end(number, early.pop(0))
        return future

    def stop(self) -> None:
        """Nothing runs."""


@dataclass
class Hands:
    """A crew of them; `early` says how groups end at once that are handed out while the test waits."""

    size: int = 2
    died: tuple[type[BaseException], ...] = (Dead,)
    order: list[int] = field(default_factory=list)
    given: dict[int, tuple[Future[bytes], bytes]] = field(default_factory=dict)
    early: dict[int, list[bool]] = field(default_factory=dict)
    hired: int = 0

    def hire(self) -> TrainingWorker:
        """One more."""
        self.hired += 1
        return Hand(self)

    def close(self) -> None:
        """Nothing is shared."""

    def end(self, number: int, alive: bool = True) -> None:
        """The group of this task is trained, or its worker dies."""
        future, group = self.given.pop(number)
        if alive:
            future.set_result(train_pickled(Toy(), group))
        else:
            future.set_exception(Dead("gone"))


def crew() -> tuple[Hands, WorkerPool]:
    hands = Hands()
    return hands, WorkerPool(Toy(), Workers(2), hands)


def begun(cohorts: WorkerPool, number: int, due: float, **seeds: int) -> PendingResult:
    (answer,) = cohorts.begin(toy_work(1, number, **seeds), [due])
    return answer


def basis(answers: Sequence[PendingResult]) -> list[str]:
    return [answer()[1].basis for answer in answers]


def test_tasks_of_many_events_keep_all_workers_busy_in_the_order_in_which_they_are_due() -> None:
    hands, cohorts = crew()
    held = [begun(cohorts, 1, 9.0)]
    assert hands.hired == 0
    held += [begun(cohorts, number, due) for number, due in ((2, 8.0), (3, 7.0), (4, 1.0), (5, 3.0))]
    assert hands.order == [2, 1]
    hands.end(1)
    held.append(begun(cohorts, 6, 2.0))
    assert hands.order == [2, 1, 4]
    hands.end(2)
    hands.end(4)
    hands.early = {number: [True] for number in (3, 5, 6)}
    assert basis(held) == [f"b{n}+{n}" for n in range(1, 7)]
    assert hands.order == [2, 1, 4, 6, 5, 3]
    assert hands.hired == 2


def test_what_nobody_holds_is_not_handed_out() -> None:
    hands, cohorts = crew()
    held = {number: begun(cohorts, number, float(number)) for number in range(1, 6)}
    del held[1], held[3], held[4]  # the first is being trained
    hands.early = {5: [True]}
    hands.end(1)
    hands.end(2)
    assert held[5]()[1].basis == "b5+5"
    assert hands.order == [1, 2, 5]
    assert cohorts.todo == []
    assert not cohorts.running


def test_one_task_at_a_time_is_trained_here() -> None:
    hands, cohorts = crew()
    for number in (1, 2):
        assert begun(cohorts, number, 0.0)()[1].basis == f"b{number}+{number}"
    assert hands.hired == 0


def test_an_error_waits_for_its_turn() -> None:
    hands, cohorts = crew()
    hands.early = {1: [True], 2: [True], 3: [True]}
    held = [begun(cohorts, 1, 5.0, t1=-2), begun(cohorts, 2, 1.0), begun(cohorts, 3, 2.0)]
    assert basis(held[1:]) == ["b2+2", "b3+3"]
    with pytest.raises(ZeroDivisionError, match="by nought"):
        held[0]()


def test_a_task_whose_workers_die_goes_first_and_in_the_end_is_given_up() -> None:
    hands, cohorts = crew()
    held = [begun(cohorts, number, float(number)) for number in (1, 2, 3)]
    hands.end(2, alive=False)
    hands.early = {2: [False] * (MOST_DEATHS - 1), 3: [True]}
    hands.end(1)
    with pytest.raises(Refused, match=f"{MOST_DEATHS} workers ended one after the other in task 2"):
        held[1]()
    assert basis([held[0], held[2]]) == ["b1+1", "b3+3"]
    assert hands.order[:3] == [1, 2, 2]
    assert hands.order.count(2) == MOST_DEATHS
    assert hands.hired == 2 + MOST_DEATHS
