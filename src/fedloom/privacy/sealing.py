"""Sealing of exact answers: what a private run must keep on the disk can be read with the secret of its server only.

A checkpoint holds answers that wait to be merged, and a kept answer is there to be merged again: both are exact, and a run folder is
shown to readers. So they are encrypted and authenticated by AES-SIV (RFC 5297), which needs no random nonce: the same values give
the same file, and a changed one is noticed. The digest of an answer in the trace is keyed for the same reason: with a plain sha256
whoever guesses an answer could try whether he is right.
"""

from __future__ import annotations

import hmac
from collections.abc import Iterator
from typing import TYPE_CHECKING

from fedloom.core.errors import Refused
from fedloom.core.schema import Malformed

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.ciphers.aead import AESSIV

PIECE = 2**30
"""Bytes that are sealed at once: the library takes less than twice as many."""
TAG = 16
"""Bytes that sealing adds to a piece."""


def keyed_digest(secret: bytes, purpose: str, text: str) -> str:
    """Return a digest that nobody can compute or try guesses on without the secret, 64 hex digits."""
    return hmac.digest(_key(secret, purpose, "sha256"), text.encode(), "sha256").hex()


def seal(secret: bytes, purpose: str, data: bytes) -> bytes:
    """Return the data encrypted and authenticated; `purpose` has to be the same when they are read."""
    cipher = _cipher(secret, purpose)
    return b"".join(cipher.encrypt(piece, [place]) for piece, place in _pieces(data, PIECE))


def unseal(secret: bytes, purpose: str, sealed: bytes) -> bytes:
    """Return the data that were sealed. Raises Malformed where the secret is another, or anything was changed."""
    from cryptography.exceptions import InvalidTag

    cipher = _cipher(secret, purpose)
    try:
        return b"".join(cipher.decrypt(piece, [place]) for piece, place in _pieces(sealed, PIECE + TAG))
    except (InvalidTag, ValueError) as error:
        raise Malformed("it was sealed with another secret, or changed") from error


def _pieces(data: bytes, size: int) -> Iterator[tuple[bytes, bytes]]:
    """The pieces of this size, each with its place, which also says whether it is the last."""
    last = max(0, (len(data) - 1) // size)
    for number in range(last + 1):
        yield data[number * size : (number + 1) * size], b"%d of %d" % (number, last)


def _cipher(secret: bytes, purpose: str) -> AESSIV:
    try:
        from cryptography.hazmat.primitives.ciphers.aead import AESSIV
    except ImportError as error:
        remedy = "answers of a private run are kept encrypted: pip install 'fedloom[privacy]'"
        raise Refused("privacy", str(error), remedy) from error
    return AESSIV(_key(secret, purpose, "sha512"))


def _key(secret: bytes, purpose: str, digest: str) -> bytes:
    """A key for one purpose, as long as the digest."""
    return hmac.digest(secret, f"fedloom {purpose}".encode(), digest)
