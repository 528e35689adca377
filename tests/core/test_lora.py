"""The algebra of factors against dense float64 matrices."""

from __future__ import annotations

import weakref
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fedloom.core.lora import (
    Adapter,
    Factor,
    compact,
    compact_with_fold,
    cut_factor,
    energy_spectrum,
    initial_factor,
    pad,
    pad_to_one_rank,
    product_norm,
    revive,
    scale_product,
    server_rank,
    stack,
    sum_products,
    truncate,
    truncate_sum,
)
from tests.support.storms import tries


def factor(rank: int, d_out: int = 12, d_in: int = 10, seed: int = 0) -> Factor:
    generator = torch.Generator().manual_seed(seed)
    return Factor(torch.randn(rank, d_in, generator=generator), torch.randn(d_out, rank, generator=generator))


def product(of: Factor) -> Tensor:
    return of.up.double() @ of.down.double()


def close(a: Tensor, b: Tensor, atol: float = 1e-5) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=atol)


def learns(of: Factor) -> bool:
    """Whether every direction has a gradient on one side at least."""
    return bool(((of.up.norm(dim=0) > 1e-6) | (of.down.norm(dim=1) > 1e-6)).all())


def test_pad_and_scale_keep_or_multiply_the_product() -> None:
    one = factor(3)
    assert pad(one, 5).rank == 5
    close(product(pad(one, 5)), product(one), 0)
    close(product(scale_product(one, -0.5)), -0.5 * product(one))
    by = torch.tensor([1.0, 0.0, 2.0])
    close(product(scale_product(one, by)), (one.up.double() * by) @ one.down.double())


@given(st.lists(st.tuples(st.floats(-2, 2), st.integers(1, 6)), min_size=1, max_size=5))
@tries(40)
def test_stack_is_the_weighted_sum(terms: list[tuple[float, int]]) -> None:
    weighted = [(weight, factor(rank, seed=k)) for k, (weight, rank) in enumerate(terms)]
    total = stack(weighted)
    assert total.rank == sum(rank for _, rank in terms)
    close(product(total), torch.stack([weight * product(one) for weight, one in weighted]).sum(0))


@given(st.integers(1, 14), st.integers(1, 14))
@tries(40)
def test_one_truncation_serves_every_lower_rank(stacked: int, rank: int) -> None:
    """Cutting the truncation to r is the best approximation of rank r (Eckart-Young)."""
    one = factor(stacked)
    values = torch.linalg.svdvals(product(one))
    top = truncate(one, rank)
    assert top.rank == min(rank, stacked, 10)
    for r in range(1, top.rank + 1):
        error = (product(one) - product(cut_factor(top, r))).norm()
        close(error, values[r:].norm())


def test_truncate_puts_the_energy_in_up() -> None:
    top = truncate(factor(8), 4)
    close(top.down @ top.down.T, torch.eye(4))
    lengths = top.up.norm(dim=0)
    assert bool((lengths.diff() <= 0).all())
    close(lengths.double().square(), energy_spectrum(factor(8))[:4], 1e-3)


@pytest.mark.parametrize("rank", [1, 7, 11, 30])
def test_energy_and_norm(rank: int) -> None:
    one = factor(rank)
    close(energy_spectrum(one), torch.linalg.svdvals(product(one))[: min(rank, 10)].square(), 1e-9)
    assert product_norm(one) == pytest.approx(float(product(one).norm()), rel=1e-12)
    assert energy_spectrum(one).dtype == torch.float64


def test_norm_survives_cancellation() -> None:
    one = factor(3)
    assert product_norm(stack([(1.0, one), (-1.0, one)])) <= 1e-13 * product_norm(one)


def test_revive_leaves_what_can_learn() -> None:
    fresh = Factor(factor(4).down, torch.zeros(12, 4))
    only_up = Factor(torch.zeros(4, 10), factor(4).up)
    for alive in (factor(4), fresh, only_up, truncate(fresh, 4)):
        assert revive(alive, 4, seed=1) is alive
    assert revive(factor(4), 2, seed=1).rank == 4


