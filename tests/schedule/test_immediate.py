"""Immediate steps as tables: each answer at once as a change."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from fedloom.core.errors import Refused
from fedloom.schedule.immediate import Immediate
from fedloom.schedule.shared.staleness import Polynomial
from tests.support.schedule_tables import answer, at, numbers, weights_and_step


def test_an_answer_is_a_step_along_its_change() -> None:
    merge = Immediate(server_learning_rate=0.2).merge(at(3, answer(1)))
    assert weights_and_step(merge) == ({1: 1.0}, 0.2)
    assert merge is not None
    assert (merge.as_delta, merge.retain, merge.cancel) == (True, (), ())


@pytest.mark.parametrize(("version", "step"), [(0, 0.4), (15, 0.4), (16, 0.4 * (16 / 17) ** 0.5), (63, 0.2)])
def test_after_the_steady_versions_the_rate_falls_as_a_square_root(version: int, step: float) -> None:
    schedule = Immediate(server_learning_rate=0.4, steady=16)
    assert weights_and_step(schedule.merge(at(version, answer(1))))[1] == pytest.approx(step)
    assert weights_and_step(Immediate(server_learning_rate=0.4).merge(at(version, answer(1))))[1] == 0.4


def test_staleness_counts_where_it_is_asked_for_alone() -> None:
    assert weights_and_step(Immediate(discount=Polynomial(1.0)).merge(at(9, answer(1, 6))))[1] == pytest.approx(0.025)


def test_answers_are_taken_one_by_one() -> None:
    merge = Immediate().merge(at(0, answer(2), answer(1)))
    assert merge is not None
    assert (list(weights_and_step(merge)[0]), numbers(merge.retain)) == ([2], [1])
    assert Immediate().merge(at(0)) is None


@pytest.mark.parametrize("choices", [1, 3])
def test_every_free_place_is_filled_at_random(choices: int) -> None:
    schedule = Immediate(max_in_flight=1, choices=choices)
    drawn = {schedule.start(at(0, idle=4, tasks=turn, latest="c0"))[0] for turn in range(60)}
    assert drawn == {"c0", "c1", "c2", "c3"}


def test_of_the_choices_those_that_worked_least_are_started() -> None:
    fleet = replace(
        at(0, idle=4), work_seconds={"c0": 2.0, "c1": 1.0, "c3": 2.0}, dispatched=dict.fromkeys(("c0", "c1", "c3"), 1)
    )
    assert Immediate(max_in_flight=2, choices=2).start(fleet) == ["c2", "c1"]


@pytest.mark.parametrize(
    "bad",
    [
        {"server_learning_rate": 0.0},
        {"server_learning_rate": 1.5},
        {"steady": 0},
        {"choices": 0},
    ],
)
def test_bad_parameters_are_refused_by_name(bad: dict[str, Any]) -> None:
    with pytest.raises(Refused, match=next(iter(bad))):
        Immediate(**bad)
