"""Shares of a secret: any so many of them give it, fewer tell nothing (Shamir 1979). The one door to `pycryptodome`.

The coefficients come from the operating system, so the shares of one secret differ from time to time; what they give does not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from fedloom.core.errors import Refused


def split_secret(secret: bytes, needed: int, holders: Sequence[str]) -> dict[str, bytes]:
    """Return a share of a secret of 16 bytes for each holder, in their order; so many of them are needed to combine it."""
    from Crypto.Protocol.SecretSharing import Shamir

    shares = Shamir.split(needed, len(holders), secret, ssss=False)
    return {holder: share for holder, (_, share) in zip(holders, shares, strict=True)}


def combine_shares(shares: Mapping[str, bytes], needed: int, holders: Sequence[str]) -> bytes:
    """Return the secret that so many of its shares give; shares beyond that number are not looked at.

    Raises:
        Refused: there are fewer.
    """
    from Crypto.Protocol.SecretSharing import Shamir

    found = [(number, shares[holder]) for number, holder in enumerate(holders, 1) if holder in shares]
    if len(found) < needed:
        raise Refused(
            "sums",
            f"{len(found)} shares of a secret, {needed} are needed",
            "too many members were lost; the round is dropped",
        )
    return bytes(Shamir.combine(found[:needed], ssss=False))
