"""What is added to a client's gradient, entry by entry and against autograd; and what pruning and selection decide."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fedloom.core.lora import Adapter, Factor, lay_flat
from fedloom.core.types import Pruning
from fedloom.train import objective
from tests.support.toys import adapter, changed, fresh


def weights_of(of: Adapter) -> dict[str, nn.Parameter]:
    return {name: nn.Parameter(tensor.clone()) for name, tensor in objective.flatten_adapter(of).items()}


def graded(weights: dict[str, nn.Parameter], seed: int = 7) -> dict[str, Tensor]:
    """A gradient for every weight, as a backward pass leaves it; returns copies."""
    draw = torch.Generator().manual_seed(seed)
    for weight in weights.values():
        weight.grad = torch.randn(weight.shape, generator=draw)
    return {name: weight.grad.clone() for name, weight in weights.items() if weight.grad is not None}


def gradients(weights: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    return {name: weight.grad for name, weight in weights.items() if weight.grad is not None}


@pytest.mark.parametrize("strength", [0.01, 3.0])
def test_the_proximal_gradient_is_that_of_the_proximal_term(strength: float) -> None:
    """FedProx (arXiv 1812.06127, Eq. 2): mu / 2 |w - w0|^2 with w0 what the task began with."""
    weights = weights_of(adapter(4))
    origin = {name: weight.detach().clone() for name, weight in weights.items()}
    pull = objective.proximal_pull(weights, strength)
    with torch.no_grad():
        for weight in weights.values():
            weight.add_(torch.randn(weight.shape))
    plain = graded(weights)
    pull()
    term = torch.stack([(w - origin[name]).square().sum() for name, w in weights.items()]).sum() * strength / 2
    for (name, weight), wanted in zip(weights.items(), torch.autograd.grad(term, [*weights.values()]), strict=True):
        torch.testing.assert_close(weight.grad, plain[name] + wanted)


def test_at_the_start_and_without_a_gradient_there_is_nothing_to_pull() -> None:
    weights = weights_of(adapter(4))
    pull = objective.proximal_pull(weights, 5.0)
    pull()
    assert gradients(weights) == {}
    plain = graded(weights)
    pull()
    assert all(weights[name].grad.equal(plain[name]) for name in plain)  # type: ignore[union-attr]


def test_a_control_variate_corrects_every_gradient_and_ends_as_their_mean() -> None:
    """SCAFFOLD (arXiv 1910.06378, Alg. 1): g - c_i + c; c_i of the next task is the mean of the uncorrected g."""
    weights = weights_of(adapter(4))
    server, own = objective.flatten_adapter(adapter(4, 1)), objective.flatten_adapter(adapter(4, 2))
    control, seen = objective.ControlVariate(weights, server, own), []
    for seed in range(3):
        seen.append(graded(weights, seed))
        control()
        for name, weight in weights.items():
            torch.testing.assert_close(weight.grad, seen[-1][name] - own[name] + server[name])
    after = control.next_variate()
    for name in weights:
        torch.testing.assert_close(after[name], torch.stack([one[name] for one in seen]).mean(0))


def test_what_was_not_trained_keeps_its_control_variate() -> None:
    weights = weights_of(adapter(4))
    own = objective.flatten_adapter(adapter(4, 2))
    trained = {name: weight for name, weight in weights.items() if objective.side_of(name) == "up"}
    control = objective.ControlVariate(trained, objective.flatten_adapter(adapter(4, 1)), own)
    graded(trained)
    control()
    after = control.next_variate()
    assert all((after[name] is own[name]) == (objective.side_of(name) != "up") for name in own)


def test_a_mask_stops_the_directions_that_were_not_chosen_and_nothing_else() -> None:
    weights = weights_of(adapter(4))
    chosen = {"query": torch.tensor([True, False, False, True]), "value": torch.zeros(4, dtype=torch.bool)}
    mask, plain = objective.mask_gradient(weights, chosen), graded(weights)
    mask()
    for layer, keep in chosen.items():
        for part, dim in (("down", 0), ("up", 1)):
            grad, before = weights[f"{layer}.{part}"].grad, plain[f"{layer}.{part}"]
            assert grad is not None
            assert grad.index_select(dim, keep.nonzero()[:, 0]).equal(before.index_select(dim, keep.nonzero()[:, 0]))
            assert not bool(grad.index_select(dim, (~keep).nonzero()[:, 0]).any())
    assert weights["head"].grad.equal(plain["head"])  # type: ignore[union-attr]


def scored(scores: dict[str, list[float]], side: str) -> tuple[Adapter, Adapter]:
    """Before and after a trial in which direction i moved by `scores[layer][i]`, in the norm of the product's change."""
    before, after = {}, {}
    for name, wanted in scores.items():
        rank = len(wanted)
        old = Factor(2.0 * torch.eye(rank, 10), 4.0 * torch.eye(12, rank))
        by = torch.tensor(wanted)
        down = old.down + (by / 4.0)[:, None] * torch.eye(10)[-rank:] if side == "down" else old.down
        up = old.up + by / 2.0 * torch.eye(12)[:, -rank:] if side == "up" else old.up
        before[name], after[name] = old, Factor(down, up)
    return Adapter(before), Adapter(after)


