"""How often each group averages inside a global round, how deep it trains, at which rank and for how many steps.

Source: HierFedLoRA (Liu, Liao, H. Xu, Y. Xu, arXiv 2503.21213, 2025) couples the two and chooses them for each group. How it does so
was not to be had; these are the three rules of our reconstruction, and a fourth of our own:

- `TimeAligned`: everybody is done when the fastest group is (closed form; ParallelSFL, arXiv 2410.01256, 2024, Eq. 17).
- `Scored`, the default: of all choices that take as long, the one that follows the most of the gradient with the least drift.
- `Bandit`: no gradient statistics; it learns from what its choices earned.
- `JointMemory`: rank and steps too, within every member's memory.

A rule is called with all groups, because who is fastest sets the time, and is a pure function of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TypeAlias

from fedloom.core.errors import Refused
from fedloom.hierarchy.joint_plan.group_cost import SLACK, Choice, GroupState

Joint: TypeAlias = Callable[[Sequence[GroupState]], tuple[Choice, ...]]
"""The groups' states -> a choice for each, in their order."""


def fastest_seconds(groups: Sequence[GroupState], rounds: int, steps: int, rank: int) -> float:
    """T*: seconds of the fastest group, each as deep as its memory allows."""
    return min(
        (group.seconds(Choice(rounds, group.depths(rank)[-1], rank, steps)) for group in groups), default=math.inf
    )


def most_rounds(group: GroupState, limit: float, choice: Choice) -> int:
    """f(d): into how many rounds, at most its own, the choice's steps can be divided with the group done in `limit`; 0: none."""
    left = limit * (1.0 + SLACK) - group.outer(choice.depth, choice.rank)
    pairs = zip(group.steps(choice.depth), group.links(choice.depth, choice.rank), strict=True)
    spare = [(left - choice.steps * step, link) for step, link in pairs]
    if min(time for time, _ in spare) < 0:
        return 0
    rounds = min((time / link for time, link in spare if link > 0), default=math.inf)
    return max((f for f in divisors(choice.steps, choice.rounds) if f <= rounds), default=0)


def divisors(steps: int, most: int) -> list[int]:
    """Into how many equal rounds, at most `most`, so many steps can be divided."""
    return [f for f in range(1, most + 1) if steps % f == 0]


def drift_loss(price: float, group: GroupState, choice: Choice) -> float:
    """What members lose by drifting apart between two averages: gamma eta^2 (steps / f)^2 delta_g^2."""
    return price * (choice.steps / choice.rounds * group.dispersion) ** 2


def explain_time(group: GroupState, choice: Choice, limit: float) -> Choice:
    """The choice, with how long it takes said after its reasons."""
    slowest, part = max(group.steps(choice.depth)), choice.steps // choice.rounds
    words = f"{choice.rounds} rounds of {part} steps at depth {choice.depth} take {group.seconds(choice):.3g} s, "
    words += (
        f"the fastest group {limit:.3g} s; the slowest of {len(group.members)} members needs {slowest:.3g} s a step"
    )
    return replace(choice, why=choice.why + words)


def check_counts(**values: int) -> None:
    for name, value in values.items():
        if value < 1:
            raise Refused(f"joint.{name}", value, "choose a whole number of at least 1")


def check_weight(name: str, value: float) -> None:
    if not 0 <= value < math.inf:
        raise Refused(f"joint.{name}", value, "a finite number, 0 or more")
