"""Bytes on the wire of one task, counted on what really has to be sent: float32 tensors, the head apart from the adapter.

Down: the directions to train, without sides that follow from the run's seed, and the fold in the smaller of its two forms
(factors, or one dense matrix a layer). Up: only what changed. A frozen side, a direction that was not selected, a layer that
was not trained come back as they were sent, and the receiver has them already.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fedloom.check import form
from fedloom.lora import Adapter
from fedloom.types import Result, Side, Start, Task

FLOAT = 4
"""Bytes of one number."""


@dataclass(frozen=True, slots=True)
class Bytes:
    """Size of a message; `dense` is the part of `total` that is the head."""

    total: int
    dense: int


def down(start: Start) -> Bytes:
    """What a client receives. A control variate counts like the adapter, on the sides that the client trains for all."""
    count = _whole(start.train, frozenset((*start.seeded, "dense")))
    count += sum(_folded(factor.up, factor.down) for factor in start.fold.factors.values()) if start.fold else 0
    dense = 0 if "dense" in start.seeded else sum(tensor.numel() for tensor in start.train.dense.values())
    control = _whole(start.control, start.rules.kept)
    return Bytes(FLOAT * (count + dense + control), FLOAT * dense)


def up(task: Task, result: Result) -> Bytes:
    """What a client sends back: rows of `down`, columns of `up` and dense tensors that differ from what it got.

    An answer that has not even the form of one, and will be refused, counts as if everything had been sent.
    """
    start, count = task.start, 0
    if form(task, result):
        dense = sum(tensor.numel() for tensor in start.train.dense.values())
        return Bytes(FLOAT * (_whole(start.train) + _whole(start.control, start.rules.kept)), FLOAT * dense)
    for name, factor in result.adapter.factors.items():
        sent = start.train.factors[name]
        count += _changed(sent.down[: factor.rank], factor.down) + _changed(sent.up[:, : factor.rank].T, factor.up.T)
    dense = sum(
        tensor.numel() for name, tensor in result.adapter.dense.items() if not tensor.equal(start.train.dense[name])
    )
    return Bytes(FLOAT * (count + dense + _whole(result.control, start.rules.kept)), FLOAT * dense)


def _changed(before: Tensor, after: Tensor) -> int:
    """Numbers in the rows that differ."""
    return int((before != after).any(1).sum()) * after.shape[1]


def _folded(up: Tensor, down: Tensor) -> int:
    return min(up.numel() + down.numel(), up.shape[0] * down.shape[1])


def _whole(adapter: Adapter | None, without: frozenset[Side] = frozenset()) -> int:
    """Numbers of an adapter, these sides apart."""
    if adapter is None:
        return 0
    count = sum(
        ("down" not in without) * factor.down.numel() + ("up" not in without) * factor.up.numel()
        for factor in adapter.factors.values()
    )
    return count + (0 if "dense" in without else sum(tensor.numel() for tensor in adapter.dense.values()))
