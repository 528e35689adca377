"""Codecs on bare rows: how far what arrives is from what was sent, at every size that float32 has."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fedloom.core.codec import (
    HALF,
    Block,
    Codec,
    DeltaInt8,
    Exact,
    Half,
    HalfChange,
    Summed,
    decode_all,
    pack_half,
    round_all_to_half,
    round_to_half,
)
from fedloom.core.lora import Factor, product_norm, stack
from tests.support.storms import tries

CODECS: tuple[Codec, ...] = (Exact(), Half(), HalfChange(), DeltaInt8())
every_codec = pytest.mark.parametrize("codec", CODECS, ids=str)
INT8 = DeltaInt8()


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def arrives(codec: Codec, values: Tensor, base: Tensor | None = None) -> Tensor:
    held = torch.zeros_like(values) if base is None else base
    return codec.pack(values, held).values(held)


FLOATS = st.floats(width=32, min_value=-(2.0**96), max_value=2.0**96)
TENSORS = st.integers(1, 4).flatmap(
    lambda width: st.lists(st.lists(FLOATS, min_size=width, max_size=width), min_size=1, max_size=4)
).map(torch.tensor)  # fmt: skip


@given(TENSORS)
@tries(600)
def test_half_is_right_to_eleven_bits_near_the_top_and_never_overflows(values: Tensor) -> None:
    got, top = arrives(HALF, values).double(), float(values.abs().max())
    assert bool(got.isfinite().all())
    room = torch.maximum(values.abs().double() * 2.0**-11, torch.tensor(max(top * 2.0**-38, 2.0**-149)).double())
    assert bool(((got - values.double()).abs() <= room).all())


@given(TENSORS)
@tries(600)
def test_half_of_what_came_out_of_half_is_the_same(values: Tensor) -> None:
    assert round_to_half(round_to_half(values)).equal(round_to_half(values))


@pytest.mark.parametrize("top", [1 - 2.0**-11, 1 - 2.0**-12, 1 - 2.0**-13, 1.0, 1 - 2.0**-24])
@pytest.mark.parametrize("exponent", [-126, -14, 0, 15, 16, 90])
def test_an_entry_that_rounds_up_to_a_power_of_two_changes_nothing_the_second_time(top: float, exponent: int) -> None:
    small = torch.arange(1.0, 200.0) * 2.0**-40
    values = torch.cat([torch.tensor([top]), small])[None] * 2.0**exponent
    assert round_to_half(round_to_half(values)).equal(round_to_half(values))


@pytest.mark.parametrize("size", [1e-45, 1e-40, 1e-38, 1e-20, 6e-8, 1.0, 65504.0, 65520.0, 1e6, 1e29])
def test_half_keeps_tensors_of_any_size(size: float) -> None:
    values = (normal(4, 50).clamp(-2, 2) * size)[None].squeeze(0)
    got = arrives(HALF, values)
    assert bool(got.isfinite().all())
    grain = 2.0**-150 / size  # half a step of the smallest float32
    assert float((got.double() - values.double()).abs().max()) <= size * (2.0**-10 + grain)


@every_codec
def test_zero_is_zero(codec: Codec) -> None:
    assert arrives(codec, torch.zeros(3, 5)).equal(torch.zeros(3, 5))
    assert arrives(codec, torch.ones(3, 5), torch.ones(3, 5)).equal(torch.ones(3, 5))


@every_codec
@pytest.mark.parametrize("odd", [math.nan, math.inf, -math.inf, 3.4e38, -(2.0**100)])
def test_what_is_out_of_range_travels_as_it_is(codec: Codec, odd: float) -> None:
    values = normal(3, 5)
    values[1, 2] = odd
    block = codec.pack(values, torch.zeros_like(values))
    assert block.numbers.dtype == torch.float32
    assert torch.equal(block.numbers.nan_to_num(9.0), values.nan_to_num(9.0))


@pytest.mark.parametrize("codec", [INT8, HalfChange()], ids=str)
def test_a_difference_beyond_float32_travels_as_it_is(codec: Codec) -> None:
    values, base = torch.full((1, 2), 3e38), torch.full((1, 2), -3e38)
    assert arrives(codec, values, base).equal(values)


@given(st.integers(0, 1000), st.floats(-30, 20))
@tries(200)
def test_half_of_a_change_is_right_to_eleven_bits_of_the_change(seed: int, magnitude: float) -> None:
    """But for the rounding of float32 values themselves."""
    base, delta = normal(3, 9, seed=seed), normal(3, 9, seed=seed + 1) * 10.0**magnitude
    values = base + delta
    got, change = arrives(HalfChange(), values, base).double(), (values - base).double()
    room = 2.0**-11 * torch.maximum(change.abs(), change.abs().amax() * 2.0**-27)
    ulp = 2.0**-23 * torch.maximum(values.abs(), base.abs()).double()
    assert bool(((got - values.double()).abs() <= room + ulp).all())


@given(st.integers(0, 1000), st.floats(-7, 2))
@tries(100)
def test_half_of_a_change_that_came_out_of_half_is_the_same(seed: int, magnitude: float) -> None:
    base = round_to_half(normal(4, 9, seed=seed))
    once = arrives(HalfChange(), base + normal(4, 9, seed=seed + 1) * 10.0**magnitude, base)
    assert arrives(HalfChange(), once, base).equal(once)


def test_half_of_a_small_change_arrives_where_half_of_the_values_loses_it() -> None:
    base = round_to_half(1.0 + 0.3 * normal(8, 50).clamp(-2, 2))
    values = base + 1e-5 * normal(8, 50, seed=1)
    lost = (arrives(HALF, values, base) - values).norm() / (values - base).norm()
    assert float(lost) > 0.9
    assert float((arrives(HalfChange(), values, base) - values).norm() / (values - base).norm()) < 5e-3


@given(st.integers(0, 1000), st.floats(-44, 25), st.integers(1, 5))
@tries(400)
def test_int8_is_right_to_half_a_step_of_its_row(seed: int, magnitude: float, rows: int) -> None:
    base = normal(rows, 9, seed=seed)
    delta = normal(rows, 9, seed=seed + 1) * 10.0 ** torch.linspace(magnitude, min(25.0, magnitude + 4), rows)[:, None]
    values = base + delta
    block = INT8.pack(values, base)
    assert int(block.numbers.abs().max()) <= 127
    assert block.scales is not None
    error = (block.values(base).double() - values.double()).abs()
    ulp = 2.0**-22 * torch.maximum(values.abs(), base.abs()).amax(1)
    assert bool((error.amax(1) <= 0.5001 * block.scales.double() + ulp).all())


def test_int8_gives_every_row_a_scale_of_its_own() -> None:
    values = normal(3, 40) * torch.tensor([[1e-6], [1.0], [1e6]])
    error = (arrives(INT8, values) - values).norm(dim=1) / values.norm(dim=1)
    assert bool((error < 0.01).all())


@every_codec
def test_some_of_the_rows_are_the_same_numbers(codec: Codec) -> None:
    values, base = normal(6, 7), normal(6, 7, seed=1)
    block, some = codec.pack(values, base), torch.tensor([1, 4])
    assert block.select(some).values(base[some]).equal(block.values(base)[some])


def drifted(rank: int, size: int, by: float) -> tuple[Factor, Factor]:
    """A trained adapter as LoRA leaves it (`up` small), and the same after it moved by this share of its entries."""
    down, up = normal(rank, size) / size**0.5, 0.003 * normal(size, rank, seed=1)
    return Factor(down, up), Factor(
        down + by * normal(rank, size, seed=2) / size**0.5, up + by * 0.003 * normal(size, rank, seed=3)
    )


@pytest.mark.parametrize("rank", [8, 64])
@pytest.mark.parametrize(
    ("codec", "low", "high"),
    [(Exact(), 0, 0), (Half(), 2e-4, 3.5e-4), (HalfChange(), 1e-6, 1e-5), (DeltaInt8(), 1e-4, 3e-4)],
)
def test_the_product_after_two_percent_of_drift(codec: Codec, low: float, high: float, rank: int) -> None:
    before, after = drifted(rank, 512, 0.02)
    got = Factor(arrives(codec, after.down, before.down), arrives(codec, after.up.T, before.up.T).T)
    error = product_norm(stack([(1.0, got), (-1.0, after)])) / product_norm(after)
    assert low <= error <= max(high, 1e-12)


def test_a_block_says_what_it_takes() -> None:
    values = normal(4, 100)
    assert [codec.pack(values, 0 * values).numbers.element_size() for codec in CODECS] == [4, 2, 2, 1]
    assert [codec.number for codec in CODECS] == [4, 2, 2, 1]
    scales = INT8.pack(values, 0 * values).scales
    assert scales is not None
    assert scales.nbytes == 4 * INT8.row
    assert isinstance(pack_half(values), Block)


@given(st.integers(4, 24), st.floats(1e-4, 1e3), st.integers(3, 256), st.integers(0, 99))
@tries(30)
def test_whole_numbers_are_right_to_half_a_step_in_any_order_and_their_sum_fits(
    bits: int, bound: float, members: int, seed: int
) -> None:
    codec, changes = Summed(bits, bound, members), normal(5, 40, seed=seed) * bound / 2
    numbers = codec.integers(changes)
    assert torch.equal(numbers.sum(0), numbers[torch.randperm(5)].sum(0))
    assert int(numbers.abs().max()) <= codec.largest
    within = changes.double().clamp(-bound, bound)
    assert float((numbers.double() * codec.step - within).abs().max()) <= codec.step * (0.5 + 1e-6)
    assert members * codec.largest < 2 ** (codec.word_bits - 1) <= 2 * members * (codec.largest + 1)


def test_packed_as_whole_numbers_a_row_arrives_as_the_base_and_what_it_moved() -> None:
    codec, base = Summed(16, 1.0, 5), normal(3, 4)
    values = base + torch.tensor([0.0, 0.25, -0.5, 1.0])
    assert torch.allclose(arrives(codec, values, base), values, atol=codec.step)
    assert arrives(codec, values * float("nan"), base).isnan().all()


class OwnCodec(Half):
    """A user's."""

    def pack(self, values: Tensor, base: Tensor) -> Block:
        return pack_half(2 * values)


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("codec", [*CODECS, Summed(20, 4.0, 3), OwnCodec()], ids=lambda codec: type(codec).__name__)
def test_many_tensors_at_once_have_the_bits_of_one_after_the_other(codec: Codec, turned: bool) -> None:
    """Of any size, zero, out of range, not finite: none of them touches its neighbours."""
    values = torch.stack([normal(4, 7, seed=k) * 10.0 ** (6 * k - 30) for k in range(9)])
    base = torch.stack([normal(4, 7, seed=20 + k) * 10.0 ** (6 * k - 30) for k in range(9)])
    values[3] = 0.0
    for place, odd in ((4, math.inf), (5, math.nan), (8, 3e38)):
        values[place, 1, 2] = odd
    if turned:
        values, base = values.mT, base.mT
    alone = torch.stack([codec.pack(one, other).values(other) for one, other in zip(values, base, strict=True)])
    torch.testing.assert_close(decode_all(codec, values, base), alone, rtol=0, atol=0, equal_nan=True)
    rounded = torch.stack([round_to_half(one) for one in values])
    torch.testing.assert_close(round_all_to_half(values), rounded, rtol=0, atol=0, equal_nan=True)
    assert round_all_to_half(values[:, :0]).shape == values[:, :0].shape
