"""Fleets for the tests of schedules: answers and tasks of a tiny model by number, client, version."""

from __future__ import annotations

from typing import Any

from fedloom.core.indexed_dict import Indexed
from fedloom.core.policies import Fleet, Merge
from fedloom.core.types import Profile, Task, Update
from tests.support import toys

SMALL = toys.adapter(1, layers={"only": (2, 2)})


def task(number: int, version: int = 0, client: str | None = None) -> Task:
    """An outstanding task that was cut from `version`."""
    return toys.make_task(SMALL, 1, number, client, version=version)


def answer(number: int, version: int = 0, client: str | None = None, examples: int = 10, tokens: int = 100) -> Update:
    """The answer to it."""
    return Update(task(number, version, client), toys.make_result(SMALL, examples, tokens=tokens))


def at(version: int, *arrived: Update, busy: tuple[Task, ...] = (), idle: int | list[str] = 0, **more: Any) -> Fleet:
    """A fleet at this version."""
    names = [f"c{k}" for k in range(idle)] if isinstance(idle, int) else idle
    given: dict[str, Any] = {"idle": Indexed({name: Profile(name, 10) for name in names})} | more
    return toys.fleet(version=version, arrived=arrived, busy={one.id: one for one in busy}, **given)


def weights_and_step(merge: Merge | None) -> tuple[dict[int, float], float]:
    """Weights by the number of the task, and the step."""
    assert merge is not None
    return {update.task.id: round(weight, 12) for weight, update in merge.weighted_updates}, round(merge.step, 12)


def numbers(updates: tuple[Update, ...]) -> list[int]:
    """Of their tasks."""
    return [update.task.id for update in updates]
