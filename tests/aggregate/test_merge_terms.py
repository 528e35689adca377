"""The mean of tensors, and sums of products with equal directions gathered."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.overrides import TorchFunctionMode

from fedloom.aggregate.product_delta import ProductDelta
from fedloom.aggregate.shared.merge_terms import (
    SMALL,
    Term,
    as_changes,
    base_offsets,
    direction_weights,
    gather_terms,
    offset_terms,
    weighted_sum,
)
from fedloom.aggregate.shared.product_space import best_approximation, product_terms
from fedloom.core import answer_change
from fedloom.core.codec import Codec, DeltaInt8, Half, HalfChange
from fedloom.core.events import ClientJoined, Dispatch, TimerFired, UpdateArrived
from fedloom.core.limits import Limits
from fedloom.core.lora import Factor, cut_factor, product_norm, stack
from fedloom.core.transfer import encode_answer
from fedloom.core.types import ClientState
from fedloom.plan.budget import Plan
from fedloom.plan.rank import FixedRank
from fedloom.schedule.fedfa import FedFa
from tests.support import toys
from tests.support.server_storm import RecordingSchedule
from tests.support.storms import tries

COUNT = 7
SHAPES = [(), (0,), (3,), (4, 5), (2, SMALL // COUNT // 2), (1, SMALL // COUNT + 1), (3, SMALL)]
"""On both sides of the size from which tensors are added up one by one."""


def terms(shape: tuple[int, ...], dtype: torch.dtype) -> list[tuple[float, Tensor]]:
    draws = torch.Generator().manual_seed(3)
    ranks = [torch.randn(shape, generator=draws) * 10.0**k for k in range(-3, COUNT - 3)]
    return [((-0.7) ** k, tensor.to(dtype)) for k, tensor in enumerate(ranks)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_mean_is_the_sum_in_float64_rounded_once(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """To one unit in the last place, where a sum in float32 of terms of seven sizes misses by more."""
    pairs = terms(shape, dtype)
    exact = sum((share * tensor.double() for share, tensor in pairs), torch.zeros(shape, dtype=torch.float64))
    given = weighted_sum(pairs)
    assert (given.dtype, given.shape) == (dtype, exact.shape)
    unit = torch.finfo(dtype).eps
    torch.testing.assert_close(given.double(), exact, rtol=unit, atol=unit * 1e-6 if dtype != torch.float64 else 1e-11)


@pytest.mark.parametrize("size", [4, SMALL])
def test_terms_may_be_strided_and_of_several_dtypes(size: int) -> None:
    one, other = torch.arange(2.0 * size).view(size, 2).T, torch.ones(2, size, dtype=torch.float16)
    given = weighted_sum([(0.5, one), (2.0, other)])
    assert given.equal(0.5 * one + 2.0)
    assert given.dtype == one.dtype


@pytest.mark.parametrize("size", [4, SMALL])
def test_a_mean_of_one_is_a_tensor_of_its_own(size: int) -> None:
    """Nobody writes into an answer, also not by way of a mean of it."""
    one = torch.ones(size, dtype=torch.float64)
    weighted_sum([(1.0, one)]).zero_()
    assert float(one.sum()) == size


def summed(terms: list[Term]) -> Tensor:
    """The sum itself, in float64."""
    parts = [(factor.up.double() * direction_weights(by, factor)) @ factor.down.double() for by, factor in terms]
    return torch.stack(parts).sum(0)


@given(st.lists(st.tuples(st.integers(1, 6), st.integers(0, 2), st.integers(-3, 3)), min_size=1, max_size=8))
@tries(60)
def test_a_sum_with_equal_directions_gathered_is_the_same_sum(drawn: list[tuple[int, int, int]]) -> None:
    """Cuts of three products, with weights that cancel now and then; one has a direction that adds nothing."""
    wholes = [toys.factor(6, 7, 9, seed=seed) for seed in range(3)]
    wholes[1].up[:, 2] = 0.0
    terms: list[Term] = [(float(by), cut_factor(wholes[seed], rank)) for rank, seed, by in drawn]
    gathered = gather_terms(terms)
    left = summed(gathered) if gathered else torch.zeros(7, 9, dtype=torch.float64)
    torch.testing.assert_close(left, summed(terms), rtol=1e-6, atol=1e-5)
    ranks = [max((rank for rank, one, _ in drawn if one == seed), default=0) for seed in range(3)]
    assert sum(factor.rank for _, factor in gathered) <= sum(ranks)


def test_where_nothing_is_left_to_add_directions_keep_the_rows_to_learn_from() -> None:
    """A fresh LoRA of which nobody trained anything: `down` still spans what it did."""
    fresh = toys.factor(4, 40, 40)
    fresh.up.zero_()
    cut, _, _ = best_approximation([(1.0, fresh), (0.5, fresh)], 4)
    rows = torch.linalg.qr(fresh.down.T)[0].T
    torch.testing.assert_close((rows @ cut.down.T).square().sum(0), torch.ones(4), rtol=1e-4, atol=1e-4)


def test_what_cancels_but_for_rounding_is_left_out() -> None:
    whole = toys.factor(4)
    ((weights, left),) = gather_terms([(1.0, whole), (-0.3, cut_factor(whole, 3)), (-0.7, whole)])
    assert left.down.equal(whole.down[3:]), "1 - 0.3 - 0.7 is not 0 in float64"
    assert direction_weights(weights, left).tolist() == pytest.approx([0.3])
    assert gather_terms([(0.1, whole)] * 10 + [(-1.0, whole)]) == []


def test_directions_may_have_weights_of_their_own() -> None:
    whole, by = toys.factor(4), torch.tensor([1.0, 0.0, -2.0, 3.0, 5.0], dtype=torch.float64)
    ((weights, gathered),) = gather_terms([(by, whole), (2.0, cut_factor(whole, 1))])
    assert direction_weights(weights, gathered).tolist() == [3.0, -2.0, 3.0]
    assert gathered.down.equal(whole.down[[0, 2, 3]])


@pytest.mark.parametrize("codec", [Half(), HalfChange(), DeltaInt8()], ids=str)
def test_only_answers_are_stacked_in_a_window_that_began_at_many_versions(codec: Codec) -> None:
    """Clients of one rank, each started from another version, through float16: bases and starts cancel."""
    method, recording = ProductDelta(), RecordingSchedule(FedFa(window=4, max_in_flight=3))
    more: dict[str, Any] = {"assign": Plan(FixedRank(3), 5), "limits": Limits(versions=20), "transfer": codec}
    server = toys.server(recording, method, start=toys.adapter(3), **more)
    for profile in toys.profiles(3).values():
        server.handle(0.0, ClientJoined(profile))
    commands = server.handle(0.0, TimerFired())
    for now in range(1, 9):
        task = (
            next(c.task for c in commands if isinstance(c, Dispatch)) if now > 3 else min(server.state.busy.items())[1]
        )
        before = server.state.model
        result, _ = encode_answer(
            task, ClientState(), toys.make_result(toys.changed(task.start, task.id)), ClientState()
        )
        commands = server.handle(float(now), UpdateArrived(task.client, task.id, result))
    merge, offsets = recording.merges[-1], base_offsets(before, recording.merges[-1])
    assert len(offsets) > 2, "the answers are to starts from several versions"
    for name in before.adapter.factors:
        terms = product_terms(name, before.adapter, as_changes(merge), torch.ones(3, dtype=torch.float64))
        assert sum(factor.rank for _, factor in gather_terms([*terms, *offset_terms(name, offsets)])) == 4 * 3


STACKS = [(40, (8,) * 3), (600, (8,) * 10), (600, (60,) * 5), (520, (84,) * 5), (30, (40,))]
"""Sides and ranks for which each method of decomposition is the cheapest."""


@pytest.mark.parametrize(("size", "ranks"), STACKS, ids=str)
def test_whether_energy_is_measured_changes_no_bit(size: int, ranks: tuple[int, ...]) -> None:
    terms: list[Term] = [(0.3, toys.factor(rank, size, size, seed=k)) for k, rank in enumerate(ranks)]
    (measured, energy, _), (plain, _, _) = (best_approximation(terms, 4, asked) for asked in (True, False))
    assert measured.up.equal(plain.up)
    assert measured.down.equal(plain.down)
    assert energy == pytest.approx(float(summed(terms).square().sum()), rel=1e-5)


def test_a_window_has_the_same_bits_from_an_empty_memo_and_is_the_best_approximation() -> None:
    """Slid by one answer; and what is remembered of factors goes with them."""
    answers: list[Term] = [(0.1 + k, toys.factor(3, 1010, 1000, seed=k)) for k in range(5)]
    best_approximation(answers[:4], 3, in_window=True)
    remembered, energy, _ = best_approximation(answers[1:], 3, in_window=True)
    fresh: list[Term] = [(by, Factor(one.down.clone(), one.up.clone())) for by, one in answers[1:]]
    forgotten, _, _ = best_approximation(fresh, 3, in_window=True)
    assert forgotten.up.equal(remembered.up)
    assert forgotten.down.equal(remembered.down)
    plain, wanted, _ = best_approximation(answers[1:], 3)
    assert product_norm(stack([(1.0, remembered), (-1.0, plain)])) < 1e-5 * product_norm(plain)
    assert energy == pytest.approx(wanted, rel=1e-6)
    held = len(answer_change._BLOCKS)
    del fresh, forgotten
    assert len(answer_change._BLOCKS) <= held - 4


class Comparisons(TorchFunctionMode):
    """Counts how often tensors are compared whole."""

    count = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is Tensor.equal
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("frozen", ["down", "up"])
def test_answers_that_share_a_frozen_side_are_not_compared_each_with_each(frozen: str) -> None:
    one, draws = toys.factor(2), [toys.factor(2, seed=seed) for seed in range(1, 40)]
    apart = [Factor(one.down.clone(), f.up) if frozen == "down" else Factor(f.down, one.up.clone()) for f in draws]
    with Comparisons() as comparisons:
        assert len(gather_terms([(1.0, factor) for factor in apart])) == len(apart)
    assert comparisons.count <= len(apart)
