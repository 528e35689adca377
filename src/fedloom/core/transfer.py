"""What a start and an answer are on the other side of the wire, given the run's codec: the same for simulation and real machines.

Down: the server rounds what it hands out, so that its own record of a task is what the client receives, and every comparison with
it (frozen sides, changes, unchanged rows) is exact. Sides that follow from the run's seed are not sent and stay as they are. A fold
is sent in the smaller of its two forms and rounded there. Up: rows that differ from the start go through the codec; rows that
do not are not sent, and neither are rows that would come out as they were sent.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fedloom.core.codec import EXACT, HALF, Block, Codec, round_to_half
from fedloom.core.lora import (
    Adapter,
    Factor,
    cut_adapter,
    from_tensors,
    map_tensors,
    named_tensors,
    product_difference,
    product_norm,
    server_rank,
    take_sides,
)
from fedloom.core.types import ClientState, Result, Task, TaskStart
from fedloom.core.validate_answer import why_invalid

Rows = tuple[int, ...] | None
"""Numbers of the rows that are sent, in order; None: all."""


@dataclass(frozen=True, slots=True, eq=False)
class PackedAnswer:
    """An answer on the wire: for each tensor of the start, in order of name, the rows that are sent. Control variates follow."""

    rank: int
    blocks: tuple[tuple[Rows, Block | None], ...]


# Down ----------------------------------------------------------------------------------------------------------------


def encode_start(start: TaskStart, codec: Codec | None) -> TaskStart:
    """The start as its client receives it."""
    if codec is None or not codec.halved:
        return start if start.codec is codec else replace(start, codec=codec)
    return replace(
        start,
        train=take_sides(start.seeded, start.train, map_tensors(round_to_half, start.train)),
        fold=start.fold and Adapter({name: _fold(factor) for name, factor in start.fold.factors.items()}),
        control=start.control and map_tensors(round_to_half, start.control),
        codec=codec,
    )


def _fold(factor: Factor) -> Factor:
    """A fold's factors rounded; or, where that is fewer numbers, its dense matrix, as a factor with an identity on one side."""
    d_out, d_in = factor.up.shape[0], factor.down.shape[1]
    if factor.up.numel() + factor.down.numel() <= d_out * d_in:
        return Factor(round_to_half(factor.down), round_to_half(factor.up))
    dense = round_to_half(factor.up @ factor.down)
    if d_out < d_in:
        return Factor(dense, torch.eye(d_out).to(dense))
    return Factor(torch.eye(d_in).to(dense), dense)


# Up ------------------------------------------------------------------------------------------------------------------


def encode_answer(task: Task, before: ClientState, result: Result, local: ClientState) -> tuple[Result, ClientState]:
    """The answer as the server receives it, and what stays at the client; `before` is what was there when the task came.

    The metrics gain `rounding`, the Frobenius norm of what the products lost relative to the products, and `rounding_change`,
    relative to what the client changed. An answer that will be refused stays as it is.
    """
    start = task.start
    if start.codec is None or why_invalid(task, result):
        return result, local
    residual = residual_of(start, before)
    adapter, control = unpack_answer(start, pack_answer(start, result, residual))
    if start.codec.feedback:
        local = replace(local, residual=_lost(result.adapter, residual, adapter))
    told = _errors(_asked(start.train, adapter), result.adapter, adapter)
    return replace(result, adapter=adapter, control=control, metrics={**result.metrics, **told}), local


def residual_of(start: TaskStart, local: ClientState) -> Adapter | None:
    """What earlier answers lost, if it is still in the coordinates of this start."""
    own = local.residual
    if own is None or local.basis != start.basis or start.codec is None or not start.codec.feedback:
        return None
    sizes = [{name: tensor.shape for name, tensor in named_tensors(adapter).items()} for adapter in (own, start.train)]
    return own if sizes[0] == sizes[1] else None


def pack_answer(start: TaskStart, result: Result, residual: Adapter | None = None) -> PackedAnswer:
    """The answer to a task with this start, whose layers and shapes it must have; `residual` is what earlier answers lost."""
    rank, codec = _rank(result.adapter), start.codec or EXACT
    extra = named_tensors(_asked(residual, result.adapter)) if residual else {}
    blocks = []
    for name, base, values in _pairs(_asked(start.train, result.adapter), result.adapter):
        blocks.append(_packed(codec, values, base, tensor_rows(name, extra[name]) if extra else None))
    if start.control and result.control:
        beside = HALF if codec.halved else EXACT
        for _, base, values in _pairs(map_tensors(torch.zeros_like, start.control), result.control):
            blocks.append(_packed(beside, values, base, None))
    return PackedAnswer(rank, tuple(blocks))


