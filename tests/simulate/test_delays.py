"""Delay laws: their quantiles, and that a draw depends on its client, its task and the seed alone."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from statistics import NormalDist, mean, median, pstdev
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedloom.core import schema
from fedloom.core.errors import Refused
from fedloom.core.schema import jsonable
from fedloom.runs import manifest
from fedloom.runs.run import Run
from fedloom.runs.run_file import override
from fedloom.simulate.delays import LARGE_DELAYS, DelayClass, DelayClasses, Delays, ExponentialDelays
from fedloom.simulate.devices import Capabilities, Devices, World
from tests.support.toys import SHAPE, adapter, make_result, make_task

LAWS: list[Any] = [
    Delays(),
    Delays(jitter=0.5),
    Delays(sigma=0.0),
    ExponentialDelays(),
    DelayClasses(),
    LARGE_DELAYS,
    Capabilities(),
    World(),
]
every_law = pytest.mark.parametrize("law", LAWS, ids=repr)
START = adapter(2)
RESULT = make_result(adapter(2, 1))


def clients(count: int) -> dict[str, int]:
    return {f"c{k:05d}": 10 + k for k in range(count)}


def times(law: Devices, count: int, tasks: int = 1, seed: int = 0) -> dict[str, list[float]]:
    """Total seconds of `tasks` tasks of each client."""
    found = {}
    for number, profile in enumerate(law.profiles(clients(count), seed)):
        found[profile.client] = [
            law.seconds(make_task(START, 2, number * tasks + k, profile.client), RESULT, profile, SHAPE, seed, k).total
            for k in range(tasks)
        ]
    return found


def flat(found: dict[str, list[float]]) -> list[float]:
    return [one for many in found.values() for one in many]


@every_law
def test_every_law_is_positive_and_fits_a_run(law: Devices) -> None:
    run = Run(model="m", data=None, world=law)  # type: ignore[arg-type]
    schema.check_fields(law)
    assert schema.matches_type(law, Devices)
    assert manifest.settings_hash(jsonable(run))
    assert all(0 < one < math.inf for one in flat(times(law, 20, 3)))


@every_law
def test_a_time_depends_on_seed_client_and_task_alone_in_any_order(law: Devices) -> None:
    """Shuffled calls, clients given backwards, other draws in between: the same numbers."""
    wanted = times(law, 10, 5, seed=3)
    profiles = {p.client: p for p in law.profiles(dict(reversed(clients(10).items())), 3)}
    calls = [(number, client, k) for number, client in enumerate(sorted(profiles)) for k in range(5)]
    random.Random(1).shuffle(calls)
    for number, client, k in calls:
        task = make_task(START, 2, number * 5 + k, client)
        assert law.seconds(task, RESULT, profiles[client], SHAPE, 3, k).total == wanted[client][k]
    if law != Delays(sigma=0.0):
        assert flat(times(law, 10, 5, seed=4)) != flat(wanted)


@every_law
def test_profiles_keep_the_examples_and_do_not_depend_on_the_order(law: Devices) -> None:
    given = clients(12)
    assert {p.client: p.examples for p in law.profiles(given, 1)} == given
    assert law.profiles(given, 1) == law.profiles(dict(reversed(given.items())), 1)


def test_without_spread_a_task_takes_the_same_time() -> None:
    assert set(flat(times(Delays(median=7.0, sigma=0.0), 5, 5))) == {7.0}


def test_lognormal_between_clients_and_none_within() -> None:
    found = times(Delays(median=2.0, sigma=0.8), 2000, 2)
    assert all(first == second for first, second in found.values())
    logs = [math.log(one[0] / 2.0) for one in found.values()]
    assert mean(logs) == pytest.approx(0.0, abs=4 * 0.8 / 2000**0.5)
    assert pstdev(logs) == pytest.approx(0.8, rel=0.06)
    slow = sum(one[0] > 2.0 * 3 for one in found.values()) / 2000
    assert slow == pytest.approx(1 - NormalDist().cdf(math.log(3) / 0.8), abs=0.025)


def test_jitter_is_of_the_task_and_comes_on_top() -> None:
    found = times(Delays(sigma=0.8, jitter=0.3), 400, 8)
    within = [pstdev(math.log(one) for one in many) for many in found.values()]
    assert math.sqrt(mean(one**2 for one in within) * 8 / 7) == pytest.approx(0.3, rel=0.06)
    assert pstdev(mean(map(math.log, many)) for many in found.values()) == pytest.approx(0.8, rel=0.15)


def test_exponential_at_the_rate_of_the_client() -> None:
    """Mean and median of one rate; with rates the clients' own means are scale / rate."""
    alike = flat(times(ExponentialDelays(scale=3.0, sigma=0.0), 100, 40))
    assert mean(alike) == pytest.approx(3.0, rel=4 / 4000**0.5)
    assert median(alike) == pytest.approx(3.0 * math.log(2), rel=0.08)
    law = ExponentialDelays(sigma=1.0)
    rates = {p.client: p.flops / 1e10 for p in law.profiles(clients(200), 0)}
    assert pstdev(map(math.log, rates.values())) == pytest.approx(1.0, rel=0.2)
    scaled = [one * rates[client] for client, many in times(law, 200, 20).items() for one in many]
    assert mean(scaled) == pytest.approx(1.0, rel=4 / 4000**0.5)


