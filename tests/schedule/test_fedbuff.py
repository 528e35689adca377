"""FedBuff as tables: when a buffer is full, what it weighs, how far it steps, and who waits."""

from __future__ import annotations

import random
from typing import Any

import pytest

from fedloom.core.errors import Refused
from fedloom.core.policies import Fleet
from fedloom.schedule.fedbuff import FedBuff
from fedloom.schedule.shared.staleness import CONSTANT, SQUARE_ROOT
from fedloom.schedule.shared.weights import by_examples, by_tokens
from tests.support.drift import alike, path
from tests.support.schedule_tables import answer, at, task, weights_and_step


@pytest.mark.parametrize("waiting", [False, True])
@pytest.mark.parametrize(("arrived", "merged"), [(0, 0), (1, 0), (2, 0), (3, 3), (4, 4)])
def test_a_full_buffer_makes_a_version(arrived: int, merged: int, waiting: bool) -> None:
    merge = FedBuff(buffer_size=3, waiting=waiting).merge(at(0, *map(answer, range(1, arrived + 1)), busy=(task(9),)))
    assert (len(merge.weighted_updates) if merge else 0) == merged
    assert merge is None or (merge.as_delta, merge.retain, merge.anchor) == (True, (), None)


def test_weights_and_step_are_those_of_algorithm_1() -> None:
    """w <- w + eta / K sum s(tau_k) Delta_k, over random buffers: step times weight is eta s / K."""
    draw = random.Random(1)
    for _ in range(100):
        version, size, eta = draw.randint(3, 30), draw.randint(1, 6), draw.choice([1.0, 0.3])
        old = [draw.randint(0, version) for _ in range(size)]
        buffer = [answer(k, version - age) for k, age in enumerate(old, 1)]
        merge = FedBuff(buffer_size=size, server_learning_rate=eta).merge(at(version, *buffer))
        assert merge is not None
        given = {update.task.id: merge.step * weight for weight, update in merge.weighted_updates}
        assert given == pytest.approx({k: eta / size * (1 + age) ** -0.5 for k, age in enumerate(old, 1)})
        assert sum(weight for weight, _ in merge.weighted_updates) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("settings", "weights", "step"),
    [
        ({}, {1: 2 / 3, 2: 1 / 3}, 0.75),
        ({"normalised_weights": True}, {1: 2 / 3, 2: 1 / 3}, 1.0),
        ({"discount": CONSTANT}, {1: 0.5, 2: 0.5}, 1.0),
        ({"weigh": by_examples}, {1: 0.4, 2: 0.6}, 0.25 + 0.75 * 0.5),
        ({"weigh": by_examples, "normalised_weights": True}, {1: 0.4, 2: 0.6}, 1.0),
        ({"weigh": by_tokens}, {1: 0.5, 2: 0.5}, 0.75),  # no tokens at all: every answer alike
        ({"server_learning_rate": 0.5, "discount": CONSTANT}, {1: 0.5, 2: 0.5}, 0.5),
    ],
)
def test_who_counts_how_much(settings: dict[str, Any], weights: dict[int, float], step: float) -> None:
    """A fresh answer of 10 examples, and one of 30 that is 3 versions old, which counts half."""
    fleet = at(3, answer(1, 3, examples=10, tokens=0), answer(2, 0, examples=30, tokens=0))
    given, how_far = weights_and_step(FedBuff(buffer_size=2, **settings).merge(fleet))
    assert given == pytest.approx(weights)
    assert how_far == pytest.approx(step)


@pytest.mark.parametrize(
    ("threshold", "worst", "rate"), [(None, 9, 1.0), (1, 0, 1.0), (1, 1, 1.0), (1, 4, 0.25), (5, 5, 1.0), (5, 6, 1 / 6)]
)
def test_the_delay_adaptive_rate_is_that_of_fadas(threshold: int | None, worst: int, rate: float) -> None:
    """arXiv 2407.18365: eta / tau_max where tau_max > tau_c, else eta; over the buffer."""
    schedule = FedBuff(buffer_size=2, delay_threshold=threshold, discount=CONSTANT)
    assert weights_and_step(schedule.merge(at(10, answer(1, 10), answer(2, 10 - worst))))[1] == pytest.approx(rate)


