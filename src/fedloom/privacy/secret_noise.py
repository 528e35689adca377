"""Noise that is secret and can be made again: a keyed function of all that the exact value depends on.

The key of each draw is HMAC-SHA256 of a secret and of names: what for, of which run, at which place, of which exact value. ChaCha20
expands it to 64-bit words, and these to normal numbers in float64 (torch's generators will not do: they take 32 bits of a seed). So
whoever has not the secret can neither foretell a draw nor take it off; a value that is released again, after a restart, gets the same
bytes, so that noise cannot be averaged away; and two different values never share their noise, so that it cannot be subtracted.

What noise was added to is rounded to a grid before it leaves: the last digits of floating point numbers tell it otherwise (Mironov,
"On significance of the least significant bits for differential privacy", CCS 2012).
"""

from __future__ import annotations

import hashlib
import hmac
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor

from fedloom.core.errors import Refused
from fedloom.core.fingerprint import fingerprint
from fedloom.core.lora import Adapter

GRID = 2.0**-20
"""Distance of the values that a released sum can take, relative to the most that one client or record can change of it."""
Name: TypeAlias = str | int


def random_words(secret: bytes, *names: Name, count: int) -> Tensor:
    """Return so many random 64-bit words, (count,) int64, that follow from the secret and these names."""
    return _words(_stream(secret, names), count)


def normals(secret: bytes, *names: Name, count: int) -> Tensor:
    """Return so many standard normal numbers, (count,) float64, that follow from the secret and these names."""
    return normals_of(random_words(secret, *names, count=count + count % 2))[:count]


def normals_of(words: Tensor) -> Tensor:
    """Return as many standard normal numbers as there are random 64-bit words, an even number (Box and Muller 1958)."""
    uniform = ((words & (2**53 - 1)).double() + 0.5) * 2.0**-53
    first, second = uniform.reshape(2, -1)
    radius, angle = (-2.0 * first.log()).sqrt(), 2.0 * math.pi * second
    return torch.cat([radius * angle.cos(), radius * angle.sin()])


def add_noise(exact: Mapping[str, Tensor], drawn: Iterable[Tensor], deviation: float, grid: float) -> dict[str, Tensor]:
    """Return tensors with Gaussian noise of a standard deviation, on a grid of this width: what may leave.

    Args:
        exact: the tensors, in float64.
        drawn: standard normal numbers for each, in order of name.
        deviation: standard deviation of the noise.
        grid: distance of the values that an entry can take.
    """
    return {
        name: ((tensor + deviation * normal.to(tensor.device)) / grid).round() * grid
        for (name, tensor), normal in zip(sorted(exact.items()), drawn, strict=True)
    }


def commitment(secret: bytes) -> str:
    """Return a digest that tells a secret from another one, and cannot be turned back into it, 64 hex digits."""
    return hashlib.sha256(b"fedloom secret noise\0" + secret).hexdigest()


@dataclass(frozen=True, slots=True)
class SecretNoise:
    """Draws of one secret for one purpose, over tensors.

    Fields:
        secret: 32 random bytes; in a simulation they follow from the seed, which protects nobody.
        names: what the draws are for, and of which run.
    """

    secret: bytes = field(repr=False)
    names: tuple[Name, ...]

    def digest(self, value: Mapping[str, Tensor], *names: Name) -> str:
        """Return a keyed digest of an exact value at this place, 64 hex digits: without the secret no guess can be tried on it."""
        facts = json.dumps([*self.names, "digest", *names, fingerprint(Adapter({}, value))])
        return hmac.digest(self.secret, facts.encode(), "sha256").hex()

    def normals(self, shapes: Mapping[str, Tensor], *names: Name) -> Iterator[Tensor]:
        """Yield, for each tensor in order of name, standard normal numbers of its shape, in float64."""
        stream = _stream(self.secret, (*self.names, *names))
        for _, tensor in sorted(shapes.items()):
            size = tensor.numel()
            yield normals_of(_words(stream, size + size % 2))[:size].reshape(tensor.shape)


def _stream(secret: bytes, names: tuple[Name, ...]) -> Any:
    """The key stream of these names. Raises Refused where the library of the cipher is missing."""
    try:
        from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
    except ImportError as error:
        remedy = "noise is drawn with a stream cipher of `cryptography`, which is not installed: pip install 'fedloom[privacy]'"
        raise Refused("privacy", "cryptography", remedy) from error
    key = hmac.digest(secret, json.dumps(list(names)).encode(), "sha256")
    return Cipher(algorithms.ChaCha20(key, bytes(16)), mode=None).encryptor()


def _words(stream: Any, count: int) -> Tensor:
    """The next words of a key stream."""
    if not count:
        return torch.zeros(0, dtype=torch.int64)
    return torch.frombuffer(bytearray(stream.update(bytes(8 * count))), dtype=torch.int64)
