"""Words of a field and their bytes."""

from __future__ import annotations

import numpy as np
import pytest

from fedloom.privacy.secure_sum.packing import pack_words, packed_size, unpack_words


@pytest.mark.parametrize("bits", range(1, 33))
def test_packed_words_are_read_as_they_were_and_waste_no_bit(bits: int) -> None:
    for length in (1, 2, 3, 7, 8, 9, 64, 1001):
        words = np.random.default_rng(length).integers(0, 2**bits, length, dtype=np.uint32)
        words[-1] = 2**bits - 1
        data = pack_words(words, bits)
        assert (unpack_words(data, length, bits) == words).all()
        assert len(data) == packed_size(length, bits)
        assert length * bits / 8 <= len(data) <= length * bits / 8 + 3  # a part of a byte at the end of three planes
        assert pack_words(unpack_words(data, length, bits), bits) == data


@pytest.mark.parametrize("size", [0, 4, 6])
def test_another_number_of_bytes_is_refused(size: int) -> None:
    with pytest.raises(ValueError, match="expected 5"):
        unpack_words(bytes(size), 2, 20)
