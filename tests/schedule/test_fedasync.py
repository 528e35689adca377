"""FedAsync as tables: every answer at once, with a rate that is computed anew each time."""

from __future__ import annotations

from typing import Any

import pytest

from fedloom.core.errors import Refused
from fedloom.schedule.fedasync import FedAsync
from fedloom.schedule.shared.staleness import CONSTANT, Discount, Hinge, Polynomial
from tests.support.drift import alike, path
from tests.support.schedule_tables import answer, at, numbers, task, weights_and_step


@pytest.mark.parametrize(
    ("discount", "age", "rate"),
    [(CONSTANT, 9, 0.6), (Polynomial(0.5), 0, 0.6), (Polynomial(0.5), 3, 0.3), (Hinge(10.0, 4), 5, 0.6 / 11)],
)
def test_the_rate_is_mixing_times_the_discount_of_staleness(discount: Discount, age: int, rate: float) -> None:
    merge = FedAsync(mixing=0.6, discount=discount).merge(at(20, answer(1, 20 - age)))
    assert weights_and_step(merge) == ({1: 1.0}, round(rate, 12))
    assert merge is not None
    assert (merge.as_delta, merge.anchor, merge.retain, merge.cancel) == (False, None, (), ())


def test_answers_are_taken_one_by_one_and_the_others_are_kept() -> None:
    merge = FedAsync().merge(at(0, answer(2), answer(1), answer(3)))
    assert merge is not None
    assert weights_and_step(merge)[0] == {2: 1.0}
    assert numbers(merge.retain) == [1, 3]


def test_the_rate_does_not_decay() -> None:
    """Alg. 1, line by line, over 200 answers: x <- (1 - a s) x + a s (x of the task's version + 1)."""
    schedule, places = FedAsync(mixing=0.9, discount=Polynomial(0.5), max_in_flight=5), 5
    found, wanted = path(schedule, 200, alike(places)), [0.0]
    for t in range(1, 201):
        base = max(t - places, 0)
        rate = 0.9 * (1 + (t - 1) - base) ** -0.5
        wanted.append((1 - rate) * wanted[-1] + rate * (wanted[base] + 1.0))
    assert found == pytest.approx(wanted, rel=1e-5)


def test_nothing_arrived_is_nothing_merged_and_no_timer() -> None:
    assert FedAsync().merge(at(3, busy=(task(1),))) is None
    assert FedAsync().wake(at(3, answer(1))) is None


@pytest.mark.parametrize(("busy", "idle", "started"), [(0, 9, 4), (3, 9, 1), (4, 9, 0), (0, 2, 2), (2, 0, 0)])
def test_every_free_place_is_filled(busy: int, idle: int, started: int) -> None:
    fleet = at(0, busy=tuple(task(k, client=f"b{k}") for k in range(busy)), idle=idle)
    drawn = FedAsync(max_in_flight=4).start(fleet)
    assert len(set(drawn)) == len(drawn) == started


@pytest.mark.parametrize("bad", [{"mixing": 0.0}, {"mixing": 1.1}, {"mixing": float("nan")}])
def test_bad_parameters_are_refused_by_name(bad: dict[str, Any]) -> None:
    with pytest.raises(Refused, match=next(iter(bad))):
        FedAsync(**bad)
