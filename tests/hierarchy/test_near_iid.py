"""The search for groups in fleets that are too large to compare every swap."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fedloom.hierarchy import near_iid
from fedloom.hierarchy.grouping import Member, NearIID, RandomGroups
from fedloom.hierarchy.near_iid import FleetArrays
from tests.support.storms import tries


def fleet(count: int, groups: int, largest: int, seed: int = 0, smallest: int = 1) -> FleetArrays:
    """Clients that each hold mostly one label of three, and of three speeds; whoever holds the first is slow."""
    draw = torch.Generator().manual_seed(seed)
    main = torch.randint(3, (count,), generator=draw)
    labels = torch.rand(count, 3, generator=draw, dtype=torch.float64) + 20.0 * torch.nn.functional.one_hot(main, 3)
    seconds = (1.0 + (main == 0)) * (0.5 + torch.rand(count, generator=draw, dtype=torch.float64))
    return FleetArrays(labels, seconds, groups, 0.5, smallest, largest).with_units(seed)


def total(one: FleetArrays, group: Tensor) -> float:
    return float(one.group_utility(group).sum())


def neighbours(group: Tensor) -> list[Tensor]:
    """What one swap of two groups can reach; None stands for an empty place."""
    sides = [[None, *(group == number).nonzero().flatten().tolist()] for number in (0, 1)]
    return [
        group.index_put(
            (torch.tensor([one for one in pair if one is not None]),),
            torch.tensor([1 - number for number, one in enumerate(pair) if one is not None]),
        )
        for pair in product(*sides)
        if pair != (None, None)
    ]


@given(st.integers(2, 14), st.integers(0, 99), st.integers(1, 2), st.integers(0, 3))
@tries(15)
def test_an_exchange_is_the_best_of_the_pair_by_the_definition_of_the_utility(
    count: int, seed: int, smallest: int, room: int
) -> None:
    largest = max(-(-count // 2) + room, smallest)
    one = fleet(count, 2, largest, seed, min(smallest, count // 2))
    group = one.random_groups(seed, 0)
    generator = torch.Generator().manual_seed(seed)
    order = one.seconds.argsort(descending=True, stable=True)
    order = order[group[order].argsort(stable=True)]
    movers, places = near_iid.find_exchanges(one, group, order, torch.tensor([[1], [0]]), generator, 0.0)
    after = group.clone()
    for mover, place in zip(movers.tolist(), places.tolist(), strict=True):
        if mover < count:
            after[mover] = place
    allowed = [
        total(one, other)
        for other in neighbours(group)
        if one.smallest <= int(other.bincount(minlength=2).min()) and int(other.bincount().max()) <= largest
    ]
    assert total(one, after) == pytest.approx(min([total(one, group), *allowed]), abs=1e-8)


@pytest.mark.parametrize(
    ("count", "groups", "largest"), [(40, 8, 5), (41, 5, 15), (90, 2, 60), (9, 9, 1), (9, 1, 9), (5, 2, 3)]
)
def test_pairs_of_groups_come_near_the_search_of_all_swaps(
    monkeypatch: pytest.MonkeyPatch, count: int, groups: int, largest: int
) -> None:
    """Of even and uneven sizes, larger than a sample, one client each, and one group."""
    monkeypatch.setattr(near_iid, "ROUNDS", 200)
    monkeypatch.setattr(near_iid, "QUIET", 20)
    one = fleet(count, groups, largest)
    begun = near_iid.build_groups(one)
    found = near_iid.improve_in_pairs(one, begun, 0)
    sizes = found.bincount(minlength=groups)
    assert 1 <= int(sizes.min()) <= int(sizes.max()) <= largest
    assert total(one, found) <= min(total(one, begun), 1.15 * total(one, near_iid.improve_by_swaps(one, begun)))


def test_clients_that_are_all_alike_stay_where_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(near_iid, "QUIET", 20)
    one = replace(fleet(40, 4, 12), labels=torch.zeros(40, 3).double(), seconds=torch.ones(40).double()).with_units(0)
    group = one.random_groups(0, 0)
    assert torch.equal(near_iid.improve_in_pairs(one, group, 0), group)


def test_a_large_fleet_is_grouped_by_samples_whatever_the_order_of_its_members(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(near_iid, "LARGE", 30)
    monkeypatch.setattr(near_iid, "ROUNDS", 60)
    monkeypatch.setattr(near_iid, "QUIET", 20)
    one = fleet(90, 9, 10)
    rows = zip(one.seconds.tolist(), one.labels.tolist(), strict=True)
    members = [Member(f"c{number:02}", 1, seconds, tuple(labels)) for number, (seconds, labels) in enumerate(rows)]
    how = NearIID(9)
    groups = how(members, 3)
    assert how(members[::-1], 3) == groups
    assert sorted(client for group in groups for client in group) == [member.client for member in members]
    assert {len(group) for group in groups} == {10}
    number = {client: place for place, group in enumerate(groups) for client in group}
    ours = one.terms(torch.tensor([number[member.client] for member in members]))
    chance = one.terms(one.random_groups(0, 0))
    assert float(ours[0].mean()) < float(chance[0].mean())  # whoever holds the first label is slow
    assert float(ours[1].mean()) < float(chance[1].mean()) / 5
    assert how.regrouped(RandomGroups(9)(members, 0), members, 3, price=100.0) == RandomGroups(9)(members, 0)


@given(st.integers(0, 400))
@tries(20)
def test_candidates_of_a_place_are_few_and_from_everywhere(length: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(near_iid, "LARGE", 40)
        kept = near_iid.thin_out(torch.arange(length)).tolist()
    assert kept == sorted(set(kept))
    assert len(kept) <= 40
    assert kept[:20] == list(range(length))[:20]
    assert length <= 40 or kept[-1] >= length - 1 - length // 20
