"""The group of a round: it passes keys and shares on, adds up what members mask, and opens one sum.

`GroupRound` is a state machine without clock, files and network. Whoever drives it sends the terms to all members, hands in what
they send with `receive`, and ends each step with `advance` when nobody is missing or the time is over; who has not answered by then
is lost. It learns nothing but the sum. A round that is not over when the process ends is dropped: what members sent cannot be asked
for twice.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from hashlib import sha256
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from fedloom.core.errors import Refused
from fedloom.core.types import ClientId
from fedloom.privacy.secure_sum.field import largest_value
from fedloom.privacy.secure_sum.graph import holders_of_shares, shares_needed
from fedloom.privacy.secure_sum.masks import SECRET_BYTES, add_mask, digest_of, public_key
from fedloom.privacy.secure_sum.member import mask_private, own_mask_key, pair_mask_key, pair_sign
from fedloom.privacy.secure_sum.messages import (
    Agreement,
    Agreements,
    FromMember,
    KeyList,
    KeyOffer,
    MaskedValues,
    OpenedShares,
    RoundTerms,
    SealedShares,
    ShareDelivery,
    Survivors,
    ToMember,
    agreement_body,
    is_hex,
    sharers_view,
)
from fedloom.privacy.secure_sum.packing import Words, unpack_words
from fedloom.privacy.secure_sum.shares import combine_shares

Verify: TypeAlias = Callable[[ClientId, bytes, str], bool]
_ANSWERS: tuple[type[FromMember], ...] = (KeyOffer, SealedShares, MaskedValues, Agreement, OpenedShares)
"""What members send, step by step."""
_SEAL_BYTES = 2 * SECRET_BYTES + 16
"""Bytes of two sealed shares, with their tag."""


class GroupRound:
    """One round, from the keys of the members to the sum."""

    def __init__(self, terms: RoundTerms, verify: Verify) -> None:
        """Begin a round.

        Args:
            terms: its terms, which the caller sends to each of `terms.members`.
            verify: returns whether a signature of these bytes is one of the member of that name.
        """
        self.terms = terms
        self._verify = verify
        self._step = 0
        self._asked = terms.members
        self._digests: dict[ClientId, str] = {}
        self._offers: dict[ClientId, KeyOffer] = {}
        self._holders: Mapping[ClientId, tuple[ClientId, ...]] = {}
        self._view = ""
        self._seals: dict[ClientId, Mapping[ClientId, str]] = {}
        self._sharers: tuple[ClientId, ...] = ()
        self._words: dict[str, Words] = {}  # sums of masked values, by start
        self._survivors: tuple[ClientId, ...] = ()
        self._signatures: dict[ClientId, str] = {}
        self._opened: dict[ClientId, OpenedShares] = {}
        self._total: Tensor | None = None

    @property
    def missing(self) -> tuple[ClientId, ...]:
        """Who has not answered in this step."""
        return tuple(member for member in self._asked if member not in self._digests)

    @property
    def total(self) -> Tensor:
        """The sum, int64, (length,), after the last step. Raises ValueError before."""
        if self._total is None:
            raise ValueError("the round is not over")
        return self._total

    @property
    def survivors(self) -> tuple[ClientId, ...]:
        """Whose values are in the sum, in order of name; nobody before they are known."""
        return self._survivors

    def receive(self, message: FromMember) -> None:
        """Take what a member sent in this step; the same once more changes nothing.

        Raises:
            Refused: it does not fit the step, the round or the member. Nothing of it is used.
        """
        if (
            self._step >= len(_ANSWERS)
            or type(message) is not _ANSWERS[self._step]
            or message.round != self.terms.digest
        ):
            raise self._refusal("a message of another step, or of another round")
        digest = _message_digest(message)
        if self._digests.get(message.member, digest) != digest:
            raise self._refusal("a second message of one member, which is another one")
        if message.member not in self._asked:
            raise self._refusal("a message of somebody who was not asked")
        if message.member in self._digests:
            return
        match message:
            case KeyOffer():
                self._receive_keys(message)
            case SealedShares():
                self._receive_seals(message)
            case MaskedValues():
                self._receive_values(message)
            case Agreement():
                self._receive_agreement(message)
            case OpenedShares():
                self._receive_shares(message)
        self._digests[message.member] = digest

    def advance(self) -> Mapping[ClientId, ToMember]:
        """End the step with those who have answered; returns what to send to each, nothing after the last step.

        Raises:
            Refused: too few are left, or their shares do not fit: the round is dropped, and nobody learns anything.
        """
        there = tuple(member for member in self._asked if member in self._digests)
        if self._step < _ANSWERS.index(Agreement):
            there = self.terms.sharing_starts(there)
        needed = self.terms.survivors_needed(len(self._offers) if self._step else len(there))
        if self._step < len(_ANSWERS) - 1 and len(there) < needed:
            raise self._refusal(f"{len(there)} members are left, the sum needs {needed}")
        end = (self._list_keys, self._deliver, self._name_survivors, self._pass_agreements, self._finish)[self._step]
        messages = end(there)
        self._step += 1
        self._asked, self._digests = tuple(messages), {}
        return messages

    def _receive_keys(self, offer: KeyOffer) -> None:
        if not all(is_hex(key, 32) for key in offer.keys):
            raise self._refusal("keys that are none")
        if not self._verify(offer.member, offer.signed, offer.signature):
            raise self._refusal("keys without the signature of their member")
        self._offers[offer.member] = offer

    def _receive_seals(self, message: SealedShares) -> None:
        peers = {*self._holders[message.member]} - {message.member}
        if message.seals.keys() != peers or not all(is_hex(sealed, _SEAL_BYTES) for sealed in message.seals.values()):
            raise self._refusal("sealed shares that are not one for each neighbour")
        self._seals[message.member] = message.seals

    def _receive_values(self, message: MaskedValues) -> None:
        try:
            words = unpack_words(message.words, self.terms.length, self.terms.field)
        except ValueError as error:
            raise self._refusal(f"masked values of another size: {error}") from error
        self._words.setdefault(self.terms.start_of(message.member), np.zeros_like(words))[:] += words

    def _receive_agreement(self, message: Agreement) -> None:
        body = agreement_body(sharers_view(self._view, self._sharers), self._survivors)
        if not self._verify(message.member, body, message.signature):
            raise self._refusal("an agreement that its member did not sign")
        self._signatures[message.member] = message.signature

    def _receive_shares(self, message: OpenedShares) -> None:
        known = {peer for peer, holders in self._holders.items() if message.member in holders}
        survivors, lost = known & {*self._survivors}, known & ({*self._sharers} - {*self._survivors})
        shares = [*message.own.values(), *message.pair.values()]
        if message.own.keys() != survivors or message.pair.keys() != lost:
            raise self._refusal("shares that are not one for each member whose shares are held")
        if not all(is_hex(share, SECRET_BYTES) for share in shares):
            raise self._refusal("shares of another size")
        self._opened[message.member] = message

    def _list_keys(self, there: tuple[ClientId, ...]) -> Mapping[ClientId, ToMember]:
        self._offers = {member: self._offers[member] for member in there}
        listed = KeyList(self.terms.digest, tuple(self._offers.values()))
        self._view, self._holders = listed.view, holders_of_shares(there, listed.view)
        return dict.fromkeys(there, listed)

    def _deliver(self, there: tuple[ClientId, ...]) -> Mapping[ClientId, ToMember]:
        self._sharers = there
        return {
            member: ShareDelivery(
                self.terms.digest,
                there,
                {peer: self._seals[peer][member] for peer in there if peer != member and peer in self._holders[member]},
            )
            for member in there
        }

    def _name_survivors(self, there: tuple[ClientId, ...]) -> Mapping[ClientId, ToMember]:
        self._survivors = there
        return dict.fromkeys(there, Survivors(self.terms.digest, there))

    def _pass_agreements(self, there: tuple[ClientId, ...]) -> Mapping[ClientId, ToMember]:
        return dict.fromkeys(there, Agreements(self.terms.digest, dict(self._signatures)))

    def _finish(self, there: tuple[ClientId, ...]) -> Mapping[ClientId, ToMember]:
        view, words = sharers_view(self._view, self._sharers), np.zeros(self.terms.length, np.uint32)
        for start in {self.terms.start_of(member) for member in self._survivors}:
            words += self._words[start]
        for member in self._sharers:
            if member in self._survivors:
                secret = self._combined(member, {one: self._opened[one].own for one in there})
                if digest_of("own secret", secret.hex()) != self._offers[member].own_digest:
                    raise self._refusal("shares of a member's own mask that do not fit")
                add_mask(words, own_mask_key(secret, view), -1)
            else:
                secret = self._combined(member, {one: self._opened[one].pair for one in there})
                self._add_lost_masks(words, member, mask_private(secret))
        self._total = _signed(words, self.terms.field)
        if int(self._total.abs().max()) > len(self._survivors) * largest_value(self.terms.bits):
            self._total = None
            raise self._refusal("the sum is beyond what its members can send: a member did not follow the protocol")
        return {}

    def _combined(self, member: ClientId, shares: Mapping[ClientId, Mapping[ClientId, str]]) -> bytes:
        """Return the secret of a member from the shares that others opened."""
        holders = self._holders[member]
        found = {one: bytes.fromhex(held[member]) for one, held in shares.items() if member in held}
        return combine_shares(found, shares_needed(self.terms.threshold, len(holders), len(self._offers)), holders)

    def _add_lost_masks(self, words: Words, lost: ClientId, private: bytes) -> None:
        """Add the masks that a lost member would have brought: its neighbours' halves cancel with them."""
        if public_key(private) != self._offers[lost].mask_key:
            raise self._refusal("shares of a lost member's key that do not fit")
        view = sharers_view(self._view, self._sharers)
        for peer in self._holders[lost]:
            if peer in self._survivors:
                key = pair_mask_key(private, self._offers[peer].mask_key, view, lost, peer)
                add_mask(words, key, pair_sign(lost, peer))

    def _refusal(self, words: str) -> Refused:
        return Refused("sums", self.terms.name, words)


def _message_digest(message: FromMember) -> str:
    """Return a digest by which a repeated message is known."""
    if isinstance(message, MaskedValues):
        return sha256(message.words).hexdigest()
    return digest_of(repr(message))


def _signed(words: Words, bits: int) -> Tensor:
    """Return words of a field as signed whole numbers."""
    values = (words & np.uint32(2**bits - 1)).astype(np.int64)
    return torch.from_numpy(np.where(values >= 2 ** (bits - 1), values - 2**bits, values))
