"""Bytes on the wire of one task: what really has to be sent, in the run's codec, the head apart from the adapter.

Down: the directions to train, without sides that follow from the run's seed, and the fold in the smaller of its two forms
(factors, or one dense matrix per layer). Up: only what changed. A frozen side, a direction that was not selected, a layer that
was not trained come back as they were sent, and the receiver has them already. The indices of the rows that are sent do not count.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from torch import Tensor

from fedloom.core.codec import EXACT, HALF, Codec, Summed
from fedloom.core.flat_buffer import FlatTensors, rows_of
from fedloom.core.lora import Adapter, cut_factor, same_buffers
from fedloom.core.transfer import dense_rows
from fedloom.core.types import Result, Side, Task, TaskStart
from fedloom.core.validate_answer import why_malformed


@dataclass(frozen=True, slots=True)
class MessageSize:
    """Size of a message.

    Fields:
        total: all bytes.
        dense: bytes of the head, a part of `total`.
    """

    total: int
    dense: int


def download_size(start: TaskStart) -> MessageSize:
    """Return the size of what a client receives. A control variate counts like the adapter, on the sides that come back."""
    count = _whole(start.train, (*start.seeded, "dense"))
    count += sum(_folded(factor.up, factor.down) for factor in start.fold.factors.values()) if start.fold else 0
    dense = 0 if "dense" in start.seeded else sum(tensor.numel() for tensor in start.train.dense.values())
    control, number = _control(start), _plain(start).number
    return MessageSize(number * (count + dense + control), number * dense)


def upload_size(task: Task, result: Result) -> MessageSize:
    """Return the size of an answer: rows of `down`, columns of `up` and rows of dense tensors that differ from what was sent.

    An answer that has not even the form of one, and will be refused, counts as if everything had been sent.
    """
    start, codec, count = task.start, task.start.codec or EXACT, 0
    if isinstance(codec, Summed):
        return summed_size(start)
    control = _plain(start).number * _control(start)
    refused = why_malformed(task, result) is not None
    received = start.train if refused else result.adapter
    flats = None if refused else same_buffers([start.train, received])
    if flats is not None:
        size = _flat_size(codec, *flats)
        return MessageSize(size.total + control, size.dense)
    for name, factor in received.factors.items():
        sent = cut_factor(start.train.factors[name], factor.rank)
        count += _sent(codec, None if refused else sent.down, factor.down, 1)
        count += _sent(codec, None if refused else sent.up, factor.up, 0)
    dense = 0
    for name, tensor in received.dense.items():
        dense += _sent(codec, None if refused else dense_rows(start.train.dense[name]), dense_rows(tensor), 1)
    return MessageSize(count + dense + control, dense)


def _flat_size(codec: Codec, before: FlatTensors, after: FlatTensors) -> MessageSize:
    """Return the size of an answer without its control variate, with a few calls for all tensors of one shape."""
    total = dense = 0
    for group in after.layout.groups:
        one, other = (rows_of(group.side, group.view(flat.buffer)) for flat in (before, after))
        changed = one[:, :, 0] != other[:, :, 0] if one.shape[2] else one.any(2)
        if not bool(changed.all()):
            changed = (one != other).any(2)
        size = int(changed.sum()) * (codec.number * one.shape[2] + codec.row)
        total, dense = total + size, dense + (size if group.side == "dense" else 0)
    return MessageSize(total, dense)


def summed_size(start: TaskStart) -> MessageSize:
    """Return the size of an answer that is only summed: all of the trained sides, since nobody may see which of them changed."""
    bits = start.codec.word_bits if isinstance(start.codec, Summed) else 8 * EXACT.number
    whole, dense = (
        -(-_whole(adapter, start.rules.unchanged) * bits // 8)
        for adapter in (start.train, Adapter({}, start.train.dense))
    )
    return MessageSize(whole, dense)


def _plain(start: TaskStart) -> Codec:
    """Return the codec of numbers that have no base."""
    return HALF if start.codec and start.codec.halved else EXACT


def _sent(codec: Codec, before: Tensor | None, after: Tensor, along: int) -> int:
    """Return the bytes of the rows, which run along this dimension, that differ; of all rows where `before` is None."""
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
    """Return how many numbers of the control variate are sent."""
    return _whole(start.control, start.rules.unchanged) if start.control else 0


def _whole(adapter: Adapter, without: Collection[Side]) -> int:
    """Return how many numbers an adapter has, without these sides."""
    if adapter.flat is not None:
        return adapter.flat.layout.numbers(without)
    count, down, up = 0, "down" not in without, "up" not in without
    for factor in adapter.factors.values():
        count += (factor.down.numel() if down else 0) + (factor.up.numel() if up else 0)
    return count + (0 if "dense" in without else sum(tensor.numel() for tensor in adapter.dense.values()))
