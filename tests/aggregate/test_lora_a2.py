"""LoRA-A2 (arXiv 2410.22815): B and A in turn, X <- X + sum w_k dX_k, r_i N rank slots over all N modules, lr_B = 5 lr_A."""

from __future__ import annotations

import pytest
import torch

from fedloom.aggregate.lora_a2 import LoRAA2
from fedloom.core import message_size
from fedloom.core.errors import Refused
from fedloom.core.lora import Adapter, Factor
from fedloom.core.types import Task
from tests.support.toys import LAYERS, adapter, answers, mean_of, returned, sent

METHOD = LoRAA2()


def one_slot(task: Task, name: str, slot: int) -> Adapter:
    """An answer that changed one direction of one layer, on the side of `up`."""
    factors = dict(task.start.train.factors)
    up = factors[name].up.clone()
    up[:, slot] += 1.0
    factors[name] = Factor(factors[name].down, up)
    return Adapter(factors, task.start.train.dense)


def test_everybody_holds_the_global_rank_and_pays_for_its_own() -> None:
    model = METHOD.init(adapter(8))
    for rank in (1, 2, 8):
        start = sent(METHOD, model, rank).start
        assert {f.rank for f in start.train.factors.values()} == {8}
        assert start.rules.select == rank * len(LAYERS)
        assert start.rules.up_rate == 5.0


def test_the_sides_take_turns_and_each_turn_is_a_basis_of_its_own() -> None:
    model, bases = METHOD.init(adapter(8)), set[str]()
    for turn in range(4):
        start = sent(METHOD, model, 2).start
        frozen, free = ("up", "down") if turn % 2 else ("down", "up")
        assert start.rules.frozen == (frozen,)
        after = METHOD.merge(model, mean_of(answers(METHOD, model, (2, 4), 10 * turn + 1)))
        for name, f in after.adapter.factors.items():
            assert getattr(f, frozen).equal(getattr(model.adapter.factors[name], frozen))
            assert not getattr(f, free).equal(getattr(model.adapter.factors[name], free))
        model, bases = after, bases | {start.basis}
    assert len(bases) == 4


@pytest.mark.parametrize("as_delta", [False, True])
def test_changes_are_added_with_their_weight_whoever_else_chose_the_slot(as_delta: bool) -> None:
    """X + sum w_k dX_k: not divided by the weight of those who chose it, also where the schedule merges models."""
    model = METHOD.init(adapter(4))
    tasks = [sent(METHOD, model, 1, number) for number in (1, 2)]
    updates = [returned(tasks[0], one_slot(tasks[0], "query", 3)), returned(tasks[1], one_slot(tasks[1], "value", 0))]
    after = METHOD.merge(model, mean_of(updates, (0.7, 0.3), step=0.5, as_delta=as_delta)).adapter
    for name, slot, weight in (("query", 3, 0.7), ("value", 0, 0.3)):
        wanted = model.adapter.factors[name].up.clone()
        wanted[:, slot] += 0.5 * weight
        torch.testing.assert_close(after.factors[name].up, wanted)


def test_only_chosen_slots_are_uploaded() -> None:
    task = sent(METHOD, METHOD.init(adapter(8)), 1)
    update = returned(task, one_slot(task, "query", 5))
    assert message_size.upload_size(task, update.result) == message_size.MessageSize(
        total=4 * LAYERS["query"][0], dense=0
    )


def test_the_head_is_frozen_as_in_the_paper_if_that_is_asked_for() -> None:
    method = LoRAA2(freeze_head=True)
    model = method.init(adapter(8))
    after = method.merge(model, mean_of(answers(method, model, (2, 4)), (0.7, 0.3)))
    assert "dense" in sent(method, model, 2).start.rules.frozen
    assert after.adapter.dense["head"].equal(model.adapter.dense["head"])
    assert "dense" not in sent(METHOD, model, 2).start.rules.frozen


@pytest.mark.parametrize("rate", [0.0, -1.0])
def test_a_learning_rate_that_is_not_positive_is_refused(rate: float) -> None:
    with pytest.raises(Refused, match="up_rate"):
        LoRAA2(up_rate=rate)
