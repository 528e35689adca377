"""RoLoRA (arXiv 2409.02346): odd rounds freeze A and average B, even rounds freeze B and average A; each round is exact."""

from __future__ import annotations

import pytest
import torch

from fedloom.aggregate.rolora import RoLoRA
from fedloom.core.lora import Adapter
from fedloom.core.types import Model
from tests.support.toys import adapter, answers, distance, function, mean_of, products, sent, weighted

METHOD = RoLoRA()


def sides(of: Adapter, side: str) -> list[torch.Tensor]:
    return [getattr(f, side) for f in of.factors.values()]


def same(one: Model, other: Model, side: str) -> bool:
    pairs = zip(sides(one.adapter, side), sides(other.adapter, side), strict=True)
    return all(a.equal(b) for a, b in pairs)


def test_the_sides_take_turns_and_the_other_one_stays_to_the_bit() -> None:
    model = METHOD.init(adapter(8))
    for turn in range(4):
        frozen, free = ("up", "down") if turn % 2 else ("down", "up")
        start = sent(METHOD, model, 4).start
        assert start.rules.frozen == (frozen,)
        after = METHOD.merge(model, mean_of(answers(METHOD, model, (2, 4, 8), 10 * turn + 1)))
        assert same(after, model, frozen)
        assert not same(after, model, free)
        assert sent(METHOD, after, 4).start.basis != start.basis
        model = after


@pytest.mark.parametrize("turns", [0, 1])
def test_every_round_is_the_exact_mean_of_products(turns: int) -> None:
    model = METHOD.init(adapter(8))
    for turn in range(turns):
        model = METHOD.merge(model, mean_of(answers(METHOD, model, (8, 8), 10 * turn + 10)))
    updates = answers(METHOD, model, (8, 8, 8))
    wanted = weighted([(w, products(u.result.adapter)) for w, u in zip((0.5, 0.3, 0.2), updates, strict=True)])
    assert distance(function(METHOD.merge(model, mean_of(updates, (0.5, 0.3, 0.2)))), wanted) < 1e-6


def test_an_answer_to_an_earlier_round_moves_the_side_that_it_trained() -> None:
    first = METHOD.init(adapter(8))
    (late,) = answers(METHOD, first, (8,))  # trained `up`
    model = METHOD.merge(first, mean_of(answers(METHOD, first, (8,), 5)))  # the next round is that of `down`
    after = METHOD.merge(model, mean_of([late, *answers(METHOD, model, (8,), 9)]))
    for name, f in after.adapter.factors.items():
        own, given = model.adapter.factors[name], late.result.adapter.factors[name]
        torch.testing.assert_close(f.up, 0.5 * own.up + 0.5 * given.up)
    assert not same(after, model, "down")
