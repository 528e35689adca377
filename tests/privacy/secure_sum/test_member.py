"""What a server that does not follow the protocol asks of a member, and that it gets nothing by it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fedloom.core.errors import Refused
from fedloom.privacy.secure_sum import graph
from fedloom.privacy.secure_sum.messages import Agreements, KeyList, KeyOffer, ShareDelivery, Survivors
from fedloom.privacy.secure_sum.packing import unpack_words
from tests.support.masked_sums import Played, identity_of, member_of, play, round_terms, whole_numbers

TERMS = round_terms(6)
VALUES = whole_numbers(TERMS)
ME, NAMES = TERMS.members[0], TERMS.members


def refuses(words: str, ask: Callable[[], object]) -> None:
    with pytest.raises(Refused, match=words):
        ask()


# A server that changes who is in the sum -------------------------------------------------------------------------------


def test_two_sets_of_survivors_are_not_signed_by_one_member() -> None:
    played = play(TERMS, VALUES, "agree")
    member = played.members[ME]
    signed = member.agree(played.sent[ME])
    assert member.agree(played.sent[ME]) == signed
    refuses("another message", lambda: member.agree(Survivors(TERMS.digest, NAMES[:5])))


def test_two_sets_of_survivors_are_not_opened_by_two_halves() -> None:
    """Each half signs one set; neither has enough signatures, and those of the other half do not count for it."""
    members = play(TERMS, VALUES, "agree").members
    sets = {name: NAMES[:5] if name in NAMES[:3] else NAMES for name in NAMES}
    signed = {name: members[name].agree(Survivors(TERMS.digest, sets[name])).signature for name in NAMES}
    for name in NAMES:
        alike = {one: signature for one, signature in signed.items() if sets[one] == sets[name]}
        mixed = {one: signature for one, signature in signed.items() if one in sets[name]}
        for signatures, words in ((alike, "3 members are left"), (mixed, "did not sign")):
            fresh = play(TERMS, VALUES, "agree").members[name]
            fresh.agree(Survivors(TERMS.digest, sets[name]))
            refuses(words, lambda m=fresh, s=signatures: m.open(Agreements(TERMS.digest, s)))


def test_a_second_opening_is_refused_after_the_first() -> None:
    played = play(TERMS, VALUES, "open")
    member, message = played.members[ME], played.sent[ME]
    opened = member.open(message)
    assert member.open(message) == opened
    fewer = dict(list(message.signatures.items())[:4])
    refuses("another message", lambda: member.open(Agreements(TERMS.digest, fewer)))


def test_shares_of_both_kinds_of_one_member_are_never_opened() -> None:
    """Members 4 and 5 are lost before and after they sent values: whatever all others open together, each has one kind."""
    played = play(TERMS, VALUES, "open", lost={"mask": NAMES[4:5], "agree": NAMES[5:]})
    opened = [played.members[name].open(message) for name, message in played.sent.items()]
    own = {peer for one in opened for peer in one.own}
    pair = {peer for one in opened for peer in one.pair}
    assert pair == {NAMES[4]}
    assert own == {*NAMES} - pair


def test_who_sends_late_stays_behind_its_own_mask() -> None:
    """The values of a member that was listed as lost are not those that its opened key would uncover."""
    played = play(TERMS, VALUES, "mask")
    late = played.members[NAMES[5]].mask(played.sent[NAMES[5]], VALUES[NAMES[5]])
    refuses("listed as lost", lambda: played.members[NAMES[5]].agree(Survivors(TERMS.digest, NAMES[:5])))
    after = play(TERMS, VALUES, "open", lost={"mask": NAMES[5:]})
    opened = [after.members[name].open(message) for name, message in after.sent.items()]
    assert not any(NAMES[5] in one.own for one in opened)
    words = unpack_words(late.words, TERMS.length, TERMS.field)
    assert (torch.from_numpy(words.astype("int64")) != VALUES[NAMES[5]] % 2**TERMS.field).float().mean() > 0.9


def test_a_member_that_sent_values_does_not_help_to_open_a_sum_without_them() -> None:
    member = play(TERMS, VALUES, "agree").members[ME]
    refuses("listed as lost", lambda: member.agree(Survivors(TERMS.digest, NAMES[1:])))


# Fewer than the least number -------------------------------------------------------------------------------------------


def test_the_owner_s_least_number_counts_and_not_that_of_the_server() -> None:
    refuses("owner wants more", lambda: member_of(replace(TERMS, least=4), ME, least=5))
    assert member_of(replace(TERMS, least=5), ME, least=5).offer().member == ME


@pytest.mark.parametrize("step", ["share", "mask", "agree"])
def test_a_list_with_a_start_that_too_few_of_it_got_is_refused(step: str) -> None:
    """All are enough, but of those who got the start of the first member too few are left: the others' values may be known."""
    terms = round_terms(10, starts=("one", "other") * 5)
    played = play(terms, whole_numbers(terms), step)
    left = [name for name in terms.members if name not in terms.members[2:7:2]]
    for name in (terms.members[0], terms.members[1]):
        member, message = played.members[name], played.sent[name]
        cut = {
            "share": lambda m=message: KeyList(terms.digest, tuple(one for one in m.offers if one.member in left)),
            "mask": lambda m=message, n=name: ShareDelivery(
                terms.digest, tuple(left), {one: m.seals[one] for one in left if one != n}
            ),
            "agree": lambda: Survivors(terms.digest, tuple(left)),
        }[step]()
        reply = {"share": member.share, "mask": lambda c, m=member: m.mask(c, VALUES[ME]), "agree": member.agree}[step]
        refuses("a start that fewer than 3", lambda c=cut, r=reply: r(c))


