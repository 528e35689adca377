"""How much an answer counts by its age, as tables; what is aborted because it would come too late."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from fedloom.core.errors import Refused
from fedloom.core.policies import Schedule
from fedloom.core.types import Task
from fedloom.schedule.fedasync import FedAsync
from fedloom.schedule.fedbuff import FedBuff
from fedloom.schedule.fedfa import FedFa
from fedloom.schedule.immediate import Immediate
from fedloom.schedule.shared.staleness import CONSTANT, SQUARE_ROOT, Discount, Hinge, Polynomial, staleness, too_stale
from fedloom.train.settings import linear
from tests.support.schedule_tables import answer, at, task

LIMITED: list[Schedule] = [
    FedAsync(max_staleness=2, max_in_flight=4),
    FedBuff(max_staleness=2, max_in_flight=4, buffer_size=1),
    FedFa(max_staleness=2, max_in_flight=4, window=3),
    Immediate(max_staleness=2, max_in_flight=4),
]


@pytest.mark.parametrize(
    ("discount", "wanted"),
    [
        (CONSTANT, [1.0, 1.0, 1.0, 1.0, 1.0, 1.0]),
        (Polynomial(0.0), [1.0, 1.0, 1.0, 1.0, 1.0, 1.0]),
        (SQUARE_ROOT, [1.0, 2**-0.5, 3**-0.5, 0.5, 5**-0.5, 6**-0.5]),
        (Polynomial(1.0), [1.0, 1 / 2, 1 / 3, 1 / 4, 1 / 5, 1 / 6]),
        (Hinge(10.0, 4), [1.0, 1.0, 1.0, 1.0, 1.0, 1 / 11]),
        (Hinge(0.5, 2), [1.0, 1.0, 1.0, 1 / 1.5, 1 / 2, 1 / 2.5]),
    ],
)
def test_discounts_are_those_of_fedasync_section_5_2(discount: Discount, wanted: list[float]) -> None:
    assert [discount(age) for age in range(6)] == pytest.approx(wanted)


def test_staleness_is_counted_in_versions_since_the_tasks() -> None:
    assert [staleness(at(7), answer(1, version)) for version in (7, 6, 0)] == [0, 1, 7]


@pytest.mark.parametrize(("limit", "aborted"), [(None, []), (1, [1, 2, 3]), (2, [1, 2]), (3, [1]), (5, [])])
def test_work_that_the_next_version_makes_too_old_is_aborted(limit: int | None, aborted: list[int]) -> None:
    """At version 5 the next one is 6: tasks of versions 2, 3, 4, 5 would be 4, 3, 2, 1 old."""
    busy = tuple(task(number, version) for number, version in ((1, 2), (2, 3), (3, 4), (4, 5)))
    assert list(too_stale(at(5, busy=busy), limit)) == aborted


def test_no_work_is_looked_at_behind_the_first_that_goes_on() -> None:
    class Watched(dict[int, Task]):
        """Outstanding tasks, of which the third and no later one may be read."""

        def items(self) -> Any:
            yield from list(super().items())[:3]
            raise AssertionError("looked at the fourth task")

    busy = Watched({number: task(number, number) for number in range(1, 10)})
    assert too_stale(replace(at(5), busy=busy), 3) == (1, 2)


@pytest.mark.parametrize("schedule", LIMITED, ids=lambda one: type(one).__name__)
def test_every_schedule_aborts_with_its_merge(schedule: Schedule) -> None:
    merge = schedule.merge(at(5, answer(9, 5), busy=(task(1, 2), task(2, 3), task(3, 4), task(4, 5))))
    assert merge is not None
    assert merge.cancel == (1, 2)


@pytest.mark.parametrize(
    "bad",
    [
        (Polynomial, {"exponent": -0.1}),
        (Polynomial, {"exponent": float("nan")}),
        (Hinge, {"slope": -1.0}),
        (Hinge, {"grace": -1}),
        *((cls, {"max_in_flight": 0}) for cls in (FedAsync, FedBuff, FedFa, Immediate)),
        *((cls, {"max_staleness": 0}) for cls in (FedAsync, FedBuff, FedFa, Immediate)),
    ],
    ids=str,
)
def test_bad_parameters_are_refused_by_name(bad: tuple[type, dict[str, Any]]) -> None:
    with pytest.raises(Refused, match=next(iter(bad[1]))):
        bad[0](**bad[1])


@pytest.mark.parametrize("schedule", [FedAsync, FedBuff, FedFa, Immediate])
@pytest.mark.parametrize("wrong", [linear, lambda staleness: 2.0, lambda staleness: float("nan")])
def test_what_is_no_function_of_staleness_is_refused(schedule: type, wrong: Discount) -> None:
    """A curve of learning rates, say: it would weigh stale answers negatively."""
    with pytest.raises(Refused, match="Hinge"):
        schedule(discount=wrong)
