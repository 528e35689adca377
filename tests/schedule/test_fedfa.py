"""FedFa as tables, and against the reference rule of its two public re-implementations, line by line."""

from __future__ import annotations

import random
from collections import deque
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch

from fedloom.core.errors import Refused
from fedloom.core.events import ClientJoined, Dispatch, TimerFired, UpdateArrived
from fedloom.core.limits import Limits
from fedloom.core.server import Server
from fedloom.core.types import ClientState, Task
from fedloom.plan.budget import Plan
from fedloom.plan.rank import FixedRank
from fedloom.schedule.fedfa import FedFa
from fedloom.schedule.shared.staleness import SQUARE_ROOT
from fedloom.schedule.shared.weights import by_examples
from tests.support import toys
from tests.support.drift import Steady, alike, path, point
from tests.support.schedule_tables import answer, at, numbers, task, weights_and_step

FIRST = toys.server().state.model


@dataclass
class Reference:
    """methods.md 3b: a first-in-first-out queue, its mean, and nothing else. `fill`: with the first model, or wait."""

    window: int
    first: float
    wait: bool
    queue: deque[float] = field(default_factory=deque)

    def upload(self, w: float) -> float | None:
        """Q.push(w_k); if |Q| > K: Q.pop_oldest(); if |Q| < K: no version yet; w = (1 / K) sum Q."""
        if not self.queue and not self.wait:
            self.queue.extend([self.first] * self.window)
        self.queue.append(w)
        if len(self.queue) > self.window:
            self.queue.popleft()
        return None if len(self.queue) < self.window else sum(self.queue) / self.window


def delivered(schedule: FedFa, uploads: int, seed: int, clients: int = 6) -> list[tuple[float, float, float | None]]:
    """Tasks answered in random order by models at random places: (the task's model, the upload, the version made of it)."""
    draw, found = random.Random(seed), list[tuple[float, float, float | None]]()
    limits = Limits(versions=10**6, evaluate_every=0, norm_ratio=None)  # models at random places are not alike
    server: Server = toys.server(schedule, start=point(0.5), limits=limits, assign=Plan(FixedRank(1), 1))
    for profile in alike(clients).values():
        server.handle(0.0, ClientJoined(profile))
    tasks: dict[int, Task] = {c.task.id: c.task for c in server.handle(0.0, TimerFired()) if isinstance(c, Dispatch)}
    for now in range(1, uploads + 1):
        one = tasks.pop(draw.choice(sorted(tasks)))
        before, base = server.state.version, float(one.start.train.dense["x"])
        w = float(torch.tensor(draw.gauss(0.0, 1.0)))
        trained = replace(one.start.train, dense={"x": torch.tensor([w])})
        commands = server.handle(float(now), UpdateArrived(one.client, one.id, toys.make_result(trained)))
        tasks |= {c.task.id: c.task for c in commands if isinstance(c, Dispatch)}
        made = float(server.state.model.adapter.dense["x"]) if server.state.version > before else None
        found.append((base, w, made))
    return found


@pytest.mark.parametrize("fill", ["seed", "wait"])
@pytest.mark.parametrize("window", [1, 2, 5, 10])
def test_fedfa_param_is_the_reference_rule(window: int, fill: Any) -> None:
    """300 random uploads, out of order, by clients who have several in the window."""
    reference = Reference(window, 0.5, fill == "wait")
    log = delivered(FedFa(window=window, fill=fill, max_in_flight=4), 300, seed=window)
    for _, upload, made in log:
        wanted = reference.upload(upload)
        assert (made is None) == (wanted is None)
        assert made is None or made == pytest.approx(wanted, abs=2e-6)


@pytest.mark.parametrize("window", [1, 5, 10])
def test_its_incremental_form_is_the_same(window: int) -> None:
    """w <- w + (w_new - w_evicted) / K, and nothing drifts over 300 uploads."""
    log = delivered(FedFa(window=window, max_in_flight=4), 300, seed=9)
    w, uploads = 0.5, [0.5] * window + [upload for _, upload, _ in log]
    for k, (_, upload, made) in enumerate(log):
        w += (upload - uploads[k]) / window
        assert made == pytest.approx(w, abs=2e-6)


