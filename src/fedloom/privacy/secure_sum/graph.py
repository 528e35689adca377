"""Who masks with whom in a round, and how many of these must be left: all compute the same from what the members offered.

Up to `MOST_NEIGHBOURS` + 1 members each masks with every other. Above, each has `MOST_NEIGHBOURS` neighbours in a circulant graph
over an order that follows from the digest of all offers (Bell et al., CCS 2020, section 3): shares and masks cost as among 41.
Since an active server may choose who offers and who is lost, nothing rests on the chance of the drawing: each member itself
demands that `shares_needed` of its holders are left. With c of these on the server's side its values are hidden among at least
`shares_needed` - c members who are not; in a complete graph among all who are not.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from fedloom.privacy.secure_sum.masks import digest_of

MOST_NEIGHBOURS = 40
"""Neighbours of a member, at most; an even number."""
_SCATTER = 0.2
"""By how much losses among a member's neighbours may exceed those among all, as a share."""


def holders_of_shares(members: Sequence[str], view: str) -> Mapping[str, tuple[str, ...]]:
    """Return who holds shares of each member's secrets: itself and its neighbours, in order of name.

    Args:
        members: all who offered keys.
        view: digest of their offers.
    """
    count = len(members)
    if count <= MOST_NEIGHBOURS + 1:
        return dict.fromkeys(members, tuple(sorted(members)))
    order = sorted(members, key=lambda member: digest_of("place", view, member))
    offsets = sorted(range(2, (count - 1) // 2 + 1), key=lambda offset: digest_of("offset", view, offset))
    chosen = [1, *offsets[: MOST_NEIGHBOURS // 2 - 1]]  # with 1 the graph is connected, whatever the others are
    reach = [0, *chosen, *(-offset for offset in chosen)]
    return {
        member: tuple(sorted(order[(place + offset) % count] for offset in reach)) for place, member in enumerate(order)
    }


def members_needed(threshold: float, members: int) -> int:
    """Return how many of so many members a share of them is, rounded up."""
    return math.ceil(threshold * members - 1e-9)


def shares_needed(threshold: float, holders: int, members: int) -> int:
    """Return how many holders of a member's shares must be left to give its secrets, of so many members in the round.

    In a sparse graph they are fewer by a part: losses scatter more among 41 than among all.
    """
    return members_needed(threshold if holders == members else threshold - _SCATTER, holders)
