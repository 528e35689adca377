"""FedAdam (arXiv 2003.00295, Alg. 2): m, v of each entry's change; w <- w + eta m / (sqrt(v) + tau)."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fedloom.aggregate.adam import MEAN, SQUARE, Adam
from fedloom.aggregate.ffa import FFA
from fedloom.core.errors import Refused
from tests.support.toys import adapter, answers, mean_of, returned, sent


def one_step(change: torch.Tensor, method: Adam) -> torch.Tensor:
    """Alg. 2 from m = 0 and v = tau^2."""
    m, v = (1 - method.beta1) * change, method.beta2 * method.tau**2 + (1 - method.beta2) * change**2
    return method.learning_rate * m / (v.sqrt() + method.tau)


def test_the_first_step_is_that_of_algorithm_2() -> None:
    method = Adam(beta1=0.8, beta2=0.9, learning_rate=0.01, tau=1e-2)
    model = method.init(adapter(8))
    (update,) = answers(method, model, (8,))
    after = method.merge(model, mean_of([update]))
    for name, f in after.adapter.factors.items():
        own = model.adapter.factors[name].up.double()
        wanted = one_step(update.result.adapter.factors[name].up.double() - own, method)
        torch.testing.assert_close(f.up.double() - own, wanted, rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("size", [1e-1, 1.0, 10.0])
def test_entries_move_by_the_same_step_whatever_the_size_of_the_change(size: float) -> None:
    """eta (1 - b1) / sqrt(1 - b2) where the change is well above tau."""
    method = Adam(beta1=0.0, beta2=0.0, learning_rate=0.02, tau=1e-6)
    model = method.init(adapter(8))
    task = sent(method, model, 8)
    grown = {n: type(f)(f.down, f.up + size) for n, f in task.start.train.factors.items()}
    after = method.merge(model, mean_of([returned(task, type(task.start.train)(grown, task.start.train.dense))]))
    for name, f in after.adapter.factors.items():
        torch.testing.assert_close(
            f.up - model.adapter.factors[name].up, torch.full_like(f.up, 0.02), rtol=1e-3, atol=0
        )


def test_tau_bounds_the_step_where_changes_are_tiny() -> None:
    steps = [float(one_step(torch.tensor(1e-6, dtype=torch.float64), Adam(tau=tau))) for tau in (1e-3, 1e-9)]
    assert steps[0] < 1e-6 < 1e-3 < steps[1]
    method = Adam(tau=1e-3)
    model = method.init(adapter(8))
    quiet = method.merge(model, mean_of([returned(sent(method, model, 8))]))
    assert all(f.up.equal(model.adapter.factors[n].up) for n, f in quiet.adapter.factors.items())


def test_what_is_remembered_is_the_mean_and_the_square_of_the_changes() -> None:
    method = Adam(FFA(), beta1=0.5, beta2=0.75)
    model = method.init(adapter(8))
    (update,) = answers(method, model, (8,))
    after = method.merge(model, mean_of([update]))
    for name, f in after.memory[MEAN].factors.items():
        change = update.result.adapter.factors[name].up.double() - model.adapter.factors[name].up.double()
        torch.testing.assert_close(f.up, 0.5 * change, rtol=0, atol=1e-6)
        torch.testing.assert_close(after.memory[SQUARE].factors[name].up, 0.25 * change**2, rtol=0, atol=1e-6)
        assert not bool(f.down.any())  # FFA never trains it


def test_the_schedules_step_scales_the_step_and_not_the_memory() -> None:
    """A stale answer, or one of a careful schedule, moves the model less, also where Adam makes all changes alike."""
    method = Adam(learning_rate=0.01)
    model = method.init(adapter(8))
    given = answers(method, model, (8, 8))
    whole, tenth = (method.merge(model, mean_of(given, step=step, as_delta=True)) for step in (1.0, 0.1))
    for name, f in model.adapter.factors.items():
        far, near = (one.adapter.factors[name].up - f.up for one in (whole, tenth))
        torch.testing.assert_close(near, 0.1 * far, rtol=1e-3, atol=1e-6)
        squares = [one.memory[SQUARE].factors[name].up for one in (whole, tenth)]
        torch.testing.assert_close(squares[0], squares[1], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(
    "bad", [{"learning_rate": 0.0}, {"beta1": 1.0}, {"beta1": -0.1}, {"beta2": 1.0}, {"tau": 0.0}, {"tau": -1.0}]
)
def test_bad_parameters_are_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(Refused, match=next(iter(bad))):
        Adam(**bad)