@pytest.mark.parametrize("window", [1, 4])
def test_fedfa_delta_uses_every_change_as_often_as_the_window_is_wide(window: int) -> None:
    """D1: w <- w + eta (1 / K) sum over Q of Delta, with an empty place for what has not come yet."""
    eta, w = 0.3, 0.5
    changes = deque([0.0] * window, maxlen=window)
    for base, upload, made in delivered(FedFa(window=window, delta_rate=eta, max_in_flight=4), 200, seed=3):
        changes.append(upload - base)
        w += eta * sum(changes) / window
        assert made == pytest.approx(w, rel=1e-5, abs=1e-5)


def test_at_rate_one_over_the_window_a_steady_change_counts_as_in_fedbuff() -> None:
    places = path(FedFa(window=5, delta_rate=0.2, max_in_flight=10), 100, alike(10))
    assert places[-1] - places[-11] == pytest.approx(2.0, rel=1e-5)


@pytest.mark.parametrize(
    ("version", "held", "filled"), [(0, 1, 0.25), (1, 2, 0.5), (2, 3, 0.75), (3, 4, 1.0), (9, 4, 1.0)]
)
def test_a_seeded_window_is_the_first_model_but_for_what_has_come(version: int, held: int, filled: float) -> None:
    fleet = at(version, *(answer(k) for k in range(1, held + 1)), first=FIRST, retained=held - 1)
    merge = FedFa(window=4).merge(fleet)
    assert merge is not None
    assert weights_and_step(merge) == ({k: round(1 / held, 12) for k in range(1, held + 1)}, filled)
    assert merge.anchor is (None if filled == 1.0 else FIRST)
    assert not merge.as_delta
    as_change = FedFa(window=4, delta_rate=0.5).merge(fleet)
    assert as_change is not None
    assert (as_change.step, as_change.as_delta, as_change.anchor) == (filled * 0.5, True, None)


def test_the_oldest_answer_leaves_by_arrival_and_not_by_the_number_of_its_task() -> None:
    merge = FedFa(window=3).merge(at(7, answer(8), answer(2), answer(9), answer(1), retained=3))
    assert merge is not None
    assert numbers(merge.retain) == [2, 9, 1]
    assert sorted(weights_and_step(merge)[0]) == [1, 2, 9]


@pytest.mark.parametrize(
    ("arrived", "retained", "version", "due"),
    [(0, 0, 0, False), (1, 0, 0, False), (3, 0, 0, True), (3, 3, 4, False), (4, 3, 4, True), (1, 0, 4, True)],
)
def test_who_waits_for_a_full_window_waits_once(arrived: int, retained: int, version: int, due: bool) -> None:
    """And a window that nothing was added to makes no version."""
    fleet = at(version, *(answer(k) for k in range(arrived)), retained=retained, busy=(task(9),))
    merge = FedFa(window=3, fill="wait").merge(fleet)
    assert (merge is not None) == due
    assert merge is None or (merge.step, merge.anchor) == (1.0, None)


@pytest.mark.parametrize(
    ("window", "dedup", "kept"), [(4, False, [2, 3, 4, 5]), (4, True, [4, 5]), (9, True, [4, 5]), (1, True, [5])]
)
def test_dedup_keeps_the_latest_answer_of_each_client(window: int, dedup: bool, kept: list[int]) -> None:
    arrived = [answer(k, client=client) for k, client in enumerate("ababb", 1)]
    arrived[3] = answer(4, client="a")  # a: 1, 3, 4; b: 2, 5
    merge = FedFa(window=window, dedup=dedup).merge(at(20, *arrived, retained=4))
    assert merge is not None
    assert sorted(weights_and_step(merge)[0]) == kept
    assert numbers(merge.retain) == (kept if window > 1 else []), "a window of one uses each answer once"
    assert merge.step == 1.0