@pytest.mark.parametrize("length", [1e-3, 1.0, 50.0])
def test_revive_fills_dead_directions(length: float) -> None:
    """The new rows are as long as the living ones, orthogonal to them and to each other; the product is unchanged."""
    living = Factor(torch.nn.functional.normalize(factor(3).down) * length, factor(3).up)
    alive = revive(living, 7, seed=1)
    close(product(alive), product(living), 0)
    assert learns(alive)
    assert alive.rank == 7
    new = alive.down[3:] / length
    close(new @ new.T, torch.eye(4))
    close(new @ living.down.T / length, torch.zeros(4, 3))
    assert torch.equal(alive.down, revive(living, 7, seed=1).down)
    assert not torch.equal(alive.down, revive(living, 7, seed=2).down)


def test_revive_a_negligible_direction_in_the_middle() -> None:
    one = factor(4)
    one.up[:, 1] *= 1e-8
    one.down[1] *= 1e-8
    alive = revive(one, 4, seed=0)
    close(product(alive), product(one))
    assert learns(alive)
    assert float(alive.up[:, 1].norm()) == 0
    assert torch.equal(alive.down[[0, 2, 3]], one.down[[0, 2, 3]])


def test_revive_ignores_rows_without_length_when_it_measures() -> None:
    """A direction with up alone lives, but says nothing of how long a row should be."""
    mixed = Factor(torch.cat([torch.zeros(2, 10), 3 * torch.eye(10)[:1]]), factor(3).up)
    assert float(revive(mixed, 4, seed=0).down[3].norm()) == pytest.approx(3, rel=1e-5)


def test_revive_all_zero_and_without_room() -> None:
    zero = revive(Factor(torch.zeros(2, 10), torch.zeros(12, 2)), 4, seed=0)
    close(zero.down @ zero.down.T, torch.eye(4))
    crowded = revive(factor(8), 14, seed=0)
    assert learns(crowded)
    assert crowded.rank == 14
    close(product(crowded), product(factor(8)), 1e-5)
    assert revive(Factor(torch.zeros(0, 10), torch.zeros(12, 0)), 2, seed=0).down.shape == (2, 10)


def test_revive_after_truncation_of_a_deficient_product() -> None:
    copies = stack([(0.5, factor(2)), (0.5, factor(2))])
    alive = revive(truncate(copies, 4), 6, seed=0)
    close(product(alive), product(factor(2)))
    assert learns(alive)


def dense(of: Factor | Tensor) -> Tensor:
    return of.double() if isinstance(of, Tensor) else product(of)


@pytest.mark.parametrize("ranks", [[3], [4, 5], [4, 6], [0, 9], [10], [11], [7] * 300, [400] * 4])
@pytest.mark.parametrize(("d_out", "d_in"), [(12, 10), (10, 14)])
def test_a_sum_is_a_stack_or_where_that_is_wider_a_matrix(ranks: list[int], d_out: int, d_in: int) -> None:
    terms = [((-1.0) ** k / len(ranks), factor(rank, d_out, d_in, k)) for k, rank in enumerate(ranks)]
    sum_ = sum_products(iter(terms))
    assert isinstance(sum_, Tensor) == (sum(ranks) >= 10)
    close(dense(sum_), product(stack(terms)), 1e-4)
    kept, squared = truncate_sum(iter(terms), 4)
    close(product(kept), product(truncate(stack(terms), 4)), 1e-4)
    assert squared == pytest.approx(float(product(stack(terms)).square().sum()), rel=1e-5)


def test_a_sum_in_half_precision_is_taken_in_float32() -> None:
    terms = [(1.0, Factor(f.down.bfloat16(), f.up.bfloat16())) for f in (factor(8), factor(8, seed=1))]
    sum_ = sum_products(terms)
    assert isinstance(sum_, Tensor)
    assert sum_.dtype == torch.float32