@pytest.mark.parametrize("step", ["share", "mask", "agree", "open"])
def test_fewer_than_the_least_number_are_refused_in_every_step(step: str) -> None:
    terms = replace(TERMS, least=5)
    played = play(terms, VALUES, step)
    message, few = played.sent[ME], NAMES[:4]
    cut = {
        "share": lambda: KeyList(terms.digest, message.offers[:4]),
        "mask": lambda: ShareDelivery(terms.digest, few, {one: message.seals[one] for one in few[1:]}),
        "agree": lambda: Survivors(terms.digest, few),
        "open": lambda: Agreements(terms.digest, {one: message.signatures[one] for one in few}),
    }[step]()
    refuses("4 members are left, the sum needs 5", lambda: ask(played, step, cut))


def test_the_threshold_counts_where_it_is_more_than_the_least_number() -> None:
    terms = round_terms(10)
    values = whole_numbers(terms)
    played = play(terms, values, "agree")
    message = Survivors(terms.digest, terms.members[:5])
    refuses("5 members are left, the sum needs 6", lambda: played.members[terms.members[0]].agree(message))


@pytest.mark.parametrize(
    ("changed", "field"),
    [
        ({"least": 2}, "least"),
        ({"least": 7}, "least"),
        ({"threshold": 0.5}, "threshold"),
        ({"threshold": 1.1}, "threshold"),
        ({"threshold": float("nan")}, "threshold"),
        ({"members": NAMES[::-1]}, "members"),
        ({"members": (*NAMES, NAMES[-1])}, "members"),
        ({"members": (*NAMES, "")}, "members"),
        ({"bits": 25}, "bits"),
        ({"length": 0}, "length"),
        ({"name": ""}, "name"),
    ],
)
def test_terms_that_protect_nobody_are_none(changed: dict[str, Any], field: str) -> None:
    refuses(field, lambda: replace(TERMS, **changed))


# Keys of somebody else -------------------------------------------------------------------------------------------------


def test_keys_that_the_server_made_are_refused() -> None:
    played = play(TERMS, VALUES, "share")
    offers, forged = played.sent[ME].offers, member_of(TERMS, NAMES[1], b"the server's own").offer()
    stranger = member_of(replace(TERMS, members=(*NAMES, "zzz")), "zzz", b"the server's own").offer()
    swapped = (offers[0], replace(offers[2], member=NAMES[1]), replace(offers[1], member=NAMES[2]), *offers[3:])
    for listed, words in (
        ((offers[0], forged, *offers[2:]), "without the signature"),
        ((offers[0], replace(offers[1], mask_key=forged.mask_key), *offers[2:]), "without the signature"),
        ((offers[0], replace(offers[1], seal_key=forged.seal_key), *offers[2:]), "without the signature"),
        (swapped, "without the signature"),
        ((*offers, stranger), "not in the round"),
        ((*offers, offers[-1]), "listed twice"),
        (offers[1:], "keys of this member"),
        ((KeyOffer(*_other_keys()), *offers[1:]), "keys of this member"),
    ):
        fresh = member_of(TERMS, ME)
        refuses(words, lambda m=fresh, many=listed: m.share(KeyList(TERMS.digest, many)))


def _other_keys() -> tuple[str, ...]:
    """Keys under this member's name and with its signature, but of another seed: as it might have offered before a restart."""
    identity, other = identity_of(b"secret", ME), member_of(TERMS, ME, b"other").offer()
    return (other.round, ME, *other.keys, identity.sign(other.signed))


def test_keys_of_another_round_are_refused() -> None:
    before = play(replace(TERMS, name="run/1/1"), VALUES, "share").sent[ME]
    member = member_of(TERMS, ME)
    refuses("another round", lambda: member.share(before))
    refuses("without the signature", lambda: member.share(KeyList(TERMS.digest, before.offers)))


# Other lists, other graphs, other masks --------------------------------------------------------------------------------


def test_members_with_different_lists_cannot_open_each_other_s_shares() -> None:
    """Another list is another graph: the seals are bound to it."""
    offers = play(TERMS, VALUES, "share").sent[ME].offers
    lists = {name: KeyList(TERMS.digest, offers if name == ME else offers[:5]) for name in NAMES[:5]}
    members = {name: member_of(TERMS, name) for name in NAMES[:5]}
    shared = {name: members[name].share(lists[name]) for name in NAMES[:5]}
    seals = {name: shared[name].seals[ME] for name in NAMES[1:5]}
    delivery = ShareDelivery(TERMS.digest, NAMES[:5], seals)
    refuses("sealed share", lambda: members[ME].mask(delivery, VALUES[ME]))


