"""The graph of masks: the same for everybody, symmetric, connected, and as wide as it must be."""

from __future__ import annotations

import pytest

from fedloom.privacy.secure_sum.graph import MOST_NEIGHBOURS, holders_of_shares, members_needed, shares_needed


def names(count: int) -> tuple[str, ...]:
    return tuple(f"site-{number:03d}" for number in range(count))


@pytest.mark.parametrize("count", [3, 10, 41, 42, 43, 50, 100])
def test_neighbours_hold_shares_of_each_other_and_all_are_connected(count: int) -> None:
    members = names(count)
    graph = holders_of_shares(members, "view")
    assert all(one in graph[one] for one in members)
    assert all(one in graph[other] for one in members for other in graph[one])
    assert {len(holders) for holders in graph.values()} == {min(count, MOST_NEIGHBOURS + 1)}
    reached = {members[0]}
    for _ in members:
        reached |= {other for one in reached for other in graph[one]}
    assert reached == {*members}


def test_the_graph_follows_from_all_offers_and_not_from_the_order_of_names() -> None:
    members = names(100)
    graph = holders_of_shares(members, "view")
    assert graph == holders_of_shares(members[::-1], "view")
    other = holders_of_shares(members, "another view")
    common = [len({*graph[one]} & {*other[one]}) for one in members]
    assert max(common) < 30  # two of 41 among 100 share about 17


@pytest.mark.parametrize(("threshold", "members", "needed"), [(0.6, 5, 3), (0.6, 10, 6), (0.55, 20, 11), (1.0, 7, 7)])
def test_a_share_of_the_members_is_rounded_up(threshold: float, members: int, needed: int) -> None:
    assert members_needed(threshold, members) == needed


def test_a_sparse_graph_asks_for_fewer_of_the_holders() -> None:
    """With 30 of 100 lost fewer than 17 of 41 holders are left with a chance of 4e-8 a member (hypergeometric)."""
    assert shares_needed(0.6, 41, 41) == 25
    assert shares_needed(0.6, 41, 100) == 17
