"""A member of a round: it masks its values, and helps to open one sum, over one set of members.

`MemberRound` is a state machine without clock, files and network. Each step takes what the group sent, checks all of it, and gives
the reply; its keys follow from a seed that the caller gives. The same message again gets the same reply; any other one for a step
that is done is refused.

What a round promises to a member, whatever the server does:

- its values are masked until `shares_needed` holders give their shares, and they give them for one sum only: a member opens what as
  many members as `RoundTerms.survivors_needed` have signed, more than half of all, and each of them signs one set of survivors;
- in that sum are at least `least` members, the number of the site's owner, also when it is opened; and, for each start that a member
  in it got, at least `least` who got the same;
- of each other member it opens the share of one secret at most: that of its own mask if its values are in the sum, that of its
  masks with others if they are not; who is listed as lost but sent values late stays behind its own mask;
- keys are signed by the members' own keys, which the owner has accepted: the server cannot put a member of its making in between.
  Masks and seals are bound to the list of all offers and sharers, so members that got different lists share nothing.

It does not hide: the sum; who took part; what differs between two sums with nearly the same members, which a server can choose.
The same values must never go into two rounds, or their difference tells a single member's: whoever drives a member sees to it. That
similar tasks tell similar things takes noise. All this holds while fewer members are on the server's side than 2 threshold - 1 of
all, and than `shares_needed` of the holders of a member. Members trust each other not to spoil the sum: a liar's values cannot be
told from others'.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import numpy as np
from torch import Tensor

from fedloom.core.errors import Refused
from fedloom.core.types import ClientId
from fedloom.privacy.secure_sum.field import largest_value
from fedloom.privacy.secure_sum.graph import holders_of_shares, shares_needed
from fedloom.privacy.secure_sum.masks import (
    SECRET_BYTES,
    add_mask,
    agreed_key,
    derived_key,
    digest_of,
    public_key,
    seal_share,
    unseal_share,
)
from fedloom.privacy.secure_sum.messages import (
    Agreement,
    Agreements,
    KeyList,
    KeyOffer,
    MaskedValues,
    OpenedShares,
    RoundTerms,
    SealedShares,
    ShareDelivery,
    Survivors,
    agreement_body,
    sharers_view,
)
from fedloom.privacy.secure_sum.packing import Words, pack_words
from fedloom.privacy.secure_sum.shares import split_secret

Message = TypeVar("Message", KeyList, ShareDelivery, Survivors, Agreements)
Reply = TypeVar("Reply", SealedShares, MaskedValues, Agreement, OpenedShares)
STEPS = ("share", "mask", "agree", "open")


@dataclass(frozen=True, slots=True)
class Identity:
    """Name and key of a member, and the keys of those whom its owner accepted.

    Fields:
        name: its name.
        sign: returns its signature of these bytes.
        verify: returns whether a signature of these bytes is one of the member of that name; False for a name that is not known.
    """

    name: ClientId
    sign: Callable[[bytes], str]
    verify: Callable[[ClientId, bytes, str], bool]


class MemberRound:
    """One member in one round. Every method raises Refused for what no honest server sends; the round is over for it then."""

    def __init__(self, terms: RoundTerms, identity: Identity, seed: bytes, least: int) -> None:
        """Begin a round.

        Args:
            terms: its terms.
            identity: who the member is.
            seed: 32 bytes that nobody else knows and that serve for no other round.
            least: members that a sum has at least, as this member's owner wants it.

        Raises:
            Refused: the member is not meant, or fewer might be in the sum than its owner wants.
        """
        if identity.name not in terms.members:
            raise Refused("sums", terms.name, "this member is not in the round")
        if terms.least < least:
            raise Refused(
                "least_sum", least, f"a sum over {terms.least} members is asked for; the site's owner wants more in it"
            )
        self.terms, self.identity = terms, identity
        purposes = ("mask", "own", "seal")
        self._mask_secret, self._own_secret, seal_secret = (
            derived_key(seed, purpose, terms.digest, identity.name, size=SECRET_BYTES) for purpose in purposes
        )
        self._mask_private, self._seal_private = mask_private(self._mask_secret), derived_key(seal_secret, "seal key")
        self._offer = self._signed_offer()
        self._replies: list[tuple[object, Any]] = []
        self._failed = False
        self._offers: dict[ClientId, KeyOffer] = {}
        self._holders: tuple[ClientId, ...] = ()
        self._view = ""
        self._held: dict[ClientId, tuple[bytes, bytes]] = {}
        self._sharers: tuple[ClientId, ...] = ()
        self._survivors: tuple[ClientId, ...] = ()

    def offer(self) -> KeyOffer:
        """Return the member's keys for this round, signed."""
        return self._offer

    def share(self, listed: KeyList) -> SealedShares:
        """Return shares of the two secrets, sealed for the neighbours among those who offered keys."""
        return self._step("share", listed, self._share)

    def mask(self, delivery: ShareDelivery, values: Tensor) -> MaskedValues:
        """Return the values masked, once all shares have been given out. A repeated message does not look at `values` again.

        Args:
            delivery: who shared, and what is for this member.
            values: int64, (length,), no larger than the bits allow.
        """
        return self._step("mask", delivery, lambda message: self._mask(message, values))

    def agree(self, survivors: Survivors) -> Agreement:
        """Return the signature with which the member agrees to open the sum over these survivors, and no other one."""
        return self._step("agree", survivors, self._agree)

    def open(self, agreements: Agreements) -> OpenedShares:
        """Return the shares that open the sum, once enough members have signed the same survivors."""
        return self._step("open", agreements, self._open)

    def _signed_offer(self) -> KeyOffer:
        name, own = self.identity.name, digest_of("own secret", self._own_secret.hex())
        keys = public_key(self._mask_private), public_key(self._seal_private), own
        unsigned = KeyOffer(self.terms.digest, name, *keys, signature="")
        return KeyOffer(self.terms.digest, name, *keys, self.identity.sign(unsigned.signed))

    def _step(self, name: str, message: Message, reply_to: Callable[[Message], Reply]) -> Reply:
        """Return the reply to a message of this step; the same one for the same message."""
        place = STEPS.index(name)
        if place < len(self._replies):
            before, reply = self._replies[place]
            if message == before:
                return cast(Reply, reply)
            raise self._refusal(f"another message for the step {name!r}, which is done")
        if self._failed or place > len(self._replies) or message.round != self.terms.digest:
            raise self._refusal(f"the step {name!r} is not due, or belongs to another round")
        self._failed = True  # until the reply is there: after a refusal nothing of this round is answered any more
        reply = reply_to(message)
        self._failed = False
        self._replies.append((message, reply))
        return reply

    def _share(self, listed: KeyList) -> SealedShares:
        self._accept_keys(listed)
        name, view = self.identity.name, listed.view
        self._view, self._holders = view, holders_of_shares(tuple(self._offers), view)[name]
        needed = shares_needed(self.terms.threshold, len(self._holders), len(self._offers))
        own = split_secret(self._own_secret, needed, self._holders)
        pair = split_secret(self._mask_secret, needed, self._holders)
        self._held[name] = own[name], pair[name]
        seals = {
            peer: seal_share(self._seal_key(peer, name, peer), own[peer] + pair[peer], view)
            for peer in self._holders
            if peer != name
        }
        return SealedShares(self.terms.digest, name, seals)

    def _accept_keys(self, listed: KeyList) -> None:
        """Take over the offers. Raises Refused if one is not its member's own, or too few are there."""
        names = [one.member for one in listed.offers]
        if names != sorted(set(names)) or not {*names} <= {*self.terms.members}:
            raise self._refusal("keys that are listed twice, or of somebody who is not in the round")
        self._require_alike(names, len(names))
        for one in listed.offers:
            if one.round != self.terms.digest or not self.identity.verify(one.member, one.signed, one.signature):
                raise self._refusal("keys without the signature of the site whose they are said to be")
        self._offers = dict(zip(names, listed.offers, strict=True))
        mine = self._offers.get(self.identity.name)
        if mine is None or mine.keys != self._offer.keys:
            raise self._refusal("keys of this member that it did not offer")

    def _mask(self, delivery: ShareDelivery, values: Tensor) -> MaskedValues:
        name, terms = self.identity.name, self.terms
        sharers = delivery.sharers
        if list(sharers) != sorted(set(sharers)) or name not in sharers or not {*sharers} <= self._offers.keys():
            raise self._refusal("sharers that offered no keys, or without this member")
        self._require_alike(sharers, len(self._offers))
        peers = [peer for peer in self._holders if peer != name and peer in sharers]
        self._require_holders(peers)
        if delivery.seals.keys() != {*peers}:
            raise self._refusal("shares that do not come from the neighbours who shared")
        for peer in peers:
            secret = unseal_share(self._seal_key(peer, peer, name), delivery.seals[peer], self._view)
            if len(secret) != 2 * SECRET_BYTES:
                raise self._refusal("a share of another size")
            self._held[peer] = secret[:SECRET_BYTES], secret[SECRET_BYTES:]
        self._sharers = sharers
        view = sharers_view(self._view, sharers)
        words = field_words(values, terms)
        add_mask(words, own_mask_key(self._own_secret, view), +1)
        for peer in peers:
            key = pair_mask_key(self._mask_private, self._offers[peer].mask_key, view, name, peer)
            add_mask(words, key, pair_sign(name, peer))
        return MaskedValues(terms.digest, name, pack_words(words & np.uint32(2**terms.field - 1), terms.field))

    def _agree(self, survivors: Survivors) -> Agreement:
        members = survivors.members
        if list(members) != sorted(set(members)) or not {*members} <= {*self._sharers}:
            raise self._refusal("survivors who did not share, or are listed twice")
        if self.identity.name not in members:
            raise self._refusal("this member is listed as lost, though its values were sent")
        self._require_alike(members, len(self._offers))
        self._require_holders(members)
        self._survivors = members
        signature = self.identity.sign(agreement_body(sharers_view(self._view, self._sharers), members))
        return Agreement(self.terms.digest, self.identity.name, signature)

    def _open(self, agreements: Agreements) -> OpenedShares:
        body = agreement_body(sharers_view(self._view, self._sharers), self._survivors)
        if not agreements.signatures.keys() <= {*self._survivors}:
            raise self._refusal("an agreement of somebody whose values are not in the sum")
        self._require_enough(len(agreements.signatures), len(self._offers))
        if not all(self.identity.verify(member, body, sign) for member, sign in agreements.signatures.items()):
            raise self._refusal("an agreement that a member did not sign, or to another set of survivors")
        survivors = {*self._survivors}
        own = {peer: shares[0].hex() for peer, shares in self._held.items() if peer in survivors}
        pair = {peer: shares[1].hex() for peer, shares in self._held.items() if peer not in survivors}
        self._held.clear()
        return OpenedShares(self.terms.digest, self.identity.name, own, pair)

    def _seal_key(self, peer: ClientId, sender: ClientId, receiver: ClientId) -> bytes:
        return agreed_key(self._seal_private, self._offers[peer].seal_key, "seal", self._view, sender, receiver)

    def _require_enough(self, members: int, offered: int) -> None:
        needed = self.terms.survivors_needed(offered)
        if members < needed:
            raise self._refusal(f"{members} members are left, the sum needs {needed}")

    def _require_alike(self, members: Sequence[ClientId], offered: int) -> None:
        """Raise Refused for a list, in order of name, of too few, or with a start that too few of them got."""
        self._require_enough(len(members), offered)
        if self.terms.sharing_starts(members) != tuple(members):
            raise self._refusal(f"a start that fewer than {self.terms.least} of those who are left got")

    def _require_holders(self, left: Collection[ClientId]) -> None:
        """Raise Refused where too few who hold this member's shares are left to hide it, and to open the sum."""
        needed = shares_needed(self.terms.threshold, len(self._holders), len(self._offers))
        count = len({*self._holders} & {*left, self.identity.name})
        if count < needed:
            raise self._refusal(f"{count} holders of this member's shares are left, {needed} are needed")

    def _refusal(self, words: str) -> Refused:
        return Refused("sums", self.terms.name, f"{words}; this member leaves the round")


