"""FLoRA (arXiv 2409.05976): A = [p_1 A_1; ...], B = [B_1, ...], B A = sum p_k B_k A_k, merged into the base; adapters begin anew."""

from __future__ import annotations

import pytest
import torch

from fedloom.aggregate.flora import FLoRA
from fedloom.core.types import Model
from tests.support.toys import (
    LAYERS,
    adapter,
    answers,
    distance,
    fresh,
    function,
    mean_of,
    products,
    returned,
    sent,
    weighted,
)

METHOD = FLoRA()
WEIGHTS = (0.4, 0.3, 0.2, 0.1)


def ranks_of(model: Model) -> dict[str, int]:
    assert model.fold
    return {name: f.rank for name, f in model.fold.factors.items()}


@pytest.mark.parametrize("ranks", [(1, 1, 1, 1), (1, 2, 4, 8), (8, 8, 8, 8), (3, 5, 2, 7)])
def test_the_stack_is_the_sum_of_products_at_any_mixture(ranks: tuple[int, ...]) -> None:
    model = METHOD.init(fresh(8))
    for turn in range(3):
        updates = answers(METHOD, model, ranks, 10 * turn + 1)
        terms = [(w, products(u.result.adapter)) for w, u in zip(WEIGHTS, updates, strict=True)]
        wanted = weighted([(1.0, function(model)), *terms])
        model = METHOD.merge(model, mean_of(updates, WEIGHTS))
        assert distance(function(model), wanted) < 1e-6


def test_the_fold_grows_with_the_ranks_but_never_beyond_a_layers_size() -> None:
    model = METHOD.init(fresh(4))
    assert model.fold is None
    model = METHOD.merge(model, mean_of(answers(METHOD, model, (1, 2, 4))))
    assert ranks_of(model) == dict.fromkeys(LAYERS, 1 + 2 + 4)
    for turn in range(3):
        model = METHOD.merge(model, mean_of(answers(METHOD, model, (1, 2, 4), 10 * turn + 10)))
        assert ranks_of(model) == {name: min(size) for name, size in LAYERS.items()}


def test_every_start_is_a_new_adapter_with_a_down_of_its_own() -> None:
    """Re-initialised each round: up = 0, and nobody shares a `down`, not even the same client in two tasks."""
    model = METHOD.merge(METHOD.init(fresh(4)), mean_of(answers(METHOD, METHOD.init(fresh(4)), (2, 4))))
    starts = [sent(METHOD, model, 4, number).start for number in (1, 2)]
    assert len({start.basis for start in starts}) == 2
    for name in LAYERS:
        one, other = (start.train.factors[name] for start in starts)
        assert not bool(one.up.any() or other.up.any())
        assert not torch.allclose(one.down, other.down, atol=1e-2)
        torch.testing.assert_close(one.down @ one.down.T, one.down.norm(dim=1)[0] ** 2 * torch.eye(4))
    assert all(start.fold is model.fold for start in starts)


def test_the_models_adapter_stays_zero_and_what_a_run_starts_with_is_folded() -> None:
    start = adapter(4)
    model = METHOD.init(start)
    assert distance(function(model), products(start)) < 1e-6
    after = METHOD.merge(model, mean_of(answers(METHOD, model, (2, 4))))
    assert not any(bool(f.up.any()) for f in (*model.adapter.factors.values(), *after.adapter.factors.values()))


@pytest.mark.parametrize("ranks", [(4,), (2, 2, 8)])
def test_answers_of_zero_leave_the_model_as_it_is(ranks: tuple[int, ...]) -> None:
    model = METHOD.init(adapter(4))
    after = METHOD.merge(model, mean_of([returned(sent(METHOD, model, r, k)) for k, r in enumerate(ranks, 1)]))
    assert distance(function(after), function(model)) < 1e-6
