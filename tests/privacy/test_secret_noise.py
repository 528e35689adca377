"""Secret noise: known keys and streams, the same draws for the same names, and nothing in common for others."""

from __future__ import annotations

import hashlib
import hmac
import json
import struct

import pytest
import torch

from fedloom.privacy.secret_noise import SecretNoise, commitment, normals, normals_of, random_words

SECRET = bytes(range(32))
SHAPES = {"up": torch.zeros(3, 5), "down": torch.zeros(7), "none": torch.zeros(0, 4)}


def chacha20_block(key: bytes, counter: int) -> bytes:
    """One block of RFC 8439, section 2.3, with a nonce of zeros; 64 bits of counter as in Bernstein's original."""

    def rotated(value: int, by: int) -> int:
        return (value << by | value >> (32 - by)) & 0xFFFFFFFF

    def quarter(s: list[int], a: int, b: int, c: int, d: int) -> None:
        for x, y, z, by in ((a, b, d, 16), (c, d, b, 12), (a, b, d, 8), (c, d, b, 7)):
            s[x] = (s[x] + s[y]) & 0xFFFFFFFF
            s[z] = rotated(s[z] ^ s[x], by)

    begin = [*struct.unpack("<4I", b"expand 32-byte k"), *struct.unpack("<8I", key), counter, 0, 0, 0]
    state = list(begin)
    for _ in range(10):
        for column in range(4):
            quarter(state, column, 4 + column, 8 + column, 12 + column)
        for row in range(4):
            quarter(state, row, 4 + (row + 1) % 4, 8 + (row + 2) % 4, 12 + (row + 3) % 4)
    return struct.pack("<16I", *((x + y) & 0xFFFFFFFF for x, y in zip(state, begin, strict=True)))


def test_words_are_those_of_the_cipher_under_the_key_of_their_names() -> None:
    key = hmac.new(SECRET, json.dumps(["what for", 3]).encode(), hashlib.sha256).digest()
    stream = b"".join(chacha20_block(key, counter) for counter in range(2))
    assert random_words(SECRET, "what for", 3, count=16).tolist() == list(struct.unpack("<16q", stream))


def test_the_block_of_the_standard() -> None:
    """RFC 8439, appendix A.1, test vector 1: the key and all else zero."""
    assert chacha20_block(bytes(32), 0).hex().startswith("76b8e0ada0f13d90405d6ae55386bd28")


@pytest.mark.parametrize("count", [0, 1, 2, 7])
def test_normals_do_not_depend_on_how_many_are_drawn(count: int) -> None:
    assert len(normals(SECRET, "a", count=count)) == count


def test_normals_are_normal() -> None:
    draw = torch.Generator().manual_seed(0)
    drawn = torch.randint(-(2**63), 2**63 - 1, (200_000,), generator=draw)
    found = normals_of(drawn).sort().values
    expected = torch.special.ndtri((torch.arange(len(drawn), dtype=torch.float64) + 0.5) / len(drawn))
    assert (found - expected).abs()[1000:-1000].max() < 0.05
    assert bool(found.isfinite().all())


def test_the_same_names_give_the_same_draws_and_others_have_nothing_in_common() -> None:
    many = [normals(SECRET, *names, count=4000) for names in (("a", 1), ("a", 1), ("a", 2), ("b", 1), ("a", "1"))]
    assert many[0].equal(many[1])
    correlations = torch.corrcoef(torch.stack(many[1:]))
    assert float((correlations - torch.eye(4)).abs().max()) < 0.08
    other = normals(SECRET[::-1], "a", 1, count=4000)
    assert abs(float(torch.corrcoef(torch.stack([many[0], other]))[0, 1])) < 0.08


def test_draws_have_the_shapes_of_the_tensors_in_order_of_name() -> None:
    drawn = list(SecretNoise(SECRET, ("a",)).normals(SHAPES, 1))
    assert [tuple(one.shape) for one in drawn] == [(7,), (0, 4), (3, 5)]
    assert all(one.dtype == torch.float64 for one in drawn)
    assert not set(drawn[0].tolist()) & set(drawn[2].flatten().tolist())


def test_a_digest_is_of_the_secret_the_place_and_every_bit_of_the_value() -> None:
    value = {"x": torch.ones(3, dtype=torch.float64)}
    nudged = {"x": torch.tensor([1.0, 1.0, 1.0 + 2.0**-52], dtype=torch.float64)}
    noise, other = SecretNoise(SECRET, ("a",)), SecretNoise(SECRET[::-1], ("a",))
    digests = {noise.digest(value, 1), noise.digest(nudged, 1), noise.digest(value, 2), other.digest(value, 1)}
    assert len(digests) == 4
    assert noise.digest({"x": torch.ones(3, dtype=torch.float64)}, 1) in digests


def test_a_commitment_tells_secrets_apart_and_not_what_they_are() -> None:
    assert commitment(SECRET) == commitment(bytes(SECRET)) != commitment(SECRET[::-1])
    assert len(commitment(SECRET)) == 64
    assert SECRET.hex() not in commitment(SECRET)
