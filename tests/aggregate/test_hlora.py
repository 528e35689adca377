"""HLoRA (arXiv 2503.00813): products are averaged and re-factorised, against dense float64 matrices."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fedloom.aggregate.hlora import HLoRA
from fedloom.aggregate.shared.product_space import energy_shares
from fedloom.core.errors import Refused
from fedloom.core.lora import Adapter, Factor
from tests.support import toys
from tests.support.storms import tries
from tests.support.toys import (
    LAYERS,
    adapter,
    best,
    changed,
    distance,
    make_update,
    mean_of,
    products,
    returned,
    sent,
    weighted,
)

RANKS = [2] * 10 + [4] * 6 + [8] * 4


@given(st.lists(st.tuples(st.integers(1, 8), st.integers(1, 50)), min_size=1, max_size=6), st.integers(1, 10))
@tries(40)
def test_it_is_the_truncated_svd_of_the_mean_of_products(clients: list[tuple[int, int]], kept: int) -> None:
    """W' = sum_k (n_k / n) B_k A_k, then a truncated SVD (methods 1a), for mixed ranks and any participants."""
    total = sum(examples for _, examples in clients)
    answers = [adapter(rank, seed) for seed, (rank, _) in enumerate(clients, 1)]
    updates = [make_update(a, clients[k][0], k + 1) for k, a in enumerate(answers)]
    weights = [examples / total for _, examples in clients]
    dense = weighted([(w, products(a)) for w, a in zip(weights, answers, strict=True)])
    method = HLoRA(rank=kept)
    after = method.merge(method.init(adapter(8)), mean_of(updates, weights))
    assert distance(products(after.adapter), {n: best(p, kept) for n, p in dense.items()}) < 1e-5
    cut_off = sum(float((p - best(p, kept)).square().sum()) for p in dense.values())
    whole = sum(float(p.square().sum()) for p in dense.values())
    assert after.discarded == pytest.approx(cut_off / whole, abs=1e-6)
    assert {f.rank for f in after.adapter.factors.values()} == {kept}


def test_the_factors_are_those_of_the_second_prototype() -> None:
    """A = V^T with orthonormal rows, B = U S with sorted columns (methods 1b, variant 2)."""
    method = HLoRA()
    model = method.merge(method.init(adapter(6)), mean_of([make_update(adapter(6, s), 6, s) for s in (1, 2)]))
    for f in model.adapter.factors.values():
        torch.testing.assert_close(f.down @ f.down.T, torch.eye(6), rtol=0, atol=1e-5)
        assert bool((f.up.norm(dim=0).diff() <= 0).all())
        cross = f.up.T @ f.up
        torch.testing.assert_close(cross, torch.diag(cross.diagonal()), rtol=0, atol=1e-3)


def test_a_client_gets_the_best_approximation_of_its_rank() -> None:
    method = HLoRA()
    model = method.merge(method.init(adapter(8)), mean_of([make_update(adapter(8, s), 8, s) for s in (1, 2, 3)]))
    for rank in range(1, 9):
        wanted = {n: best(p, rank) for n, p in products(model.adapter).items()}
        assert distance(products(sent(method, model, rank).start.train), wanted) < 1e-5


def shares_of_zero_learning(method: HLoRA, rounds: int) -> list[float]:
    model = method.init(toys.graded([0.91**i for i in range(8)]))
    shares = [sum(energy_shares(model)[:2])]
    for turn in range(rounds):
        updates = [returned(sent(method, model, rank, 100 * turn + k)) for k, rank in enumerate(RANKS, 1)]
        model = method.merge(model, mean_of(updates))
        shares.append(sum(energy_shares(model)[:2]))
    return shares


@pytest.mark.parametrize("alpha", [None, 16.0])
def test_energy_drains_into_the_smallest_shared_rank(alpha: float | None) -> None:
    """20 clients of rank 2/4/8 (10/6/4), zero learning: 0.32 -> 0.79 -> 0.95 -> 0.99 in 3 rounds (methods 1h)."""
    assert shares_of_zero_learning(HLoRA(published_alpha=alpha), 3) == pytest.approx([0.32, 0.79, 0.95, 0.99], abs=0.01)


