"""What comes from outside is checked here before the core uses it. A fault is theirs, never an exception: it becomes a reason."""

from __future__ import annotations

import math
import reprlib
import sys
from collections.abc import Mapping

import torch
from torch import Tensor

from fedloom.lora import Adapter, Factor
from fedloom.types import Result, Task

MAX_NORM = 1e5
"""Largest Frobenius norm of one tensor. A trained LoRA factor stays below about 1e2; what is beyond would drown the others."""


def fault(task: Task, result: Result) -> str | None:
    """Why `result` is no answer to `task`, in words; None if it is one. Cost: one pass over the tensors. Never raises."""
    if not isinstance(result, Result) or not isinstance(result.adapter, Adapter):
        return f"the answer is a {type(result).__name__}, not a result with an adapter"
    return _numbers(task, result) or _adapter(task.start.train, result.adapter)


def _numbers(task: Task, result: Result) -> str | None:
    counts = {"examples": (result.examples, 1, 10**12), "tokens": (result.tokens, 0, 10**15)}
    counts["steps"] = (result.steps, 1, task.budget.steps)
    for name, (value, low, high) in counts.items():
        if type(value) is not int or not low <= value <= high:
            return f"{name} is {_told(value)}, expected a whole number from {low} to {high}"
    if not isinstance(result.metrics, Mapping):
        return "metrics are not a mapping of names to numbers"
    for name, number in result.metrics.items():
        if not isinstance(name, str) or type(number) not in (int, float) or not abs(number) <= sys.float_info.max:
            return f"metric {_told(name)} is {_told(number)}, expected a finite number"
    return None


def _adapter(asked: Adapter, given: Adapter) -> str | None:
    for kind, wanted, got in (("layer", asked.factors, given.factors), ("dense tensor", asked.dense, given.dense)):
        if not isinstance(got, Mapping) or wanted.keys() != got.keys():
            odd = sorted(map(str, wanted.keys() ^ (got.keys() if isinstance(got, Mapping) else set())))
            return f"{kind} {_told(odd[0]) if odd else '?'} is missing or was not asked for"
    for name, factor in given.factors.items():
        if not isinstance(factor, Factor):
            return f"layer {name!r} holds a {type(factor).__name__}, not a factor"
        reason = _tensor(f"{name}.down", asked.factors[name].down, factor.down) or _tensor(
            f"{name}.up", asked.factors[name].up, factor.up
        )
        if reason:
            return reason
    return next(filter(None, (_tensor(name, asked.dense[name], got) for name, got in given.dense.items())), None)


def _tensor(name: str, asked: Tensor, given: Tensor) -> str | None:
    if type(given) is not Tensor:  # a subclass may lack data, or shape, or do anything
        return f"{name} is a {type(given).__name__}, not a plain tensor"
    if given.is_nested:
        return f"{name} is a nested tensor"
    if given.requires_grad:  # it would keep the graph behind it alive
        return f"{name} requires a gradient; detach it"
    if given.layout != torch.strided or given.dtype != asked.dtype:
        return f"{name} is {given.layout} {given.dtype}, expected strided {asked.dtype}"
    if given.shape != asked.shape:
        return f"{name} has shape {tuple(given.shape)}, expected {tuple(asked.shape)}"
    if given.device != asked.device:
        return f"{name} is on {given.device}, expected {asked.device}"
    size = float(torch.linalg.vector_norm(given, dtype=torch.float64))
    if not math.isfinite(size):
        return f"{name} is not finite"
    return f"{name} has norm {size:.3g}, above the limit of {MAX_NORM:.0g}" if size > MAX_NORM else None


def _told(value: object) -> str:
    """A foreign value in a few words: its repr may be endless, and that of a huge int raises."""
    if isinstance(value, int) and value.bit_length() > 64:
        return f"a whole number of {value.bit_length()} bits"
    return reprlib.repr(value)