@pytest.mark.parametrize(("law", "slow"), [(DelayClasses(), (5.0, 8.0)), (LARGE_DELAYS, (50.0, 80.0))], ids=repr)
def test_classes_keep_to_their_bounds_and_are_uniform(law: DelayClasses, slow: tuple[float, float]) -> None:
    tiers = {p.client: p.tier for p in law.profiles(clients(300), 0)}
    bounds = {"fast": (1.0, 2.0), "slower": (3.0, 5.0), "slow": slow}
    found = times(law, 300, 4)
    for name, (low, high) in bounds.items():
        own = [one for client, many in found.items() if tiers[client] == name for one in many]
        assert low <= min(own) <= max(own) <= high
        assert mean(own) == pytest.approx((low + high) / 2, abs=4 * (high - low) / math.sqrt(12 * len(own)))


def test_shares_of_classes_are_a_dirichlet_around_the_given_ones() -> None:
    """Dirichlet(c (3, 2, 1)): means 1/2, 1/3, 1/6; variance m (1 - m) / (6 c + 1). Without concentration: just them."""

    def shares(law: DelayClasses, seed: int) -> list[float]:
        dealt = Counter(p.tier for p in law.profiles(clients(60), seed))
        return [dealt[one.name] / 60 for one in law.classes]

    exact = DelayClasses(concentration=None)
    assert shares(exact, 0) == shares(exact, 1) == [30 / 60, 20 / 60, 10 / 60]
    for concentration in (1.0, 10.0):
        law = DelayClasses(concentration=concentration)
        for drawn, m in zip(
            zip(*(shares(law, seed) for seed in range(300)), strict=True), (1 / 2, 1 / 3, 1 / 6), strict=True
        ):
            spread = math.sqrt(m * (1 - m) / (6 * concentration + 1))
            assert mean(drawn) == pytest.approx(m, abs=4 * spread / 300**0.5)
            assert pstdev(drawn) == pytest.approx(spread, rel=0.2)


def test_capabilities_deal_thirty_forty_ten() -> None:
    profiles = Capabilities().profiles(clients(80), 0)
    assert Counter(p.tier for p in profiles) == {"weak": 30, "middle": 40, "strong": 10}
    flops = {p.tier: p.flops for p in profiles}
    assert (flops["middle"] / flops["weak"], flops["strong"] / flops["weak"]) == (2.5, 6.0)
    assert {p.up_bps for p in profiles} == {15.5e6}


