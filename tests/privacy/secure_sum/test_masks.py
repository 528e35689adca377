"""Keys, seals and masks: known values of the standards, and what they are bound to."""

from __future__ import annotations

import hmac

import numpy as np
import pytest

from fedloom.core.errors import Refused
from fedloom.privacy.secure_sum import masks
from fedloom.privacy.secure_sum.masks import (
    add_mask,
    agreed_key,
    derived_key,
    digest_of,
    public_key,
    seal_share,
    unseal_share,
)

ONE = bytes.fromhex("77076d0a7318a57d3c16c17251b26645df4c2f87ebc0992ab177fba51db92c2a")
OTHER = bytes.fromhex("5dab087e624a8a4b79e17f8b83800ee66f3bb1292618b6fd1c2f8b27ff88e0eb")


def test_keys_are_agreed_as_in_rfc_7748(monkeypatch: pytest.MonkeyPatch) -> None:
    """Section 6.1, and the first vector of section 5.2; the secret is looked at before a key is derived from it."""
    assert public_key(ONE) == "8520f0098930a754748b7ddcb43ef75a0dbf3a0d26381af4eba4a98eaa9b4e6a"
    assert public_key(OTHER) == "de9edb7d7b7dc1b4d35b61c2ece435373f8343c85b78674dadfc7e146f882b4f"
    monkeypatch.setattr(masks, "derived_key", lambda shared, *purpose: shared)
    both = [agreed_key(ONE, public_key(OTHER)).hex(), agreed_key(OTHER, public_key(ONE)).hex()]
    assert both == 2 * ["4a5d9d5ba4ce2de1728e3bf480350f25e07e21c947d19e3376f09b3c1e161742"]
    scalar = bytes.fromhex("a546e36bf0527c9d3b16154b82465edd62144c0ac1fc5a18506a2244ba449ac4")
    point = "e6db6867583030db3594c1a424b15f7c726624ec26b3353b10a903a6d0ab1c4c"
    assert agreed_key(scalar, point).hex() == "c3da55379de9c6908e94ea4df28d084f32eccf03491c71f754b4075577a28552"


@pytest.mark.parametrize("point", ["00" * 32, "01" + "00" * 31, "ab", "no key"])
def test_a_point_that_is_no_key_is_refused(point: str) -> None:
    """With 0 and 1, points of small order, everybody would agree on the same."""
    with pytest.raises(Refused, match="a public key that is none"):
        agreed_key(ONE, point, "mask")


def test_a_key_is_that_of_hkdf_and_of_one_purpose() -> None:
    """RFC 5869 with no salt, in one block of SHA-256, computed here from HMAC alone."""
    info = digest_of("fedloom secure sum", "mask", 7).encode()
    extracted = hmac.digest(bytes(32), b"secret", "sha256")
    assert derived_key(b"secret", "mask", 7) == hmac.digest(extracted, info + b"\x01", "sha256")
    assert derived_key(b"secret", "mask", 7, size=16) == derived_key(b"secret", "mask", 7)[:16]
    keys = [derived_key(b"secret", *purpose) for purpose in (("a", "b"), ("ab",), ("a, b",), (["a", "b"],), ("b", "a"))]
    assert len(set(keys)) == 5


def test_a_seal_is_the_cipher_of_rfc_8439() -> None:
    """The stream of the second vector of appendix A.1, from block 1 on; and that of section 2.8.2 with its tag, by the library."""
    from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

    stream = "9f07e7be5551387a98ba977c732d080dcb0f29a048e3656912c6533e32ee7aed"
    assert seal_share(bytes(32), bytes(32), "").startswith(stream)
    text = b"Ladies and Gentlemen of the class of '99: If I could offer you only one tip for the future, sunscreen would be it."
    nonce, about = bytes.fromhex("070000004041424344454647"), bytes.fromhex("50515253c0c1c2c3c4c5c6c7")
    sealed = ChaCha20Poly1305(bytes(range(0x80, 0xA0))).encrypt(nonce, text, about).hex()
    assert sealed.startswith("d31a8d34648e60db7b86afbc53ef7ec2")
    assert sealed.endswith("1ae10b594f09e26a7e902ecbd0600691")


def test_a_seal_opens_with_its_key_about_what_it_was_made_and_unchanged() -> None:
    key, sealed = derived_key(b"one", "seal"), seal_share(derived_key(b"one", "seal"), b"share", "round 1")
    assert unseal_share(key, sealed, "round 1") == b"share"
    changed = f"{int(sealed[:1], 16) ^ 1:x}{sealed[1:]}"
    for other in (
        (derived_key(b"two", "seal"), sealed, "round 1"),
        (key, sealed, "round 2"),
        (key, changed, "round 1"),
        (key, "x", ""),
    ):
        with pytest.raises(Refused, match="sealed share"):
            unseal_share(*other)


def test_a_mask_is_the_stream_of_aes_256_and_comes_off_again() -> None:
    """Blocks 0 and 1 under the zero key: H and E(K, Y0) of test case 13 in the specification of GCM (McGrew and Viega 2005)."""
    words = np.zeros(8, np.uint32)
    add_mask(words, bytes(32), +1)
    assert words.tobytes().hex() == "dc95c078a2408989ad48a21492842087" + "530f8afbc74536b9a963b4f1c4cb738b"
    length = 2 * masks._CHUNK + 5
    start = np.arange(length, dtype=np.uint32)
    masked = start.copy()
    add_mask(masked, bytes(32), +1)
    assert (masked[:8] == words + start[:8]).all()  # however many words there are
    assert (masked != start).mean() > 0.99
    assert len(set((masked - start).tolist())) > 0.99 * length  # no chunk repeats another
    add_mask(masked, bytes(32), -1)
    assert (masked == start).all()
