"""Drawing idle clients: different ones, each choice equally likely, and no more work than clients are drawn."""

from __future__ import annotations

from collections import Counter
from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedloom.indexed import Indexed
from fedloom.schedule.draw import draw, draw_least_asked
from fedloom.types import Fleet, Profile
from toys import fleet, profiles


def crowd(size: int, **more: int) -> Fleet:
    return fleet(idle=Indexed(profiles(size)), **more)


@given(size=st.integers(0, 30), count=st.integers(-1, 40), seed=st.integers(0, 99), tasks=st.integers(0, 99))
def test_as_many_as_asked_for_all_different(size: int, count: int, seed: int, tasks: int) -> None:
    drawn = draw(crowd(size, seed=seed, tasks=tasks), count)
    assert len(drawn) == len(set(drawn)) == min(size, max(count, 0))
    assert set(drawn) <= profiles(size).keys()


def test_the_seed_and_the_number_of_the_task_decide() -> None:
    drawn = draw(crowd(30, seed=3), 5)
    assert drawn == draw(crowd(30, seed=3), 5)
    assert drawn != draw(crowd(30, seed=4), 5)
    assert drawn != draw(crowd(30, seed=3, tasks=5), 5)
    assert drawn[:2] == draw(crowd(30, seed=3), 2)


@pytest.mark.parametrize(("size", "count"), [(6, 1), (6, 2), (4, 3), (5, 5)])
def test_every_choice_is_equally_likely(size: int, count: int) -> None:
    """Sets of clients, and who comes first: 5 standard deviations."""
    turns = 6000
    drawn = [draw(crowd(size, tasks=count * turn), count) for turn in range(turns)]
    sets = Counter(frozenset(one) for one in drawn)
    firsts = Counter(one[0] for one in drawn)
    for counts, kinds in ((sets, len(list(combinations(range(size), count)))), (firsts, size)):
        share = turns / kinds
        assert len(counts) == kinds
        assert all(abs(seen - share) <= 5 * share**0.5 for seen in counts.values())


def test_a_million_cost_as_much_as_ten() -> None:
    class Counted(Indexed[str, Profile]):
        looked = 0

        def __len__(self) -> int:
            return 10**6

        def at(self, place: int) -> str:
            self.looked += 1
            return f"c{place}"

        def __iter__(self):  # type: ignore[no-untyped-def]
            raise AssertionError("walked through everybody")

    idle = Counted()
    drawn = draw(fleet(idle=idle), 10)
    assert len(set(drawn)) == idle.looked == 10


@given(size=st.integers(0, 12), count=st.integers(-1, 15), choices=st.integers(1, 9), tasks=st.integers(0, 99))
def test_the_least_asked_are_as_many_and_all_different(size: int, count: int, choices: int, tasks: int) -> None:
    asked = {f"c{k}": k % 3 for k in range(size)}
    drawn = draw_least_asked(fleet(idle=Indexed(profiles(size)), tasks=tasks, dispatched=asked), count, choices)
    assert len(drawn) == len(set(drawn)) == min(size, max(count, 0))
    if choices * max(count, 0) >= size:  # all are looked at
        assert sorted(asked[one] for one in drawn) == sorted(asked.values())[: len(drawn)]


def test_a_few_choices_make_shares_nearly_equal() -> None:
    def spread(choices: int) -> int:
        asked = dict.fromkeys(profiles(50), 0)
        for turn in range(1000):
            (one,) = draw_least_asked(fleet(idle=Indexed(profiles(50)), tasks=turn, dispatched=asked), 1, choices)
            asked[one] += 1
        return max(asked.values()) - min(asked.values())

    assert spread(5) <= 4
    assert spread(1) >= 10
