"""FedEx-LoRA (arXiv 2410.09432): A = sum p_k A_k, B = sum p_k B_k, and W0 grows by sum p_k B_k A_k - B A."""

from __future__ import annotations

import pytest
import torch

from fedloom.aggregate.fedex import FedEx
from fedloom.core.lora import Adapter, Factor
from tests.support.toys import (
    LAYERS,
    adapter,
    answers,
    distance,
    fresh,
    function,
    mean_of,
    product,
    products,
    returned,
    sent,
    weighted,
)

METHOD, WEIGHTS = FedEx(), (0.5, 0.3, 0.2)


def test_factors_are_means_and_the_whole_is_exact() -> None:
    model = METHOD.init(adapter(4))
    updates = answers(METHOD, model, (4, 4, 4))
    after = METHOD.merge(model, mean_of(updates, WEIGHTS))
    for name, f in after.adapter.factors.items():
        given = [u.result.adapter.factors[name] for u in updates]
        torch.testing.assert_close(
            f.down, torch.stack([w * g.down for w, g in zip(WEIGHTS, given, strict=True)]).sum(0)
        )
        torch.testing.assert_close(f.up, torch.stack([w * g.up for w, g in zip(WEIGHTS, given, strict=True)]).sum(0))
    wanted = weighted([(w, products(u.result.adapter)) for w, u in zip(WEIGHTS, updates, strict=True)])
    assert distance(function(after), wanted) < 1e-6


def test_the_fold_is_the_covariance_that_fedit_misses() -> None:
    """sum p_k B_k A_k - B A = sum p_k (B_k - B)(A_k - A)."""
    model = METHOD.init(adapter(4))
    updates = answers(METHOD, model, (4, 4, 4))
    after = METHOD.merge(model, mean_of(updates, WEIGHTS))
    assert after.fold
    for name, mean in after.adapter.factors.items():
        apart = [Factor(f.down - mean.down, f.up - mean.up) for f in (u.result.adapter.factors[name] for u in updates)]
        wanted = torch.stack([w * product(one) for w, one in zip(WEIGHTS, apart, strict=True)]).sum(0)
        assert float(wanted.norm()) > 0.01
        torch.testing.assert_close(product(after.fold.factors[name]), wanted, rtol=0, atol=1e-5)


def test_the_whole_stays_exact_over_many_rounds_in_a_fold_of_bounded_size() -> None:
    model = METHOD.init(fresh(4))
    for turn in range(5):
        updates = answers(METHOD, model, (1, 2, 4), 10 * turn + 1)
        changes = [(w, products(u.result.adapter)) for w, u in zip(WEIGHTS, updates, strict=True)]
        changes += [(-w, products(u.task.start.train)) for w, u in zip(WEIGHTS, updates, strict=True)]
        wanted = weighted([(1.0, function(model)), *changes])
        model = METHOD.merge(model, mean_of(updates, WEIGHTS))
        assert distance(function(model), wanted) < 1e-6
        assert model.fold
        assert all(f.rank <= min(LAYERS[name]) for name, f in model.fold.factors.items())


@pytest.mark.parametrize("rank", [1, 2, 3, 4])
def test_every_client_runs_the_whole_model(rank: int) -> None:
    model = METHOD.init(adapter(4))
    model = METHOD.merge(model, mean_of(answers(METHOD, model, (2, 4))))
    assert distance(function(sent(METHOD, model, rank).start), function(model)) < 1e-6


@pytest.mark.parametrize("copies", [1, 3])
def test_clients_who_agree_leave_nothing_to_fold(copies: int) -> None:
    model = METHOD.init(adapter(4))
    task = sent(METHOD, model, 4)
    one = adapter(4, 7).factors
    flat = Adapter(
        {n: Factor(f.down[[0, 0, 1, 1]], f.up[:, [0, 0, 1, 1]]) for n, f in one.items()}, model.adapter.dense
    )
    after = METHOD.merge(model, mean_of([returned(task, flat)] * copies))
    assert after.fold
    assert all(float(product(f).norm()) < 1e-5 for f in after.fold.factors.values())
    assert distance(function(after), products(flat)) < 1e-6


def test_where_nobody_changed_anything_nothing_is_folded() -> None:
    """To the bit, and not but for the rounding of two products that should cancel."""
    model = METHOD.init(adapter(4))
    after = METHOD.merge(model, mean_of([returned(sent(METHOD, model, rank)) for rank in (4, 4, 2)]))
    assert after.fold
    assert not any(bool(factor.up.any()) for factor in after.fold.factors.values())