def test_the_path_of_a_whole_run_is_algorithm_1s() -> None:
    """Staleness, buffer and discount over 60 versions at 7 equal clients, buffers of 3."""
    found = path(FedBuff(buffer_size=3, max_in_flight=7), 60, alike(7))
    wanted, version_of = [0.0], [0] * 7
    for upload in range(7, 7 + 3 * 60):
        version_of.append((upload - 6) // 3)
    for version in range(60):
        old = [version - version_of[upload] for upload in range(3 * version, 3 * version + 3)]
        wanted.append(wanted[-1] + sum(SQUARE_ROOT(age) for age in old) / 3)
    assert found == pytest.approx(wanted, rel=1e-5)


def resting(waiting: bool, answered: int, busy: int, idle: int) -> Fleet:
    """c0, c1, ... answered and are idle again, with others to make `idle`."""
    arrived = [answer(k + 1, client=f"c{k}") for k in range(answered)]
    working = tuple(task(90 + k, client=f"b{k}") for k in range(busy))
    return at(0, *arrived, busy=working, idle=idle, tasks=7)


@pytest.mark.parametrize(
    ("waiting", "answered", "busy", "idle", "started"),
    [
        (False, 0, 0, 9, 4),
        (False, 2, 3, 9, 1),
        (False, 2, 2, 2, 2),  # those who answered go on
        (True, 0, 0, 9, 4),
        (True, 2, 2, 9, 0),  # their places are kept
        (True, 2, 0, 9, 2),
        (True, 2, 0, 2, 0),  # nobody else is there: they rest
        (True, 2, 1, 3, 1),
    ],
)
def test_who_waits_keeps_the_place_and_does_not_work(
    waiting: bool, answered: int, busy: int, idle: int, started: int
) -> None:
    for goes_on in (False, True):
        schedule = FedBuff(buffer_size=4, max_in_flight=4, waiting=waiting, uploader_goes_on=goes_on)
        fleet = resting(waiting, answered, busy, idle)
        drawn = schedule.start(fleet)
        assert len(drawn) == len(set(drawn)) == started
        assert set(drawn) <= set(fleet.idle)
        assert not waiting or not set(drawn) & {f"c{k}" for k in range(answered)}


@pytest.mark.parametrize(
    ("answered", "busy", "idle", "merged"),
    [
        (2, 0, 2, True),  # everybody waits
        (2, 0, 3, False),  # one can still be started
        (2, 1, 2, False),  # one is at work
        (2, 0, 0, True),  # who answered has left since
        (0, 0, 3, False),
    ],
)
def test_a_buffer_that_nobody_can_fill_is_merged_as_it_is(answered: int, busy: int, idle: int, merged: bool) -> None:
    assert (FedBuff(buffer_size=4, waiting=True).merge(resting(True, answered, busy, idle)) is not None) == merged
    assert FedBuff(buffer_size=4).merge(resting(False, answered, busy, idle)) is None


@pytest.mark.parametrize("clients", [1, 2, 3, 5, 9])
def test_waiting_never_blocks_however_few_clients_there_are(clients: int) -> None:
    """And nobody is in a buffer twice: with fewer clients than the buffer takes, each version is one round of all."""
    schedule = FedBuff(buffer_size=4, max_in_flight=6, waiting=True, discount=CONSTANT)
    places = path(schedule, 12, alike(clients))
    assert len(places) == 13
    if clients < 6:
        assert places == pytest.approx([float(version) for version in range(13)])


@pytest.mark.parametrize(
    "bad",
    [
        {"buffer_size": 0},
        {"buffer_size": 5, "max_in_flight": 4, "waiting": True},
        {"server_learning_rate": 0.0},
        {"server_learning_rate": 1.5},
        {"delay_threshold": 0},
    ],
)
def test_bad_parameters_are_refused_by_name(bad: dict[str, Any]) -> None:
    with pytest.raises(Refused, match=next(iter(bad))):
        FedBuff(**bad)


def test_a_buffer_larger_than_the_places_is_fine_where_nobody_waits() -> None:
    assert len(path(FedBuff(buffer_size=5, max_in_flight=2), 3, alike(3))) == 4
