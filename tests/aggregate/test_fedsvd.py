"""FedSVD (arXiv 2505.12805): B-only rounds, B = sum p_k B_k, then A = V^T and B = U S of svd(B A)."""

from __future__ import annotations

import pytest
import torch

from fedloom.aggregate.fedsvd import FedSVD
from fedloom.core.lora import Factor
from tests.support.toys import answers, best, distance, fresh, function, mean_of, products, returned, sent, weighted

METHOD, WEIGHTS = FedSVD(), (0.5, 0.3, 0.2)


def inside(row_space: Factor, other: Factor) -> float:
    """How much of the rows of `other` lies outside of those of `row_space`."""
    basis = torch.linalg.qr(row_space.down.double().T)[0]
    rows = other.down.double()
    return float((rows - rows @ basis @ basis.T).norm() / rows.norm())


def test_the_mean_is_exact_and_down_is_orthonormal_afterwards() -> None:
    model = METHOD.init(fresh(4))
    for turn in range(3):
        updates = answers(METHOD, model, (4, 4, 4), 10 * turn + 1)
        wanted = weighted([(w, products(u.result.adapter)) for w, u in zip(WEIGHTS, updates, strict=True)])
        model = METHOD.merge(model, mean_of(updates, WEIGHTS))
        assert distance(function(model), wanted) < 1e-5
        for f in model.adapter.factors.values():
            torch.testing.assert_close(f.down @ f.down.T, torch.eye(4), rtol=0, atol=1e-5)
            assert bool((f.up.norm(dim=0).diff() <= 0).all())


def test_down_is_refreshed_and_spans_what_it_spanned() -> None:
    first = METHOD.init(fresh(4))
    model = first
    for turn in range(3):
        after = METHOD.merge(model, mean_of(answers(METHOD, model, (4, 4), 10 * turn + 1)))
        for name, f in after.adapter.factors.items():
            assert not torch.allclose(f.down, model.adapter.factors[name].down, atol=1e-2)
            assert inside(first.adapter.factors[name], f) < 1e-5
        model = after


def test_clients_train_up_alone_in_a_basis_of_the_round() -> None:
    model = METHOD.init(fresh(8))
    after = METHOD.merge(model, mean_of(answers(METHOD, model, (4, 8))))
    before, now = (sent(METHOD, of, 4).start for of in (model, after))
    assert now.rules.frozen == ("down",)
    assert before.basis != now.basis
    for name, p in products(now.train).items():
        torch.testing.assert_close(p, best(function(after)[name], 4), rtol=0, atol=1e-5)


@pytest.mark.parametrize("kept", [0, 1, 2])
def test_deficient_answers_leave_directions_that_can_still_learn(kept: int) -> None:
    """A zero answer, or one of lower rank: `up` is zero there, `down` still has rows of length 1."""
    model = METHOD.init(fresh(4))
    task = sent(METHOD, model, 4)
    trained = answers(METHOD, model, (4,))[0].result.adapter
    low = {n: Factor(f.down, f.up * (torch.arange(4) < kept)) for n, f in trained.factors.items()}
    after = METHOD.merge(model, mean_of([returned(task, type(trained)(low, trained.dense))] * 2))
    for name, f in after.adapter.factors.items():
        torch.testing.assert_close(f.down.norm(dim=1), torch.ones(4), rtol=0, atol=1e-5)
        assert int((f.up.norm(dim=0) > 1e-5).sum()) == kept, name
