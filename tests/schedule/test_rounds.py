"""Synchronous rounds as tables: what a fleet looks like, and what is decided."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest

from fedloom.core.errors import Refused
from fedloom.core.policies import Fleet
from fedloom.core.types import Task, Update
from fedloom.schedule.rounds import Rounds
from fedloom.schedule.shared.weights import ByQuality, by_examples, by_text, by_tokens, normalised, uniform
from tests.support.toys import adapter, fleet, make_result, make_task, profiles

SMALL = adapter(1, layers={"only": (2, 2)})


def task(number: int, sent: float = 0.0) -> Task:
    return make_task(SMALL, 1, number, sent=sent)


def arrived(number: int, sent: float = 0.0, examples: int = 10, tokens: int = 100) -> Update:
    return Update(task(number, sent), make_result(SMALL, examples, tokens=tokens))


def round_of(busy: int, answers: int, now: float = 0.0, sent: float = 0.0) -> Fleet:
    return fleet(
        now=now,
        arrived=tuple(arrived(k, sent) for k in range(1, answers + 1)),
        busy={k: task(k, sent) for k in range(answers + 1, answers + busy + 1)},
    )


def crowd(**more: Any) -> Fleet:
    return fleet(idle=profiles(30), **more)


def test_a_cohort_is_drawn_without_replacement_and_by_the_seed() -> None:
    drawn = Rounds(cohort_size=7).start(crowd(seed=3))
    assert len(drawn) == len(set(drawn)) == 7
    assert set(drawn) <= profiles(30).keys()
    assert drawn == Rounds(cohort_size=7).start(crowd(seed=3))
    assert drawn != Rounds(cohort_size=7).start(crowd(seed=4))
    assert drawn != Rounds(cohort_size=7).start(crowd(seed=3, version=1))
    assert drawn != Rounds(cohort_size=7).start(crowd(seed=3, tasks=1))


def test_the_draw_does_not_depend_on_the_order_in_which_clients_came() -> None:
    backwards = dict(reversed(profiles(30).items()))
    assert Rounds().start(fleet(idle=backwards)) == Rounds().start(crowd())


def test_every_client_is_drawn_about_equally_often() -> None:
    counts = Counter(c for version in range(600) for c in Rounds(cohort_size=10).start(crowd(version=version)))
    assert len(counts) == 30
    assert all(140 < count < 260 for count in counts.values())  # 200 +- 5 standard deviations


@pytest.mark.parametrize(
    ("cohort", "over", "started"),
    [(10, 1.0, 10), (10, 1.3, 13), (3, 1.5, 5), (40, 1.0, 30), (20, 2.0, 30), (20, 1.1, 22)],
)
def test_over_selection_rounds_up_and_a_small_federation_takes_part_whole(
    cohort: int, over: float, started: int
) -> None:
    assert len(Rounds(cohort_size=cohort, over_selection=over).start(crowd())) == started


@pytest.mark.parametrize("open_round", [round_of(1, 0), round_of(0, 1), round_of(2, 3)])
def test_nobody_starts_while_a_round_is_open(open_round: Fleet) -> None:
    assert not Rounds(cohort_size=2).start(replace(open_round, idle=profiles(9)))


@pytest.mark.parametrize(
    ("busy", "answers", "merged"),
    [(3, 0, 0), (2, 1, 0), (1, 2, 0), (0, 3, 3), (0, 2, 2), (0, 1, 1), (0, 0, 0), (2, 3, 3)],
)
def test_a_round_closes_when_all_have_answered_or_enough(busy: int, answers: int, merged: int) -> None:
    """Three are wanted; those who were lost are waited for no longer."""
    merge = Rounds(cohort_size=3).merge(round_of(busy, answers))
    assert (len(merge.weighted_updates) if merge else 0) == merged


def test_over_selection_cancels_the_slowest() -> None:
    merge = Rounds(cohort_size=3, over_selection=2.0).merge(round_of(3, 3))
    assert merge is not None
    assert sorted(merge.cancel) == [4, 5, 6]
    assert [update.task.id for _, update in merge.weighted_updates] == [1, 2, 3]


def test_the_mean_is_a_whole_step_towards_the_clients_models() -> None:
    merge = Rounds(cohort_size=2).merge(round_of(0, 2))
    assert merge is not None
    assert (merge.step, merge.as_delta, merge.retain) == (1.0, False, ())


def test_a_deadline_closes_the_round_with_what_has_arrived() -> None:
    rounds = Rounds(cohort_size=5, deadline=8.0)
    assert rounds.merge(round_of(3, 2, now=17.9, sent=10.0)) is None
    merge = rounds.merge(round_of(3, 2, now=18.0, sent=10.0))
    assert merge is not None
    assert len(merge.weighted_updates) == 2
    assert sorted(merge.cancel) == [3, 4, 5]


def test_a_deadline_with_nothing_arrived_waits_for_the_first_answer() -> None:
    rounds = Rounds(cohort_size=5, deadline=8.0)
    late = round_of(3, 0, now=20.0)
    assert rounds.merge(late) is None
    assert rounds.wake(late) is None
    first = rounds.merge(round_of(2, 1, now=21.0))
    assert first is not None
    assert len(first.weighted_updates) == 1


@pytest.mark.parametrize(
    ("open_round", "wake"),
    [
        (round_of(3, 0, now=11.0, sent=10.0), 18.0),
        (round_of(2, 1, now=11.0, sent=10.0), 18.0),
        (round_of(2, 1, now=19.0, sent=10.0), 18.0),  # missed: the server makes it now
        (round_of(0, 0), None),
    ],
)
def test_the_timer_is_the_deadline_of_the_open_round(open_round: Fleet, wake: float | None) -> None:
    assert Rounds(cohort_size=5, deadline=8.0).wake(open_round) == wake
    assert Rounds(cohort_size=5).wake(open_round) is None


def test_when_the_whole_cohort_is_lost_another_one_starts() -> None:
    rest = {name: profile for name, profile in profiles(30).items() if name > "c2"}
    drawn = Rounds(cohort_size=3).start(fleet(idle=rest, tasks=3))
    assert len(drawn) == 3
    assert set(drawn) <= rest.keys()


def test_weights_by_examples_tokens_or_alike() -> None:
    """FedAvg's n_k / n, in task order."""
    updates = [arrived(2, examples=30, tokens=100), arrived(1, examples=10, tokens=300)]
    for weigh, wanted in ((by_examples, [0.25, 0.75]), (by_tokens, [0.75, 0.25]), (uniform, [0.5, 0.5])):
        parts = normalised(updates, weigh)
        assert [update.task.id for _, update in parts] == [1, 2]
        assert [weight for weight, _ in parts] == pytest.approx(wanted)
        assert sum(weight for weight, _ in parts) == pytest.approx(1.0, abs=1e-12)