@pytest.mark.parametrize("side", ["down", "up"])
@pytest.mark.parametrize(
    ("count", "query", "value"),
    [(1, [], [0]), (2, [], [0, 2]), (3, [3], [0, 2]), (4, [0, 3], [0, 2]), (8, [0, 1, 2, 3], [0, 1, 2, 3])],
)
def test_the_best_directions_over_all_layers_are_selected(
    count: int, query: list[int], value: list[int], side: str
) -> None:
    """LoRA-A2 (arXiv 2410.22815): S = |dB[:, i] A[i]| or |B[:, i] dA[i]|, the best r_i N of all modules together."""
    scores = {"query": [4.0, 1.0, 0.5, 9.0], "value": [20.0, 2.0, 10.0, 0.0]}
    keep = objective.most_moved_directions(*scored(scores, side), count)
    assert {name: mask.nonzero()[:, 0].tolist() for name, mask in keep.items()} == {"query": query, "value": value}


def test_equal_scores_are_broken_by_order_and_more_than_there_are_is_all() -> None:
    before = adapter(4)
    assert [m.tolist() for m in objective.most_moved_directions(before, before, 3).values()] == [
        [True] * 3 + [False],
        [False] * 4,
    ]
    assert all(bool(m.all()) for m in objective.most_moved_directions(before, adapter(4, 1), 99).values())


@pytest.mark.parametrize(("keep", "first"), [(0.99, 7), (0.5, 4), (0.2, 2)])
def test_the_penalty_is_the_product_of_the_tails(keep: float, first: int) -> None:
    """HetLoRA (arXiv 2401.06432): lambda |B[:, g r:]| |A[g r:, :]|, a sum over layers."""
    pruning, of = Pruning(0.03, keep, least=2), adapter(8)
    tails = [f.up[:, first:].double().norm() * f.down[first:].double().norm() for f in of.factors.values()]
    assert pruning.rank_after(8) == first
    assert float(objective.pruning_penalty(weights_of(of), pruning).detach()) == pytest.approx(
        0.03 * float(sum(tails)), rel=1e-5
    )


@pytest.mark.parametrize("rank", [1, 2, 8])
@pytest.mark.parametrize("zero", ["up", "both", "none"])
def test_the_penalty_has_a_finite_gradient_at_zero_too(rank: int, zero: str) -> None:
    of = {"up": fresh(rank), "none": adapter(rank)}.get(zero) or Adapter(
        {n: Factor(0.0 * f.down, 0.0 * f.up) for n, f in adapter(rank).factors.items()}
    )
    weights = weights_of(of)
    objective.pruning_penalty(weights, Pruning(1.0, 0.5)).backward()
    tails = [weight.grad for name, weight in weights.items() if objective.side_of(name) != "dense"]
    assert all(grad is not None and bool(grad.isfinite().all()) for grad in tails)
    assert any(bool(grad.any()) for grad in tails if grad is not None) == (zero == "none" and rank > 1)


