"""Keys and masks of a round: the one door to `cryptography` for secure sums.

Keys are agreed by X25519 (RFC 7748) and derived by HKDF with SHA-256 (RFC 5869), each for one purpose; shares are sealed with
ChaCha20-Poly1305 (RFC 8439); masks are the stream of AES-256 in counter mode (NIST SP 800-38A), for which processors have
instructions. A secret from which keys follow has 16 bytes, the 128 bits that X25519 is good for, since that is what Shamir's scheme
of `pycryptodome` shares. Each key serves for one message, or for one stream: a nonce or a counter begins at zero.
"""

from __future__ import annotations

import json
from hashlib import sha256

import numpy as np

from fedloom.core.errors import Refused
from fedloom.privacy.secure_sum.packing import Words

SECRET_BYTES = 16
"""Bytes of a secret that is shared among members."""
_CHUNK = 2**15
"""Words of a mask that are computed at a time: they stay in a processor's cache."""


def digest_of(*parts: object) -> str:
    """Return the sha256 of texts, numbers, and lists and tables of them, in hex; no two sequences of parts are spelt alike."""
    return sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def derived_key(secret: bytes, *purpose: object, size: int = 32) -> bytes:
    """Return a key that follows from a secret, for one purpose (HKDF with SHA-256, no salt)."""
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.kdf.hkdf import HKDF

    return HKDF(hashes.SHA256(), size, None, digest_of("fedloom secure sum", *purpose).encode()).derive(secret)


def public_key(private: bytes) -> str:
    """Return the public half of an X25519 key, in hex."""
    from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

    return X25519PrivateKey.from_private_bytes(private).public_key().public_bytes_raw().hex()


def agreed_key(private: bytes, public: str, *purpose: object) -> bytes:
    """Return the key that two members agree on, for one purpose.

    Raises:
        Refused: the public key is none, or one of the points with which everybody would agree on the same.
    """
    from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey

    try:
        peer = X25519PublicKey.from_public_bytes(bytes.fromhex(public))
        shared = X25519PrivateKey.from_private_bytes(private).exchange(peer)
    except ValueError as error:
        raise Refused("sums", "a public key that is none", "the round is dropped; its member must be mended") from error
    return derived_key(shared, *purpose)


def seal_share(key: bytes, secret: bytes, about: str) -> str:
    """Return a secret sealed with a key that serves for nothing else, bound to what it is about, in hex."""
    from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

    return ChaCha20Poly1305(key).encrypt(bytes(12), secret, about.encode()).hex()


def unseal_share(key: bytes, sealed: str, about: str) -> bytes:
    """Return the secret that was sealed with this key about this. Raises Refused for anything else."""
    from cryptography.exceptions import InvalidTag
    from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

    try:
        return ChaCha20Poly1305(key).decrypt(bytes(12), bytes.fromhex(sealed), about.encode())
    except (InvalidTag, ValueError) as error:
        remedy = "it was not sealed by this member, for this one, in this round; the round is dropped"
        raise Refused("sums", "a sealed share that cannot be opened", remedy) from error


def add_mask(words: Words, key: bytes, sign: int) -> None:
    """Add the mask of a key to words in place, or take it off (sign -1), modulo 2^32."""
    from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

    stream = Cipher(algorithms.AES(key), modes.CTR(bytes(16))).encryptor()
    nothing, drawn = bytes(4 * _CHUNK), bytearray(4 * _CHUNK + 16)
    mask = np.frombuffer(drawn, "<u4", _CHUNK)
    for first in range(0, len(words), _CHUNK):
        part = words[first : first + _CHUNK]
        stream.update_into(nothing, drawn)
        if sign > 0:
            part += mask[: len(part)]
        else:
            part -= mask[: len(part)]