def test_terms_of_a_sum_are_let_go() -> None:
    """However many clients: no more of them are held than a chunk."""
    living, most = weakref.WeakSet[Tensor](), 0

    def terms() -> Iterator[tuple[float, Factor]]:
        nonlocal most
        for seed in range(200):
            one = factor(64, seed=seed)
            living.add(one.up)
            most = max(most, len(living))
            yield 1.0, one

    sum_products(terms())
    assert 0 < most <= 1024 // 64 + 2


@pytest.mark.parametrize(("d_out", "d_in"), [(12, 10), (10, 14), (3, 40)])
@pytest.mark.parametrize("rank", [1, 3, 10, 11, 30])
def test_compact_keeps_the_product_in_no_more_directions_than_there_can_be(rank: int, d_out: int, d_in: int) -> None:
    one = factor(rank, d_out, d_in)
    small = compact(one)
    assert small.rank == min(rank, d_out, d_in)
    assert (small is one) == (rank <= min(d_out, d_in))
    close(product(small), product(one), 1e-4)


def two_layers(rank: int, other: int, seed: int = 0) -> Adapter:
    return Adapter({"one": factor(rank, seed=seed), "two": factor(other, 10, 14, seed + 1)}, {"head": torch.ones(3)})


def test_the_whole_is_adapter_and_fold_together() -> None:
    adapter, fold = two_layers(3, 4), Adapter(two_layers(2, 30, seed=5).factors)
    both = compact_with_fold(adapter, fold)
    assert {n: f.rank for n, f in both.factors.items()} == {"one": 5, "two": 10}
    for name, f in both.factors.items():
        close(product(f), product(adapter.factors[name]) + product(fold.factors[name]), 1e-4)
    assert both.dense is adapter.dense
    assert all(f is adapter.factors[name] for name, f in compact_with_fold(adapter, None).factors.items())


def test_the_whole_of_an_adapter_and_its_opposite_is_zero() -> None:
    adapter = two_layers(3, 4)
    opposite = Adapter({n: scale_product(f, -1.0) for n, f in adapter.factors.items()})
    assert all(product_norm(f) < 1e-6 for f in compact_with_fold(adapter, opposite).factors.values())


def test_level_gives_all_layers_the_highest_rank_and_changes_no_product() -> None:
    adapter = two_layers(2, 7)
    even = pad_to_one_rank(adapter)
    assert server_rank(adapter) == 7
    assert {f.rank for f in even.factors.values()} == {7}
    assert even.dense is adapter.dense
    for name, f in adapter.factors.items():
        close(product(even.factors[name]), product(f), 0)
        assert even.factors[name].down[: f.rank].equal(f.down)


@pytest.mark.parametrize("rank", [1, 4, 10, 13])
@pytest.mark.parametrize("length", [1e-3, 2.0])
def test_a_fresh_lora_is_zero_and_can_learn_in_every_direction(rank: int, length: float) -> None:
    """`up` zero, `down` random rows as long as the model's, orthogonal while there is room; the seed decides."""
    like = Factor(torch.nn.functional.normalize(factor(6).down) * length, factor(6).up)
    one = initial_factor(like, rank, seed=1)
    assert one.down.shape == (rank, 10)
    assert one.up.shape == (12, rank)
    assert not bool(one.up.any())
    close(one.down.norm(dim=1) / length, torch.ones(rank))
    if rank <= 10:
        close(one.down @ one.down.T / length**2, torch.eye(rank))
    assert torch.equal(one.down, initial_factor(like, rank, seed=1).down)
    assert not torch.allclose(one.down, initial_factor(like, rank, seed=2).down, atol=0.1 * length)


def test_a_fresh_lora_is_measured_by_the_median_row() -> None:
    """One dead or one huge row says nothing of how long a row should be."""
    uneven = Factor(torch.diag(torch.tensor([0.0, 2.0, 2.0, 2.0, 99.0])), torch.zeros(12, 5))
    close(initial_factor(uneven, 3, seed=0).down.norm(dim=1), torch.full((3,), 2.0))
