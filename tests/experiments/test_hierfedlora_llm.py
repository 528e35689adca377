"""The experiment with eighty devices: what its memory and its rules allow, and when a run is at its target."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hierfedlora_llm import (
    BLOCKS,
    CELLS,
    CLASSES,
    COHORT,
    MEMORY,
    METHODS,
    PLACE,
    SPLITS,
    STARTED,
    STEPS,
    TARGET,
    TOKENS,
    UPLOADS,
    DepthInTime,
    claims,
    seconds,
)
from hypothesis import given
from hypothesis import strategies as st
from loss_targets import reached

from fedloom.core.model_shape import Shape
from fedloom.core.types import Budget, Profile
from fedloom.plan.depth import DepthByMemory
from tests.support import toys
from tests.support.storms import tries

WIDTHS = ((576, 576), (192, 576), (192, 576), (576, 576), (1536, 576), (1536, 576), (576, 1536))
SMOLLM2 = Shape(
    134_515_008,
    0,
    30,
    576,
    WIDTHS * BLOCKS,
    0,
    {f"{block}.{k}": 30 - block for block in range(26, 30) for k in range(len(WIDTHS))},
    49_152,
)
"""What `load_base` says of the model with the adapter of the experiment."""
losses = st.lists(st.floats(0.01, 3.0), min_size=1, max_size=12)


def device(flops: float) -> Profile:
    return Profile("a", 30, flops=flops, up_bps=1.55e7, down_bps=1.55e7, memory=MEMORY)


def line(cell: str, found: list[float], seed: int = 0) -> dict[str, Any]:
    """A run with these test losses after its base's, a second apart."""
    scores = [{"loss": loss, "label_accuracy": 0.5} for loss in (9.0, *found)]
    curve = [[place, float(place), 0.0] for place in range(len(scores))]
    return {"cell": cell, "seed": seed, "scores": scores, "curve": curve, "work": [[0, 0, 0]] * len(scores)}


def test_a_devices_memory_holds_the_adapted_blocks_and_no_more() -> None:
    assert DepthByMemory(TOKENS)(device(1e12), toys.fleet(shape=SMOLLM2), Budget(8, STEPS)) == BLOCKS
    assert {one.memory for one in CLASSES} == {MEMORY}


@given(st.sampled_from(CLASSES), st.floats(1.0, 10.0), st.floats(0.1, 5.0))
@tries(50)
def test_a_faster_device_or_more_time_never_means_less_depth(one: Any, faster: float, limit: float) -> None:
    fleet, budget = toys.fleet(shape=SMOLLM2), Budget(8, STEPS)
    slow, quick = (DepthInTime(limit)(device(times * one.flops), fleet, budget) for times in (1.0, faster))
    longer = DepthInTime(2 * limit)(device(one.flops), fleet, budget)
    assert 1 <= slow <= min(quick, longer)
    assert max(quick, longer) <= BLOCKS


def test_every_run_has_as_many_tasks_and_devices_at_work() -> None:
    for name, method in METHODS.items():
        assert UPLOADS % method.answers == 0, name
        assert COHORT % method.answers == 0 or method.answers % COHORT == 0, name
        inside = method.hierarchy.schedule.max_in_flight if method.hierarchy else 1  # type: ignore[union-attr]
        groups = getattr(method.schedule, "max_in_flight", 0)
        assert groups * inside == STARTED, name


@given(losses, st.floats(0.01, 3.0), st.floats(0.0, 1.0))
@tries(50)
def test_a_lower_target_is_never_reached_earlier(found: list[float], target: float, lower: float) -> None:
    one = line("ours/dir0.5/far", found)
    sooner, later = reached(one, target), reached(one, target - lower)
    assert later is None or (sooner is not None and 0 <= sooner <= later <= len(found))


@pytest.mark.parametrize(("found", "expected"), [([3.0, 0.0], None), ([0.0], None), ([3.0, 2.0, 2.0], 3.0)])
def test_times_to_a_target_are_between_two_scores(found: list[float], expected: float | None) -> None:
    """In a straight line of the loss; of a run that never gets there its whole time."""
    target, one = TARGET, line("ours/dir0.5/far", found)
    before, after = (score["loss"] for score in one["scores"][-2:])
    there = len(found) - 1 + (before - target) / (before - after) if expected is None else expected
    assert seconds(one) == pytest.approx(there)


def test_a_claim_of_speed_is_above_its_margin_where_ours_is_sooner() -> None:
    """Two seeds, at the target after one score and after three: three times as fast."""
    low = TARGET
    soon, late = ([low, low, low], [low + 1, low + 1, low])
    names = {"ours": soon, "hierfedlora": soon, "fedit-over": late, "ungrouped": late, "fedbuff": late}
    depths = {"ours-depth-1": [low + 1, low, low], "ours-depth-4": late}
    found = [line(f"{name}/{PLACE}", own, seed) for seed in (0, 1) for name, own in (names | depths).items()]
    judged = {claim.name: claim for claim in claims(found)}
    assert {claim.seeds for claim in judged.values()} == {2}
    assert judged["hierfedlora-speed"].values == pytest.approx([math.log(3)] * 2)
    assert judged["hierfedlora-depth"].values == pytest.approx([math.log(2)] * 2), "of the better fixed depth"
    assert judged["hierfedlora-accuracy"].values == (0.0, 0.0)


def test_cells_without_groups_have_no_edges() -> None:
    assert {name for name in CELLS if name.endswith("/near")} == {
        f"{name}/{split}/near" for name, method in METHODS.items() if method.hierarchy for split in SPLITS
    }
