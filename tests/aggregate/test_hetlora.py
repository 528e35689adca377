"""HetLoRA (arXiv 2401.06432): weights p_k = |B_k A_k| / sum_j |B_j A_j|, zero-padded factors, ranks that shrink."""

from __future__ import annotations

import pytest
import torch

from fedloom.aggregate.hetlora import HetLoRA, weigh_by_norm
from fedloom.core.errors import Refused
from fedloom.core.lora import Adapter, Factor, cut_factor, pad, scale_product
from fedloom.core.types import Pruning, Update
from fedloom.schedule.shared.weights import uniform
from tests.support.toys import adapter, distance, fresh, function, make_update, mean_of, products, returned, sent

METHOD = HetLoRA()


def sized(length: float, seed: int, rank: int = 4) -> Adapter:
    """An adapter whose products have this Frobenius norm over all layers."""
    born = adapter(rank, seed)
    by = length / sum(float(p.square().sum()) for p in products(born).values()) ** 0.5
    return Adapter({n: scale_product(f, by) for n, f in born.factors.items()}, born.dense)


def shares(updates: list[Update], weights: list[float]) -> list[float]:
    return [share for share, _ in weigh_by_norm(mean_of(updates, weights))]


def test_uniform_weights_give_the_papers_rule() -> None:
    """p_k = |B_k A_k| / sum_j |B_j A_j|, whatever the clients' examples, with the schedule's uniform weights."""
    updates = [make_update(sized(norm, k), 4, k, examples=50 // k) for k, norm in enumerate((1.0, 2.0, 5.0), 1)]
    assert [uniform(u) for u in updates] == [1.0] * 3
    assert shares(updates, [1 / 3] * 3) == pytest.approx([1 / 8, 2 / 8, 5 / 8])
    after = METHOD.merge(METHOD.init(adapter(4)), mean_of(updates))
    for name, f in after.adapter.factors.items():
        ups = [
            share * u.result.adapter.factors[name].up for share, u in zip((0.125, 0.25, 0.625), updates, strict=True)
        ]
        torch.testing.assert_close(f.up, torch.stack(ups).sum(0))


def test_the_schedules_weight_multiplies_the_norm() -> None:
    updates = [make_update(sized(norm, k), 4, k) for k, norm in enumerate((1.0, 4.0), 1)]
    assert shares(updates, [0.8, 0.2]) == pytest.approx([0.5, 0.5])


def test_a_rank_counts_by_its_norm_and_not_by_its_size() -> None:
    low, high = make_update(sized(3.0, 1, rank=1), 1, 1), make_update(sized(1.0, 2, rank=8), 8, 2)
    assert shares([low, high], [0.5, 0.5]) == pytest.approx([0.75, 0.25])


@pytest.mark.parametrize("norms", [(0.0, 0.0), (0.0, 2.0)])
def test_who_learnt_nothing_has_no_weight_unless_nobody_learnt(norms: tuple[float, float]) -> None:
    updates = [make_update(sized(norm, k) if norm else fresh(4, k), 4, k) for k, norm in enumerate(norms, 1)]
    after = METHOD.merge(METHOD.init(adapter(4)), mean_of(updates, [0.25, 0.75]))
    assert shares(updates, [0.25, 0.75]) == pytest.approx([0.0, 1.0] if any(norms) else [0.25, 0.75])
    assert all(bool(p.isfinite().all()) for p in function(after).values())
    wanted = products(updates[1].result.adapter)  # with weight 1, or zero as everybody
    assert distance(function(after), wanted) < 1e-6


def test_the_head_keeps_the_schedules_weights() -> None:
    updates = [make_update(sized(norm, k), 4, k) for k, norm in enumerate((1.0, 9.0), 1)]
    head = METHOD.merge(METHOD.init(adapter(4)), mean_of(updates)).adapter.dense["head"]
    torch.testing.assert_close(head, 0.5 * sum(u.result.adapter.dense["head"] for u in updates))


def test_clients_get_the_first_directions_with_the_order_to_prune() -> None:
    """A[:r_k], B[:, :r_k]; lambda, gamma and r_min go along."""
    model = METHOD.init(adapter(8))
    start = sent(HetLoRA(strength=0.01, keep=0.5, least=2), model, 4).start
    assert start.rules.pruning == Pruning(0.01, 0.5, 2)
    assert all(torch.equal(f.down, model.adapter.factors[n].down[:4]) for n, f in start.train.factors.items())
    assert sent(HetLoRA(prune=False), model, 4).start.rules.pruning is None


def test_a_pruned_answer_is_padded_like_one_of_lower_rank() -> None:
    model = METHOD.init(adapter(8))
    task = sent(METHOD, model, 4)
    left = Adapter({n: cut_factor(f, 3) for n, f in task.start.train.factors.items()}, task.start.train.dense)
    after = METHOD.merge(model, mean_of([returned(task, left)]))
    wanted = {n: pad(f, 8) for n, f in left.factors.items()}
    assert distance(function(after), products(Adapter(wanted))) < 1e-6


def test_duplicates_and_deficient_answers_are_no_special_case() -> None:
    one = sized(2.0, 1)
    flat = Adapter({n: Factor(f.down[[0] * 4], f.up[:, [0] * 4]) for n, f in one.factors.items()}, one.dense)
    after = METHOD.merge(METHOD.init(adapter(4)), mean_of([make_update(flat, 4, k) for k in (1, 2, 3)]))
    assert distance(function(after), products(flat)) < 1e-6


@pytest.mark.parametrize("bad", [{"strength": -1.0}, {"keep": 0.0}, {"keep": 1.0}, {"least": 0}])
def test_bad_parameters_are_refused(bad: dict[str, float]) -> None:
    with pytest.raises(Refused, match=next(iter(bad))):
        HetLoRA(**bad)  # type: ignore[arg-type]
