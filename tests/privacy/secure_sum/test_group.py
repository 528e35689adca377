"""A round from the keys to the sum: exact whoever is lost and when, and what the group refuses of its members."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch

from fedloom.core.errors import Refused
from fedloom.core.types import ClientId
from fedloom.privacy.secure_sum import graph
from fedloom.privacy.secure_sum.member import MemberRound
from fedloom.privacy.secure_sum.messages import Survivors
from tests.support.masked_sums import Step, masked_sum, member_of, play, reply_of, round_terms, whole_numbers

LONG = [pytest.mark.slow, pytest.mark.storms]


@pytest.mark.parametrize(
    ("count", "share"),
    [
        (3, 0.0),
        (10, 0.0),
        (10, 0.1),
        (10, 0.3),
        pytest.param(50, 0.3, marks=pytest.mark.slow),
        *(pytest.param(n, p, marks=LONG) for n, p in ((50, 0.0), (50, 0.1), (100, 0.0), (100, 0.1), (100, 0.3))),
    ],
)
def test_a_sum_is_that_of_the_whole_numbers_whoever_is_lost(count: int, share: float) -> None:
    terms = round_terms(count)
    values, gone = whole_numbers(terms), terms.members[:: max(1, round(1 / share))] if share else ()
    gone = gone[: int(share * count)]
    before, after = gone[::2], gone[1::2]
    total, survivors = masked_sum(terms, values, lost_before=before, lost_after=after)
    assert survivors == tuple(one for one in terms.members if one not in before)
    assert (total == sum(values[one] for one in survivors)).all()
    assert total.dtype == torch.int64


def test_a_sum_over_a_sparse_graph_is_exact_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graph, "MOST_NEIGHBOURS", 6)
    terms = round_terms(16)
    values, lost = whole_numbers(terms), round_terms(16).members[::5]
    total, survivors = masked_sum(terms, values, lost_before=lost[:2], lost_after=lost[2:])
    assert len(survivors) == 14
    assert (total == sum(values[one] for one in survivors)).all()


@pytest.mark.parametrize("step", ["share", "mask"])
def test_where_too_few_of_a_start_are_left_all_of_it_are_out_of_the_sum(step: Step) -> None:
    terms = round_terms(12, starts=("one", "other", "other") * 4, threshold=0.55)
    values, gone = whole_numbers(terms), terms.members[:6:3]
    group = play(terms, values, lost={step: gone}).group
    others = tuple(name for name in terms.members if terms.start_of(name) == "other")
    assert group.survivors == others
    assert (group.total == sum(values[one] for one in others)).all()


def test_members_are_lost_in_every_step() -> None:
    terms = round_terms(15)
    values, names = whole_numbers(terms), terms.members
    lost: Mapping[Step, tuple[ClientId, ...]] = {
        "share": names[:1],
        "mask": names[1:3],
        "agree": names[3:4],
        "open": names[4:5],
    }
    group = play(terms, values, lost=lost).group
    assert group.survivors == names[3:]
    assert (group.total == sum(values[one] for one in names[3:])).all()


@pytest.mark.parametrize("bits", [4, 12, 24])
def test_the_largest_values_do_not_overflow(bits: int) -> None:
    terms = round_terms(3, bits=bits)
    values = {one: torch.full((terms.length,), 2 ** (bits - 1) - 1) for one in terms.members}
    assert (masked_sum(terms, values)[0] == 3 * (2 ** (bits - 1) - 1)).all()
    assert (masked_sum(terms, {one: -value for one, value in values.items()})[0] == -3 * (2 ** (bits - 1) - 1)).all()


def test_keys_and_order_do_not_change_the_sum() -> None:
    terms = round_terms(5)
    values = whole_numbers(terms)
    first, second = masked_sum(terms, values), masked_sum(terms, values, secret=b"another secret")
    assert (first[0] == second[0]).all()
    group, members, sent = play(terms, values, "mask")
    for name in reversed(terms.members):
        group.receive(members[name].mask(sent[name], values[name]))
    sent = group.advance()
    for step in ("agree", "open"):
        for name in reversed(terms.members):
            group.receive(reply_of(members[name], step, sent[name], values))
        sent = group.advance()
    assert (group.total == first[0]).all()


@pytest.mark.parametrize(
    ("lost", "left"),
    [({"share": 5}, 5), ({"mask": 5}, 5), ({"agree": 5}, 5), ({"mask": 2, "agree": 3}, 5)],
)
def test_a_round_with_too_few_left_is_dropped(lost: dict[Step, int], left: int) -> None:
    """Of ten six must be left in every step, by the threshold; here the least number is smaller."""
    terms, gone = round_terms(10), {}
    names = terms.members
    for step, count in lost.items():
        gone[step], names = names[:count], names[count:]
    with pytest.raises(Refused, match=f"{left} members are left, the sum needs 6"):
        play(terms, whole_numbers(terms), lost=gone)


def test_without_enough_opened_shares_the_round_is_dropped() -> None:
    terms = round_terms(10)
    with pytest.raises(Refused, match="5 shares of a secret, 6 are needed"):
        play(terms, whole_numbers(terms), lost={"open": terms.members[:5]})


def test_the_sum_is_there_only_at_the_end() -> None:
    group = play(round_terms(3), whole_numbers(round_terms(3)), "open").group
    with pytest.raises(ValueError, match="not over"):
        _ = group.total
    assert group.missing == round_terms(3).members


def test_a_message_counts_once_and_only_from_who_was_asked() -> None:
    terms = round_terms(4)
    values = whole_numbers(terms)
    group, members, sent = play(terms, values, "mask", lost={"share": terms.members[3:]})
    one, gone = terms.members[0], terms.members[3]
    masked = members[one].mask(sent[one], values[one])
    group.receive(masked)
    group.receive(masked)
    for message, words in (
        (replace(masked, words=masked.words[::-1]), "which is another one"),
        (replace(masked, member=gone), "not asked"),
        (replace(masked, member=terms.members[1], words=masked.words[:-1]), "another size"),
        (replace(masked, round="0" * 64), "another round"),
        (Survivors(terms.digest, terms.members), "another step"),
    ):
        with pytest.raises(Refused, match=words):
            group.receive(message)
    for name in terms.members[1:3]:
        group.receive(members[name].mask(sent[name], values[name]))
    finish(group, members)
    assert (group.total == sum(values[one] for one in terms.members[:3])).all()


def test_keys_of_somebody_else_are_left_out_and_the_round_goes_on() -> None:
    terms = round_terms(4)
    group = play(terms, whole_numbers(terms), "share").group
    fresh = type(group)(terms, group._verify)
    offers = {name: member_of(terms, name).offer() for name in terms.members}
    with pytest.raises(Refused, match="signature"):
        fresh.receive(replace(offers[terms.members[0]], member=terms.members[1]))
    with pytest.raises(Refused, match="signature"):
        fresh.receive(replace(offers[terms.members[0]], mask_key=offers[terms.members[1]].mask_key))
    with pytest.raises(Refused, match="keys that are none"):
        fresh.receive(replace(offers[terms.members[0]], mask_key="zz"))
    for name in terms.members[1:]:
        fresh.receive(offers[name])
    assert {*fresh.advance()} == {*terms.members[1:]}


def test_a_share_that_does_not_fit_drops_the_round_and_no_wrong_sum_comes_out() -> None:
    terms = round_terms(5)
    values = whole_numbers(terms)
    for kind in ("own", "pair"):
        group, members, sent = play(terms, values, "open", lost={"mask": terms.members[4:]})
        for name in terms.members[:4]:
            opened = members[name].open(sent[name])
            wrong = dict.fromkeys(getattr(opened, kind), "00" * 16)
            group.receive(replace(opened, **{kind: wrong}) if name == terms.members[0] else opened)
        with pytest.raises(Refused, match="do not fit"):
            group.advance()


def test_shares_that_were_not_asked_for_are_refused() -> None:
    terms = round_terms(5)
    group, members, sent = play(terms, whole_numbers(terms), "open", lost={"mask": terms.members[4:]})
    opened = members[terms.members[0]].open(sent[terms.members[0]])
    both = replace(opened, pair={**opened.pair, terms.members[1]: "00" * 16})
    with pytest.raises(Refused, match="one for each member"):
        group.receive(both)


def finish(group: object, members: Mapping[ClientId, MemberRound]) -> None:
    """Play the last two steps."""
    sent = group.advance()
    for step in ("agree", "open"):
        for name, message in sent.items():
            group.receive(getattr(members[name], step)(message))
        sent = group.advance()
