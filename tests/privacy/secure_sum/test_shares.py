"""Shares of a secret: any so many give it, and fewer do not."""

from __future__ import annotations

from itertools import combinations

import pytest

from fedloom.core.errors import Refused
from fedloom.privacy.secure_sum.shares import combine_shares, split_secret

HOLDERS = ("a", "b", "c", "d", "e")
SECRET = bytes(range(16))


def test_any_so_many_shares_give_the_secret() -> None:
    shares = split_secret(SECRET, 3, HOLDERS)
    for some in combinations(HOLDERS, 3):
        assert combine_shares({one: shares[one] for one in some}, 3, HOLDERS) == SECRET
    assert combine_shares(shares, 3, HOLDERS) == SECRET


def test_fewer_shares_give_another_secret_or_are_refused() -> None:
    shares = split_secret(SECRET, 3, HOLDERS)
    two = {one: shares[one] for one in "ae"}
    assert combine_shares(two, 2, HOLDERS) != SECRET
    with pytest.raises(Refused, match="2 shares of a secret, 3 are needed"):
        combine_shares(two, 3, HOLDERS)


def test_a_share_in_the_place_of_another_gives_another_secret() -> None:
    shares = split_secret(SECRET, 2, HOLDERS)
    assert combine_shares({"a": shares["b"], "b": shares["a"]}, 2, HOLDERS) != SECRET
