"""The ranges of what stands in a message, checked on both sides after the types (`fedloom.core.schema`) and before any use.

The ranges are wide: they keep out what no server or site can mean (a rank of zero, a name of a megabyte, a shape that does not
fit), so that nothing behind them has to think of it. What a plan or a task allows is narrower, and judged by the core. A site
also compares what it is sent with its own copy of the base model (`model_mismatch`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch

from fedloom.core.lora import Adapter, named_tensors
from fedloom.core.rate_by_rank import MOST_RANK
from fedloom.core.schema import Malformed
from fedloom.core.types import Budget, Profile, Side, Task, TaskStart
from fedloom.core.validate_answer import MAX_MEMBERS
from fedloom.deploy.messages.container import is_placeholder

MAX_NAME = 200
"""Characters of a name."""
MAX_INTEGER = 2**63 - 1
"""What fits into 64 bits."""
MAX_STEPS = 10**9
"""Local steps of a task."""


def tensor_side(name: str) -> Side:
    """The side of an adapter that a tensor belongs to, by its flat name (`lora.named_tensors`)."""
    return "dense" if name.startswith("dense:") else "up" if name.endswith(".up") else "down"


def check_start(start: TaskStart, left_out: Sequence[Side] = ()) -> None:
    """Raise Malformed for a start that no server gives; the sides `left_out` must have no numbers, and all others must."""
    check_ranges(_start_ranges(start))
    if not {*left_out} <= {*start.seeded} or len({*left_out}) != len(left_out):
        raise Malformed("a side was left out that does not follow from the seed")
    for where, adapter in (("train", start.train), ("fold", start.fold), ("control", start.control)):
        for name, tensor in named_tensors(adapter).items() if adapter else ():
            if is_placeholder(tensor) != (where == "train" and tensor_side(name) in left_out):
                raise Malformed(f"{where}: {name!r:.60} has no numbers, or has some and should not")
    if not start.train.factors:
        raise Malformed("there is nothing to train")
    for where, adapter in (("train", start.train), ("fold", start.fold), ("control", start.control)):
        for name, factor in adapter.factors.items() if adapter else ():
            if factor.down.ndim != 2 or factor.up.ndim != 2 or factor.up.shape[1] != len(factor.down):
                raise Malformed(f"{where}: {name!r:.60} is no product of two matrices")
    rank = max(factor.rank for factor in start.train.factors.values())
    if start.directions is not None and (not _ascending(start.directions) or len(start.directions) != rank):
        raise Malformed("directions are not as many numbers in order as the rank")
    if start.control and _shapes(start.control) != _shapes(start.train):
        raise Malformed("the control variate has other shapes than what is trained")


def check_profiles(profiles: Sequence[Profile]) -> None:
    """Raise Malformed for a profile that no site has, or for more of them than a region has."""
    check_range("members", len(profiles), 0, MAX_MEMBERS + 1)
    for profile in profiles:
        check_name("profile.client", profile.client)
        check_range("profile.examples", profile.examples, 1, 10**12)
        for name in ("flops", "up_bps", "down_bps", "memory"):
            check_range(f"profile.{name}", getattr(profile, name), 1.0, 1e30)
        check_range("profile.tier", len(profile.tier), 0, MAX_NAME)
        for name, value, least, most in budget_ranges(profile.most) if profile.most else ():
            check_range(f"profile.most.{name}", value, least, min(most, MAX_NAME) if name == "why" else most)


def budget_ranges(budget: Budget) -> Iterator[tuple[str, float, float, float]]:
    """Return the numbers of a budget, with their minimum and maximum."""
    yield "rank", budget.rank, 1, 2**20
    yield "steps", budget.steps, 1, MAX_STEPS
    yield "depth", 1 if budget.depth is None else budget.depth, 1, 2**20
    yield "rounds", budget.rounds, 1, 10**9
    yield "why", len(budget.why), 0, 100 * MAX_NAME
    yield "rate.reference", 1 if budget.rate is None else budget.rate.reference or 0, 1, MOST_RANK


def task_ranges(task: Task) -> Iterator[tuple[str, float, float, float]]:
    """Return the numbers of a task without its start, with their minimum and maximum."""
    yield from budget_ranges(task.budget)
    yield "task", task.id, 1, MAX_INTEGER
    yield "version", task.version, 0, MAX_INTEGER
    yield "sent", task.sent, -1e18, 1e18


def _start_ranges(start: TaskStart) -> Iterator[tuple[str, float, float, float]]:
    """Return the numbers of a start, with their minimum and maximum."""
    pruning = start.rules.pruning
    yield "basis", len(start.basis), 0, MAX_NAME
    yield "scaling", 1.0 if start.scaling is None else start.scaling, 1e-9, 1e9
    yield "select", 1 if start.rules.select is None else start.rules.select, 1, MAX_INTEGER
    yield "up_rate", start.rules.up_rate, 1e-9, 1e9
    if pruning is not None:
        yield "strength", pruning.strength, 0.0, 1e9
        yield "keep", pruning.keep, 0.0, 1.0
        yield "least", pruning.least, 1, 2**20


def check_ranges(numbers: Iterable[tuple[str, float, float, float]]) -> None:
    """Raise Malformed for the first number that is out of its range."""
    for name, value, least, most in numbers:
        check_range(name, value, least, most)


def check_range(name: str, value: float, least: float, most: float) -> None:
    """Raise Malformed for a number that is out of its range, or is none."""
    if not least <= value <= most:
        raise Malformed(f"{name} is {str(value)[:40]}, expected {least} to {most}")


def check_name(field: str, text: str) -> None:
    """Raise Malformed for a name that is empty or too long."""
    if not 0 < len(text) <= MAX_NAME:
        raise Malformed(f"{field} has {len(text)} characters, expected 1 to {MAX_NAME}")


def _ascending(numbers: Sequence[int]) -> bool:
    return all(one < other for one, other in zip((-1, *numbers), (*numbers, MAX_INTEGER), strict=True))


def _shapes(adapter: Adapter) -> Mapping[str, torch.Size]:
    return {name: tensor.shape for name, tensor in named_tensors(adapter).items()}


def model_mismatch(first: Adapter, start: TaskStart) -> str:
    """Return why a start is one of another base model than that of `first`, the adapter that is drawn here; "" if it is not.

    Layers and dense tensors are compared by name and size, whatever their rank.
    """
    here = _sizes(first)
    for adapter in (start.train, start.fold):
        for name, size in _sizes(adapter).items() if adapter else ():
            if here.get(name) != size:
                has = f"the copy here has {here[name]}" if name in here else "the copy here has no such layer"
                return f"the server's has {name} of {size}, {has}: it is another model"
    return ""


def _sizes(adapter: Adapter) -> dict[str, tuple[int, ...]]:
    layers = {name: (factor.up.shape[0], factor.down.shape[1]) for name, factor in adapter.factors.items()}
    return layers | {f"dense:{name}": tuple(tensor.shape) for name, tensor in adapter.dense.items()}
