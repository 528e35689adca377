"""FedSA-LoRA (arXiv 2410.01463): A = sum p_k A_k is shared; B_k and the classifier stay at client k."""

from __future__ import annotations

import torch

from fedloom.aggregate.fedsa import FedSA
from fedloom.core import message_size
from fedloom.core.lora import Adapter, Factor
from fedloom.core.validate_answer import why_invalid
from tests.support.toys import adapter, answers, changed, make_result, mean_of, sent

METHOD = FedSA()


def test_rows_of_down_are_averaged_over_those_who_hold_them() -> None:
    model = METHOD.init(adapter(8))
    low, high = answers(METHOD, model, (2, 4))
    after = METHOD.merge(model, mean_of([low, high], (0.75, 0.25)))
    for name, f in after.adapter.factors.items():
        down = {u.task.budget.rank: u.result.adapter.factors[name].down for u in (low, high)}
        torch.testing.assert_close(f.down[:2], 0.75 * down[2] + 0.25 * down[4][:2])
        torch.testing.assert_close(f.down[2:4], down[4][2:])
        assert f.down[4:].equal(model.adapter.factors[name].down[4:])


def test_up_and_head_of_the_server_never_change() -> None:
    first = METHOD.init(adapter(8))
    model = first
    for turn in range(3):
        updates = answers(METHOD, model, (2, 4, 8), 10 * turn + 1)
        model = METHOD.merge(model, mean_of(updates, (0.7, 0.2, 0.1), step=0.6, as_delta=turn == 1))
    assert all(f.up.equal(first.adapter.factors[n].up) for n, f in model.adapter.factors.items())
    assert model.adapter.dense["head"].equal(first.adapter.dense["head"])


def test_an_answer_with_another_up_or_head_is_refused() -> None:
    """B_k and the head of client k are never sent: what the server would see of them is a mistake."""
    task = sent(METHOD, METHOD.init(adapter(8)), 4)
    assert task.start.rules.private == ("up", "dense")
    sent_, moved = task.start.train, changed(task.start.train, 1)
    only_down = {n: Factor(f.down, sent_.factors[n].up) for n, f in moved.factors.items()}
    assert why_invalid(task, make_result(Adapter(only_down, sent_.dense))) is None
    assert "up side" in str(why_invalid(task, make_result(Adapter(moved.factors, sent_.dense))))
    assert "dense side" in str(why_invalid(task, make_result(Adapter(only_down, moved.dense))))


def test_what_goes_up_is_down_alone() -> None:
    model = METHOD.init(adapter(8))
    (update,) = answers(METHOD, model, (4,))
    inner = sum(f.down.shape[1] for f in model.adapter.factors.values())
    assert message_size.upload_size(update.task, update.result) == message_size.MessageSize(
        total=4 * 4 * inner, dense=0
    )
