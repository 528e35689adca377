"""FADAS (arXiv 2407.18365, Alg. 1, and the official code): AMSGrad on the mean change; the step is the schedule's."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import assume
from torch import Tensor

from fedloom.aggregate.fadas import FADAS, LARGEST, MEAN, SQUARE, TIMES
from fedloom.aggregate.fedit import FedIT
from fedloom.aggregate.fedsa import FedSA
from fedloom.aggregate.hlora import HLoRA
from fedloom.aggregate.rolora import RoLoRA
from fedloom.core.errors import Refused
from fedloom.core.types import Model
from tests.support import toys
from tests.support.equations import Round, Values, values
from tests.support.oracles import free_sides, oracle_of, stepped
from tests.support.toys import adapter, answers, mean_of, returned, sent


def oracle(m: FADAS, r: Round) -> Values:
    """m, v of D; vhat = max(vhat, v); w += eta_t (m / (1 - b1^t)) / (sqrt(vhat / (1 - b2^t)) + eps), eta_t = eta step.

    An entry moves by eta whatever D is: where D is all but cancelled, so that the roundings of float32 decide, there is no case.
    """

    def by(key: str, change: Tensor) -> tuple[Tensor, Values]:
        d, zero = change / r.step, torch.zeros_like(change)
        mean, square, largest = (r.memory.get(name, {}).get(key, zero) for name in (MEAN, SQUARE, LARGEST))
        t = r.memory.get(TIMES, {}).get(key, torch.zeros(()))
        if key.rpartition(".")[2] in free_sides(r):
            mean, square = m.beta1 * mean + (1 - m.beta1) * d, m.beta2 * square + (1 - m.beta2) * d**2
            largest, t = torch.maximum(largest, square), t + 1
        t1 = max(float(t.max()), 1.0)
        length = largest.sqrt() / (1 - m.beta2**t1) ** 0.5 + m.epsilon
        eta = r.step * m.learning_rate / (1 - m.beta1**t1)
        rounded = eta * (1 - m.beta1) * 1e-7 * r.own[key] * (d != 0) / length
        assume(key.rpartition(".")[2] not in free_sides(r) or rounded.norm() < 2e-7 * r.own[key].norm())
        new = r.own[key] + eta * mean / length
        return new, {f"{MEAN}:{key}": mean, f"{SQUARE}:{key}": square, f"{LARGEST}:{key}": largest}

    return stepped(r, oracle_of(m.inner)(m.inner, r), by)


def test_it_is_torchs_amsgrad_with_the_schedules_step_in_the_rate() -> None:
    """torch.optim.Adam(amsgrad=True) on the gradient -D, its learning rate set to eta step before each of several merges."""
    method = FADAS(learning_rate=0.01)
    models = [method.init(adapter(8))]
    w = [torch.nn.Parameter(x.clone()) for x in values(models[0].adapter).values()]
    reference = torch.optim.Adam(w, lr=1.0, betas=(0.9, 0.99), eps=1e-8, amsgrad=True)
    for turn, step in enumerate((1.0, 0.2, 0.5, 0.2, 1.0, 0.05)):
        given = answers(
            method, models[-1 if turn % 2 else 0], (8, 4, 2), 10 * turn + 1
        )  # fresh, and from the first model
        d = [torch.zeros_like(x) for x in w]
        for p, update in zip((0.5, 0.3, 0.2), given, strict=True):
            gave, got = values(update.result.adapter), values(update.task.start.train)
            for total, key in zip(d, gave, strict=True):
                total[: len(gave[key])] += p * (gave[key] - got[key])
        for parameter, change in zip(w, d, strict=True):
            parameter.grad = -change
        reference.param_groups[0]["lr"] = 0.01 * step
        reference.step()
        models.append(method.merge(models[-1], mean_of(given, (0.5, 0.3, 0.2), step=step, as_delta=True)))
        for x, wanted in zip(values(models[-1].adapter).values(), w, strict=True):
            assert float((x - wanted.detach()).abs().max()) < 2e-5  # steps are up to 1e-2


def test_the_step_scales_the_step_and_not_the_memory() -> None:
    """The delay-adaptive rate: an Adam that took it as a part of the change would go as far at any step."""
    method = FADAS(learning_rate=0.01)
    model = method.init(adapter(8))
    merges = [mean_of(answers(method, model, (8, 8)), step=step, as_delta=True) for step in (1.0, 0.1)]
    whole, tenth = (method.merge(model, merge) for merge in merges)
    for key, x in values(model.adapter).items():
        far, near = values(whole.adapter)[key] - x, values(tenth.adapter)[key] - x
        torch.testing.assert_close(near, 0.1 * far, rtol=1e-3, atol=3e-7)
        assert float(far.abs().max()) == pytest.approx(0.01, rel=1e-3)  # one step of AMSGrad is the rate itself
        for name in (MEAN, SQUARE):
            torch.testing.assert_close(
                values(whole.memory[name])[key], values(tenth.memory[name])[key], rtol=1e-4, atol=1e-6
            )


def test_a_large_change_is_not_forgotten() -> None:
    """vhat = max(vhat, v): after a spike, steps stay small, where Adam's grow again."""
    method = FADAS(learning_rate=0.01, beta1=0.0, beta2=0.5)
    model = method.init(adapter(4))
    sizes = []
    for turn, by in enumerate((10.0, *[0.01] * 8)):
        task = sent(method, model, 4, turn)
        grown = {n: type(f)(f.down, f.up + by) for n, f in task.start.train.factors.items()}
        given = returned(task, type(task.start.train)(grown, task.start.train.dense))
        after = method.merge(model, mean_of([given], as_delta=True))
        sizes.append(float((after.adapter.factors["query"].up - model.adapter.factors["query"].up).abs().max()))
        model = after
    assert sizes[0] == pytest.approx(0.01, rel=1e-3)
    assert max(sizes[1:]) < 0.01 * 0.01


