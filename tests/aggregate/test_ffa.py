"""FFA-LoRA (arXiv 2403.12313): A fixed at the shared random initialisation, B = sum p_k B_k."""

from __future__ import annotations

import torch

from fedloom.aggregate.ffa import FFA
from fedloom.core import message_size
from tests.support.toys import adapter, answers, distance, fresh, function, mean_of, products, returned, sent, weighted

METHOD = FFA()


def test_the_mean_of_one_side_is_the_mean_of_products() -> None:
    """sum p_k B_k A = (sum p_k B_k) A: exact, where FedIT misses the covariance of the factors."""
    model = METHOD.init(fresh(8))
    updates = answers(METHOD, model, (8, 8, 8))
    wanted = weighted([(w, products(u.result.adapter)) for w, u in zip((0.5, 0.3, 0.2), updates, strict=True)])
    assert distance(function(METHOD.merge(model, mean_of(updates, (0.5, 0.3, 0.2)))), wanted) < 1e-6


def test_down_is_never_trained_never_sent_and_never_changed() -> None:
    first = METHOD.init(fresh(8))
    model = first
    for turn in range(3):
        model = METHOD.merge(model, mean_of(answers(METHOD, model, (2, 4, 8), 10 * turn + 1), step=0.5))
    assert all(f.down is first.adapter.factors[n].down or f.down.equal(first.adapter.factors[n].down)
               for n, f in model.adapter.factors.items())  # fmt: skip
    start = sent(METHOD, model, 4).start
    assert start.rules.frozen == start.seeded == ("down",)
    half = 4 * (4 * sum(f.up.shape[0] for f in start.train.factors.values()) + 3)
    assert message_size.download_size(start).total == half


def test_a_low_rank_votes_for_the_servers_columns() -> None:
    model = METHOD.init(adapter(8))
    (update,) = answers(METHOD, model, (2,))
    after = METHOD.merge(model, mean_of([update]))
    for name, f in after.adapter.factors.items():
        torch.testing.assert_close(f.up[:, :2], update.result.adapter.factors[name].up)
        assert f.up[:, 2:].equal(model.adapter.factors[name].up[:, 2:])


def test_equal_answers_are_their_own_mean() -> None:
    model = METHOD.init(fresh(4))
    task = sent(METHOD, model, 4)
    trained = answers(METHOD, model, (4,))[0].result.adapter
    after = METHOD.merge(model, mean_of([returned(task, trained)] * 3, (0.5, 0.25, 0.25)))
    assert distance(function(after), products(trained)) < 1e-6
