"""Law 11: how far an answer moves the model, for every schedule, at equally fast clients that always move theirs by d = 1.

Asynchronous methods are to be compared at equal effective server step, and this is the step. C clients are at work; whoever
answers starts again, so an answer is merged C - 1 answers after the one that its task followed.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise, product

import pytest

import fedloom.schedule
from fedloom.core.policies import Schedule
from fedloom.schedule.fedasync import FedAsync
from fedloom.schedule.fedbuff import FedBuff
from fedloom.schedule.fedfa import FedFa
from fedloom.schedule.immediate import Immediate
from fedloom.schedule.rounds import Rounds
from fedloom.schedule.shared.staleness import CONSTANT, SQUARE_ROOT
from tests.support import toys
from tests.support.drift import alike, path, slope
from tests.support.storms import one_in

CONCURRENCY, WINDOWS = (1, 10, 20, 50), (1, 5, 10)


def of_fedasync(s: FedAsync, c: int) -> float:
    """w <- (1 - a) w + a (w of C - 1 versions ago + d): v = a (d - (C - 1) v)."""
    a = s.mixing * s.discount(c - 1)
    return a / (1 + a * (c - 1))


def of_fedbuff(s: FedBuff, c: int) -> float:
    """eta / K of each change, by the staleness of answers 1 ... K of a buffer: versions between task and merge."""
    stale = [q - (q * s.buffer_size + r - c) // s.buffer_size for q in (10 * c,) for r in range(1, s.buffer_size + 1)]
    return s.server_learning_rate / s.buffer_size * sum(map(s.discount, stale)) / s.buffer_size


def of_fedfa(s: FedFa, c: int) -> float:
    """The mean of answers C + j versions old, j < K: v (C + (K - 1) / 2) = d. As changes: each K times eta / K."""
    return s.delta_rate or 1 / (c + (s.window - 1) / 2)


DRIFT: dict[type, Callable[..., float]] = {
    FedAsync: of_fedasync,
    FedBuff: of_fedbuff,
    FedFa: of_fedfa,
    Immediate: lambda s, c: s.server_learning_rate,
    Rounds: lambda s, c: 1 / s.cohort_size,
}
"""The model's drift an answer, in d, at concurrency C."""

CASES: list[tuple[Schedule, int]] = [
    *((FedFa(window=k, max_in_flight=c), c) for k, c in product(WINDOWS, CONCURRENCY)),
    *((FedBuff(buffer_size=k, max_in_flight=c, discount=CONSTANT), c) for k, c in product(WINDOWS, (10, 20))),
    *((FedBuff(buffer_size=k, max_in_flight=c, discount=SQUARE_ROOT), c) for k, c in ((5, 20), (10, 20), (1, 3))),
    *((FedAsync(max_in_flight=c, discount=s), c) for c, s in product((1, 10), (CONSTANT, SQUARE_ROOT))),
    (FedFa(window=5, max_in_flight=10, fill="wait"), 10),
    (FedFa(window=5, max_in_flight=10, dedup=True), 10),
    (FedFa(window=5, max_in_flight=10, delta_rate=0.2), 10),
    (Immediate(max_in_flight=10), 10),
    (Rounds(cohort_size=10), 10),
]


def test_every_schedule_says_how_far_an_answer_moves_the_model() -> None:
    assert set(toys.classes(fedloom.schedule, toys.SCHEDULE)) <= DRIFT.keys()
    assert {type(schedule) for schedule, _ in CASES} == DRIFT.keys()


@pytest.mark.parametrize(("schedule", "concurrency"), one_in(3, CASES), ids=toys.called)
def test_the_drift_of_an_answer(schedule: Schedule, concurrency: int) -> None:
    """The slope over several times the longest memory, after as long a time of settling."""
    answers = getattr(schedule, "buffer_size", getattr(schedule, "cohort_size", 1))
    memory = concurrency + getattr(schedule, "window", 0)
    places = path(schedule, (12 * memory + 60) // answers, alike(concurrency))
    settled = places[len(places) // 3 :]
    assert slope(settled) / answers == pytest.approx(DRIFT[type(schedule)](schedule, concurrency), rel=0.01)


@pytest.mark.parametrize(("window", "concurrency"), list(product(WINDOWS, CONCURRENCY)))
def test_fedfa_takes_the_path_of_its_recurrence(window: int, concurrency: int) -> None:
    """w_t = mean over j < K of w_{t - C - j} + 1, where what is before the first answer is the first model's place, 0."""
    given = path(FedFa(window=window, max_in_flight=concurrency), 2 * (window + concurrency), alike(concurrency))
    wanted = [0.0]
    for t in range(1, len(given)):
        window_of_t = [wanted[max(t - j - concurrency, 0)] + 1.0 if t - j > 0 else 0.0 for j in range(window)]
        wanted.append(sum(window_of_t) / window)
    assert given == pytest.approx(wanted, abs=1e-5)
    assert all(after >= before - 1e-6 for before, after in pairwise(given))