def test_a_side_that_rests_keeps_its_memory_and_its_count() -> None:
    method = FADAS(RoLoRA())
    models = [method.init(adapter(8))]
    for turn in range(4):
        models.append(method.merge(models[-1], mean_of(answers(method, models[-1], (8,), 10 * turn + 1), step=0.5)))

    def side(of: Model, name: str, key: str) -> Tensor:
        return getattr(of.memory[name].factors["query"], key)

    assert [float(side(model, TIMES, "up").max()) for model in models[1:]] == [1.0, 1.0, 2.0, 2.0]
    assert [float(side(model, TIMES, "down").max()) for model in models[1:]] == [0.0, 1.0, 1.0, 2.0]
    for k, (before, after) in enumerate(pairwise(models[1:]), 1):
        resting = ("down", "up")[k % 2]
        assert torch.equal(side(before, MEAN, resting), side(after, MEAN, resting))
        pair = [getattr(model.adapter.factors["query"], resting) for model in (before, after)]
        assert torch.equal(*pair)


def test_private_sides_are_not_moved() -> None:
    method = FADAS(FedSA(), learning_rate=0.1)
    model = method.init(adapter(8))
    after = method.merge(model, mean_of(answers(method, model, (2, 8))))
    for name, f in after.adapter.factors.items():
        assert torch.equal(f.up, model.adapter.factors[name].up)
        assert not torch.equal(f.down, model.adapter.factors[name].down)
    assert torch.equal(after.adapter.dense["head"], model.adapter.dense["head"])


def test_a_redrawn_basis_starts_with_an_empty_memory() -> None:
    method = FADAS()
    model = method.merge(method.init(adapter(8)), mean_of(answers(method, method.init(adapter(8)), (8,))))
    assert model.memory.keys() == {MEAN, SQUARE, LARGEST, TIMES}
    redrawn = method.merge(model, mean_of(answers(method, model, (2, 2))))
    assert (redrawn.basis, dict(redrawn.memory)) == (model.basis + 1, {})


def test_models_and_changes_are_the_same_where_all_started_from_the_server() -> None:
    method = FADAS(learning_rate=0.01)
    model = method.init(adapter(8))
    given = answers(method, model, (8, 8))
    one, other = (method.merge(model, mean_of(given, step=0.5, as_delta=form)) for form in (False, True))
    assert toys.distance(toys.function(one), toys.function(other)) < 1e-6


def test_products_are_refused() -> None:
    with pytest.raises(Refused, match="AMSGrad"):
        FADAS(HLoRA())


@pytest.mark.parametrize("bad", [{"learning_rate": 0.0}, {"beta1": 1.0}, {"beta2": -0.1}, {"epsilon": 0.0}])
def test_bad_parameters_are_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(Refused, match=next(iter(bad))):
        replace(FADAS(FedIT()), **bad)
