"""Device and link models, worked out by hand."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from statistics import mean, pstdev
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedloom.core.errors import Refused
from fedloom.core.types import Profile, Result
from fedloom.simulate.devices import LAPTOP, PHONE, WORKSTATION, Tier, World
from tests.support.toys import SHAPE, adapter, make_result, make_task

CLIENT = Profile("a", 10, flops=1e6, up_bps=1e3, down_bps=4e3)
STILL = World(jitter=0.0)


def task(number: int = 1, rank: int = 4, client: str = "a") -> Any:
    return make_task(adapter(rank), rank, number, client)


def result(rank: int = 4) -> Result:
    return make_result(adapter(rank, 1), tokens=50)


RESULT = result()


def test_seconds_are_bytes_over_links_and_flop_over_speed() -> None:
    """8 bits a byte; 2 FLOP a weight and token forward, 2 back, 6 for LoRA (cost.py)."""
    took = STILL.seconds(task(), RESULT, CLIENT, SHAPE, seed=0)
    values = 4 * (12 + 10 + 10 + 14)  # rank x (out + in) of both layers
    payload = 4 * (values + 3)
    assert took.up == pytest.approx(8 * payload / 1e3)
    assert took.down == pytest.approx(8 * payload / 4e3)
    assert took.train == pytest.approx(50 * (4 * 1000 + 6 * values) / 1e6)
    assert took.total == pytest.approx(took.down + took.train + took.up)


def test_a_higher_rank_takes_longer_on_the_wire_and_to_train() -> None:
    low, high = (STILL.seconds(task(rank=rank), result(rank), CLIENT, SHAPE, 0) for rank in (2, 8))
    assert low.up < high.up
    assert low.train < high.train


def test_jitter_is_lognormal_of_the_training_time_alone() -> None:
    still = STILL.seconds(task(), RESULT, CLIENT, SHAPE, 0)
    drawn = [World(jitter=0.3).seconds(task(k), RESULT, CLIENT, SHAPE, 0) for k in range(1, 1001)]
    logs = [math.log(one.train / still.train) for one in drawn]
    assert abs(mean(logs)) < 0.05
    assert pstdev(logs) == pytest.approx(0.3, abs=0.03)
    assert {one.up for one in drawn} == {still.up}
    assert {one.down for one in drawn} == {still.down}


def test_jitter_depends_on_seed_client_and_task_alone() -> None:
    def train(number: int = 1, client: str = "a", seed: int = 0) -> float:
        return World().seconds(task(number, client=client), RESULT, replace(CLIENT, client=client), SHAPE, seed).train

    assert train() == train()
    assert len({train(), train(number=2), train(client="b"), train(seed=1)}) == 4


@given(st.lists(st.floats(0.01, 10), min_size=1, max_size=5), st.integers(1, 60), st.integers(0, 5))
def test_tiers_are_dealt_by_largest_remainder(shares: list[float], clients: int, seed: int) -> None:
    world = World(tuple(Tier(f"t{k}", share, 1, 1, 1, 1) for k, share in enumerate(shares)))
    dealt = Counter(p.tier for p in world.profiles({f"c{k}": 1 for k in range(clients)}, seed))
    assert sum(dealt.values()) == clients
    for k, share in enumerate(shares):
        assert abs(dealt[f"t{k}"] - clients * share / sum(shares)) < 1


@pytest.mark.parametrize(
    ("clients", "counts"), [(10, (5, 3, 2)), (100, (50, 30, 20)), (1, (1, 0, 0)), (4, (2, 1, 1)), (0, (0, 0, 0))]
)
def test_the_default_world_is_half_phones(clients: int, counts: tuple[int, ...]) -> None:
    dealt = Counter(p.tier for p in World().profiles({f"c{k}": 1 for k in range(clients)}, 0))
    assert tuple(dealt[t.name] for t in (PHONE, LAPTOP, WORKSTATION)) == counts


def test_a_profile_is_the_tier_with_the_clients_own_data() -> None:
    (profile,) = World((LAPTOP,)).profiles({"zoe": 42}, 0)
    assert profile == Profile("zoe", 42, LAPTOP.flops, LAPTOP.up_bps, LAPTOP.down_bps, LAPTOP.memory, "laptop")


def test_who_gets_which_device_is_seeded_and_does_not_depend_on_the_order_of_clients() -> None:
    examples = {f"c{k}": k + 1 for k in range(20)}
    backwards = dict(reversed(list(examples.items())))
    assert World().profiles(examples, 1) == World().profiles(backwards, 1)
    assert World().profiles(examples, 1) != World().profiles(examples, 2)


@pytest.mark.parametrize("field", ["share", "flops", "up_bps", "down_bps", "memory"])
@pytest.mark.parametrize("value", [0.0, -1.0, float("nan")])
def test_a_tier_without_speed_is_refused_by_name(field: str, value: float) -> None:
    with pytest.raises(Refused, match=f"world.tiers.{field}"):
        replace(PHONE, **{field: value})


@pytest.mark.parametrize("bad", [{"tiers": ()}, {"jitter": -0.1}, {"jitter": float("nan")}])
def test_a_bad_world_is_refused_by_name(bad: dict[str, Any]) -> None:
    with pytest.raises(Refused, match=next(iter(bad))):
        World(**bad)
