"""SCAFFOLD (arXiv 1910.06378, Alg. 1): clients step with g - c_i + c; c <- c + (1/N) sum_i (c_i+ - c_i)."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fedloom.aggregate.fedit import FedIT
from fedloom.aggregate.fedplora import FedPLoRA
from fedloom.aggregate.scaffold import CONTROL, Scaffold
from fedloom.core.errors import Refused
from fedloom.core.lora import map_tensors
from fedloom.core.types import Task, Update
from tests.support.toys import adapter, answers, changed, distance, function, mean_of, returned, sent


def ones(task: Task, by: float = 1.0) -> Update:
    """Nothing learnt, and a control variate that grew by the same in every entry."""
    update = returned(task)
    assert task.start.control
    grown = map_tensors(lambda x: torch.full_like(x, by), task.start.control)
    return replace(update, result=replace(update.result, control=grown))


def test_the_control_variate_starts_at_zero_and_is_handed_out_at_the_clients_rank() -> None:
    method = Scaffold()
    control = sent(method, method.init(adapter(8)), 3).start.control
    assert control
    assert {f.rank for f in control.factors.values()} == {3}
    assert not any(bool(f.down.any() or f.up.any()) for f in control.factors.values())
    assert not bool(control.dense["head"].any())


def test_it_grows_by_the_sum_over_the_number_of_all_clients() -> None:
    """1/N, not the schedule's weights and not the number of participants: the absent ones changed nothing."""
    method = Scaffold(clients=10)
    model = method.init(adapter(8))
    parts = [ones(sent(method, model, 2, 1), 3.0), ones(sent(method, model, 8, 2), 2.0)]
    control = method.merge(model, mean_of(parts, (0.9, 0.1), step=0.5)).memory[CONTROL]
    for f in control.factors.values():
        torch.testing.assert_close(f.down[:2], torch.full_like(f.down[:2], 0.5))
        torch.testing.assert_close(f.up[:, 2:], torch.full_like(f.up[:, 2:], 0.2))
    torch.testing.assert_close(control.dense["head"], torch.full((3,), 0.5))


def test_it_follows_the_modules_that_a_client_draws() -> None:
    method = Scaffold(FedPLoRA(), clients=1)
    model = method.init(adapter(8))
    task = sent(method, model, 3, 5)
    after = method.merge(model, mean_of([ones(task)]))
    held = torch.zeros(8, dtype=torch.bool)
    held[list(task.start.directions or ())] = True
    for f in after.memory[CONTROL].factors.values():
        assert bool((f.down[held] == 1).all())
        assert not bool(f.down[~held].any())
    again = sent(method, after, 3, 6).start
    assert again.control
    for f in again.control.factors.values():
        assert (f.down[:, 0] == 1).tolist() == [bool(held[slot]) for slot in again.directions or ()]


def test_the_model_is_that_of_the_wrapped_method() -> None:
    method = Scaffold()
    model = method.init(adapter(8))
    updates = answers(method, model, (2, 8))
    assert (
        distance(function(method.merge(model, mean_of(updates))), function(FedIT().merge(model, mean_of(updates)))) == 0
    )


def test_an_answer_without_a_control_variate_changes_none() -> None:
    method = Scaffold()
    model = method.init(adapter(8))
    task = sent(method, model, 8)
    after = method.merge(model, mean_of([returned(task, changed(task.start, 1))]))
    assert all(f.up.equal(model.memory[CONTROL].factors[n].up) for n, f in after.memory[CONTROL].factors.items())


def test_a_federation_of_nobody_is_refused() -> None:
    with pytest.raises(Refused, match="clients"):
        Scaffold(clients=0)
