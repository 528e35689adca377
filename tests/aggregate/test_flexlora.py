"""FlexLoRA (arXiv 2402.11505): W = sum p_k s B_k A_k stays whole on the server; clients get U_r S_r V_r^T of it."""

from __future__ import annotations

from itertools import accumulate

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedloom.aggregate.flexlora import FlexLoRA
from fedloom.core.errors import Refused
from fedloom.core.lora import Adapter, Factor
from fedloom.core.types import Model
from tests.support.storms import tries
from tests.support.toys import (
    LAYERS,
    adapter,
    answers,
    best,
    distance,
    fresh,
    function,
    mean_of,
    products,
    returned,
    sent,
    weighted,
)

METHOD, WEIGHTS = FlexLoRA(), (0.5, 0.3, 0.2)


def merged(ranks: tuple[int, ...], server: int = 4) -> tuple[Model, dict[str, torch.Tensor]]:
    """A model and the mean that it should be."""
    model = METHOD.init(adapter(server))
    updates = answers(METHOD, model, ranks)
    dense = weighted([(w, products(u.result.adapter)) for w, u in zip(WEIGHTS, updates, strict=True)])
    return METHOD.merge(model, mean_of(updates, WEIGHTS)), dense


def test_the_model_is_the_mean_untruncated_and_its_adapter_the_best_part_of_it() -> None:
    model, dense = merged((4, 4, 4))
    assert distance(function(model), dense) < 1e-6
    assert distance(products(model.adapter), {n: best(p, 4) for n, p in dense.items()}) < 1e-5
    assert distance(products(model.adapter), dense) > 0.01
    assert (model.discarded or 0.0) < 1e-6


def test_clients_get_the_best_approximation_of_their_rank() -> None:
    model, dense = merged((4, 2, 4))
    for rank in (1, 2, 3, 4):
        start = sent(METHOD, model, rank).start
        assert distance(products(start.train), {n: best(p, rank) for n, p in dense.items()}) < 1e-5
        assert start.fold is None
        torch.testing.assert_close(start.train.factors["query"].down.norm(dim=1), torch.ones(rank))


def test_what_is_beyond_the_clients_rank_stays_and_fades_with_the_step() -> None:
    """A mixing step keeps (1 - step) of the whole W, also of what nobody was sent."""
    model, dense = merged((4, 4, 4))
    updates = answers(METHOD, model, (4, 4, 4), 10)
    after = METHOD.merge(model, mean_of(updates, WEIGHTS, step=0.25))
    new = weighted([(w, products(u.result.adapter)) for w, u in zip(WEIGHTS, updates, strict=True)])
    assert distance(function(after), weighted([(0.75, dense), (0.25, new)])) < 1e-6


def test_the_server_keeps_no_more_directions_than_there_can_be() -> None:
    model = METHOD.init(adapter(4))
    for turn in range(3):
        model = METHOD.merge(model, mean_of(answers(METHOD, model, (1, 2, 4), 10 * turn + 1), step=0.5))
        assert model.fold
        for name, size in LAYERS.items():
            assert model.adapter.factors[name].rank + model.fold.factors[name].rank <= max(min(size), 4)


def test_one_round_of_few_clients_needs_no_more_than_their_ranks() -> None:
    """With a whole step the model is the sum of what came back, and has as many directions."""
    model = METHOD.init(fresh(2))
    for turn in range(3):
        model = METHOD.merge(model, mean_of(answers(METHOD, model, (1, 2), 10 * turn + 1)))
        assert model.fold
        assert {f.rank for f in model.fold.factors.values()} == {1}


@given(st.floats(0.05, 1.0), st.lists(st.sampled_from((1, 2, 4)), min_size=3, max_size=3))
@tries(30)
def test_with_a_share_of_energy_each_layer_is_cut_as_in_florist(share: float, ranks: list[int]) -> None:
    """arXiv 2506.09199: the best p directions of the sum, p the fewest with sum_{i <= p} sigma_i^2 >= share sum_i sigma_i^2."""
    method = FlexLoRA(energy=share)
    model = method.init(adapter(2))
    updates = answers(method, model, tuple(ranks))
    after = method.merge(model, mean_of(updates, WEIGHTS))
    dense, lost, total = (
        weighted([(w, products(u.result.adapter)) for w, u in zip(WEIGHTS, updates, strict=True)]),
        0.0,
        0.0,
    )
    for name, one in dense.items():
        energies = (torch.linalg.svdvals(one) ** 2).tolist()
        p = next(
            p for p, reached in enumerate(accumulate(energies), 1) if reached >= share * (1 - 1e-9) * sum(energies)
        )
        assert distance({name: function(after)[name]}, {name: best(one, p)}) < 1e-5
        assert after.fold
        assert after.fold.factors[name].rank == max(0, p - 2)
        lost, total = lost + sum(energies[p:]), total + sum(energies)
    assert {factor.rank for factor in after.adapter.factors.values()} == {2}
    assert after.discarded == pytest.approx(lost / total, abs=1e-5)


def test_all_of_the_energy_is_the_whole_sum_and_a_bad_share_is_refused() -> None:
    updates = answers(METHOD, METHOD.init(adapter(4)), (4, 2, 4))
    whole, cut = (function(one.merge(one.init(adapter(4)), mean_of(updates))) for one in (METHOD, FlexLoRA(energy=1.0)))
    assert distance(cut, whole) < 1e-6
    for share in (0.0, 1.1, float("nan")):
        with pytest.raises(Refused, match=r"aggregator\.energy"):
            FlexLoRA(energy=share)


def test_zero_and_duplicate_answers() -> None:
    model = METHOD.init(fresh(4))
    task = sent(METHOD, model, 4)
    assert all(float(p.norm()) == 0 for p in function(METHOD.merge(model, mean_of([returned(task)] * 2))).values())
    twice = {n: Factor(f.down[[0, 0, 1, 1]], f.up[:, [0, 0, 1, 1]]) for n, f in adapter(4, 3).factors.items()}
    answer = returned(task, Adapter(twice, task.start.train.dense))
    assert distance(function(METHOD.merge(model, mean_of([answer] * 3))), products(answer.result.adapter)) < 1e-6
