"""Messages of a round: frozen values of texts, numbers and bytes. Digests, keys, seals and shares are in hex.

In order: the group sends `RoundTerms`, a member `KeyOffer`; `KeyList`, `SealedShares`; `ShareDelivery`, `MaskedValues`; `Survivors`,
`Agreement`; `Agreements`, `OpenedShares`. Every one but the first names its round by the digest of the terms.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields
from typing import TypeAlias

from fedloom.core.errors import Refused
from fedloom.core.types import ClientId
from fedloom.privacy.secure_sum.field import field_bits
from fedloom.privacy.secure_sum.graph import members_needed
from fedloom.privacy.secure_sum.masks import digest_of

LEAST_MEMBERS = 3
"""Members of a sum, at least: of two each would know the other's values."""
_MOST_MEMBERS = 1000
_MOST_VALUES = 2**30
_LONGEST_NAME = 500


@dataclass(frozen=True, slots=True)
class RoundTerms:
    """Terms of a round, the same for everybody in it.

    Fields:
        name: name of the round, which no other one ever has.
        members: who may take part, in order of name.
        length: values of each member.
        bits: bits of a value.
        least: members whose values must be in the sum, at least.
        threshold: share of those who offered keys that must have sent values, and agree to the opening (above 0.5, at most 1).
        starts: digest of all that decides on what each member's values are about, in their order (empty: it is not told).
    """

    name: str
    members: tuple[ClientId, ...]
    length: int
    bits: int
    least: int
    threshold: float
    starts: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for field, text in (
            ("name", self.name),
            *(("members", one) for one in self.members),
            *(("starts", one) for one in self.starts),
        ):
            if not 0 < len(text) <= _LONGEST_NAME:
                raise Refused(field, text[:_LONGEST_NAME], f"1 to {_LONGEST_NAME} characters")
        if self.members != tuple(sorted(set(self.members))) or len(self.members) > _MOST_MEMBERS:
            raise Refused("members", len(self.members), f"at most {_MOST_MEMBERS} different names, in order")
        for field, number, least, most in (
            ("least", self.least, LEAST_MEMBERS, len(self.members)),
            ("bits", self.bits, 4, 24),
            ("length", self.length, 1, _MOST_VALUES),
        ):
            if not least <= number <= most:
                raise Refused(field, number, f"a whole number from {least} to {most}")
        if len(self.starts) not in (0, len(self.members)):
            raise Refused("starts", len(self.starts), f"one for each of {len(self.members)} members, or none")
        if not 0.5 < self.threshold <= 1:
            raise Refused("threshold", self.threshold, "above 0.5: else two sets of members could be opened; at most 1")
        field_bits(self.bits, len(self.members))

    @property
    def digest(self) -> str:
        """Names these terms."""
        return digest_of("terms", *(getattr(self, field.name) for field in fields(self)))

    @property
    def field(self) -> int:
        """Bits of the field: sums are computed modulo 2^field."""
        return field_bits(self.bits, len(self.members))

    def start_of(self, member: ClientId) -> str:
        """Return the start of a member ("": it is not told)."""
        return self.starts[self.members.index(member)] if self.starts else ""

    def sharing_starts(self, members: Collection[ClientId]) -> tuple[ClientId, ...]:
        """Return, in order of name, those of these members whose start at least `least` of them got.

        No others may be in a list of a round: were the rest sent models that learn nothing, the sum would be theirs alone.
        """
        starts = {name: self.start_of(name) for name in sorted(members)}
        counts = Counter(starts.values())
        return tuple(name for name, start in starts.items() if counts[start] >= self.least)

    def survivors_needed(self, offered: int) -> int:
        """Return how many members must be left, at every step, of those who offered keys."""
        return max(self.least, members_needed(self.threshold, offered))


@dataclass(frozen=True, slots=True)
class KeyOffer:
    """Keys of a member for one round, signed with the key of its site.

    Fields:
        round: digest of the terms.
        member: whose they are.
        mask_key: public key from which masks with others follow.
        seal_key: public key with which others seal shares for it.
        own_digest: digest of the secret from which its own mask follows, by which a wrong one is noticed.
        signature: signature of `signed`.
    """

    round: str
    member: ClientId
    mask_key: str
    seal_key: str
    own_digest: str
    signature: str

    @property
    def signed(self) -> bytes:
        """What is signed: everything else."""
        return f"fedloom sum keys {digest_of(self.round, self.member, *self.keys)}".encode()

    @property
    def keys(self) -> tuple[str, str, str]:
        """The keys and the digest, which must be 32 bytes each."""
        return self.mask_key, self.seal_key, self.own_digest


@dataclass(frozen=True, slots=True)
class KeyList:
    """All offers of a round, in order of name: who takes part."""

    round: str
    offers: tuple[KeyOffer, ...]

    @property
    def view(self) -> str:
        """Names the offers: masks and seals are bound to it, so members with different lists share nothing."""
        return digest_of("offers", self.round, *([one.member, *one.keys] for one in self.offers))


@dataclass(frozen=True, slots=True)
class SealedShares:
    """Shares of a member's two secrets, sealed for each of its neighbours."""

    round: str
    member: ClientId
    seals: Mapping[ClientId, str]


@dataclass(frozen=True, slots=True)
class ShareDelivery:
    """All members who sealed shares, in order of name, and the seals that are for one of them, by sender."""

    round: str
    sharers: tuple[ClientId, ...]
    seals: Mapping[ClientId, str]


@dataclass(frozen=True, slots=True)
class MaskedValues:
    """The masked values of a member, as `packing` writes them."""

    round: str
    member: ClientId
    words: bytes


@dataclass(frozen=True, slots=True)
class Survivors:
    """Whose values are to be in the sum, in order of name."""

    round: str
    members: tuple[ClientId, ...]


@dataclass(frozen=True, slots=True)
class Agreement:
    """A member agrees to open the sum over these survivors, and will agree to no other in this round."""

    round: str
    member: ClientId
    signature: str


@dataclass(frozen=True, slots=True)
class Agreements:
    """The signatures of all who agreed, by member."""

    round: str
    signatures: Mapping[ClientId, str]


@dataclass(frozen=True, slots=True)
class OpenedShares:
    """Shares that open the sum: of one kind for each member, never of both.

    Fields:
        round: digest of the terms.
        member: who held them.
        own: shares of the secrets of own masks, by member whose values are in the sum.
        pair: shares of the secrets of masks with others, by member who was lost before it sent values.
    """

    round: str
    member: ClientId
    own: Mapping[ClientId, str]
    pair: Mapping[ClientId, str]


FromMember: TypeAlias = KeyOffer | SealedShares | MaskedValues | Agreement | OpenedShares
ToMember: TypeAlias = KeyList | ShareDelivery | Survivors | Agreements


def sharers_view(view: str, sharers: tuple[ClientId, ...]) -> str:
    """Return the name of offers and sharers together: masks follow from it."""
    return digest_of("sharers", view, sharers)


def agreement_body(view: str, survivors: tuple[ClientId, ...]) -> bytes:
    """Return what a member signs to agree to an opening.

    Args:
        view: `sharers_view` of the round.
        survivors: whose values are in the sum.
    """
    return f"fedloom sum opening {digest_of(view, survivors)}".encode()


def is_hex(text: str, size: int) -> bool:
    """Return whether a text is so many bytes in hex, in small letters."""
    return re.fullmatch(f"[0-9a-f]{{{2 * size}}}", text) is not None