def tail_times(of: Adapter, by: float, layers: tuple[str, ...]) -> Adapter:
    """With the last direction of these layers so many times as long."""
    scaled = {n: f.up * torch.tensor([1.0, 1.0, 1.0, by]) if n in layers else f.up for n, f in of.factors.items()}
    return Adapter({n: Factor(f.down, scaled[n]) for n, f in of.factors.items()}, of.dense)


@pytest.mark.parametrize(
    ("by", "layers", "rank"),
    [
        (0.9, ("query", "value"), 3),
        (1.1, ("query", "value"), 4),
        (1.0, (), 4),
        (0.5, ("query",), 3),
        (0.0, ("value",), 3),
    ],
)
def test_an_adapter_is_pruned_exactly_if_its_tail_shrank(by: float, layers: tuple[str, ...], rank: int) -> None:
    """|B[:, g r:]| |A[g r:]|, summed over layers, smaller than before the task: then r becomes g r, in all layers."""
    before = adapter(4)
    after = objective.prune_tail(before, tail_times(before, by, layers), Pruning(keep=0.99))
    assert {f.rank for f in after.factors.values()} == {rank}
    assert after.dense is before.dense


@pytest.mark.parametrize(("rank", "least"), [(1, 1), (2, 2), (4, 8)])
def test_pruning_stops_at_the_least_rank(rank: int, least: int) -> None:
    before = adapter(rank)
    smaller = Adapter({n: Factor(f.down, 0.1 * f.up) for n, f in before.factors.items()})
    assert {f.rank for f in objective.prune_tail(before, smaller, Pruning(least=least)).factors.values()} == {rank}


def test_what_a_client_keeps_is_found_again_under_the_servers_directions() -> None:
    """A task holds some of the directions: it writes those and leaves the others as earlier tasks left them."""
    one, two = adapter(2, 1), adapter(3, 2)
    kept = objective.put_directions(objective.put_directions(None, one, (1, 4)), two, (0, 4, 6))
    for name, f in objective.take_directions(kept, one, (0, 1, 4, 5, 6, 9)).factors.items():
        first, second = one.factors[name], two.factors[name]
        assert f.down[[0, 2, 4]].equal(second.down)
        assert f.up[:, [0, 2, 4]].equal(second.up)
        assert f.down[1].equal(first.down[0])
        assert not bool(f.down[[3, 5]].any() or f.up[:, [3, 5]].any())
    assert kept.dense is two.dense
    head = objective.put_directions(None, lay_flat(two), (0, 4, 6)).dense["head"]
    assert head.equal(two.dense["head"])
    assert head.untyped_storage().nbytes() == head.nbytes


def test_flat_names_are_those_of_the_parameters_and_come_back() -> None:
    of = adapter(4)
    flat = objective.flatten_adapter(of)
    assert flat.keys() == {"query.down", "query.up", "value.down", "value.up", "head"}
    again = objective.unflatten_adapter(flat, of)
    assert all(again.factors[n].up is f.up and again.factors[n].down is f.down for n, f in of.factors.items())
    assert [objective.side_of(name) for name in flat] == ["down", "up", "down", "up", "dense"]


@pytest.mark.parametrize("sides", [("up",), ("down", "dense"), ()])
def test_two_adapters_are_mixed_by_side_and_by_direction(sides: tuple[str, ...]) -> None:
    own, other = adapter(4), changed(adapter(4), 1)
    chosen = {"query": torch.tensor([True, False, True, False]), "value": torch.ones(4, dtype=torch.bool)}
    given = objective.replace_sides(own, other, frozenset(sides), chosen)  # type: ignore[arg-type]
    for name, f in given.factors.items():
        for part, dim in (("down", 0), ("up", 1)):
            source = getattr((other if part in sides else own).factors[name], part)
            rest = getattr(other.factors[name], part)
            keep = chosen[name][:, None] if dim == 0 else chosen[name]
            assert getattr(f, part).equal(torch.where(keep, source, rest))
    assert given.dense is (other if "dense" in sides else own).dense