def unpack_answer(start: TaskStart, parcel: PackedAnswer) -> tuple[Adapter, Adapter | None]:
    """The adapter of the answer and, if one was asked for, the change of the control variate."""
    asked = layout(start, parcel.rank)
    found = []
    for (name, base), (which, block) in zip(asked, parcel.blocks, strict=True):
        held = tensor_rows(name, base)
        if block is not None:
            chosen = None if which is None else torch.tensor(which)
            values = block.values(held if chosen is None else held[chosen])
            held = values if chosen is None else held.index_copy(0, chosen, values)
            base = held.T.contiguous() if _turned(name) else held.reshape(base.shape)
        found.append((name, base))
    like = cut_adapter(start.train, parcel.rank)
    own = len(named_tensors(like))
    control = from_tensors(start.control, dict(found[own:])) if start.control else None
    return from_tensors(like, dict(found[:own])), control


def layout(start: TaskStart, rank: int) -> list[tuple[str, Tensor]]:
    """Name and base of every tensor of an answer of this rank, in the order in which they are sent."""
    asked = sorted(named_tensors(cut_adapter(start.train, rank)).items())
    return asked + (sorted(named_tensors(map_tensors(torch.zeros_like, start.control)).items()) if start.control else [])


def _rank(adapter: Adapter) -> int:
    return server_rank(adapter) if adapter.factors else 0


def _asked(adapter: Adapter, given: Adapter) -> Adapter:
    return cut_adapter(adapter, _rank(given))


def _turned(name: str) -> bool:
    return name.endswith(".up") and not name.startswith("dense:")


def dense_rows(dense: Tensor) -> Tensor:
    """A view (rows, width) of a dense tensor; a vector is one row."""
    return dense.flatten(1) if dense.ndim > 1 else dense.reshape(1, -1)


def tensor_rows(name: str, tensor: Tensor) -> Tensor:
    """A view (rows, width) of any tensor: a row for each direction."""
    return tensor.T if _turned(name) else dense_rows(tensor)


def _pairs(base: Adapter, given: Adapter) -> Iterator[tuple[str, Tensor, Tensor]]:
    own = named_tensors(base)
    for name, tensor in sorted(named_tensors(given).items()):
        yield name, tensor_rows(name, own[name]), tensor_rows(name, tensor)


def _packed(codec: Codec, values: Tensor, base: Tensor, residual: Tensor | None) -> tuple[Rows, Block | None]:
    """The rows that differ, and differ on the other side too."""
    if values.equal(base):
        return (), None
    block = codec.pack(values if residual is None else values + residual, base)
    got = block.values(base)
    if bool(_moved(values[:, :8], base[:, :8], got[:, :8]).all()):  # the rule, and much cheaper to see
        return None, block
    which = _moved(values, base, got).nonzero().flatten()
    if len(which) == len(values):
        return None, block
    return tuple(which.tolist()), block.select(which) if len(which) else None


def _moved(values: Tensor, base: Tensor, got: Tensor) -> Tensor:
    """Rows with an entry that changed here and changes there."""
    return ((values != base) & (got != base)).any(1)


def _lost(exact: Adapter, residual: Adapter | None, received: Adapter) -> Adapter:
    """What packing lost, now and of earlier answers."""
    if residual is None:
        return map_tensors(torch.sub, exact, received)
    return map_tensors(lambda given, owed, got: given - got + owed, exact, _asked(residual, exact), received)


def _errors(start: Adapter, exact: Adapter, received: Adapter) -> dict[str, float]:
    """Over all layers together, from the factors."""
    lost, whole, change = _size(received, exact), _size(exact, None), _size(exact, start)
    return {"rounding": lost / whole if whole else 0.0, "rounding_change": lost / change if change else 0.0}


def _size(one: Adapter, other: Adapter | None) -> float:
    """Frobenius norm of the products, or of their difference."""
    pairs = ((new, other and other.factors[name]) for name, new in one.factors.items())
    return math.sqrt(sum(product_norm(product_difference(new, old) if old else new) ** 2 for new, old in pairs))
