"""FedIT (Zhang et al., 2023): the factors are averaged apart."""

from __future__ import annotations

import torch

from fedloom.aggregate.fedit import FedIT
from fedloom.core.lora import Adapter, map_tensors, named_tensors, pad
from tests.support.toys import adapter, changed, make_update, mean_of, products, returned, sent

WEIGHTS = (0.5, 0.3, 0.2)


def test_the_error_is_the_covariance_of_the_factors() -> None:
    """FedIT - sum p_k B_k A_k = -sum p_k (B_k - B)(A_k - A) (methods 1a, 5.1)."""
    clients = [adapter(4, seed) for seed in (1, 2, 3)]
    merge = mean_of([make_update(one, 4, k) for k, one in enumerate(clients, 1)], WEIGHTS)
    given = FedIT().merge(FedIT().init(adapter(4)), merge).adapter
    for name in given.factors:
        ups = [one.factors[name].up.double() for one in clients]
        downs = [one.factors[name].down.double() for one in clients]
        up = sum(p * b for p, b in zip(WEIGHTS, ups, strict=True))
        down = sum(p * a for p, a in zip(WEIGHTS, downs, strict=True))
        exact = sum(p * b @ a for p, b, a in zip(WEIGHTS, ups, downs, strict=True))
        error = sum(p * (b - up) @ (a - down) for p, b, a in zip(WEIGHTS, ups, downs, strict=True))
        torch.testing.assert_close(products(given)[name], exact - error, rtol=1e-5, atol=1e-5)
        assert float(error.norm()) > 0.1 * float(exact.norm())


def test_whoever_takes_all_directions_is_sent_the_model_itself() -> None:
    model = FedIT().init(adapter(8))
    assert sent(FedIT(), model, 8).start.train is model.adapter
    assert {f.rank for f in sent(FedIT(), model, 2).start.train.factors.values()} == {2}


def test_a_merge_writes_into_no_answer() -> None:
    """Also where answers are in float64 already, in which the sum is made."""
    answers = [map_tensors(torch.Tensor.double, adapter(4, k)) for k in (1, 2, 3)]
    merge = mean_of([make_update(one, 4, k) for k, one in enumerate(answers, 1)], WEIGHTS)
    FedIT().merge(FedIT().init(answers[0]), merge)
    for k, one in enumerate(answers, 1):
        assert all(t.equal(named_tensors(adapter(4, k))[name].double()) for name, t in named_tensors(one).items())


def test_lower_ranks_are_padded_with_zeros() -> None:
    low, high = adapter(2, 1), adapter(8, 2)
    given = FedIT().merge(
        FedIT().init(adapter(8)), mean_of([make_update(low, 2, 1), make_update(high, 8, 2)], [0.7, 0.3])
    )
    for name, f in given.adapter.factors.items():
        padded = pad(low.factors[name], 8)
        torch.testing.assert_close(f.up, 0.7 * padded.up + 0.3 * high.factors[name].up)
        torch.testing.assert_close(f.down, 0.7 * padded.down + 0.3 * high.factors[name].down)


def test_all_clients_share_one_basis_and_one_down_until_a_direction_dies() -> None:
    method = FedIT()
    model = method.init(adapter(8))
    first = sent(method, model, 8, 1)
    assert sent(method, model, 8, 2).start.basis == first.start.basis
    after = method.merge(model, mean_of([returned(first, changed(first.start.train, 1))]))
    assert sent(method, after, 8, 3).start.basis == first.start.basis
    low = sent(method, after, 2, 4)
    redrawn = method.merge(after, mean_of([returned(low)]))
    assert sent(method, redrawn, 8, 5).start.basis != first.start.basis
    here, there = (sent(method, redrawn, rank, rank).start.train for rank in (4, 8))
    assert all(torch.equal(here.factors[n].down, there.factors[n].down[:4]) for n in here.factors)


def test_a_redrawn_direction_does_not_change_the_product() -> None:
    method = FedIT()
    model = method.init(adapter(8))
    low = sent(method, model, 2)
    after = method.merge(model, mean_of([returned(low)]))
    wanted = products(Adapter({n: pad(f, 8) for n, f in low.start.train.factors.items()}))
    assert all(torch.allclose(products(after.adapter)[n], wanted[n]) for n in wanted)
