"""Groups for the rules of a joint plan: drawn by hypothesis, or made by hand."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from hypothesis import strategies as st

from fedloom.hierarchy.joint_plan.group_cost import Choice, Device, GroupState, Sizes

SIZES = Sizes(
    up=lambda depth, rank: 1e4 * depth * rank,
    down=lambda depth, rank: 1e5 * rank,
    memory=lambda depth, rank: 1e9 + 1e8 * depth + 1e6 * depth * rank,
)


def line(base: float, layers: int = 6) -> tuple[float, ...]:
    """t(d) = a + b d, as HierFedLoRA's cost model has it, with b = a / layers."""
    return tuple(base * (1 + depth / layers) for depth in range(1, layers + 1))


def group(*bases: float, bps: float = 1e7, memory: float = math.inf, **more: Any) -> GroupState:
    """Members of these speeds behind one kind of link."""
    members = (Device(f"c{place}", line(base), bps, bps, memory) for place, base in enumerate(bases))
    return GroupState(tuple(members), SIZES, **more)


devices = st.builds(
    lambda base, up, down, memory: Device("c", line(base), up, down, memory),
    st.floats(0.05, 3.0),
    st.floats(1e6, 1e8),
    st.floats(1e6, 1e8) | st.just(math.inf),
    st.floats(1.2e9, 2.0e9),
)
groups = st.builds(
    lambda members, dispersion, mass, up: GroupState(
        tuple(members), SIZES, up, up, dispersion, tuple(mass), (5.0, 2.0, 1.0)
    ),
    st.lists(devices, min_size=1, max_size=4),
    st.floats(0.0, 3.0),
    st.lists(st.floats(0.0, 9.0), min_size=6, max_size=6),
    st.floats(1e7, 1e9) | st.just(math.inf),
)
fleets = st.lists(groups, min_size=1, max_size=4)


def limit(fleet: Sequence[GroupState], most: int, steps: int, rank: int = 8) -> float:
    """T*: the fastest group at its most rounds and the depth that its memory allows."""
    return min(one.seconds(Choice(most, one.depths(rank)[-1], rank, steps)) for one in fleet)
