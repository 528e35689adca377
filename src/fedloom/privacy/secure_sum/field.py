"""Whole numbers modulo a power of two: how wide a value and a sum of values are."""

from __future__ import annotations

from fedloom.core.errors import Refused

WORD = 32
"""Bits of the words that sums are computed in: no field is wider."""


def largest_value(bits: int) -> int:
    """Return the largest whole number of so many bits, one of which is the sign."""
    return (1 << (bits - 1)) - 1


def field_bits(bits: int, members: int) -> int:
    """Return the bits of a field in which no sum of so many values overflows. Raises Refused above 32."""
    needed = bits + max(1, (members - 1).bit_length())
    if needed > WORD:
        remedy = (
            f"{members} members need a field of {needed} bits; choose fewer bits, or smaller groups, for at most {WORD}"
        )
        raise Refused("bits", bits, remedy)
    return needed
