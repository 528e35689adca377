"""Immediate steps as tables: each answer at once as a change, rare clients further."""

from __future__ import annotations

from typing import Any

import pytest

from fedloom.errors import Refused
from fedloom.schedule.immediate import Immediate
from fedloom.schedule.staleness import Polynomial
from fedloom.types import Fleet
from schedule.tables import answer, at, numbers, told


def asked(own: int, others: int, clients: int = 4, version: int = 0, age: int = 0) -> Fleet:
    """c1 answers, who had `own` tasks; each of the others had `others`."""
    dispatched = {"c1": own} | {f"d{k}": others for k in range(clients - 1)}
    return at(version, answer(1, version - age), dispatched=dispatched, tasks=sum(dispatched.values()))


@pytest.mark.parametrize(
    ("own", "others", "step"),
    [
        (3, 3, 0.2),
        (1, 3, 0.2 * 2.5),  # 10 tasks of 4 clients: 2.5 a client
        (6, 2, 0.2 * 0.5),  # 12 tasks: 3 a client
        (1, 21, 0.2 * 4.0),  # 16 a client, but at most 4 times as far
        (400, 4, 0.2 * 103 / 400),  # 412 tasks: 103 a client
    ],
)
def test_a_step_is_as_long_as_its_client_is_rare(own: int, others: int, step: float) -> None:
    merge = Immediate(server_learning_rate=0.2, balance=4.0).merge(asked(own, others))
    assert told(merge) == ({1: 1.0}, pytest.approx(step))
    assert merge is not None
    assert (merge.as_delta, merge.retain, merge.cancel) == (True, (), ())
    floor = Immediate(server_learning_rate=0.2, balance=2.0).merge(asked(400, 4))
    assert told(floor)[1] == 0.1
    assert told(Immediate(server_learning_rate=0.2, balance=1.0).merge(asked(own, others)))[1] == 0.2


@pytest.mark.parametrize(("version", "step"), [(0, 0.4), (15, 0.4), (16, 0.4 * (16 / 17) ** 0.5), (63, 0.2)])
def test_after_the_steady_versions_the_rate_falls_as_a_square_root(version: int, step: float) -> None:
    schedule = Immediate(server_learning_rate=0.4, steady=16)
    assert told(schedule.merge(asked(2, 2, version=version)))[1] == pytest.approx(step)
    assert told(Immediate(server_learning_rate=0.4).merge(asked(2, 2, version=version)))[1] == 0.4


def test_staleness_counts_where_it_is_asked_for_and_no_step_is_above_1() -> None:
    assert told(Immediate(discount=Polynomial(1.0)).merge(asked(1, 1, version=9, age=3)))[1] == pytest.approx(0.05)
    assert told(Immediate(server_learning_rate=0.9).merge(asked(1, 9)))[1] == 1.0


def test_answers_are_taken_one_by_one() -> None:
    merge = Immediate().merge(at(0, answer(2), answer(1)))
    assert merge is not None
    assert (list(told(merge)[0]), numbers(merge.retain)) == ([2], [1])
    assert Immediate().merge(at(0)) is None


def test_a_client_that_nobody_wrote_down_is_as_rare_as_a_client_with_one_task() -> None:
    assert told(Immediate().merge(at(0, answer(1), dispatched={"d": 3}, tasks=3)))[1] == pytest.approx(0.6)


def test_every_free_place_is_filled_at_random() -> None:
    drawn = {Immediate(max_in_flight=1).start(at(0, idle=4, tasks=turn, latest="c0"))[0] for turn in range(60)}
    assert drawn == {"c0", "c1", "c2", "c3"}


@pytest.mark.parametrize(
    "bad",
    [
        {"server_learning_rate": 0.0},
        {"server_learning_rate": 1.5},
        {"steady": 0},
        {"balance": 0.5},
        {"balance": float("nan")},
    ],
)
def test_bad_parameters_are_refused_by_name(bad: dict[str, Any]) -> None:
    with pytest.raises(Refused, match=next(iter(bad))):
        Immediate(**bad)
