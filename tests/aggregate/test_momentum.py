"""FedAvgM (arXiv 1909.06335): v <- beta v + change, w <- w + eta v. What the server's optimisers refuse, for all of them."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch

from fedloom.aggregate.adam import Adam
from fedloom.aggregate.averaged import Averaged
from fedloom.aggregate.clip import Clip
from fedloom.aggregate.fedex import FedEx
from fedloom.aggregate.fedit import FedIT
from fedloom.aggregate.flora import FLoRA
from fedloom.aggregate.hlora import HLoRA
from fedloom.aggregate.momentum import VELOCITY, Momentum
from fedloom.aggregate.rolora import RoLoRA
from fedloom.aggregate.scaffold import Scaffold
from fedloom.core.errors import Refused
from fedloom.core.lora import Adapter
from fedloom.core.types import Model
from tests.support.toys import adapter, answers, changed, distance, function, mean_of, returned, sent


def nudged(method: Any, model: Model) -> Model:
    """After a merge in which the only client added 1 to every entry of `up`."""
    task = sent(method, model, 4)
    up = {n: type(f)(f.down, f.up + 1.0) for n, f in task.start.train.factors.items()}
    return method.merge(model, mean_of([returned(task, Adapter(up, task.start.train.dense))]))


def moved(before: Model, after: Model) -> float:
    """By how much every entry of `up` moved; all by the same."""
    steps = [after.adapter.factors[n].up - f.up for n, f in before.adapter.factors.items()]
    (value,) = {round(float(entry), 4) for step in steps for entry in step.flatten()}
    return value


def test_equal_changes_add_up_to_the_geometric_series() -> None:
    method = Momentum(beta=0.5, learning_rate=0.1)
    models = [method.init(adapter(4))]
    for _ in range(4):
        models.append(nudged(method, models[-1]))
    steps = [moved(a, b) for a, b in pairwise(models)]
    assert steps == pytest.approx([0.1 * v for v in (1.0, 1.5, 1.75, 1.875)], abs=1e-4)


def test_the_model_goes_on_when_nobody_changes_anything() -> None:
    method = Momentum(beta=0.5)
    first = method.init(adapter(4))
    second = nudged(method, first)
    third = method.merge(second, mean_of([returned(sent(method, second, 4))]))
    assert (moved(first, second), moved(second, third)) == (1.0, 0.5)


def test_without_momentum_it_is_the_wrapped_method() -> None:
    method = Momentum(beta=0.0)
    model = method.init(adapter(8))
    for turn in range(3):
        merge = mean_of(answers(method, model, (2, 4, 8), 10 * turn + 1))
        plain, model = FedIT().merge(model, merge), method.merge(model, merge)
        assert distance(function(model), function(plain)) < 1e-6


def test_a_side_that_rests_keeps_its_velocity_and_does_not_move() -> None:
    method = Momentum(RoLoRA(), beta=0.5)
    models = [method.init(adapter(8))]
    for turn in range(3):
        models.append(method.merge(models[-1], mean_of(answers(method, models[-1], (8,), 10 * turn + 1))))
    for name in models[0].adapter.factors:
        assert models[2].adapter.factors[name].up.equal(models[1].adapter.factors[name].up)
        velocity = [model.memory[VELOCITY].factors[name].up for model in models[1:]]
        assert velocity[0].equal(velocity[1])
        assert not torch.allclose(velocity[2], velocity[1])


@pytest.mark.parametrize("method", [Momentum(), Adam()], ids=lambda m: type(m).__name__)
def test_a_redrawn_basis_starts_with_an_empty_memory(method: Any) -> None:
    """After a whole round of rank 2, FedIT draws directions 3 to 8 anew: what was remembered of them means nothing."""
    model = method.merge(method.init(adapter(8)), mean_of(answers(method, method.init(adapter(8)), (8,))))
    assert model.memory
    redrawn = method.merge(model, mean_of(answers(method, model, (2, 2))))
    assert redrawn.basis == model.basis + 1
    assert redrawn.memory == {}
    assert distance(function(redrawn), function(FedIT().merge(model, mean_of(answers(method, model, (2, 2)))))) == 0.0


PRODUCTS = [HLoRA(), FedEx(), FLoRA(), Clip(HLoRA()), Averaged(FedIT())]


@pytest.mark.parametrize("inner", PRODUCTS, ids=lambda m: type(m).__name__)
@pytest.mark.parametrize("wrapper", [Momentum, Adam, Scaffold])
def test_a_method_that_adds_products_is_refused(wrapper: Any, inner: Any) -> None:
    with pytest.raises(Refused) as caught:
        wrapper(inner)
    name = type(inner).__name__
    assert (caught.value.field, caught.value.value) == (f"aggregator ({wrapper.__name__}).inner", name)
    assert "Use FedIT" in caught.value.remedy


@pytest.mark.parametrize("bad", [{"beta": 1.0}, {"beta": -0.1}, {"learning_rate": 0.0}])
def test_bad_parameters_are_refused(bad: dict[str, float]) -> None:
    with pytest.raises(Refused, match=next(iter(bad))):
        Momentum(**bad)  # type: ignore[arg-type]


def test_what_is_trained_in_between_comes_on_top() -> None:
    """w + eta (beta v + change): the second merge moves by its own change and half of the first."""
    method = Momentum(beta=0.5)
    first = method.init(adapter(8))
    second = method.merge(first, mean_of(answers(method, first, (8,), 1)))
    task = sent(method, second, 8, 2)
    third = method.merge(second, mean_of([returned(task, changed(task.start, 2))]))
    for name, f in third.adapter.factors.items():
        before, start = second.adapter.factors[name], first.adapter.factors[name]
        wanted = changed(task.start, 2).factors[name].up + 0.5 * (before.up - start.up)
        torch.testing.assert_close(f.up, wanted)
