"""The algebra of factors against dense float64 matrices."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedloom.lora import Factor, cut, energy, norm, pad, revive, scale, stack, truncate


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
    close(product(scale(one, -0.5)), -0.5 * product(one))
    by = torch.tensor([1.0, 0.0, 2.0])
    close(product(scale(one, by)), (one.up.double() * by) @ one.down.double())


@given(st.lists(st.tuples(st.floats(-2, 2), st.integers(1, 6)), min_size=1, max_size=5))
@settings(max_examples=40, deadline=None)
def test_stack_is_the_weighted_sum(terms: list[tuple[float, int]]) -> None:
    weighted = [(weight, factor(rank, seed=k)) for k, (weight, rank) in enumerate(terms)]
    total = stack(weighted)
    assert total.rank == sum(rank for _, rank in terms)
    close(product(total), torch.stack([weight * product(one) for weight, one in weighted]).sum(0))


@given(st.integers(1, 14), st.integers(1, 14))
@settings(max_examples=40, deadline=None)
def test_one_truncation_serves_every_lower_rank(stacked: int, rank: int) -> None:
    """Cutting the truncation to r is the best approximation of rank r (Eckart-Young)."""
    one = factor(stacked)
    values = torch.linalg.svdvals(product(one))
    top = truncate(one, rank)
    assert top.rank == min(rank, stacked, 10)
    for r in range(1, top.rank + 1):
        error = (product(one) - product(cut(top, r))).norm()
        close(error, values[r:].norm())


def test_truncate_puts_the_energy_in_up() -> None:
    top = truncate(factor(8), 4)
    close(top.down @ top.down.T, torch.eye(4))
    lengths = top.up.norm(dim=0)
    assert bool((lengths.diff() <= 0).all())
    close(lengths.double().square(), energy(factor(8))[:4], 1e-3)


@pytest.mark.parametrize("rank", [1, 7, 11, 30])
def test_energy_and_norm(rank: int) -> None:
    one = factor(rank)
    close(energy(one), torch.linalg.svdvals(product(one))[: min(rank, 10)].square(), 1e-9)
    assert norm(one) == pytest.approx(float(product(one).norm()), rel=1e-12)
    assert energy(one).dtype == torch.float64


def test_norm_survives_cancellation() -> None:
    one = factor(3)
    assert norm(stack([(1.0, one), (-1.0, one)])) <= 1e-13 * norm(one)


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
