"""The sliding window against the sum of what is in it, computed anew."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedloom.lora import Factor, norm, stack, truncate_sum
from fedloom.window import Window

SLOTS, RANK = 6, 8


def factor(rank: int, seed: int, d_out: int = 300, d_in: int = 280, size: float = 1.0) -> Factor:
    """A signal that all share, and noise."""
    shared = torch.Generator().manual_seed(0)
    own = torch.Generator().manual_seed(seed)
    down = torch.randn(RANK, d_in, generator=shared)[:rank] + 0.3 * torch.randn(rank, d_in, generator=own)
    up = torch.randn(d_out, RANK, generator=shared)[:, :rank] + 0.3 * torch.randn(d_out, rank, generator=own)
    return Factor(size * down / d_in**0.5, up / d_out**0.5)


def agrees(window: Window, held: dict[int, Factor], weights: list[float], rank: int = RANK) -> None:
    """As good as the recomputed answer, to float32 rounding of the terms."""
    mine, energy = window.best(weights, rank)
    terms = [(weights[slot], update) for slot, update in held.items()] or [(1.0, factor(1, 0, size=0.0))]
    anew, squared = truncate_sum(terms, rank)
    size = sum(abs(weight) * norm(update) for weight, update in terms) + 1e-30

    def error(kept: Factor) -> float:
        return norm(stack([*terms, (-1.0, kept)]))

    assert error(mine) == pytest.approx(error(anew), abs=2e-6 * size)
    assert energy == pytest.approx(squared, rel=1e-5, abs=1e-5 * size**2)
    torch.testing.assert_close(mine.down @ mine.down.T, torch.eye(mine.rank), rtol=0, atol=2e-6)


@pytest.mark.parametrize("slots", [SLOTS, 30])
def test_nothing_drifts_over_hundreds_of_updates(slots: int) -> None:
    """Thin (Householder) and wide (Krylov), other weights at every step, every rank."""
    window, held = Window(slots, RANK, factor(1, 0)), dict[int, Factor]()
    draw = torch.Generator().manual_seed(1)
    for step in range(300):
        update = factor(1 + step % RANK, step + 1, size=10.0 ** (step % 5 - 2))
        window.put(step % slots, update)
        held[step % slots] = update
        if step % 37 == 0 or step == 299:
            agrees(window, held, torch.rand(slots, generator=draw).tolist())
    mine, _ = window.best([1 / slots] * slots, RANK)
    anew, _ = truncate_sum([(1 / slots, update) for update in held.values()], RANK)
    assert norm(stack([(1.0, mine), (-1.0, anew)])) <= 1e-5 * norm(anew)


put = st.tuples(
    st.integers(0, SLOTS - 1), st.integers(1, RANK), st.integers(0, 2), st.sampled_from([0.0, 1e-6, 1.0, 1e20])
)
weight = st.sampled_from([0.0, 0.2, 1.0, -0.5])


@given(st.lists(put, max_size=12), st.lists(weight, min_size=SLOTS, max_size=SLOTS), st.integers(1, 2 * RANK))
@settings(max_examples=40, deadline=None)
def test_any_contents(puts: list[tuple[int, int, int, float]], weights: list[float], rank: int) -> None:
    """Empty slots, copies of one update, zero updates, weights zero or negative."""
    window, held = Window(SLOTS, RANK, factor(1, 0, 40, 270)), dict[int, Factor]()
    for slot, own, seed, size in puts:
        held[slot] = factor(own, seed, 40, 270, size)
        window.put(slot, held[slot])
    held = held or {0: factor(1, 0, 40, 270, 0.0)}
    agrees(window, held, weights, rank)


def test_copies_and_zeros_where_krylov_is_used() -> None:
    slots, same = 30, factor(RANK, 1)
    for fill in (same, factor(RANK, 1, size=0.0), Factor(same.down, 0 * same.up)):
        window = Window(slots, RANK, same)
        for slot in range(slots):
            window.put(slot, fill)
        agrees(window, dict.fromkeys(range(slots), fill), [1 / slots] * slots)


def test_an_update_too_wide_for_its_slot_is_refused() -> None:
    with pytest.raises(RuntimeError):
        Window(2, 4, factor(1, 0)).put(0, factor(5, 1))
