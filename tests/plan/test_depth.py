"""Depth rules: what fits a client, and never less than the least."""

from __future__ import annotations

from dataclasses import replace

import pytest

from fedloom.core.errors import Refused
from fedloom.core.model_shape import Shape
from fedloom.core.types import Budget, Profile
from fedloom.plan.budget import Plan
from fedloom.plan.client_cost import CostModel
from fedloom.plan.depth import DepthByCapability, DepthByMemory, FixedDepth
from fedloom.plan.rank import FixedRank
from tests.support import toys

SHAPE = Shape(600, 0, 6, 10, modules=((10, 10),) * 6, dense=5, depths={f"layer{k}": 6 - k for k in range(6)})
FLEET = toys.fleet(shape=SHAPE)
BUDGET = Budget(2, 5)
CLIENT = Profile("c", 10, flops=1e3, up_bps=1e6, down_bps=1e6, memory=1e12)
MEMORY = {depth: SHAPE.train_memory(2, 64, depth) for depth in range(1, 7)}


def test_without_a_rule_everybody_trains_everything() -> None:
    assert Plan(FixedRank(2), 5)(CLIENT, FLEET) == Budget(2, 5, None)


def test_the_fixed_depth_is_everybodys() -> None:
    assert Plan(FixedRank(2), 5, FixedDepth(3))(CLIENT, FLEET) == Budget(2, 5, 3)


@pytest.mark.parametrize(("spare", "depth"), [(-1.0, 3), (0.0, 4), (1.0, 4)])
def test_the_deepest_that_fits_the_memory(spare: float, depth: int) -> None:
    rule = DepthByMemory(batch_tokens=64)
    assert rule(replace(CLIENT, memory=MEMORY[4] + spare), FLEET, BUDGET) == depth


def test_who_fits_nothing_trains_the_least() -> None:
    for rule in (DepthByMemory(64, least=2), DepthByCapability(1e-9, 64, least=2)):
        assert rule(replace(CLIENT, memory=0.0), FLEET, BUDGET) == 2
        assert rule.bounds == (2, None)


def test_a_higher_rank_leaves_less_depth() -> None:
    client = replace(CLIENT, memory=MEMORY[4])
    assert DepthByMemory(64)(client, FLEET, Budget(64, 5)) < DepthByMemory(64)(client, FLEET, BUDGET)


def test_the_more_capable_trains_deeper_and_answers_in_time() -> None:
    """LEGEND: depths by capability, so that all take about the same time."""
    limit = CostModel.from_profile(CLIENT, SHAPE, 2, 64).task_seconds(SHAPE, 2, 4, 5)
    rule = DepthByCapability(limit, batch_tokens=64)
    depths = [rule(replace(CLIENT, flops=1e3 * speed), FLEET, BUDGET) for speed in (0.1, 0.9, 1.0, 1.2, 10.0)]
    assert depths == sorted(depths)
    assert depths[2] == 4
    assert depths[0] == 1
    assert depths[-1] == 6
    slow_link = replace(CLIENT, up_bps=8 * SHAPE.payload(2, 2) / limit)
    assert rule(slow_link, FLEET, BUDGET) == 1
    assert rule(replace(CLIENT, memory=MEMORY[2]), FLEET, BUDGET) == 2


@pytest.mark.parametrize(
    ("rule", "field"),
    [(FixedDepth, "depth"), (DepthByMemory, "least"), (DepthByCapability, "least"), (DepthByCapability, "seconds")],
)
def test_what_makes_no_sense_is_refused(rule: type, field: str) -> None:
    with pytest.raises(Refused, match=rf"plan\.depth\.{field} = 0"):
        rule(**{field: 0})
