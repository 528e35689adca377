"""Groupings: rules that put clients into groups, each behind an edge.

Source: Liu, Liao, H. Xu and Y. Xu, HierFedLoRA, arXiv 2503.21213, 2025 (near-IID groups); its predecessor ParallelSFL, arXiv
2410.01256, 2024 (how they are found); the other groupings are what it is compared with.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean
from typing import TypeAlias

import torch

from fedloom.core.errors import Refused
from fedloom.core.seeds import rng
from fedloom.core.types import ClientId
from fedloom.hierarchy import near_iid

Groups: TypeAlias = tuple[tuple[ClientId, ...], ...]


@dataclass(frozen=True, slots=True)
class Member:
    """Facts that a grouping knows of a client.

    Fields:
        client: name of the client.
        examples: number of its training examples.
        seconds: its own time for one step or one round, whichever the caller measures, the same for all.
        labels: counts of its examples by label, or by topic where there are no labels; may be noisy; empty if no grouping needs them.
        region: where it is, or which link it hangs on ("": unknown).
    """

    client: ClientId
    examples: int
    seconds: float
    labels: tuple[float, ...]
    region: str = ""

    def __post_init__(self) -> None:
        if self.examples < 0:
            raise Refused(
                "member.examples", self.examples, f"client {self.client} holds a number of examples, 0 or more"
            )
        if not 0 <= self.seconds < math.inf:
            raise Refused("member.seconds", self.seconds, f"give finite seconds of client {self.client}, 0 or more")
        if not all(0 <= count < math.inf for count in self.labels):
            raise Refused("member.labels", self.labels, f"the counts of client {self.client} are finite, 0 or more")


Grouping: TypeAlias = Callable[[Sequence[Member], int], Groups]
"""(members, seed) -> groups, with every member in exactly one. The order of the members does not matter."""


@dataclass(frozen=True, slots=True)
class Given:
    """Grouping as given, in that order.

    Fields:
        groups: names of the clients of each group.
    """

    groups: Groups = ()

    def __post_init__(self) -> None:
        twice = next((client for client, times in count_named(self.groups).items() if times > 1), None)
        if twice is not None:
            raise Refused("grouping.groups", twice, "a client is in one group; it is named twice")
        if not all(self.groups):
            raise Refused("grouping.groups", self.groups, "a group has at least one client; leave the empty one out")

    def __call__(self, members: Sequence[Member], seed: int) -> Groups:
        """Return these groups, if they name just these members."""
        named, there = {client for group in self.groups for client in group}, set(members_by_name(members, 1))
        for client in sorted(there - named):
            raise Refused("grouping.groups", client, "is in no group; name every client of the run")
        for client in sorted(named - there):
            raise Refused("grouping.groups", client, "is no client of the run; take it out")
        return self.groups


@dataclass(frozen=True, slots=True)
class ByRegion:
    """Grouping by region, in order of their names: clients near each other, whose links to an edge are short."""

    def __call__(self, members: Sequence[Member], seed: int) -> Groups:
        """Return the clients of each region."""
        regions = dict[str, list[ClientId]]()
        for member in members_by_name(members, 1).values():
            if not member.region:
                raise Refused(
                    "member.region", member.region, f"say where client {member.client} is, or group otherwise"
                )
            regions.setdefault(member.region, []).append(member.client)
        return tuple(tuple(regions[region]) for region in sorted(regions))


@dataclass(frozen=True, slots=True)
class RandomGroups:
    """Grouping at random into so many groups, of sizes that differ by at most 1: what every other grouping must beat.

    Fields:
        groups: number of groups.
    """

    groups: int = 8

    def __post_init__(self) -> None:
        check_at_least_one("groups", self.groups)

    def __call__(self, members: Sequence[Member], seed: int) -> Groups:
        """Return a draw that the seed alone decides."""
        clients = list(members_by_name(members, self.groups))
        rng(seed, "groups").shuffle(clients)
        return tuple(tuple(sorted(group)) for group in split_evenly(clients, self.groups))


@dataclass(frozen=True, slots=True)
class BySpeed:
    """Grouping by speed, the fastest clients first: clients wait little, whatever the labels (tiers, as in TiFL).

    Fields:
        groups: number of groups.
    """

    groups: int = 8

    def __post_init__(self) -> None:
        check_at_least_one("groups", self.groups)

    def __call__(self, members: Sequence[Member], seed: int) -> Groups:
        """Return the clients sorted by seconds, and cut into pieces of sizes that differ by at most 1."""
        by_name = members_by_name(members, self.groups)
        quickest = sorted(by_name, key=lambda client: (by_name[client].seconds, client))
        return tuple(tuple(sorted(group)) for group in split_evenly(quickest, self.groups))


@dataclass(frozen=True, slots=True)
class NearIID:
    """Grouping in which each group resembles all clients together, in labels, and clients wait little (HierFedLoRA).

    Minimises the sum over groups of `waiting` * waiting time + (1 - `waiting`) * KL of the group's labels from all. Both are relative
    to random groups. It makes groups greedily, then swaps clients until no swap gains, in large fleets of a sample (see `near_iid`).

    Fields:
        groups: number of groups.
        waiting: weight of waiting, between 0 (labels alone) and 1.
        smallest: the fewest clients of a group.
        largest: largest number of clients of a group (None: the even share, rounded up).
    """

    groups: int = 8
    waiting: float = 0.5
    smallest: int = 1
    largest: int | None = None

    def __post_init__(self) -> None:
        check_at_least_one("groups", self.groups)
        check_at_least_one("smallest", self.smallest)
        if not 0 <= self.waiting <= 1:
            raise Refused("grouping.waiting", self.waiting, "the weight of waiting lies between 0 (labels alone) and 1")
        if self.largest is not None and self.largest < self.smallest:
            raise Refused("grouping.largest", self.largest, f"at least grouping.smallest, which is {self.smallest}")

    def __call__(self, members: Sequence[Member], seed: int) -> Groups:
        """Return new groups, from nothing. Cost: see `near_iid`; 1,000 clients take seconds, and 10,000 ten or so."""
        by_name = members_by_name(members, self.groups)
        fleet = self._fleet(list(by_name.values()), seed)
        group = near_iid.improve_groups(fleet, near_iid.build_groups(fleet), seed)
        return groups_by_number(list(by_name), group, self.groups)

    def regrouped(self, before: Groups, members: Sequence[Member], seed: int, price: float = 0.05) -> Groups:
        """Return the groups `before`, in their order, with as few clients as pays in another one.

        New clients go where they add least; then swaps, each of which must lower the utility by `price` (a random group has 1).
        From nothing, if `before` cannot be kept: another number of groups, or sizes that are out of bounds now.
        """
        by_name = members_by_name(members, self.groups)
        clients, old = list(by_name), {client: number for number, group in enumerate(before) for client in group}
        fleet = self._fleet(list(by_name.values()), seed)
        if len(before) == self.groups:
            group = near_iid.add_members(fleet, torch.tensor([old.get(client, -1) for client in clients]))
            sizes = torch.bincount(group, minlength=self.groups)
            if fleet.smallest <= int(sizes.min()) and int(sizes.max()) <= fleet.largest:
                return groups_by_number(clients, near_iid.improve_groups(fleet, group, seed, price), self.groups)
        return self(members, seed)

    def _fleet(self, members: Sequence[Member], seed: int) -> near_iid.FleetArrays:
        """Return the members, in order of their names, as tensors."""
        count, lengths = len(members), {len(member.labels) for member in members}
        largest = self.largest if self.largest is not None else -(-count // self.groups)
        if not self.smallest * self.groups <= count <= largest * self.groups:
            bounds = f"{self.groups} groups of {self.smallest} to {largest} clients"
            raise Refused("grouping.smallest", self.smallest, f"{count} clients do not make {bounds}")
        if len(lengths) > 1 or 0 in lengths:
            remedy = "histograms of all clients have the same labels, at least one; without labels use BySpeed"
            raise Refused("member.labels", sorted(lengths), remedy)
        labels = torch.tensor([member.labels for member in members], dtype=torch.float64)
        seconds = torch.tensor([member.seconds for member in members], dtype=torch.float64)
        return near_iid.FleetArrays(labels, seconds, self.groups, self.waiting, self.smallest, largest).with_units(seed)


def time_drift(before: Mapping[ClientId, float], now: Mapping[ClientId, float]) -> float:
    """Return the share by which clients' seconds have moved apart; inf if no client is in both.

    Compared is each client's time relative to all others': if all become twice as slow, waiting does not change.
    It is exp(mean of |log(now / before) - its mean|) - 1, so 0.25 if half the clients became 1.25 times slower, half as much faster.
    """
    moves = [math.log(max(now[one], 1e-9) / max(was, 1e-9)) for one, was in before.items() if one in now]
    if not moves:
        return math.inf
    centre = fmean(moves)
    return math.expm1(fmean(abs(move - centre) for move in moves))


def validate_groups(groups: Groups, members: Sequence[Member]) -> Groups:
    """Return the groups that are not empty. Raises Refused unless each client is in exactly one."""
    valid = tuple(group for group in groups if group)
    every = count_named(valid)
    for client in {member.client for member in members} ^ set(every):
        remedy = "is no client of this run" if client in every else "is in no group"
        raise Refused("hierarchy.groups", client, f"this client {remedy}; each client belongs to exactly one")
    for client, times in every.items():
        if times > 1:
            raise Refused("hierarchy.groups", client, "this client is in two groups; each belongs to exactly one")
    return valid


def count_named(groups: Groups) -> Counter[ClientId]:
    """Return how often each client is named in the groups, in their order."""
    return Counter(client for group in groups for client in group)


def match_groups(before: Groups, after: Groups) -> Groups:
    """Return the groups `after` in the order of `before`, so that few clients change their number: the largest overlaps first.

    Raises Refused if there are more or fewer than before.
    """
    if len(after) != len(before):
        remedy = (
            f"asked anew it makes so many, and there are {len(before)} edges; make always as many, or leave regroup out"
        )
        raise Refused("hierarchy.groups", len(after), remedy)
    old = {client: number for number, group in enumerate(before) for client in group}
    common = Counter((number, old[client]) for number, group in enumerate(after) for client in group if client in old)
    places, placed = dict[int, int](), set[int]()
    for (number, place), _ in sorted(common.items(), key=lambda entry: (-entry[1], entry[0])):
        if number not in placed and place not in places:
            places[place] = number
            placed.add(number)
    rest = iter(sorted(set(range(len(after))) - placed))
    return tuple(after[places[place] if place in places else next(rest)] for place in range(len(before)))


def members_by_name(members: Sequence[Member], groups: int) -> dict[ClientId, Member]:
    """Return the members by client, in order of their names. Raises Refused if one is there twice, or there are fewer than groups."""
    by_name = {member.client: member for member in sorted(members, key=lambda member: member.client)}
    if len(by_name) < len(members):
        raise Refused("members", len(members), f"{len(members) - len(by_name)} of the clients are there twice")
    if len(by_name) < max(groups, 1):
        raise Refused("grouping.groups", groups, f"there are {len(by_name)} clients; make no more groups than clients")
    return by_name


def split_evenly(clients: Sequence[ClientId], groups: int) -> Groups:
    """Return the clients in this order, cut into groups of sizes that differ by at most 1."""
    share, rest = divmod(len(clients), groups)
    ends = [number * share + min(number, rest) for number in range(groups + 1)]
    return tuple(tuple(clients[begin:end]) for begin, end in pairwise(ends))


def groups_by_number(clients: Sequence[ClientId], group: torch.Tensor, groups: int) -> Groups:
    """Return the clients of each group, by the numbers in `group`."""
    held: list[list[ClientId]] = [[] for _ in range(groups)]
    for client, own in zip(clients, group.tolist(), strict=True):
        held[own].append(client)
    return tuple(map(tuple, held))


def check_at_least_one(field: str, value: int) -> None:
    """Raise Refused for a setting below 1."""
    if value < 1:
        raise Refused(f"grouping.{field}", value, "choose a whole number of at least 1")
