"""Who trains with whom: clients put into groups, each led by an edge."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from fedloom.errors import Refused
from fedloom.types import ClientId


@dataclass(frozen=True, slots=True)
class Member:
    """What a grouping knows of a client.

    `seconds` is the client's own time for one step or one round, whichever the caller measures, the same for all. `labels` counts
    its examples by label (or by topic, where there are no labels): it may be noisy, and is empty where nobody asked. `region` is
    where it is, or which link it hangs on.
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


Grouping: TypeAlias = Callable[[Sequence[Member], int], tuple[tuple[ClientId, ...], ...]]
"""(members, seed) -> groups: every member in exactly one. The order of the members does not matter."""
