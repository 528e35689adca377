"""Rounds of masked sums in one process: all members and their group, up to any step, with members that are lost on the way."""

from __future__ import annotations

import hmac
from collections.abc import Collection, Mapping
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from fedloom.core.types import ClientId
from fedloom.privacy.secure_sum.field import largest_value
from fedloom.privacy.secure_sum.group import GroupRound
from fedloom.privacy.secure_sum.member import Identity, MemberRound
from fedloom.privacy.secure_sum.messages import RoundTerms

Step = Literal["share", "mask", "agree", "open", "done"]
STEPS: tuple[Step, ...] = ("share", "mask", "agree", "open", "done")


class Played(NamedTuple):
    """A round up to a step: its group, its members, and what the group has sent for that step, by member."""

    group: GroupRound
    members: Mapping[ClientId, MemberRound]
    sent: Mapping[ClientId, Any]


def round_terms(count: int, length: int = 20, least: int = 3, bits: int = 16, **changed: Any) -> RoundTerms:
    """Terms of a round of so many members."""
    names = tuple(f"site-{number:03d}" for number in range(count))
    fields = {"name": "run/1/0", "members": names, "length": length, "bits": bits, "least": least}
    return RoundTerms(**{**fields, "threshold": 0.6, **changed})


def whole_numbers(terms: RoundTerms, seed: int = 0) -> dict[ClientId, Tensor]:
    """Values of each member over the whole range, both ends among them."""
    draw, most = torch.Generator().manual_seed(seed), largest_value(terms.bits)
    values = {one: torch.randint(-most, most + 1, (terms.length,), generator=draw) for one in terms.members}
    for one in values.values():
        one[:1], one[1:2] = most, -most
    return values


def identity_of(secret: bytes, name: ClientId) -> Identity:
    """An identity whose signatures are keyed digests: all members live in one process."""

    def signature(member: ClientId, body: bytes) -> str:
        return hmac.digest(secret, member.encode() + b"\0" + body, "sha256").hex()

    def verify(member: ClientId, body: bytes, found: str) -> bool:
        return hmac.compare_digest(signature(member, body), found)

    return Identity(name, lambda body: signature(name, body), verify)


def member_of(terms: RoundTerms, name: ClientId, secret: bytes = b"secret", least: int = 3) -> MemberRound:
    """One member, whose seed follows from the secret."""
    return MemberRound(terms, identity_of(secret, name), hmac.digest(secret, name.encode(), "sha256"), least)


def play(
    terms: RoundTerms,
    values: Mapping[ClientId, Tensor],
    until: Step = "done",
    secret: bytes = b"secret",
    lost: Mapping[Step, Collection[ClientId]] | None = None,
) -> Played:
    """Play a round until what the group sends for a step is there; `lost` are the members who do not answer in a step."""
    group = GroupRound(terms, identity_of(secret, "").verify)
    members = {name: member_of(terms, name, secret) for name in terms.members}
    for member in members.values():
        group.receive(member.offer())
    sent = group.advance()
    for step in STEPS[: STEPS.index(until)]:
        for name, message in sent.items():
            if name not in (lost or {}).get(step, ()):
                group.receive(reply_of(members[name], step, message, values))
        sent = group.advance()
    return Played(group, members, sent)


def reply_of(member: MemberRound, step: Step, message: Any, values: Mapping[ClientId, Tensor]) -> Any:
    """What a member replies in a step; its values are looked at where they are masked."""
    return member.mask(message, values[member.identity.name]) if step == "mask" else getattr(member, step)(message)


def masked_sum(
    terms: RoundTerms,
    values: Mapping[ClientId, Tensor],
    secret: bytes = b"secret",
    lost_before: Collection[ClientId] = (),
    lost_after: Collection[ClientId] = (),
) -> tuple[Tensor, tuple[ClientId, ...]]:
    """The sum that a round opens and who is in it, with members lost before and after they sent their values."""
    group = play(terms, values, secret=secret, lost={"mask": lost_before, "agree": lost_after}).group
    return group.total, group.survivors
