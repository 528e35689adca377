"""How wide a field is: no sum overflows it, and it is as narrow as it can be."""

from __future__ import annotations

import pytest

from fedloom.core.errors import Refused
from fedloom.privacy.secure_sum.field import field_bits, largest_value


@pytest.mark.parametrize("bits", [4, 8, 16, 24])
@pytest.mark.parametrize("members", [2, 3, 4, 5, 10, 64, 65, 100])
def test_no_sum_overflows_the_field_which_is_as_narrow_as_it_can_be(bits: int, members: int) -> None:
    field = field_bits(bits, members)
    assert members * largest_value(bits) <= largest_value(field)
    assert members * largest_value(bits) > largest_value(field - 2)


def test_a_field_wider_than_a_word_is_refused() -> None:
    assert field_bits(24, 256) == 32
    with pytest.raises(Refused, match="257 members need a field of 33 bits"):
        field_bits(24, 257)
