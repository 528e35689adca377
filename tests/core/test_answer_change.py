"""What an answer changed: factors, products, and their inner products, against matrices that are formed."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedloom.core.answer_change import (
    euclidean_norm,
    factor_change,
    inner_products,
    product_change,
    sent_part,
    with_change,
)
from fedloom.core.lora import Adapter, Factor, cut_adapter, map_tensors
from fedloom.core.types import Rules, TaskStart


def adapter(seed: int, rank: int, layers: tuple[str, ...] = ("a", "b")) -> Adapter:
    draw = torch.Generator().manual_seed(seed)
    factors = {
        name: Factor(torch.randn(rank, 5, generator=draw), torch.randn(7, rank, generator=draw)) for name in layers
    }
    return Adapter(factors, {"head": torch.randn(3, 2, generator=draw)})


def length(start: TaskStart, answer: Adapter) -> float:
    return float(inner_products([product_change(start, answer)])) ** 0.5


def formed(start: TaskStart, answer: Adapter) -> torch.Tensor:
    """The change of all layers as one long vector; of a layer that was not trained, zero."""
    flat = []
    for name in ("a", "b"):
        if name in answer.factors:
            new, old = answer.factors[name], start.train.factors[name]
            flat.append((new.up.double() @ new.down.double() - old.up.double() @ old.down.double()).flatten())
        else:
            flat.append(torch.zeros(35, dtype=torch.float64))
    return torch.cat([*flat, (answer.dense["head"].double() - start.train.dense["head"].double()).flatten()])


@given(st.lists(st.tuples(st.integers(1, 4), st.integers(0, 3), st.booleans()), min_size=1, max_size=4))
def test_grams_are_those_of_the_matrices(clients: list[tuple[int, int, bool]]) -> None:
    changes, matrices = [], []
    for k, (rank, pruned, both) in enumerate(clients):
        layers = ("a", "b") if both else ("b",)
        start = TaskStart(adapter(k, rank, layers), "0")
        answer = cut_adapter(adapter(100 + k, rank, layers), max(1, rank - pruned))
        changes.append(product_change(start, answer))
        matrices.append(formed(start, answer))
    vectors = torch.stack(matrices)
    wanted = vectors @ vectors.T
    scale = float(wanted.diagonal().max())
    assert (inner_products(changes) - wanted).abs().max() < 1e-5 * scale
    assert (inner_products(changes, torch.float32) - wanted).abs().max() < 1e-4 * scale
    assert float(inner_products(changes[:1])) ** 0.5 == pytest.approx(float(vectors[0].norm()), rel=1e-5)


def test_changes_that_nearly_agree_keep_their_distance() -> None:
    start = TaskStart(adapter(0, 2), "0")
    one = map_tensors(lambda x: x + 1e-4, start.train)
    wanted = float(formed(start, one).norm())
    assert length(start, one) == pytest.approx(wanted, rel=1e-3)


def test_no_change_has_no_norm() -> None:
    start = TaskStart(adapter(0, 2), "0")
    assert euclidean_norm(factor_change(start, start.train)) == 0.0
    assert length(start, start.train) == 0.0


@pytest.mark.parametrize("frozen", ["down", "up", "dense"])
def test_a_side_that_may_not_change_counts_as_unchanged_and_stays_as_sent(frozen: str) -> None:
    start = replace(TaskStart(adapter(0, 3), "0"), rules=Rules(frozen=(frozen,)))  # type: ignore[arg-type]
    answer = adapter(1, 3)
    change = factor_change(start, answer)
    back = with_change(start, answer, change)
    sides = {
        "down": lambda one: one.factors["a"].down,
        "up": lambda one: one.factors["a"].up,
        "dense": lambda one: one.dense["head"],
    }
    for side, tensor in sides.items():
        if side == frozen:
            assert not tensor(change).any()
            assert tensor(back).equal(tensor(start.train))
        else:
            assert torch.allclose(tensor(back), tensor(answer))


def test_a_pruned_answer_is_held_against_what_it_kept() -> None:
    start, answer = TaskStart(adapter(0, 4), "0"), cut_adapter(adapter(0, 4), 2)
    assert sent_part(start, answer).factors["a"].rank == 2
    assert euclidean_norm(factor_change(start, answer)) == 0.0
    assert length(start, answer) == pytest.approx(float(formed(start, answer).norm()))
