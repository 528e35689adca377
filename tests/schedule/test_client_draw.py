"""Drawing idle clients: different ones, each choice equally likely, and no more work than clients are drawn."""

from __future__ import annotations

from collections import Counter
from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedloom.core.indexed_dict import Indexed
from fedloom.core.policies import Fleet
from fedloom.core.types import Profile
from fedloom.schedule.shared.client_draw import draw_idle, draw_least_worked
from tests.support.toys import fleet, profiles


def crowd(size: int, **more: int) -> Fleet:
    return fleet(idle=Indexed(profiles(size)), **more)


@given(size=st.integers(0, 30), count=st.integers(-1, 40), seed=st.integers(0, 99), tasks=st.integers(0, 99))
def test_as_many_as_asked_for_all_different(size: int, count: int, seed: int, tasks: int) -> None:
    drawn = draw_idle(crowd(size, seed=seed, tasks=tasks), count)
    assert len(drawn) == len(set(drawn)) == min(size, max(count, 0))
    assert set(drawn) <= profiles(size).keys()


def test_the_seed_and_the_number_of_the_task_decide() -> None:
    drawn = draw_idle(crowd(30, seed=3), 5)
    assert drawn == draw_idle(crowd(30, seed=3), 5)
    assert drawn != draw_idle(crowd(30, seed=4), 5)
    assert drawn != draw_idle(crowd(30, seed=3, tasks=5), 5)
    assert drawn[:2] == draw_idle(crowd(30, seed=3), 2)


@pytest.mark.parametrize(("size", "count"), [(6, 1), (6, 2), (4, 3), (5, 5)])
def test_every_choice_is_equally_likely(size: int, count: int) -> None:
    """Sets of clients, and who comes first: 5 standard deviations."""
    turns = 6000
    drawn = [draw_idle(crowd(size, tasks=count * turn), count) for turn in range(turns)]
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
    drawn = draw_idle(fleet(idle=idle), 10)
    assert len(set(drawn)) == idle.looked == 10


@given(size=st.integers(0, 12), count=st.integers(-1, 15), choices=st.integers(1, 9), tasks=st.integers(0, 99))
def test_the_least_worked_are_as_many_and_all_different(size: int, count: int, choices: int, tasks: int) -> None:
    worked = {f"c{k}": float(k % 3) for k in range(size)}
    crowd = fleet(idle=Indexed(profiles(size)), tasks=tasks, work_seconds=worked, dispatched=dict.fromkeys(worked, 2))
    drawn = draw_least_worked(crowd, count, choices)
    assert len(drawn) == len(set(drawn)) == min(size, max(count, 0))
    if choices > 1 and choices * max(count, 0) >= size:  # all are looked at
        assert sorted(worked[one] for one in drawn) == sorted(worked.values())[: len(drawn)]


def test_a_task_that_would_last_long_counts_before_it_has_begun() -> None:
    """Worked seconds 6 in 1 task against 7 in 7: the next ends at 12, and at 8."""
    crowd = fleet(idle=Indexed(profiles(2)), work_seconds={"c0": 6.0, "c1": 7.0}, dispatched={"c0": 1, "c1": 7})
    assert draw_least_worked(crowd, 1, 2) == ["c1"]


def shares(choices: int) -> tuple[int, float, float]:
    """50 clients, a fifth of them ten times slower, one at a time until 3,000 seconds are over: tasks, least and most seconds."""
    seconds = {client: 10.0 if k % 5 == 0 else 1.0 for k, client in enumerate(profiles(50))}
    worked, asked = dict.fromkeys(seconds, 0.0), dict.fromkeys(seconds, 0)
    while sum(worked.values()) < 3000:
        crowd = fleet(idle=Indexed(profiles(50)), tasks=sum(asked.values()), work_seconds=worked, dispatched=asked)
        (one,) = draw_least_worked(crowd, 1, choices)
        worked[one] += seconds[one]
        asked[one] += 1
    return sum(asked.values()), min(worked.values()), max(worked.values())


def test_a_few_choices_give_equal_time_and_so_more_answers() -> None:
    """3,000 seconds at 2.8 a task are 1,071 if all are asked alike, and 2,460 if all work 60 seconds."""
    tasks, least, most = shares(5)
    assert tasks >= 2200
    assert most <= 2 * least
    tasks, least, most = shares(1)
    assert tasks <= 1300
    assert most >= 5 * least