def mask_private(secret: bytes) -> bytes:
    """Return the private key of masks with others, which follows from the secret that is shared."""
    return derived_key(secret, "mask key")


def own_mask_key(secret: bytes, view: str) -> bytes:
    """Return the key of a member's own mask, which is taken off where its values are in the sum."""
    return derived_key(secret, "own mask", view)


def pair_mask_key(private: bytes, public: str, view: str, one: ClientId, other: ClientId) -> bytes:
    """Return the key of the mask between two members: one adds it, the other takes it off."""
    return agreed_key(private, public, "pair mask", view, *sorted((one, other)))


def pair_sign(member: ClientId, peer: ClientId) -> int:
    """Return whether `member` adds the mask that it shares with `peer` (1), or takes it off (-1)."""
    return 1 if member < peer else -1


def field_words(values: Tensor, terms: RoundTerms) -> Words:
    """Return values as words. Raises Refused where they are not as the terms say: a wrong one would overflow the field."""
    flat = values.detach().reshape(-1)
    if flat.is_floating_point() or len(flat) != terms.length:
        raise Refused("sums", terms.name, f"{len(flat)} values are there, {terms.length} whole numbers are asked for")
    if int(flat.max()) > largest_value(terms.bits) or int(flat.min()) < -largest_value(terms.bits):
        raise Refused("sums", terms.name, f"a value has more than {terms.bits} bits; the field would overflow")
    return flat.cpu().long().numpy().astype(np.uint32)
