"""How far an answer may move: what is usual passes, what is far beside others does not, in products, factors, head and control."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedloom.core.change_norms import WINDOW, ChangeNorms, NormLimits, change_norms, remember
from fedloom.core.lora import Adapter, Factor, cut_adapter, map_tensors, product_difference, product_norm
from fedloom.core.rate_by_rank import RateByRank
from fedloom.core.types import Result, Rules, Task
from tests.support.storms import tries
from tests.support.toys import adapter, changed, make_result, make_task

TASK = make_task(adapter(4), 4)
USUAL = [change_norms(TASK, make_result(changed(TASK.start, seed, 0.01))) for seed in range(5)]
LIMITS = NormLimits(ratio=10.0, step_ratio=3.0, largest_step=0.01)


def moved(by: float, seed: int = 9, task: Task = TASK) -> ChangeNorms:
    return change_norms(task, make_result(changed(task.start, seed, by)))


@given(by=st.floats(1e-3, 0.03), seed=st.integers(6, 99))
@tries(30)
def test_what_is_usual_passes(by: float, seed: int) -> None:
    assert NormLimits(ratio=10.0).why_unlike(moved(by, seed), USUAL, "own") is None


@given(by=st.floats(0.3, 1e4), seed=st.integers(6, 99))
@tries(30)
def test_what_is_far_is_refused_with_both_numbers(by: float, seed: int) -> None:
    mine = moved(by, seed)
    reason = str(NormLimits(ratio=10.0).why_unlike(mine, USUAL, "own"))
    assert "above 10 times" in reason
    assert "the median of others" in reason


@given(by=st.floats(1e-6, 1e6))
@tries(20)
def test_most_of_the_others_decide_and_no_single_one(by: float) -> None:
    """One other who moved far or not at all neither lets a far answer pass nor has a usual one refused."""
    others = [*USUAL[:2], moved(by, 7)]
    limits = NormLimits(ratio=10.0)
    assert limits.why_unlike(moved(0.01), others, "own") is None
    assert limits.why_unlike(moved(1.0), others, "own")


def test_a_rate_by_rank_is_no_reason_and_hides_no_head() -> None:
    """Who trains at twenty times the rate moves its factors so much further; beside others that is usual, in a head it is not."""
    fast = replace(TASK, budget=replace(TASK.budget, rate=RateByRank(2.0, round(4 * 20**0.5))))
    limits, factors = NormLimits(ratio=5.0), changed(TASK.start, 9, 0.2).factors
    still = change_norms(fast, make_result(Adapter(factors, TASK.start.train.dense)))
    assert limits.why_unlike(still, USUAL, "own") is None
    assert limits.why_unlike(replace(still, rate=1.0), USUAL, "own")
    assert "its dense moved" in str(limits.why_unlike(replace(still, dense=20 * USUAL[0].dense), USUAL, "own"))


def test_a_rescaled_product_is_seen_in_its_factors() -> None:
    """up * 1000 and down / 1000 make the same product; a mean of factors takes one without the other."""
    factors = {n: Factor(f.down / 1000, f.up * 1000) for n, f in TASK.start.train.factors.items()}
    mine = change_norms(TASK, make_result(Adapter(factors, TASK.start.train.dense)))
    assert mine.products < 0.01
    assert "its factors moved" in str(LIMITS.why_too_far(TASK, mine, [], "own"))
    assert "its factors moved" in str(NormLimits(ratio=10.0).why_unlike(mine, USUAL, "own"))
    assert NormLimits(ratio=10.0).why_unlike(mine, USUAL, "rotated") is None, "an edge's factors may be rotated"


def test_the_head_and_the_control_variate_hide_behind_nothing() -> None:
    start = TASK.start.train
    head = Adapter(changed(start, 9, 0.01).factors, {"head": start.dense["head"] + 3.0})
    assert "its dense moved" in str(
        NormLimits(ratio=10.0).why_unlike(change_norms(TASK, make_result(head)), USUAL, "own")
    )
    few = [replace(one, control=0.01) for one in USUAL]
    assert "its control moved" in str(NormLimits(ratio=10.0).why_unlike(replace(few[0], control=1.0), few, "own"))


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_norms_are_those_of_the_products_also_of_a_client_that_pruned_itself(rank: int) -> None:
    trained = changed(TASK.start, 3, 0.1)
    cut = Adapter({n: Factor(f.down[:rank], f.up[:, :rank]) for n, f in trained.factors.items()}, trained.dense)
    found, start = change_norms(TASK, make_result(cut)), TASK.start.train.factors
    numbers = sum(f.up.numel() + f.down.numel() for f in cut.factors.values())
    wanted = sum(product_norm(product_difference(f, start[n])) ** 2 for n, f in cut.factors.items())
    assert found.products == pytest.approx((wanted / numbers) ** 0.5, rel=1e-4)


def test_the_first_answers_are_bounded_by_what_an_optimiser_can_do() -> None:
    far = LIMITS.step_ratio * LIMITS.largest_step * TASK.budget.steps  # type: ignore[operator]
    assert LIMITS.why_too_far(TASK, moved(0.9 * far), [], "own") is None
    assert "steps reach" in str(LIMITS.why_too_far(TASK, moved(1.5 * far), [], "own"))
    assert "steps reach" in str(LIMITS.why_too_far(TASK, moved(50 * far), [], "rotated"))
    fast = replace(TASK, start=replace(TASK.start, rules=Rules(up_rate=2.0)))
    assert LIMITS.why_too_far(fast, moved(1.5 * far, task=fast), [], "own") is None


def test_nothing_is_measured_where_nothing_is_limited() -> None:
    given: Any = make_result(changed(TASK.start, 1))
    assert NormLimits(None, 3.0, None).measured(TASK, given) is None
    assert NormLimits(None, None, 0.1).measured(TASK, given) is None
    assert isinstance(given, Result)
    assert NormLimits(None, 3.0, 0.1).measured(TASK, given) is not None


def test_the_window_has_one_answer_a_client_and_an_end() -> None:
    recent = dict[str, ChangeNorms]()
    for turn in range(3 * WINDOW):
        remember(recent, f"c{turn}", replace(USUAL[0], task=turn))
        remember(recent, "loud", replace(USUAL[0], task=turn))
    assert len(recent) == WINDOW + 1
    assert list(recent)[-1] == "loud"


def test_norms_do_not_depend_on_the_order_in_memory() -> None:
    """A start that is a part of the model here has memory of its own where it came in a message."""
    layers = {str(k): (50, 65) for k in range(6)}
    part = cut_adapter(adapter(8, layers=layers), 4)
    read = map_tensors(lambda tensor: tensor.clone(memory_format=torch.contiguous_format), part)
    assert not part.factors["0"].up.is_contiguous()
    result = make_result(changed(part, 2))
    assert change_norms(make_task(part, 4), result) == change_norms(make_task(read, 4), result)
