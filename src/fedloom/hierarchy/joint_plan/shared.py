"""What rules of a joint plan share: the time of the fastest group, rounds that fit a time, the price of drift, reasons in words.

A rule is called with the states of all groups, because who is fastest sets the time, and returns a choice for each, in their order.
It is a pure function of them. Source: HierFedLoRA (Liu, Liao, H. Xu, Y. Xu, arXiv 2503.21213, 2025), which couples how often a group
averages and how deep it trains. How it chooses them was not to be had; the rules are our reconstruction.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TypeAlias

from fedloom.core.errors import Refused
from fedloom.hierarchy.joint_plan.group_cost import SLACK, Choice, GroupState

JointRule: TypeAlias = Callable[[Sequence[GroupState]], tuple[Choice, ...]]
"""(states of all groups) -> a choice for each, in their order."""


def fastest_seconds(groups: Sequence[GroupState], rounds: int, steps: int, rank: int) -> float:
    """Return T*: the seconds of the fastest group, each as deep as its memory allows."""
    return min(
        (group.seconds(Choice(rounds, group.depths(rank)[-1], rank, steps)) for group in groups), default=math.inf
    )


def most_rounds(group: GroupState, limit: float, choice: Choice) -> int:
    """Return f(d), the most rounds, at most the choice's own, that divide its steps and end within `limit` s; 0: none does."""
    left = limit * (1.0 + SLACK) - group.edge_link_seconds(choice.depth, choice.rank)
    pairs = zip(group.step_seconds(choice.depth), group.link_seconds(choice.depth, choice.rank), strict=True)
    spare = [(left - choice.steps * step, link) for step, link in pairs]
    if min(time for time, _ in spare) < 0:
        return 0
    rounds = min((time / link for time, link in spare if link > 0), default=math.inf)
    return max((f for f in divisors(choice.steps, choice.rounds) if f <= rounds), default=0)


def divisors(steps: int, most: int) -> list[int]:
    """Return the numbers of equal rounds, at most `most`, into which so many steps can be divided."""
    return [f for f in range(1, most + 1) if steps % f == 0]


def drift_loss(price: float, group: GroupState, choice: Choice) -> float:
    """Return what members lose by drifting apart between two averages: gamma eta^2 (steps / f)^2 delta_g^2."""
    return price * (choice.steps / choice.rounds * group.dispersion) ** 2


def explain_time(group: GroupState, choice: Choice, limit: float) -> Choice:
    """Return the choice with its time added to its reasons."""
    slowest, part = max(group.step_seconds(choice.depth)), choice.steps // choice.rounds
    words = f"{choice.rounds} rounds of {part} steps at depth {choice.depth} take {group.seconds(choice):.3g} s, "
    words += (
        f"the fastest group {limit:.3g} s; the slowest of {len(group.members)} members needs {slowest:.3g} s a step"
    )
    return replace(choice, why=choice.why + words)


def check_counts(**values: int) -> None:
    """Raise Refused for a setting below 1."""
    for name, value in values.items():
        if value < 1:
            raise Refused(f"joint.{name}", value, "choose a whole number of at least 1")


def check_weight(name: str, value: float) -> None:
    """Raise Refused for a weight that is negative or infinite."""
    if not 0 <= value < math.inf:
        raise Refused(f"joint.{name}", value, "a finite number, 0 or more")
