"""Words of a field as bytes, with no bit unused between them.

A word is cut into planes of 16, 8, 4, 2 and 1 bits, as its width has them in the binary system. Of a plane of less than eight bits
the first part of the words takes the lowest bits of each byte, the next part the bits above: whole arrays are shifted.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

Words: TypeAlias = npt.NDArray[np.uint32]
_FORMS = {16: "<u2", 8: "u1"}


def packed_size(length: int, bits: int) -> int:
    """Return the bytes of so many words of so many bits."""
    return sum(_plane_size(length, width) for _, width in _planes(bits))


def pack_words(words: Words, bits: int) -> bytes:
    """Return words, each below 2^bits, as bytes. `bits` is 1 to 32."""
    return b"".join(_packed_plane((words >> shift) & (2**width - 1), width) for shift, width in _planes(bits))


def unpack_words(data: bytes, length: int, bits: int) -> Words:
    """Return the words in bytes that `pack_words` made. Raises ValueError for another number of bytes."""
    if len(data) != packed_size(length, bits):
        raise ValueError(f"{len(data)} bytes, expected {packed_size(length, bits)}")
    words, place = np.zeros(length, np.uint32), 0
    for shift, width in _planes(bits):
        size = _plane_size(length, width)
        words |= _unpacked_plane(data[place : place + size], length, width).astype(np.uint32) << np.uint32(shift)
        place += size
    return words


def _planes(bits: int) -> Iterator[tuple[int, int]]:
    """Yield the shift and the width of each plane, from the lowest bits."""
    shift = 0
    for width in (16, 16, 8, 4, 2, 1):
        if width <= bits - shift:
            yield shift, width
            shift += width


def _plane_size(length: int, width: int) -> int:
    return length * width // 8 if width >= 8 else -(-length // (8 // width))


def _packed_plane(plane: Words, width: int) -> bytes:
    if width >= 8:
        return plane.astype(_FORMS[width]).tobytes()
    packed = np.zeros(_plane_size(len(plane), width), np.uint8)
    for number, (first, last) in enumerate(_parts(len(plane), width)):
        packed[: last - first] |= plane[first:last].astype(np.uint8) << np.uint8(number * width)
    return packed.tobytes()


def _unpacked_plane(data: bytes, length: int, width: int) -> npt.NDArray[Any]:
    if width >= 8:
        return np.frombuffer(data, _FORMS[width])
    packed, plane = np.frombuffer(data, np.uint8), np.zeros(length, np.uint8)
    for number, (first, last) in enumerate(_parts(length, width)):
        plane[first:last] = (packed[: last - first] >> np.uint8(number * width)) & np.uint8(2**width - 1)
    return plane


def _parts(length: int, width: int) -> Iterator[tuple[int, int]]:
    """Yield the first and the last word of each part of a plane; the last parts may be shorter, or empty."""
    size = _plane_size(length, width)
    ends = [min(number * size, length) for number in range(8 // width + 1)]
    return pairwise(ends)