class Prototype:
    """`fedavg_lora.py` of the prototype, dense and in float64 (methods 1b): it knows factors without scaling only."""

    def __init__(self, alpha: float, top: int, start: Adapter) -> None:
        """The server's own function is (alpha / top) B A."""
        self.alpha, self.top = alpha, top
        self.mean = {n: p * top / alpha for n, p in products(start).items()}

    def runs(self, rank: int) -> dict[str, Tensor]:
        """What a client of this rank computes with: alpha / r times the leading directions."""
        return {n: self.alpha / rank * best(p, rank) for n, p in self.mean.items()}

    def round(self, answers: list[tuple[float, int, Adapter]]) -> None:
        """Averages B_k A_k without scaling; PEFT's factors are ours with `up` divided by the client's scaling."""
        plain = [(w, {n: p * r / self.alpha for n, p in products(a).items()}) for w, r, a in answers]
        self.mean = {n: best(p, self.top) for n, p in weighted(plain).items()}

    def model(self) -> dict[str, Tensor]:
        return {n: self.alpha / self.top * p for n, p in self.mean.items()}


def test_published_mode_is_the_prototype() -> None:
    """Clients run alpha/r_k, the server averages unscaled B_k A_k (methods 1b, 1g)."""
    method, top = HLoRA(published_alpha=16.0), 8
    start = toys.graded([0.8**i for i in range(top)])
    model, reference = method.init(start), Prototype(16.0, top, start)
    for turn in range(4):
        answers, updates = [], []
        for k, (rank, weight) in enumerate([(2, 0.5), (4, 0.2), (8, 0.3)]):
            task = sent(method, model, rank, 10 * turn + k + 1)
            assert task.start.scaling == 16.0 / rank
            assert distance(products(task.start.train), reference.runs(rank)) < 1e-4
            trained = changed(task.start.train, 10 * turn + k + 1, by=0.1)
            answers.append((weight, rank, trained))
            updates.append(returned(task, trained))
        model = method.merge(model, mean_of(updates, [w for w, _, _ in answers]))
        reference.round(answers)
        assert distance(products(model.adapter), reference.model()) < 1e-4


def test_published_mode_rescales_what_is_subtracted_too() -> None:
    """As delta, a client that learned nothing moves nothing, whatever its rank."""
    method = HLoRA(published_alpha=16.0)
    model = method.init(toys.graded([0.8**i for i in range(8)]))
    merge = mean_of([returned(sent(method, model, rank, rank)) for rank in (2, 4, 8)], as_delta=True, step=0.5)
    assert distance(products(method.merge(model, merge).adapter), products(model.adapter)) < 1e-5


def test_a_server_of_lower_rank_than_its_clients_cuts_and_says_what_it_lost() -> None:
    method = HLoRA(rank=2)
    model = method.merge(method.init(adapter(2)), mean_of([make_update(adapter(8, s), 8, s) for s in (1, 2)]))
    assert 0.05 < (model.discarded or 0.0) < 0.95
    assert {f.rank for f in sent(method, model, 8).start.train.factors.values()} == {8}


def test_nothing_is_lost_where_nothing_was() -> None:
    zero = Adapter({n: Factor(torch.zeros(4, i), torch.zeros(o, 4)) for n, (o, i) in LAYERS.items()})
    assert HLoRA().merge(HLoRA().init(zero), mean_of([make_update(zero, 4)])).discarded == 0.0


@pytest.mark.parametrize("bad", [{"rank": 0}, {"published_alpha": 0.0}, {"published_alpha": -1.0}])
def test_bad_parameters_are_refused(bad: dict[str, float]) -> None:
    with pytest.raises(Refused, match=next(iter(bad))):
        HLoRA(**bad)  # type: ignore[arg-type]


def test_balanced_factors_are_the_same_function_with_sides_of_equal_length() -> None:
    """up = U sqrt(S), down = sqrt(S) V^T (methods 1g)."""
    answers = [make_update(adapter(8, s), 8, s) for s in (1, 2)]
    model = HLoRA().merge(HLoRA().init(adapter(8)), mean_of(answers))
    plain, even = (sent(HLoRA(balanced=balanced), model, 4).start.train for balanced in (False, True))
    assert distance(products(even), products(plain)) < 1e-5
    for name, f in even.factors.items():
        torch.testing.assert_close(f.up.norm(dim=0), f.down.norm(dim=1))
        torch.testing.assert_close(plain.factors[name].down.norm(dim=1), torch.ones(4))
