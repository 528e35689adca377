"""Encoding of starts and answers by the run's codec: what they are on the other side, in a simulation as on real machines.

Down: the server rounds what it hands out, so that its own record of a task is what the client receives, and every comparison with
it (frozen sides, changes, unchanged rows) is exact. Sides that follow from the run's seed are not sent and stay as they are. A fold
is sent in the smaller of its two forms and rounded there. Up: rows that differ from the start go through the codec; rows that
do not are not sent, and neither are rows that would come out as they were sent.

At the server: an answer is read as its exact start, before it was rounded, plus what the client changed of what it received
(`lift_answer`). So starts are exact parts of the versions that they were cut from, and cancel against them in a merge.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fedloom.core.answer_change import squared_change
from fedloom.core.codec import EXACT, HALF, Block, Codec, Summed, decode_all, round_all_to_half, round_to_half
from fedloom.core.flat_buffer import FlatTensors, map_groups, rows_of
from fedloom.core.lora import (
    Adapter,
    Factor,
    cut_adapter,
    from_tensors,
    lay_flat,
    map_tensors,
    named_tensors,
    product_difference,
    same_buffers,
    server_rank,
    take_sides,
    view_as_adapter,
)
from fedloom.core.truncated_svd import grams
from fedloom.core.types import ClientState, Result, Task, TaskStart, Update
from fedloom.core.validate_answer import why_invalid

Rows = tuple[int, ...] | None
"""Indices of the rows that are sent, in order; None: all."""


@dataclass(frozen=True, slots=True, eq=False)
class PackedAnswer:
    """Answer on the wire.

    Fields:
        rank: rank of the answer's factors.
        blocks: for each tensor of the start, in order of name, the rows that are sent; those of control variates follow.
    """

    rank: int
    blocks: tuple[tuple[Rows, Block | None], ...]


# Down ----------------------------------------------------------------------------------------------------------------


def encode_start(start: TaskStart, codec: Codec | None) -> TaskStart:
    """Return the start as its client receives it."""
    if codec is None or not codec.halved:
        return start if start.codec is codec else replace(start, codec=codec)
    return replace(
        start,
        train=lay_flat(take_sides(start.seeded, start.train, _rounded(start.train))),
        fold=start.fold and Adapter({name: _fold(factor) for name, factor in start.fold.factors.items()}),
        control=start.control and map_tensors(round_to_half, start.control),
        codec=codec,
    )


def _rounded(adapter: Adapter) -> Adapter:
    """Return every tensor as it comes out of float16."""
    if adapter.flat is None:
        return map_tensors(round_to_half, adapter)
    return view_as_adapter(map_groups(lambda side, tensors: round_all_to_half(tensors), adapter.flat))


def _fold(factor: Factor) -> Factor:
    """Return a fold's factors rounded; or, where that is fewer numbers, its dense matrix (with an identity as the other side)."""
    d_out, d_in = factor.up.shape[0], factor.down.shape[1]
    if factor.up.numel() + factor.down.numel() <= d_out * d_in:
        return Factor(round_to_half(factor.down), round_to_half(factor.up))
    dense = round_to_half(factor.up @ factor.down)
    if d_out < d_in:
        return Factor(dense, torch.eye(d_out).to(dense))
    return Factor(torch.eye(d_in).to(dense), dense)


# Up ------------------------------------------------------------------------------------------------------------------


def encode_answer(task: Task, before: ClientState, result: Result, local: ClientState) -> tuple[Result, ClientState]:
    """Return the answer as the server receives it, and the client's state after it.

    `before` is the client's state when the task came, `local` that after training. The metrics gain `rounding`, the Frobenius norm of
    what the products lost relative to the products, and `rounding_change`, relative to what the client changed. An answer that will
    be refused stays as it is, and so does one that is summed: what is rounded there is its change.
    """
    start = task.start
    if start.codec is None or isinstance(start.codec, Summed) or why_invalid(task, result):
        return result, local
    residual = residual_of(start, before)
    adapter, control = _transferred(start, result, residual)
    if start.codec.feedback:
        local = replace(local, residual=_lost(result.adapter, residual, adapter))
    errors = _rounding_errors(_at_rank_of(start.train, adapter), result.adapter, adapter)
    return replace(result, adapter=adapter, control=control, metrics={**result.metrics, **errors}), local


