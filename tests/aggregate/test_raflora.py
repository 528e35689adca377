"""raFLoRA (arXiv 2602.13486): Eq. 8 written out literally, in dense float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fedloom.aggregate.flexlora import FlexLoRA
from fedloom.aggregate.folded_delta import FoldedDelta
from fedloom.aggregate.hlora import HLoRA
from fedloom.aggregate.product_delta import ProductDelta
from fedloom.aggregate.raflora import RaFLoRA
from fedloom.aggregate.shared.product_space import energy_shares
from fedloom.core.errors import Refused
from fedloom.core.fingerprint import fingerprint
from fedloom.core.lora import Adapter
from fedloom.core.types import Budget
from tests.support import toys
from tests.support.storms import tries
from tests.support.toys import adapter, best, distance, make_update, mean_of, products, returned, sent

GLOBAL = (1, 2, 4, 6, 8)


def equation_8(server: Adapter, clients: list[tuple[int, int, Adapter]]) -> dict[str, Tensor]:
    """W = sum_h dW_h, dW_h = sum_{k in C_h} (n_k / sum_{C_h} n) B_k[:, h_prev:h] A_k[h_prev:h, :].

    Boundaries are the ranks of the federation, not of the round; with C_h empty the server's component stays.
    """
    total = {}
    for name, own in server.factors.items():
        whole, before = 0.0 * products(server)[name], 0
        for h in GLOBAL:
            holders = [(n, a.factors[name]) for rank, n, a in clients if rank >= h] or [(1, own)]
            examples = sum(n for n, _ in holders)
            for n, f in holders:
                whole += n / examples * f.up.double()[:, before:h] @ f.down.double()[before:h]
            before = h
        total[name] = best(whole, GLOBAL[-1])
    return total


@given(st.lists(st.tuples(st.sampled_from(GLOBAL), st.integers(1, 50)), min_size=1, max_size=6))
@tries(60)
def test_it_is_equation_8(drawn: list[tuple[int, int]]) -> None:
    clients = [(rank, examples, adapter(rank, seed)) for seed, (rank, examples) in enumerate(drawn, 1)]
    updates = [make_update(a, rank, k, examples) for k, (rank, examples, a) in enumerate(clients, 1)]
    total, server = sum(examples for _, examples in drawn), adapter(8)
    merge = mean_of(updates, [examples / total for _, examples in drawn])
    after = RaFLoRA().merge(RaFLoRA().init(server), merge)
    assert distance(products(after.adapter), equation_8(server, clients)) < 1e-5


def test_a_partition_that_nobody_brought_keeps_the_servers_component() -> None:
    """Eq. 8 with C_h empty (methods 5.1): otherwise that energy would be lost."""
    server, low = adapter(8), adapter(2, 1)
    after = RaFLoRA().merge(RaFLoRA().init(server), mean_of([make_update(low, 2)]))
    for name, f in server.factors.items():
        wanted = products(low)[name] + f.up[:, 2:].double() @ f.down[2:].double()
        assert distance({name: products(after.adapter)[name]}, {name: wanted}) < 1e-5


def test_a_client_without_weight_counts_as_one_that_brought_nothing() -> None:
    server, low, high = adapter(8), adapter(2, 1), adapter(8, 2)
    with_it = mean_of([make_update(low, 2, 1), make_update(high, 8, 2)], [1.0, 0.0])
    without = mean_of([make_update(low, 2, 1)])
    given, wanted = (products(RaFLoRA().merge(RaFLoRA().init(server), m).adapter) for m in (with_it, without))
    assert distance(given, wanted) < 1e-5


def test_with_one_rank_for_all_it_is_the_plain_mean_of_products() -> None:
    answers = [adapter(8, seed) for seed in (1, 2, 3)]
    merge = mean_of([make_update(a, 8, k) for k, a in enumerate(answers, 1)], [0.5, 0.3, 0.2])
    dense = toys.weighted([(w, products(a)) for w, a in zip((0.5, 0.3, 0.2), answers, strict=True)])
    after = RaFLoRA().merge(RaFLoRA().init(adapter(8)), merge)
    assert distance(products(after.adapter), {n: best(p, 8) for n, p in dense.items()}) < 1e-5


def test_energy_does_not_drain() -> None:
    """20 clients of rank 2/4/8 (10/6/4), zero learning: stays 0.32 where HLoRA goes to 0.99 (methods 1h)."""
    method = RaFLoRA()
    model = method.init(toys.graded([0.91**i for i in range(8)]))
    for turn in range(3):
        ranks = [2] * 10 + [4] * 6 + [8] * 4
        model = method.merge(
            model, mean_of([returned(sent(method, model, r, 100 * turn + k)) for k, r in enumerate(ranks, 1)])
        )
        assert sum(energy_shares(model)[:2]) == pytest.approx(0.3245, abs=1e-3)


def test_it_hands_out_a_model_as_its_neighbours_do() -> None:
    """The same numbers, so that raFLoRA differs in its weights alone; `down` has rows of length 1, and not 0.58 as a fresh LoRA."""
    merge = mean_of([make_update(adapter(8, seed), 8, seed) for seed in (1, 2)])
    model = RaFLoRA().merge(RaFLoRA().init(adapter(8)), merge)
    wanted = HLoRA().start(model, Budget(4, 1), 7).train
    for method in (RaFLoRA(), FlexLoRA(), ProductDelta(), FoldedDelta()):
        assert fingerprint(method.start(model, Budget(4, 1), 7).train) == fingerprint(wanted)
    rows = torch.cat([factor.down.norm(dim=1) for factor in wanted.factors.values()])
    torch.testing.assert_close(rows, torch.ones_like(rows))


def test_a_rank_below_one_is_refused() -> None:
    with pytest.raises(Refused, match="rank"):
        RaFLoRA(rank=0)