def test_the_weight_of_a_clients_text_does_not_depend_on_how_long_it_trained() -> None:
    """CLLoRA's p_k in proportion to the sum of lengths: 30 texts of 5 tokens are as much as 10 texts of 15."""

    def answer(examples: int, length: int, steps: int) -> Update:
        return Update(task(1), make_result(SMALL, examples, tokens=16 * steps * length, steps=steps))

    assert by_text(answer(30, 5, 4)) == by_text(answer(10, 15, 8))
    assert by_text(answer(30, 5, 4)) == pytest.approx(by_text(answer(15, 5, 4)) * 2)
    assert by_text(Update(task(1), make_result(SMALL, 5, tokens=0, steps=0))) == 0.0


def test_a_loss_discounts_a_client_by_its_exponential() -> None:
    def answer(**metrics: float) -> Update:
        return Update(task(1), make_result(SMALL, 10, metrics=metrics))

    poor, good, silent = answer(loss=1.5), answer(loss=0.5), answer()
    weigh = ByQuality(sharpness=2.0)
    assert weigh(good) / weigh(poor) == pytest.approx(math.exp(2.0))
    assert weigh(silent) == by_examples(silent)
    assert ByQuality(sharpness=0.0)(poor) == by_examples(poor)
    for bad in (-1.0, float("nan"), float("inf")):
        with pytest.raises(Refused, match="sharpness"):
            ByQuality(bad)


def test_the_schedule_weighs_by_its_rule() -> None:
    answers = (arrived(1, examples=10, tokens=300), arrived(2, examples=30, tokens=100))
    for weigh, first in ((by_examples, 0.25), (by_tokens, 0.75), (uniform, 0.5)):
        merge = Rounds(cohort_size=2, weigh=weigh).merge(fleet(arrived=answers))
        assert merge is not None
        assert merge.weighted_updates[0][0] == pytest.approx(first)


def test_answers_that_all_weigh_nothing_count_alike() -> None:
    """Zero tokens is an answer that `check` lets pass; it must not divide by zero."""
    parts = normalised([arrived(1, tokens=0), arrived(2, tokens=0)], by_tokens)
    assert [weight for weight, _ in parts] == [0.5, 0.5]


@pytest.mark.parametrize(
    "bad",
    [
        {"cohort_size": 0},
        {"over_selection": 0.9},
        {"over_selection": float("nan")},
        {"deadline": 0.0},
        {"deadline": -1.0},
    ],
)
def test_bad_parameters_are_refused_by_name(bad: dict[str, Any]) -> None:
    with pytest.raises(Refused, match=next(iter(bad))):
        Rounds(**bad)