def lift_answer(update: Update, exact: Adapter) -> Update:
    """Return an accepted answer as if its client had received `exact`, of which its start was rounded, and changed the same.

    An answer that changed nothing becomes the exact start, to the bit. Layers that the task does not ask for are left out.
    """
    sent, answer = update.task.start.train, update.result.adapter
    if exact.factors.keys() != sent.factors.keys():
        exact = Adapter({name: exact.factors[name] for name in sent.factors}, exact.dense)
    origin, received = _at_rank_of(exact, answer), _at_rank_of(sent, answer)
    flats = same_buffers((origin, received, answer))
    if flats is None:
        lifted = map_tensors(_lift_tensor, origin, received, answer)
    else:
        buffer = _lift_tensor(*(flat.buffer for flat in flats))
        lifted = view_as_adapter(FlatTensors(buffer, flats[0].layout))
    task = replace(update.task, start=replace(update.task.start, train=exact))
    return replace(update, task=task, result=replace(update.result, adapter=lifted))


def _lift_tensor(exact: Tensor, sent: Tensor, answer: Tensor) -> Tensor:
    """Return exact + (answer - sent), with the exact numbers themselves where nothing changed."""
    if answer is sent or answer.equal(sent):
        return exact
    return exact - (sent - answer)  # 0.0 is taken away there, which leaves -0.0 as it is


def _transferred(start: TaskStart, result: Result, residual: Adapter | None) -> tuple[Adapter, Adapter | None]:
    """Return what `unpack_answer` makes of what `pack_answer` makes of an answer, without its bytes where that is cheaper."""
    answer, codec = result.adapter, start.codec or EXACT
    sides = [_at_rank_of(start.train, answer), answer, *([_at_rank_of(residual, answer)] if residual else [])]
    flats = same_buffers([lay_flat(one) for one in sides])
    if start.control or flats is None:
        return unpack_answer(start, pack_answer(start, result, residual))

    def received(side: str, base: Tensor, values: Tensor, *owed: Tensor) -> Tensor:
        before, now, *lost = (rows_of(side, one) for one in (base, values, *owed))
        got = decode_all(codec, now + lost[0] if lost else now, before)
        rows = torch.where(((now != before) & (got != before)).any(2, keepdim=True), got, before)
        return rows.mT if side == "up" else rows.reshape(base.shape)

    return view_as_adapter(map_groups(received, *flats)), None


def residual_of(start: TaskStart, local: ClientState) -> Adapter | None:
    """Return what packing lost of earlier answers, if it is still in the coordinates of this start; else None."""
    residual = local.residual
    if residual is None or local.basis != start.basis or start.codec is None or not start.codec.feedback:
        return None
    sizes = [
        {name: tensor.shape for name, tensor in named_tensors(adapter).items()} for adapter in (residual, start.train)
    ]
    return residual if sizes[0] == sizes[1] else None


def pack_answer(start: TaskStart, result: Result, residual: Adapter | None = None) -> PackedAnswer:
    """Pack the answer to a task with this start, whose layers and shapes it must have; `residual` is what earlier answers lost."""
    rank, codec = _rank(result.adapter), start.codec or EXACT
    extra = named_tensors(_at_rank_of(residual, result.adapter)) if residual else {}
    blocks = []
    for name, base, values in _pairs(_at_rank_of(start.train, result.adapter), result.adapter):
        blocks.append(_packed(codec, values, base, tensor_rows(name, extra[name]) if extra else None))
    if start.control and result.control:
        beside = HALF if codec.halved else EXACT
        for _, base, values in _pairs(map_tensors(torch.zeros_like, start.control), result.control):
            blocks.append(_packed(beside, values, base, None))
    return PackedAnswer(rank, tuple(blocks))


def unpack_answer(start: TaskStart, packed: PackedAnswer) -> tuple[Adapter, Adapter | None]:
    """Return the adapter of a packed answer and, if the task brought a control variate, the change of it."""
    tensors = []
    for (name, base), (which, block) in zip(layout(start, packed.rank), packed.blocks, strict=True):
        rows = tensor_rows(name, base)
        if block is not None:
            sent = None if which is None else torch.tensor(which)
            values = block.values(rows if sent is None else rows[sent])
            rows = values if sent is None else rows.index_copy(0, sent, values)
            base = rows.T.contiguous() if _is_up(name) else rows.reshape(base.shape)
        tensors.append((name, base))
    like = cut_adapter(start.train, packed.rank)
    count = len(named_tensors(like))
    control = from_tensors(start.control, dict(tensors[count:])) if start.control else None
    return lay_flat(from_tensors(like, dict(tensors[:count]))), control


