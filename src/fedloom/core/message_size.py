"""Bytes on the wire of one task, counted on what really has to be sent, in the run's codec, the head apart from the adapter.

Down: the directions to train, without sides that follow from the run's seed, and the fold in the smaller of its two forms
(factors, or one dense matrix a layer). Up: only what changed. A frozen side, a direction that was not selected, a layer that
was not trained come back as they were sent, and the receiver has them already. Which rows these are is said beside, uncounted.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from torch import Tensor

from fedloom.core.codec import EXACT, HALF, Codec
from fedloom.core.lora import Adapter, cut_factor
from fedloom.core.transfer import dense_rows
from fedloom.core.types import Result, Side, Task, TaskStart
from fedloom.core.validate_answer import why_malformed


@dataclass(frozen=True, slots=True)
class MessageSize:
    """Size of a message; `dense` is the part of `total` that is the head."""

    total: int
    dense: int


def download_size(start: TaskStart) -> MessageSize:
    """What a client receives. A control variate counts like the adapter, on the sides that the client trains for all."""
    count = _whole(start.train, (*start.seeded, "dense"))
    count += sum(_folded(factor.up, factor.down) for factor in start.fold.factors.values()) if start.fold else 0
    dense = 0 if "dense" in start.seeded else sum(tensor.numel() for tensor in start.train.dense.values())
    control, number = _control(start), _plain(start).number
    return MessageSize(number * (count + dense + control), number * dense)


def upload_size(task: Task, result: Result) -> MessageSize:
    """What a client sends back: rows of `down`, columns of `up` and rows of dense tensors that differ from what it got.

    An answer that has not even the form of one, and will be refused, counts as if everything had been sent.
    """
    start, codec, count = task.start, task.start.codec or EXACT, 0
    control = _plain(start).number * _control(start)
    refused = why_malformed(task, result) is not None
    given = start.train if refused else result.adapter
    for name, factor in given.factors.items():
        sent = cut_factor(start.train.factors[name], factor.rank)
        count += _sent(codec, None if refused else sent.down, factor.down, 1)
        count += _sent(codec, None if refused else sent.up, factor.up, 0)
    dense = 0
    for name, tensor in given.dense.items():
        dense += _sent(codec, None if refused else dense_rows(start.train.dense[name]), dense_rows(tensor), 1)
    return MessageSize(count + dense + control, dense)


def _plain(start: TaskStart) -> Codec:
    """How travels what has no base."""
    return HALF if start.codec and start.codec.halved else EXACT


def _sent(codec: Codec, before: Tensor | None, after: Tensor, along: int) -> int:
    """Bytes of the rows, which run along this dimension, that differ; of all of them, where nothing is known of before."""
    if before is None:
        count = after.shape[1 - along]
    elif before.equal(after):  # a frozen side, much cheaper to see
        return 0
    else:
        count = (before != after).any(along).tolist().count(True)
    return count * (codec.number * after.shape[along] + codec.row)


def _folded(up: Tensor, down: Tensor) -> int:
    return min(up.numel() + down.numel(), up.shape[0] * down.shape[1])


def _control(start: TaskStart) -> int:
    """Numbers of the control variate that are sent."""
    return _whole(start.control, start.rules.unchanged) if start.control else 0


def _whole(adapter: Adapter, without: Collection[Side]) -> int:
    """Numbers of an adapter, these sides apart."""
    count, down, up = 0, "down" not in without, "up" not in without
    for factor in adapter.factors.values():
        count += (factor.down.numel() if down else 0) + (factor.up.numel() if up else 0)
    return count + (0 if "dense" in without else sum(tensor.numel() for tensor in adapter.dense.values()))
