"""Checks of what comes from outside, before the core uses it: a client's answer, a remote edge's statistics.

Each check returns the reason why the value is refused, as text, or None where it is valid. It never raises: a bad answer is the
sender's fault and must not stop the server, whatever it holds (`server` turns the reason into a `Reject`).
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from fedloom.core.change_norms import norm
from fedloom.core.lora import Adapter, Factor, cut_adapter, named_tensors, same_buffers, server_rank
from fedloom.core.model_shape import Shape
from fedloom.core.types import GroupStatistics, MemberWork, Result, Task, TaskStart

MAX_NORM = 1e5
"""Largest Frobenius norm of the change of one tensor, whatever that was: a version that somebody spoilt can be trained on. The change
of a LoRA factor stays below about 1e2; how far one may move beside others is judged by `change_norms`.
"""
MAX_MEMBERS, MAX_DIRECTIONS = 1000, 4096
"""Bounds of an edge's statistics: members of a group, and directions whose energy is reported."""
MAX_SECONDS, MIN_SECONDS, MAX_LOSS, MAX_MASS, MAX_METRICS = 1e9, 1e-9, 1e12, 1e30, 100
"""Bounds of members' work: a plan divides by their seconds, and squares how their losses fell. A metric is bounded as a loss."""


def why_invalid(task: Task, result: Result, clipped: bool = False) -> str | None:
    """Return why `result` is no valid answer to `task`; None if it is one. Cost: one pass over the tensors. Never raises.

    Where answers are `clipped` before they are merged, how far one moved is no reason: it would tell of the client's data.
    """
    most = math.inf if clipped else MAX_NORM
    return (
        why_malformed(task, result)
        or _invalid_counts(task, result)
        or _invalid_change(_pruned(task.start, result.adapter), result.adapter, most)
        or (_invalid_norms("control variate: ", {}, result.control, most) if result.control else None)
        or _changed_side(task.start, result.adapter)
    )


def why_invalid_statistics(task: Task, statistics: GroupStatistics, shape: Shape) -> str | None:
    """Return why a remote edge cannot have these statistics of its task; None if it can.

    Everything that a plan computes with is bounded, so that no plan comes to an infinite number or to none.
    """
    if statistics.budget != task.budget:
        return f"it tells of another budget than that of task {task.id}"
    if not len(statistics.work) <= MAX_MEMBERS or len({work.client for work in statistics.work}) < len(statistics.work):
        return f"it tells of {len(statistics.work)} members, expected at most {MAX_MEMBERS}, each of them once"
    if odd := sorted(statistics.mass.keys() - shape.depths.keys() - task.start.train.dense.keys()):
        return f"it tells how {odd[0]!r:.60} changed, which is no layer of the model"
    if len(statistics.energy) > MAX_DIRECTIONS:
        return f"it tells of {len(statistics.energy)} directions, expected at most {MAX_DIRECTIONS}"
    bounded = [("spread", statistics.spread, 0, 1), ("loss", statistics.loss, -MAX_LOSS, MAX_LOSS)]
    bounded += [("mass", value, 0, MAX_MASS) for value in statistics.mass.values()]
    bounded += [("energy", value, 0, 1) for value in statistics.energy]
    bounded += [(name, getattr(statistics, name), 0, MAX_SECONDS) for name in ("seconds", "down", "up")]
    return _out_of_range(bounded) or next(filter(None, (_invalid_work(task, work) for work in statistics.work)), None)


def _invalid_work(task: Task, work: MemberWork) -> str | None:
    """Return why no member can have done this work; None if one can."""
    deepest = task.budget.depth or 2**20  # a site may say that it lets a task be deeper than the model is
    bounded: list[tuple[str, float | None, float, float]] = [
        ("name's length", len(work.client), 1, 200),
        ("rank", work.rank, 1, task.budget.rank),
        ("depth", work.depth, 1, deepest),
        ("answers", work.answers, 1, 10**9),
        ("steps", work.steps, 1, task.budget.steps * min(max(work.answers, 1), 10**9)),
        ("seconds of training", work.train, MIN_SECONDS if work.train else 0, MAX_SECONDS),
        ("seconds down", work.down, 0, MAX_SECONDS),
        ("seconds up", work.up, 0, MAX_SECONDS),
        ("first loss", work.first_loss, -MAX_LOSS, MAX_LOSS),
        ("last loss", work.last_loss, -MAX_LOSS, MAX_LOSS),
    ]
    reason = _out_of_range(bounded)
    return reason and f"member {work.client!r:.60}: {reason}"


def _out_of_range(bounded: Iterable[tuple[str, float | None, float, float]]) -> str | None:
    """Return the first number (None: not reported) outside its bounds, or not a number at all."""
    for name, value, least, most in bounded:
        if value is not None and not least <= value <= most:
            return f"{name} is {_short(value)}, expected {least:g} to {most:g}"
    return None


def why_malformed(task: Task, result: Result) -> str | None:
    """Return why `result` has not the form of an answer: its tensors' names, types and shapes. No number is looked at."""
    if not isinstance(result, Result) or not isinstance(result.adapter, Adapter):
        return f"the answer is a {type(result).__name__}, not a result with an adapter"
    return _adapter(_pruned(task.start, result.adapter), result.adapter) or _control(task.start, result.control)