def test_bandwidth_is_drawn_for_every_task_and_the_mode_after_twenty() -> None:
    law = Capabilities()
    (profile,) = law.profiles({"a": 10}, 0)
    took = [law.seconds(make_task(START, 2, k, "a"), RESULT, profile, SHAPE, 0, k) for k in range(2000)]
    bps = [(one.up + one.down) for one in took]
    assert len(set(bps)) == 2000
    assert max(bps) / min(bps) == pytest.approx(30.0, rel=0.3)
    assert all(one.up == pytest.approx(one.down * took[0].up / took[0].down) for one in took)
    modes = [took[k].train for k in range(0, 2000, 20)]
    assert all(took[k].train == modes[k // 20] for k in range(2000))
    fastest = SHAPE.train_flops(RESULT.tokens, 2) / profile.flops
    assert {round(fastest / one, 9) for one in modes} == {1.0, 0.75, 0.5, 0.25}


@given(st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=5), st.integers(0, 40), st.integers(0, 3))
def test_every_client_gets_a_class(shares: list[float], count: int, seed: int) -> None:
    law = DelayClasses(tuple(DelayClass(f"t{k}", share, 1, 2) for k, share in enumerate(shares)))
    assert len(law.profiles(clients(count), seed)) == count


@pytest.mark.parametrize(
    ("make", "field"),
    [
        (lambda: Delays(median=0.0), "world.median"),
        (lambda: Delays(sigma=-1.0), "world.sigma"),
        (lambda: Delays(sigma=1e9), "world.sigma"),
        (lambda: Delays(jitter=math.nan), "world.jitter"),
        (lambda: ExponentialDelays(scale=-1.0), "world.scale"),
        (lambda: ExponentialDelays(sigma=math.inf), "world.sigma"),
        (lambda: DelayClass("a", 0.0, 1, 2), "world.classes.share"),
        (lambda: DelayClass("a", 1, 3, 2), "world.classes.low"),
        (lambda: DelayClass("a", 1, -1, 2), "world.classes.low"),
        (lambda: DelayClass("a", 1, 0, 0), "world.classes.high"),
        (lambda: DelayClasses(()), "world.classes"),
        (lambda: DelayClasses((DelayClass("a", 1, 1, 2), DelayClass("a", 1, 1, 2))), "world.classes"),
        (lambda: DelayClasses(concentration=0.0), "world.concentration"),
        (lambda: Capabilities(()), "world.classes"),
        (lambda: Capabilities(low_bps=0.0), "world.low_bps"),
        (lambda: Capabilities(low_bps=4e7), "world.low_bps"),
        (lambda: Capabilities(modes=()), "world.modes"),
        (lambda: Capabilities(modes=(0.0,)), "world.modes"),
        (lambda: Capabilities(mode_tasks=0), "world.mode_tasks"),
        (lambda: replace(Capabilities().classes[0], flops=0.0), "world.classes.flops"),
    ],
)
def test_what_makes_no_sense_is_refused_by_name(make: Callable[[], object], field: str) -> None:
    with pytest.raises(Refused) as caught:
        make()
    assert caught.value.field == field


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        (("world=FixedRank",), None),
        (("world=Delays",), Delays()),
        (("world=Delays()", "world.sigma=1"), Delays(sigma=1.0)),
        (("world=ExponentialDelays(sigma=2)",), ExponentialDelays(sigma=2)),
        (("world=LARGE_DELAYS",), LARGE_DELAYS),
        (("world=LARGE_DELAYS", "world.concentration=None"), replace(LARGE_DELAYS, concentration=None)),
        (("world=DelayClasses((DelayClass('a', 1, 2, 3),))",), DelayClasses((DelayClass("a", 1, 2, 3),))),
        (("world=Capabilities()", "world.modes=(1.0,)"), Capabilities(modes=(1.0,))),
    ],
)
def test_a_law_is_named_on_the_command_line(settings: tuple[str, ...], wanted: object) -> None:
    run = Run(model="m", data=None)  # type: ignore[arg-type]
    if wanted is None:
        with pytest.raises(Refused, match=r"expected a value like World"):
            override(run, settings)
    else:
        assert override(run, settings).world == wanted