def layout(start: TaskStart, rank: int) -> list[tuple[str, Tensor]]:
    """Return name and base of every tensor of an answer of this rank, in the order in which they are sent."""
    tensors = sorted(named_tensors(cut_adapter(start.train, rank)).items())
    return tensors + (
        sorted(named_tensors(map_tensors(torch.zeros_like, start.control)).items()) if start.control else []
    )


def _rank(adapter: Adapter) -> int:
    return server_rank(adapter) if adapter.factors else 0


def _at_rank_of(adapter: Adapter, answer: Adapter) -> Adapter:
    return cut_adapter(adapter, _rank(answer))


def _is_up(name: str) -> bool:
    return name.endswith(".up") and not name.startswith("dense:")


def dense_rows(dense: Tensor) -> Tensor:
    """Return a view (rows, width) of a dense tensor; a vector is one row."""
    return dense.flatten(1) if dense.ndim > 1 else dense.reshape(1, -1)


def tensor_rows(name: str, tensor: Tensor) -> Tensor:
    """Return a view (rows, width) of any tensor of an adapter; of a factor, with a row for each direction."""
    return tensor.T if _is_up(name) else dense_rows(tensor)


def _pairs(base: Adapter, answer: Adapter) -> Iterator[tuple[str, Tensor, Tensor]]:
    before = named_tensors(base)
    for name, tensor in sorted(named_tensors(answer).items()):
        yield name, tensor_rows(name, before[name]), tensor_rows(name, tensor)


def _packed(codec: Codec, values: Tensor, base: Tensor, residual: Tensor | None) -> tuple[Rows, Block | None]:
    """Pack the rows that differ from the base, and will differ on the other side too."""
    if values.equal(base):
        return (), None
    block = codec.pack(values if residual is None else values + residual, base)
    got = block.values(base)
    if bool(_moved(values[:, :8], base[:, :8], got[:, :8]).all()):  # implies the rule below, and is much cheaper
        return None, block
    which = _moved(values, base, got).nonzero().flatten()
    if len(which) == len(values):
        return None, block
    return tuple(which.tolist()), block.select(which) if len(which) else None


def _moved(values: Tensor, base: Tensor, got: Tensor) -> Tensor:
    """Return a mask of the rows with an entry that changed here and will change there."""
    return ((values != base) & (got != base)).any(1)


def _lost(exact: Adapter, residual: Adapter | None, received: Adapter) -> Adapter:
    """Return what packing lost, now and of earlier answers."""
    if residual is None:
        return map_tensors(torch.sub, exact, received)
    return map_tensors(lambda values, owed, got: values - got + owed, exact, _at_rank_of(residual, exact), received)


def _rounding_errors(start: Adapter, exact: Adapter, received: Adapter) -> dict[str, float]:
    """Return the relative errors of the products, over all layers together, from the factors."""
    flats = same_buffers(lay_flat(one, in_any_order=True) for one in (start, exact, received))
    if flats is None:
        lost, total, change = _size(received, exact), _size(exact, None), _size(exact, start)
    else:
        before, sent, came = flats
        nothing = FlatTensors(torch.zeros_like(sent.buffer), sent.layout)
        pairs = ((came, sent), (sent, nothing), (sent, before))
        lost, total, change = (math.sqrt(squared_change(new, old)[0]) for new, old in pairs)
    return {"rounding": lost / total if total else 0.0, "rounding_change": lost / change if change else 0.0}


def _size(one: Adapter, other: Adapter | None) -> float:
    """Return the Frobenius norm of the products, or of their difference, right to 1e-6: nothing cancels in either."""
    squares = 0.0
    for name, new in one.factors.items():
        factor = product_difference(new, other.factors[name]) if other else new
        squares += grams(factor.up, factor.down)[1]
    return math.sqrt(max(0.0, squares))