def test_shares_of_others_than_the_neighbours_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graph, "MOST_NEIGHBOURS", 4)
    terms = round_terms(8)
    played = play(terms, whole_numbers(terms), "mask")
    message = played.sent[ME]
    outside = next(one for one in terms.members if one != ME and one not in message.seals)
    first, *others = message.seals
    changed = {outside: message.seals[first], **{one: message.seals[one] for one in others}}
    refuses("neighbours", lambda: ask(played, "mask", replace(message, seals=changed)))


def test_a_member_whose_neighbours_are_said_to_be_lost_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Enough others are left, but nobody with whom it has a mask: its values would stand alone."""
    monkeypatch.setattr(graph, "MOST_NEIGHBOURS", 4)
    terms = round_terms(12)
    values = whole_numbers(terms)
    played = play(terms, values, "mask")
    apart = tuple(one for one in terms.members if one not in played.sent[ME].seals)
    words = "1 holders of this member's shares are left, 2 are needed"
    refuses(words, lambda: ask(played, "mask", ShareDelivery(terms.digest, apart, {})))
    later = play(terms, values, "agree")
    refuses(words, lambda: later.members[ME].agree(Survivors(terms.digest, apart)))


@pytest.mark.parametrize("place", [1, 5])
def test_seals_of_another_member_or_another_place_are_refused(place: int) -> None:
    played = play(TERMS, VALUES, "mask")
    message, other = played.sent[ME], played.sent[NAMES[2]]
    seals = {**message.seals, NAMES[place]: other.seals[NAMES[place]]}
    refuses("sealed share", lambda: ask(played, "mask", replace(message, seals=seals)))
    swapped = {**message.seals, NAMES[1]: message.seals[NAMES[5]], NAMES[5]: message.seals[NAMES[1]]}
    refuses("sealed share", lambda: ask(play(TERMS, VALUES, "mask"), "mask", replace(message, seals=swapped)))


def test_masks_of_members_with_different_sharers_do_not_cancel() -> None:
    """Masks are bound to who shared. Five of eight go on with the group's list and open it: what comes out is no sum."""
    terms = round_terms(8)
    values = whole_numbers(terms)
    group, members, sent = play(terms, values, "mask")
    few = terms.members[:6]
    for name, message in sent.items():
        seals = {one: message.seals[one] for one in few if one != name}
        shorter = ShareDelivery(terms.digest, few, seals)
        group.receive(members[name].mask(shorter if name in few[:3] else message, values[name]))
    for name, survivors in group.advance().items():
        if name in few[:3]:
            refuses("did not share", lambda m=members[name], s=survivors: m.agree(s))
        else:
            group.receive(members[name].agree(survivors))
    for name, agreements in group.advance().items():
        group.receive(members[name].open(agreements))
    group.advance()
    assert (group.total == sum(values.values())).float().mean() < 0.2


def ask(played: Played, step: str, message: object) -> object:
    member = played.members[ME]
    return member.mask(message, VALUES[ME]) if step == "mask" else getattr(member, step)(message)


# Rounds that begin again -----------------------------------------------------------------------------------------------


def test_steps_come_in_order_and_after_a_refusal_nothing_more() -> None:
    played = play(TERMS, VALUES, "agree")
    message = played.sent[ME]
    early = member_of(TERMS, ME)
    refuses("not due", lambda: early.agree(message))
    member = played.members[ME]
    refuses("survivors", lambda: member.agree(Survivors(TERMS.digest, (*NAMES[:5], "zzz"))))
    refuses("not due", lambda: member.agree(message))


# Values ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (torch.full((20,), 2**15), "more than 16 bits"),
        (torch.full((20,), -(2**15)), "more than 16 bits"),
        (torch.full((20,), -(2**63)), "more than 16 bits"),
        (torch.zeros(19, dtype=torch.int64), "19 values"),
        (torch.zeros(20), "20 whole numbers"),
    ],
)
def test_values_that_would_overflow_the_field_are_refused(values: Tensor, words: str) -> None:
    played = play(TERMS, VALUES, "mask")
    refuses(words, lambda: played.members[ME].mask(played.sent[ME], values))


def test_what_is_sent_looks_alike_for_any_values_and_repeats_in_no_round() -> None:
    terms = round_terms(4, length=20_000)
    zeros = dict.fromkeys(terms.members, torch.zeros(terms.length, dtype=torch.int64))
    seen = []
    for name in ("run/1/0", "run/1/1"):
        played = play(replace(terms, name=name), zeros, "mask")
        masked = played.members[ME].mask(played.sent[ME], zeros[ME])
        seen.append(unpack_words(masked.words, terms.length, terms.field))
    for words in seen:
        shares = (
            torch.bincount(torch.from_numpy(words.astype("int64")) >> (terms.field - 4), minlength=16) / terms.length
        )
        assert (shares - 1 / 16).abs().max() < 0.01  # 5.8 standard deviations
    assert (seen[0] == seen[1]).mean() < 0.001


def test_a_stranger_is_not_in_the_round() -> None:
    refuses("not in the round", lambda: member_of(TERMS, "zzz"))