def test_dedup_throws_no_answer_away_that_was_in_no_version() -> None:
    """Who waits for a full window counts all that came until then, once."""
    schedule = FedFa(window=3, dedup=True, fill="wait")
    first = schedule.merge(at(0, answer(1, client="a"), answer(2, client="a"), answer(3, client="b")))
    assert first is not None
    assert numbers(first.retain) == [1, 2, 3]
    second = schedule.merge(at(1, *first.retain, answer(4, client="b"), retained=3))
    assert second is not None
    assert numbers(second.retain) == sorted(weights_and_step(second)[0]) == [2, 4]


def test_weights_by_examples_and_by_age_at_the_merge() -> None:
    window = (answer(1, 0, examples=10), answer(2, 3, examples=30))
    for settings, wanted in (
        ({}, {1: 0.5, 2: 0.5}),
        ({"weigh": by_examples}, {1: 0.25, 2: 0.75}),
        ({"discount": SQUARE_ROOT}, {1: 1 / 3, 2: 2 / 3}),  # 3 versions old, and fresh
        ({"weigh": by_examples, "discount": SQUARE_ROOT}, {1: 1 / 7, 2: 6 / 7}),
    ):
        given, step = weights_and_step(FedFa(window=2, **settings).merge(at(3, *window, retained=1)))  # type: ignore[arg-type]
        assert given == pytest.approx(wanted)
        assert step == 1.0


def test_the_uploader_goes_on_or_anybody() -> None:
    """With one free place and nine idle clients."""
    fleets = [at(5, busy=(task(1),), idle=9, latest="c4", tasks=turn) for turn in range(60)]
    at_random = [FedFa(max_in_flight=2).start(fleet) for fleet in fleets]
    assert all(len(drawn) == 1 for drawn in at_random)
    assert len({drawn[0] for drawn in at_random}) == 9
    assert {tuple(FedFa(max_in_flight=2, uploader_goes_on=True).start(fleet)) for fleet in fleets} == {("c4",)}


@pytest.mark.parametrize(
    ("latest", "places", "first"),
    [("c4", 3, "c4"), (None, 3, None), ("gone", 3, None), ("c4", 9, None), ("c4", 0, None)],
)
def test_with_more_places_the_uploader_is_one_of_different_ones(latest: str, places: int, first: str | None) -> None:
    drawn = FedFa(max_in_flight=places + 1, uploader_goes_on=True).start(at(5, busy=(task(1),), idle=9, latest=latest))
    assert len(drawn) == len(set(drawn)) == places
    assert first is None or first in drawn


def test_whose_work_is_aborted_makes_room_at_once() -> None:
    """One slow client among three: with no answer older than 2 versions its place is given away, and it is idle again."""
    server = toys.server(
        FedFa(window=2, max_in_flight=3, max_staleness=2, uploader_goes_on=True), limits=Limits(versions=50)
    )
    for profile in alike(4).values():
        server.handle(0.0, ClientJoined(profile))
    server.handle(0.0, TimerFired())
    slow = min(server.state.busy)
    for now in range(1, 5):
        fast = max(number for number, one in server.state.busy.items() if number != slow)
        one = server.state.busy[fast]
        server.handle(float(now), UpdateArrived(one.client, one.id, toys.make_result(one.start.train)))
        assert len(server.state.busy) == 3
        assert all(server.state.version - task.version <= 2 for task in server.state.busy.values())
        assert (slow in server.state.busy) == (now <= 2)


def test_who_trains_further_by_one_is_found_further() -> None:
    """The trainer of these tests does what it says."""
    ((result, _),) = Steady().train([(toys.make_task(point(2.0), 1), ClientState())])
    assert float(result.adapter.dense["x"]) == 3.0


@pytest.mark.parametrize(
    "bad",
    [{"window": 0}, {"delta_rate": 0.0}, {"delta_rate": 1.1}, {"delta_rate": float("nan")}, {"fill": "zero"}],
)
def test_bad_parameters_are_refused_by_name(bad: dict[str, Any]) -> None:
    with pytest.raises(Refused, match=next(iter(bad))):
        FedFa(**bad)
