"""Codecs for the numbers of a task: float32, float16, or the difference to what both sides hold in 16 or 8 bits. Tensors only.

A codec packs rows: rows of `down`, columns of `up`, rows of a dense matrix. What `Block.values` returns is what the other side will
hold, to the bit, so that a simulation merges what a real server would receive.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar, Protocol

import torch
from torch import Tensor

TALLEST = 2.0**100
"""Entries from here on, and those that are not finite, travel as float32: no answer that will be accepted has any."""
LOWEST = -126
"""Exponent of the smallest normal float32."""


@dataclass(frozen=True, slots=True, eq=False)
class Block:
    """Rows of one tensor on the wire.

    Fields:
        numbers: (rows, width); float32 as they are, float16 to be multiplied by 2^exponent, or int8 steps to be added to the base.
        exponent: exponent for float16.
        scales: size of one int8 step, (rows,) in float32 (None: no int8).
        is_change: whether float16 is to be added to the base.
    """

    numbers: Tensor
    exponent: int = 0
    scales: Tensor | None = None
    is_change: bool = False

    def values(self, base: Tensor) -> Tensor:
        """Return the rows in float32; `base` (rows, width) is what both sides hold."""
        if self.scales is not None:
            return base + self.numbers.float() * self.scales[:, None]
        numbers = self.numbers.float() * 2.0**self.exponent if self.exponent else self.numbers.float()
        return base + numbers if self.is_change else numbers

    def select(self, rows: Tensor) -> Block:
        """Return some of the rows, by their indices or a mask."""
        return replace(self, numbers=self.numbers[rows], scales=None if self.scales is None else self.scales[rows])


class Codec(Protocol):
    """Encoding of the numbers of a task."""

    @property
    def number(self) -> int:
        """Bytes of one number of an answer."""
        ...

    @property
    def row(self) -> int:
        """Bytes of one row of an answer, beside those of its numbers."""
        ...

    @property
    def halved(self) -> bool:
        """Whether what the server sends, and control variates (which have no base), travel as float16 instead of float32."""
        ...

    @property
    def feedback(self) -> bool:
        """Whether the client keeps what packing lost and adds it to its next answer (error feedback)."""
        ...

    def pack(self, values: Tensor, base: Tensor) -> Block:
        """Pack rows (rows, width) in float32; `base` are the same rows as both sides hold them. Never raises."""
        ...


@dataclass(frozen=True, slots=True)
class Exact:
    """Float32, four bytes per number: nothing is lost. The codec of a run whose `transfer` is None."""

    number: ClassVar[int] = 4
    row: ClassVar[int] = 0
    halved: ClassVar[bool] = False
    feedback: ClassVar[bool] = False

    def pack(self, values: Tensor, base: Tensor) -> Block:
        """Pack the rows as they are."""
        return Block(values)


@dataclass(frozen=True, slots=True)
class Half:
    """Float16, two bytes per number, each tensor times a power of two of its own: a product is right to about 3e-4."""

    number: ClassVar[int] = 2
    row: ClassVar[int] = 0
    halved: ClassVar[bool] = True
    feedback: ClassVar[bool] = False

    def pack(self, values: Tensor, base: Tensor) -> Block:
        """Pack the rows rounded to float16."""
        return pack_half(values)


@dataclass(frozen=True, slots=True)
class HalfChange:
    """The difference to what the task started from in float16, two bytes per number, times a power of two; the way down as `Half`.

    Right to 3e-4 of what was learnt, where `Half` is right to 3e-4 of the whole. The less an answer moved, the more this gains.
    """

    number: ClassVar[int] = 2
    row: ClassVar[int] = 0
    halved: ClassVar[bool] = True
    feedback: ClassVar[bool] = False

    def pack(self, values: Tensor, base: Tensor) -> Block:
        """Pack values - base rounded to float16; the values as they are where the difference is out of range."""
        block = pack_half(values - base)
        return replace(block, is_change=True) if block.numbers.dtype == torch.float16 else Block(values)


@dataclass(frozen=True, slots=True)
class DeltaInt8:
    """The difference to what the task started from in int8, with a scale a row and error feedback; the way down as `Half`.

    One byte per number and four per row. It is right to about 1 % of what was learnt: 2e-4 of a product that moved by 2 %. What
    was lost is added to the client's next answer as long as the basis stays (Seide et al. 2014; EF-SGD, arXiv 1901.09847).
    """

    number: ClassVar[int] = 1
    row: ClassVar[int] = 4
    halved: ClassVar[bool] = True
    feedback: ClassVar[bool] = True

    def pack(self, values: Tensor, base: Tensor) -> Block:
        """Pack values - base, rounded to the nearest of 255 steps, of which the row's largest entry is the last."""
        delta = values - base
        largest = delta.abs().amax(1)
        if not bool((largest < TALLEST).all()):
            return Block(values)
        scales = (largest / 127).clamp_min(2.0**LOWEST)
        return Block((delta / scales[:, None]).round().to(torch.int8), scales=scales)


