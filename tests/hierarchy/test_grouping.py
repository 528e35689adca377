"""Who trains with whom."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cache
from itertools import permutations
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedloom.core import schema
from fedloom.core.errors import Refused
from fedloom.core.seeds import rng
from fedloom.hierarchy import near_iid
from fedloom.hierarchy.grouping import (
    ByRegion,
    BySpeed,
    Given,
    Grouping,
    Groups,
    Member,
    NearIID,
    RandomGroups,
    time_drift,
)
from tests.support.storms import tries

EVERY: tuple[Grouping, ...] = (NearIID(3), BySpeed(3), RandomGroups(3), ByRegion())


def fleet(count: int, labels: int = 4, seed: int = 0) -> list[Member]:
    """Clients that each hold mostly one label, of three speeds and in three regions."""
    draw = rng(seed, "fleet")
    return [
        Member(
            f"c{number:03}",
            100,
            draw.choice((1.0, 2.4, 6.0)) * draw.uniform(0.8, 1.2),
            tuple(90.0 if draw.randrange(labels) == label else float(draw.randrange(4)) for label in range(labels)),
            f"r{number % 3}",
        )
        for number in range(count)
    ]


@cache
def units_of(how: NearIID, members: tuple[Member, ...], seed: int) -> tuple[float, float]:
    return how._fleet(sorted(members, key=lambda member: member.client), seed).units


def utility(how: NearIID, members: Sequence[Member], groups: Groups, seed: int = 0) -> float:
    """The sum that NearIID minimises, term by term: Eqs. 11 and 14 of ParallelSFL in units of random groups."""
    units = units_of(how, tuple(members), seed)
    known = {member.client: member for member in members}
    whole = [sum(column) for column in zip(*(member.labels for member in members), strict=True)]
    total = 0.0
    for group in groups:
        times = [known[client].seconds for client in group]
        counts = [sum(column) for column in zip(*(known[client].labels for client in group), strict=True)]
        wait = max(times) - sum(times) / len(times)
        shares = torch.tensor([counts, whole], dtype=torch.float64) + near_iid.SMOOTHING
        own, all_ = shares / shares.sum(1, keepdim=True)
        far = float((own * (own / all_).log()).sum())
        total += how.waiting * wait / units[0] + (1 - how.waiting) * far / units[1]
    return total


def partitions(clients: Sequence[str], sizes: tuple[int, int], groups: int) -> Iterator[Groups]:
    """Every way to make so many unordered groups of sizes within these bounds."""
    if not clients:
        yield from [()] if groups == 0 else []
        return
    if groups == 0:
        return
    first, rest = clients[0], clients[1:]
    for picks in range(2 ** len(rest)):
        mates = [client for place, client in enumerate(rest) if picks >> place & 1]
        if sizes[0] <= len(mates) + 1 <= sizes[1]:
            left = [client for client in rest if client not in mates]
            yield from (((first, *mates), *others) for others in partitions(left, sizes, groups - 1))


@pytest.mark.parametrize(
    ("count", "how"),
    [
        (6, NearIID(2)),
        (8, NearIID(2)),
        (8, NearIID(4, waiting=0.3)),
        (8, NearIID(3, smallest=2, largest=4)),
        (7, NearIID(2, largest=5)),
    ],
)
def test_near_iid_groups_are_near_the_best_there_are(count: int, how: NearIID) -> None:
    """Against all partitions of the allowed sizes: never worse than 1.6 times the best, and the best itself 8 times in 12."""
    largest, ratios = how.largest or -(-count // how.groups), []
    for seed in range(12):
        members = fleet(count, 3, seed)
        every = partitions([member.client for member in members], (how.smallest, largest), how.groups)
        of = cache(lambda group, members=members: utility(how, members, (group,)))
        best = min(sum(map(of, groups)) for groups in every)
        ratios.append(utility(how, members, how(members, 0)) / best)
    assert min(ratios) >= 1 - 1e-9
    assert max(ratios) < 1.6
    assert sum(ratio < 1 + 1e-9 for ratio in ratios) >= 8


@given(st.integers(4, 24), st.integers(1, 4), st.integers(0, 3), st.floats(0, 1), st.randoms())
@tries(40)
def test_near_iid_stops_where_no_swap_gains(count: int, groups: int, seed: int, waiting: float, order: Any) -> None:
    """Every exchange and every allowed move is tried by the definition of the utility; sizes keep their bounds."""
    how, members = NearIID(groups, waiting, smallest=1, largest=count // groups + 2), fleet(count, 3, seed)
    found = how(members, seed)
    shuffled = list(members)
    order.shuffle(shuffled)
    assert how(shuffled, seed) == found
    assert sorted(client for group in found for client in group) == [member.client for member in members]
    assert all(1 <= len(group) <= count // groups + 2 for group in found)
    reached = utility(how, members, found, seed)
    for other in neighbours(found, how.largest or 0):
        assert utility(how, members, other, seed) > reached - 1e-6


def neighbours(groups: Groups, largest: int) -> Iterator[Groups]:
    """One exchange or one move away."""
    home = {client: number for number, group in enumerate(groups) for client in group}
    for one, ours in home.items():
        for number, group in enumerate(groups):
            if number != ours and len(group) < largest and len(groups[ours]) > 1:
                yield placed({**home, one: number}, len(groups))
        for two, theirs in home.items():
            if one < two and ours != theirs:
                yield placed({**home, one: theirs, two: ours}, len(groups))


def placed(home: dict[str, int], groups: int) -> Groups:
    return tuple(tuple(client for client, own in home.items() if own == number) for number in range(groups))


def test_near_iid_groups_resemble_the_whole_more_than_random_ones_and_wait_less() -> None:
    members = fleet(60, 4)
    fast, random = NearIID(6), RandomGroups(6)
    everyone = fast._fleet(members, 0)

    def terms(groups: Groups) -> tuple[float, float]:
        number = {client: place for place, group in enumerate(groups) for client in group}
        waiting, far = everyone.terms(torch.tensor([number[member.client] for member in members]))
        return float(waiting.mean()), float(far.mean())

    drawn = [terms(random(members, seed)) for seed in range(10)]
    waiting, far = (sum(values) / len(values) for values in zip(*drawn, strict=True))
    ours = terms(fast(members, 0))
    assert ours[0] < 0.7 * waiting
    assert ours[1] < far / 5
    assert terms(NearIID(6, waiting=0.0)(members, 0))[1] < ours[1]
    assert terms(NearIID(6, waiting=1.0)(members, 0))[0] <= ours[0]


def test_waiting_alone_is_groups_by_speed() -> None:
    """On one line nothing beats neighbours: with distinct times, sorted and cut."""
    members = [replace(member, seconds=float(2**place)) for place, member in enumerate(fleet(12))]
    by_speed = BySpeed(4)(members, 0)
    alone = NearIID(4, waiting=1.0)
    assert utility(alone, members, alone(members, 0)) <= utility(alone, members, by_speed) + 1e-9


@pytest.mark.parametrize("how", EVERY, ids=lambda how: type(how).__name__)
@given(count=st.integers(3, 20), seed=st.integers(0, 5), order=st.randoms())
@tries(15)
def test_everybody_is_in_one_group_whatever_the_order(how: Grouping, count: int, seed: int, order: Any) -> None:
    members = fleet(count)
    groups = how(members, seed)
    assert sorted(client for group in groups for client in group) == [member.client for member in members]
    assert len(groups) == 3
    assert all(list(group) == sorted(group) for group in groups)
    if isinstance(how, BySpeed | RandomGroups):
        assert max(map(len, groups)) - min(map(len, groups)) <= 1
    order.shuffle(members)
    assert how(members, seed) == groups


def test_groups_by_speed_begin_with_the_fastest() -> None:
    members = [Member(name, 1, seconds, ()) for name, seconds in zip("abcde", (5.0, 1.0, 1.0, 3.0, 9.0), strict=True)]
    assert BySpeed(2)(members, 0) == (("b", "c", "d"), ("a", "e"))


def test_random_groups_follow_the_seed() -> None:
    drawn = {RandomGroups(3)(fleet(12), seed) for seed in range(5)}
    assert len(drawn) == 5
    assert RandomGroups(3)(fleet(12), 2) in drawn


def test_given_groups_are_what_was_written() -> None:
    how = Given((("c002", "c000"), ("c001",)))
    assert how(fleet(3), 9) == (("c002", "c000"), ("c001",))


def seconds_of(members: Sequence[Member]) -> dict[str, float]:
    return {member.client: member.seconds for member in members}


def test_times_drift_when_they_move_apart_not_when_all_are_slower() -> None:
    before = fleet(20)
    slower = [replace(member, seconds=3 * member.seconds) for member in before]
    apart = [replace(member, seconds=member.seconds * (2 if place % 2 else 0.5)) for place, member in enumerate(before)]
    others = [replace(member, client=f"new {member.client}") for member in before]
    assert time_drift(seconds_of(before), seconds_of(before)) == 0.0
    assert time_drift(seconds_of(before), seconds_of(slower)) < 0.01
    assert time_drift(seconds_of(before), seconds_of(apart)) == pytest.approx(1.0)  # exactly twice or half
    assert time_drift(seconds_of(before), seconds_of(others)) == math.inf


def test_regrouping_keeps_clients_where_they_are() -> None:
    """A tenth of the fleet has become another class: few move, and three quarters of what new groups would save is saved."""
    how, members = NearIID(6), fleet(60)
    before = how(members, 0)
    now = [replace(m, seconds=7.0 - m.seconds) if place % 10 == 0 else m for place, m in enumerate(members)]
    kept, fresh = how.regrouped(before, now, 0), how(now, 0)
    assert stay(before, before) == 1.0
    assert stay(before, kept) > 0.7
    assert stay(before, kept) > 0.2 + max(stay(before, renumbered) for renumbered in permutations(fresh))
    old, new, best = (utility(how, now, groups) for groups in (before, kept, fresh))
    assert old - new > 0.75 * (old - best) > 0
    assert how.regrouped(before, now, 0, price=100.0) == before
    assert how.regrouped(before, members, 0) == before


def stay(before: Groups, after: Groups) -> float:
    """The share of clients in the same group, groups told by their number."""
    same = sum(len(set(old) & set(new)) for old, new in zip(before, after, strict=True))
    return same / sum(map(len, before))


def test_who_joins_finds_a_place_and_who_left_leaves_one() -> None:
    how, members = NearIID(4, largest=8), fleet(24)
    before = how(members[:20], 0)
    after = how.regrouped(before, members[4:], 0, price=100.0)
    there = {member.client for member in members[4:]}
    assert {client for group in after for client in group} == there
    for old, new in zip(before, after, strict=True):
        assert set(old) & there <= set(new)


def test_groups_that_cannot_be_kept_are_made_anew() -> None:
    how, members = NearIID(4), fleet(20)
    before = how(members, 0)
    gone = [member for member in members if member.client not in before[0]]
    assert how.regrouped(before[1:], members, 0) == before
    fewer = how.regrouped(before, gone, 0)  # the first group is empty, the others hold more than the even share
    assert fewer == how(gone, 0)


@pytest.mark.parametrize("how", [NearIID, BySpeed, ByRegion, RandomGroups, Given])
def test_a_grouping_needs_no_arguments_and_prints_as_python(how: Any) -> None:
    schema.check_fields(how())
    assert repr(how()).startswith(f"{how.__name__}(")
    assert eval(repr(how()), {how.__name__: how}) == how()


@pytest.mark.parametrize(
    ("make", "field"),
    [
        (lambda: NearIID(groups=0), "groups"),
        (lambda: NearIID(waiting=1.5), "waiting"),
        (lambda: NearIID(waiting=float("nan")), "waiting"),
        (lambda: NearIID(smallest=0), "smallest"),
        (lambda: NearIID(smallest=5, largest=4), "largest"),
        (lambda: BySpeed(0), "groups"),
        (lambda: RandomGroups(-1), "groups"),
        (lambda: Given((("a", "b"), ("b",))), "groups"),
        (lambda: Given((("a",), ())), "groups"),
        (lambda: Given((("c000",),))(fleet(2), 0), "groups"),
        (lambda: Given((("c000", "c001"),))(fleet(1), 0), "groups"),
        (lambda: NearIID(9)(fleet(8), 0), "groups"),
        (lambda: BySpeed(9)(fleet(8), 0), "groups"),
        (lambda: ByRegion()([], 0), "groups"),
        (lambda: ByRegion()([Member("a", 1, 1.0, ())], 0), "region"),
        (lambda: NearIID(2, smallest=5)(fleet(8), 0), "smallest"),
        (lambda: NearIID(2, largest=3)(fleet(8), 0), "smallest"),
        (lambda: NearIID(2)([*fleet(3), Member("z", 1, 1.0, (1.0,))], 0), "labels"),
        (lambda: NearIID(1)([Member("z", 1, 1.0, ())], 0), "labels"),
        (lambda: RandomGroups(1)([*fleet(3), *fleet(1)], 0), "members"),
        (lambda: Member("a", -1, 1.0, ()), "examples"),
        (lambda: Member("a", 1, float("inf"), ()), "seconds"),
        (lambda: Member("a", 1, -1.0, ()), "seconds"),
        (lambda: Member("a", 1, 1.0, (1.0, float("nan"))), "labels"),
    ],
)
def test_what_cannot_be_grouped_is_refused_by_name(make: Any, field: str) -> None:
    with pytest.raises(Refused, match=field):
        make()
