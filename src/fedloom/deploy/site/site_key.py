"""The key of a site, an ECDSA key on a NIST curve as `fedloom keys site` makes it: read, named, and used to sign a text.

Signatures are ECDSA with SHA-256 (FIPS 186-5), in base64.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from fedloom.core.errors import Refused

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey, EllipticCurvePublicKey


def read_private_key(path: Path) -> EllipticCurvePrivateKey:
    """Return the private half of a site's key. Raises Refused."""
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.serialization import load_ssh_private_key

    try:
        key = load_ssh_private_key(path.read_bytes(), None)
    except (OSError, ValueError, TypeError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise Refused("key", str(path), "it is no private key that `fedloom keys site` made")
    return key


def read_site_key(path: Path) -> EllipticCurvePublicKey:
    """Return the public half of a site's key. Raises Refused."""
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.serialization import load_ssh_public_key

    try:
        key = load_ssh_public_key(path.read_bytes())
    except (OSError, ValueError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, ec.EllipticCurvePublicKey):
        raise Refused("--key", str(path), "give the .pub file that `fedloom keys site` made")
    return key


def key_fingerprint(key: EllipticCurvePublicKey) -> str:
    """Return the fingerprint of a key as SSH writes it."""
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    blob = key.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).split()[1]
    return "SHA256:" + base64.b64encode(hashlib.sha256(base64.b64decode(blob)).digest()).decode().rstrip("=")


def sign(key: EllipticCurvePrivateKey, body: bytes) -> str:
    """Return a signature of these bytes."""
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import ec

    return base64.b64encode(key.sign(body, ec.ECDSA(hashes.SHA256()))).decode()


def is_signed_by(keys: Iterable[EllipticCurvePublicKey], body: bytes, signature: str) -> bool:
    """Return whether one of the keys made this signature of these bytes."""
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import ec

    for key in keys:
        try:
            key.verify(base64.b64decode(signature, validate=True), body, ec.ECDSA(hashes.SHA256()))
        except (InvalidSignature, ValueError):
            continue
        return True
    return False
