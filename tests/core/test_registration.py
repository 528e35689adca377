"""What a client counts for follows from what it registered, and from no answer of it."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from fedloom.core.registration import MOST, counted_examples, register
from fedloom.core.types import Profile
from tests.support.storms import tries

SIZES = st.lists(st.integers(1, 10**12), min_size=2, max_size=9)


def joined(sizes: list[int], claimed: bool = True) -> tuple[dict[str, int], list[Profile]]:
    registered, profiles = dict[str, int](), [Profile(f"c{k}", size, claimed=claimed) for k, size in enumerate(sizes)]
    return registered, [register(registered, profile) for profile in profiles]


@given(sizes=SIZES, lie=st.integers(1, 10**12))
@tries(50)
def test_a_liar_has_a_share_that_does_not_grow_with_its_lie(sizes: list[int], lie: int) -> None:
    registered, (*honest, liar) = joined([*sizes, lie])
    counted = [counted_examples(registered, one) for one in (*honest, liar)]
    assert all(count <= one.examples for count, one in zip(counted, (*honest, liar), strict=True))
    assert counted[-1] <= MOST * sorted(registered.values())[len(sizes) // 2]


@given(sizes=SIZES, later=st.integers(1, 10**12))
@tries(30)
def test_a_later_claim_changes_nothing(sizes: list[int], later: int) -> None:
    registered, profiles = joined(sizes)
    before = dict(registered)
    again = register(registered, Profile("c0", later, flops=5.0, claimed=True))
    assert registered == before
    assert (again.examples, again.flops) == (sizes[0], 5.0)
    assert counted_examples(registered, again) == counted_examples(registered, profiles[0])


@given(sizes=SIZES)
@tries(30)
def test_what_the_simulator_or_the_operator_knows_counts_as_it_is(sizes: list[int]) -> None:
    registered, profiles = joined(sizes, claimed=False)
    assert [counted_examples(registered, one) for one in profiles] == sizes
    register(registered, Profile("c0", 7))
    assert registered["c0"] == 7
