"""Sealing: only the same secret and purpose open it, and nothing in it can be changed or told from outside."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedloom.core.schema import Malformed
from fedloom.privacy import sealing
from fedloom.privacy.sealing import keyed_digest, seal, unseal

SECRET, OTHER = b"s" * 32, b"t" * 32


@given(st.binary(min_size=1, max_size=200), st.integers(1, 40), st.data())
def test_what_was_sealed_in_pieces_opens_and_nothing_else_does(data, piece, draw):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sealing, "PIECE", piece)
        sealed = seal(SECRET, "a", data)
        assert sealed == seal(SECRET, "a", data)
        assert unseal(SECRET, "a", sealed) == data
        place = draw.draw(st.integers(0, len(sealed) - 1))
        changed = bytes([*sealed[:place], sealed[place] ^ 1, *sealed[place + 1 :]])
        cut = sealed[: draw.draw(st.integers(0, len(sealed) - 1))]
        for secret, purpose, damaged in (
            (OTHER, "a", sealed),
            (SECRET, "b", sealed),
            (SECRET, "a", changed),
            (SECRET, "a", cut),
        ):
            with pytest.raises(Malformed):
                unseal(secret, purpose, damaged)


def test_whole_pieces_cannot_change_places_or_be_left_out(monkeypatch):
    monkeypatch.setattr(sealing, "PIECE", 4)
    sealed = seal(SECRET, "a", b"aaaabbbbcccc")
    size = 4 + sealing.TAG
    first, second, third = sealed[:size], sealed[size : 2 * size], sealed[2 * size :]
    for order in (second + first + third, first + second, first + third, first + second + second):
        with pytest.raises(Malformed):
            unseal(SECRET, "a", order)


def test_a_keyed_digest_needs_the_secret():
    digests = {keyed_digest(secret, purpose, text) for secret in (SECRET, OTHER) for purpose in "ab" for text in "xy"}
    assert len(digests) == 8
    assert {len(digest) for digest in digests} == {64}