def _invalid_counts(task: Task, result: Result) -> str | None:
    counts = (
        ("examples", result.examples, 1, 10**12),
        ("tokens", result.tokens, 0, 10**15),
        ("steps", result.steps, 1, task.budget.steps),
    )
    for name, value, low, high in counts:
        if type(value) is not int or not low <= value <= high:
            return f"{name} is {_short(value)}, expected a whole number from {low} to {high}"
    if not isinstance(result.metrics, Mapping):
        return "metrics are not a mapping of names to numbers"
    if len(result.metrics) > MAX_METRICS:
        return f"there are {len(result.metrics)} metrics, expected at most {MAX_METRICS}"
    for name, number in result.metrics.items():
        if not isinstance(name, str) or type(number) not in (int, float) or not abs(number) <= MAX_LOSS:
            return f"metric {_short(name)} is {_short(number)}, expected a finite number, at most {MAX_LOSS:.0g}"
    return None


def _pruned(start: TaskStart, received: Adapter) -> Adapter:
    """Return the adapter that is asked for; under self-pruning at the rank that the client chose, `least` or more."""
    if start.rules.pruning is None or not isinstance(received.factors, Mapping):
        return start.train
    first = next(iter(received.factors.values()), None)
    if not isinstance(first, Factor) or type(first.down) is not Tensor or first.down.is_nested or first.down.dim() != 2:
        return start.train
    rank = max(min(start.rules.pruning.least, server_rank(start.train)), first.down.shape[0])
    return cut_adapter(start.train, rank)


def _changed_side(start: TaskStart, received: Adapter) -> str | None:
    """Return the first tensor that changed on a side that had to come back as it was sent."""
    if not start.rules.unchanged:
        return None
    expected = _pruned(start, received)
    flats = same_buffers([expected, received])
    for side in sorted(start.rules.unchanged):
        if flats and all(
            group.view(flats[0].buffer).equal(group.view(flats[1].buffer))
            for group in flats[0].layout.groups
            if group.side == side
        ):
            continue
        if side == "dense":
            pairs = {name: (tensor, received.dense[name]) for name, tensor in expected.dense.items()}
        else:
            pairs = {n: (getattr(f, side), getattr(received.factors[n], side)) for n, f in expected.factors.items()}
        for name, (sent, back) in pairs.items():
            if not sent.equal(back):
                return f"the {side} side of {name!r} was not to be changed"
    return None


def _control(start: TaskStart, received: object) -> str | None:
    if start.control is None:
        return None if received is None else "a control variate was not asked for"
    if not isinstance(received, Adapter):
        return f"the control variate is a {type(received).__name__}, not an adapter"
    reason = _adapter(start.control, received)
    return reason and f"control variate: {reason}"


def _adapter(expected: Adapter, received: Adapter) -> str | None:
    if same_buffers([expected, received]) is not None:
        return None
    for kind, wanted, got in (
        ("layer", expected.factors, received.factors),
        ("dense tensor", expected.dense, received.dense),
    ):
        if not isinstance(got, Mapping) or wanted.keys() != got.keys():
            odd = sorted(map(str, wanted.keys() ^ (got.keys() if isinstance(got, Mapping) else set())))
            return f"{kind} {_short(odd[0]) if odd else '?'} is missing or was not asked for"
    for name, factor in received.factors.items():
        if not isinstance(factor, Factor):
            return f"layer {name!r} holds a {type(factor).__name__}, not a factor"
        sent = expected.factors[name]
        if reason := _tensor(sent.down, factor.down):
            return f"{name}.down {reason}"
        if reason := _tensor(sent.up, factor.up):
            return f"{name}.up {reason}"
    for name, tensor in received.dense.items():
        if reason := _tensor(expected.dense[name], tensor):
            return f"{name} {reason}"
    return None


def _tensor(expected: Tensor, received: Tensor) -> str | None:
    if type(received) is not Tensor:  # a subclass may lack data, or shape, or do anything
        return f"is a {type(received).__name__}, not a plain tensor"
    if received.is_nested:
        return "is a nested tensor"
    if received.requires_grad:  # it would keep the graph behind it alive
        return "requires a gradient; detach it"
    if received.layout != torch.strided or received.dtype != expected.dtype:
        return f"is {received.layout} {received.dtype}, expected strided {expected.dtype}"
    if received.shape != expected.shape:
        return f"has shape {tuple(received.shape)}, expected {tuple(expected.shape)}"
    return None if received.device == expected.device else f"is on {received.device}, expected {expected.device}"


def _invalid_change(sent: Adapter, adapter: Adapter, most: float) -> str | None:
    """Return the first tensor that is not finite, or changed by more than `most`; one norm that is small clears them all."""
    if (flats := same_buffers([sent, adapter])) is not None:
        size = norm(flats[1].buffer - flats[0].buffer)
        if math.isfinite(size) and size <= 0.5 * most:
            return None
    return _invalid_norms("", named_tensors(sent), adapter, most)


def _invalid_norms(where: str, sent: Mapping[str, Tensor], adapter: Adapter, most: float) -> str | None:
    """Return the first tensor that is not finite, or changed by more than `most` from what was `sent` (no such name: from zero)."""
    for name, tensor in named_tensors(adapter).items():
        # a norm that is small says that both are finite, in one pass; most are
        size = norm(tensor if name not in sent else tensor - sent[name])
        if not math.isfinite(size):
            return f"{where}{name.removeprefix('dense:')} is not finite"
        if size > most:
            return f"{where}{name.removeprefix('dense:')} changed by norm {size:.3g}, above the limit of {most:.0g}"
    return None


def _short(value: object) -> str:
    """Describe a foreign value shortly: its repr may be endless, and that of a huge int raises."""
    if isinstance(value, int) and value.bit_length() > 64:
        return f"a whole number of {value.bit_length()} bits"
    return reprlib.repr(value)
