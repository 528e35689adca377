"""Which rank a client trains at."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedloom.core.errors import Refused
from fedloom.core.types import Budget, Profile
from fedloom.plan.budget import Plan
from fedloom.plan.rank import FixedRank, RandomRank, RankByCapability, RankByData, RankRule
from tests.support.toys import SHAPE, fleet

CLIENT = Profile("a", 10)
MEMORY = {rank: SHAPE.train_memory(rank, 2048) for rank in (2, 4, 8)}
UPLOAD = {rank: 8 * SHAPE.payload(rank) / 10.0 for rank in (2, 4, 8)}


def test_a_fixed_rank_is_the_same_for_everyone() -> None:
    assert {FixedRank(4)(Profile(name, 1), fleet()) for name in "abc"} == {4}


@given(st.dictionaries(st.sampled_from("abcdef"), st.integers(1, 100)), st.integers(1, 64))
def test_rank_by_data_is_the_formula_of_the_prototype(seen: dict[str, int], top: int) -> None:
    """r_k = max(1, floor(r_max * #{j seen : n_j <= n_k} / #seen)); not seen yet: r_max (methods 1b, P2)."""
    given_rank = RankByData(top)(CLIENT, fleet(reported_examples=seen))
    if "a" not in seen:
        assert given_rank == top
    else:
        percentile = sum(n <= seen["a"] for n in seen.values()) / len(seen)
        assert given_rank == max(1, int(top * percentile + 1e-9))


def test_rank_by_data_goes_by_what_was_reported_not_by_the_profile() -> None:
    boastful = replace(CLIENT, examples=10**6)
    assert RankByData(8)(boastful, fleet(reported_examples={"a": 1, "b": 2, "c": 3, "d": 4})) == 2


@pytest.mark.parametrize(("share", "rank"), [(10.0, 8), (1.0, 8), (0.999, 4), (0.0, 2)])
def test_capability_is_limited_by_memory(share: float, rank: int) -> None:
    """`share` places the memory between what rank 4 and what rank 8 need; none fits: the smallest."""
    memory = MEMORY[4] + share * (MEMORY[8] - MEMORY[4]) if share else 1.0
    assert RankByCapability()(replace(CLIENT, memory=memory, up_bps=1e12), fleet()) == rank


@pytest.mark.parametrize(
    ("seconds", "rank"), [(UPLOAD[8], 8), (UPLOAD[8] - 1, 4), (UPLOAD[4], 4), (UPLOAD[4] - 1, 2), (1e-3, 2)]
)
def test_capability_is_limited_by_the_time_to_upload(seconds: float, rank: int) -> None:
    rule = RankByCapability(upload_seconds=seconds)
    assert rule(replace(CLIENT, up_bps=10.0, memory=1e12), fleet()) == rank


def test_capability_does_not_mind_the_order_of_the_ranks() -> None:
    profile = replace(CLIENT, memory=MEMORY[4] + 1.0)
    assert {RankByCapability(ranks)(profile, fleet()) for ranks in ((2, 4, 8), (8, 4, 2), (4, 8, 2))} == {4}


def test_random_ranks_are_uniform() -> None:
    rule = RandomRank(2, 8)
    counts = Counter(rule(CLIENT, fleet(dispatched={"a": turn})) for turn in range(3500))
    assert sorted(counts) == [2, 3, 4, 5, 6, 7, 8]
    assert all(380 < count < 620 for count in counts.values())  # 500 +- 5.8 standard deviations


def test_a_random_rank_depends_on_seed_client_and_turn_alone() -> None:
    rule, turns = RandomRank(1, 10**6), fleet(dispatched={"a": 3})
    drawn = rule(CLIENT, turns)
    assert drawn == rule(replace(CLIENT, examples=99), replace(turns, now=5.0, version=7, reported_examples={"a": 1}))
    others = {
        rule(replace(CLIENT, client="b"), turns),
        rule(CLIENT, fleet(dispatched={"a": 4})),
        rule(CLIENT, fleet(seed=1)),
    }
    assert drawn not in others
    assert len(others) == 3


@pytest.mark.parametrize("rule", [FixedRank(3), RandomRank(2, 5), RankByData(6), RankByCapability((4, 2))])
def test_no_rule_gives_more_than_its_largest(rule: RankRule) -> None:
    situations = [fleet(seed=s, reported_examples={"a": s + 1, "b": 5}, dispatched={"a": s}) for s in range(30)]
    assert max(rule(CLIENT, one) for one in situations) <= rule.largest
    assert min(rule(CLIENT, one) for one in situations) >= 1


def test_a_plan_is_a_rank_and_a_number_of_steps() -> None:
    assert Plan(FixedRank(4), 7)(CLIENT, fleet()) == Budget(4, 7)


@pytest.mark.parametrize(
    ("rule", "bad"),
    [
        (FixedRank, {"rank": 0}),
        (RandomRank, {"low": 0}),
        (RandomRank, {"low": 5, "high": 4}),
        (RankByData, {"rank_max": 0}),
        (RankByCapability, {"ranks": ()}),
        (RankByCapability, {"ranks": (4, 0)}),
        (RankByCapability, {"upload_seconds": 0.0}),
        (RankByCapability, {"upload_seconds": float("nan")}),
        (Plan, {"local_steps": 0}),
    ],
)
def test_bad_parameters_are_refused_by_name(rule: Any, bad: dict[str, Any]) -> None:
    with pytest.raises(Refused, match=list(bad)[-1]):
        rule(**bad)
