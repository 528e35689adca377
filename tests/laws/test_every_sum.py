"""A law of every aggregator: merging sums over clients is merging their answers, or the method says why not, and that is true."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from fedloom.aggregate.averaged import Averaged
from fedloom.aggregate.shared.parts import (
    CommonStart,
    add_part,
    block_part,
    summed_answers,
    summed_by_factors,
    why_not_summed,
)
from fedloom.core.answer_change import factor_change
from fedloom.core.lora import Adapter, map_tensors
from fedloom.core.policies import Aggregator
from fedloom.core.types import Model, Update
from tests.support import toys

TOP, RANKS = 8, (2, 4, 8, 8, 4, 1)
METHODS = toys.aggregators()
every_method = pytest.mark.parametrize("method", METHODS, ids=toys.called)
EXACT = 1e-5
"""Of the model; the merge of float32 factors."""


def only_up(update: Update) -> Update:
    """The answer with `down` as it was sent."""
    sent, given = update.task.start.train.factors, update.result.adapter
    factors = {name: type(one)(sent[name].down, one.up) for name, one in given.factors.items()}
    return toys.returned(update.task, Adapter(factors, given.dense))


def of_sums(updates: Sequence[Update]) -> list[Update]:
    """The answers that stand for the sum of these."""
    largest = max(updates, key=lambda update: len(next(iter(update.result.adapter.factors.values())).down))
    sums = map_tensors(lambda one: torch.zeros_like(one, dtype=torch.float64), largest.result.adapter)
    for update in updates:
        add_part(sums, block_part(factor_change(update.task.start, update.result.adapter), 0, TOP), 0)
    answers = summed_answers([update.task for update in updates], sums, 1.0)
    return [toys.returned(update.task, answers[update.task.id]) for update in updates]


def gap(method: Aggregator, model: Model, updates: Sequence[Update]) -> float:
    """How far merging the sum is from merging the answers."""
    one, other = (method.merge(model, toys.mean_of(given)) for given in (of_sums(updates), updates))
    heads = [{"head": merged.adapter.dense["head"]} for merged in (one, other)]
    return max(toys.distance(toys.function(one), toys.function(other)), toys.distance(*heads))


def rounds(method: Aggregator) -> list[float]:
    """The gap in three rounds, each from the model of the last one; also where directions were lost."""
    common, found = CommonStart(method), list[float]()
    model = common.init(toys.adapter(TOP))
    for ranks in (RANKS, (2, 2, 1), RANKS):
        updates = toys.answers(common, model, ranks, first=1 + 10 * len(found))
        if summed_by_factors(method):
            updates = [only_up(update) for update in updates]
        found.append(gap(common, model, updates))
        model = common.merge(model, toys.mean_of(updates))
    return found


@every_method
def test_merging_sums_is_merging_or_the_method_says_why_not(method: Aggregator) -> None:
    if reason := why_not_summed(method, method.init(toys.adapter(TOP))):
        assert len(reason) > 30
        assert gap(method, *scene(method)) > 1e-3 or needs_more(method), reason
    else:
        assert max(rounds(method)) < EXACT


def needs_more(method: Aggregator) -> bool:
    """Whether a client answers with more than its change, keeps a side, or a merge keeps what only single answers tell."""
    model, updates = scene(method)
    start = updates[0].task.start
    if start.control is not None or start.rules.private:
        return True
    one, other = (method.merge(model, toys.mean_of(given)).memory for given in (of_sums(updates), updates))
    pairs = (pair for key in one for pair in zip(tensors(one[key]), tensors(other[key]), strict=True))
    return any(float((a - b).abs().max()) > 1e-3 for a, b in pairs)


def tensors(adapter: Adapter) -> list[torch.Tensor]:
    return [side for factor in adapter.factors.values() for side in (factor.down, factor.up)]


def scene(method: Aggregator) -> tuple[Model, list[Update]]:
    """A model and answers to it; clients answer with what the method asks for."""
    model = method.init(toys.adapter(TOP))
    return model, toys.answers(method, model, RANKS)


@pytest.mark.parametrize("method", [m for m in METHODS if summed_by_factors(m)], ids=toys.called)
def test_a_method_that_says_it_is_only_near_is_so_where_both_sides_change(method: Aggregator) -> None:
    assert 1e-3 < gap(CommonStart(method), *scene(CommonStart(method))) < 0.1


def test_a_wrapper_has_the_reasons_of_what_it_wraps() -> None:
    assert summed_by_factors(Averaged()) is not None
    assert "FedEx" in (
        why_not_summed(Averaged(toys_method("FedEx")), toys_method("FedEx").init(toys.adapter(TOP))) or ""
    )


def toys_method(name: str) -> Aggregator:
    return next(method for method in METHODS if type(method).__name__ == name)


@pytest.mark.parametrize("method", [m for m in METHODS if m.space == "product"], ids=toys.called)
def test_clients_of_any_rank_start_from_the_same_directions_also_new_ones(method: Aggregator) -> None:
    common = CommonStart(method)
    if why_not_summed(method, method.init(toys.adapter(TOP))):
        return
    first = common.init(toys.adapter(TOP))
    model = common.merge(first, toys.mean_of(toys.answers(common, first, (2, 2))))
    tasks = [toys.sent(common, model, rank, number) for number, rank in enumerate((2, 5, TOP), 1)]
    for name, whole in tasks[-1].start.train.factors.items():
        for task in tasks:
            part = task.start.train.factors[name]
            assert torch.equal(part.down, whole.down[: part.rank])
            assert torch.equal(part.up, whole.up[:, : part.rank])