@dataclass(frozen=True, slots=True)
class Summed:
    """Whole numbers that are added to those of other clients before anybody reads them (fixed point); the way down as it says.

    A change x of one number is round(x * largest / bound), at most `largest` = 2^(bits - 1) - 1; what is larger is cut off at the
    bound. So the sum of `members` clients fits into `word_bits` bits, whatever they hold, and does not depend on the order.

    Fields:
        bits: bits of one client's number.
        bound: largest change of a number.
        members: clients whose numbers are added up, at most.
        halved: whether what the server sends travels as float16.
    """

    bits: int
    bound: float
    members: int
    halved: bool = True
    row: ClassVar[int] = 0
    feedback: ClassVar[bool] = False

    @property
    def largest(self) -> int:
        """The largest whole number of one client."""
        largest: int = 2 ** (self.bits - 1) - 1
        return largest

    @property
    def step(self) -> float:
        """The change that the whole number 1 stands for."""
        return self.bound / self.largest

    @property
    def word_bits(self) -> int:
        """Bits of a sum, and so of a masked number: the sum of all members needs that many."""
        return self.bits + (self.members - 1).bit_length()

    @property
    def number(self) -> int:
        """Bytes of one masked number, rounded up."""
        return -(-self.word_bits // 8)

    def integers(self, changes: Tensor) -> Tensor:
        """Return changes as whole numbers, int64, half to even; beyond the bound they are cut off. They must be finite."""
        return (changes.double() / self.bound * self.largest).round().clamp(-self.largest, self.largest).to(torch.int64)

    def pack(self, values: Tensor, base: Tensor) -> Block:
        """Pack values - base as steps; what is not finite as it is."""
        if not bool(values.isfinite().all()):
            return Block(values)
        steps = self.integers(values.double() - base.double()).to(torch.int32)
        return Block(steps, scales=torch.full((len(values),), self.step))


EXACT, HALF = Exact(), Half()


def pack_half(values: Tensor) -> Block:
    """Pack as float16 times a power of two that puts the largest entry under 2^15: nothing overflows, small tensors keep their
    digits.

    The exponent is that of the largest entry after rounding, so that packing again what came out changes nothing.
    """
    low, high = torch.aminmax(values)
    exponent = _half_exponent(max(-float(low), float(high)))
    return Block(values) if exponent is None else Block((values * 2.0**-exponent).half(), exponent)


def _half_exponent(largest: float) -> int | None:
    """The exponent for float16 of a tensor with this largest entry; None: it travels as float32."""
    if not largest < TALLEST:
        return None
    return max(math.frexp(largest / (1 - 2.0**-12))[1] - 15, LOWEST) if largest else 0


def round_to_half(tensor: Tensor) -> Tensor:
    """Return the tensor as it comes out of float16, in its own shape and dtype."""
    return pack_half(tensor).values(tensor) if tensor.numel() else tensor


# Many tensors of one shape at once, with the bits of one after the other ------------------------------------------------


def round_all_to_half(tensors: Tensor) -> Tensor:
    """Return tensors of one shape (count, *shape) in float32, each as `round_to_half` gives it."""
    if not tensors.numel():
        return tensors
    axes = tuple(range(1, tensors.ndim))
    exponents = [_half_exponent(largest) for largest in tensors.abs().amax(axes).tolist()]
    down, up = (
        torch.tensor([2.0 ** (sign * (one or 0)) for one in exponents], device=tensors.device).view(
            -1, *(1,) * len(axes)
        )
        for sign in (-1, 1)
    )
    rounded = (tensors * down).half().float() * up
    for place, exponent in enumerate(exponents):
        if exponent is None:
            rounded[place] = tensors[place]
    return rounded


def decode_all(codec: Codec, values: Tensor, base: Tensor) -> Tensor:
    """Return what the other side reads of tensors of one shape (count, rows, width), each packed by itself.

    As `codec.pack(values[k], base[k]).values(base[k])` for each; the product's own codecs do it at once.
    """
    kind = type(codec)  # exactly: a subclass may encode in another way
    if kind is Exact:
        return values
    if kind is Half:
        return round_all_to_half(values)
    if kind is HalfChange:
        change = values - base
        fits = change.abs().amax((1, 2), keepdim=True) < TALLEST
        return torch.where(fits, base + round_all_to_half(change), values)
    if kind is DeltaInt8:
        delta = values - base
        largest = delta.abs().amax(2, keepdim=True)
        scales = (largest / 127).clamp_min(2.0**LOWEST)
        fits = (largest < TALLEST).all(1, keepdim=True)
        return torch.where(fits, base + (delta / scales).round().to(torch.int8).float() * scales, values)
    return torch.stack([codec.pack(one, other).values(other) for one, other in zip(values, base, strict=True)])
