"""Seeded sides: those of a start that follow from the run's seed are not sent, where the site has drawn the same numbers.

A side is left out if it is, to the bit, that of the adapter with which the run began (`Terms.first`), and if the site has said that
it drew the same: another version of torch may draw other numbers. What was drawn for one task alone (FLoRA) is sent: it goes
through a QR factorisation, whose last digits are those of a processor.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from fedloom.core.errors import Refused
from fedloom.core.fingerprint import fingerprint
from fedloom.core.lora import Adapter, cut_factor, from_tensors, named_tensors
from fedloom.core.types import Side
from fedloom.deploy.messages.checks import tensor_side
from fedloom.deploy.messages.messages import TaskRequest


def without_seeded_sides(work: TaskRequest, first: Adapter) -> TaskRequest:
    """The request without the sides that a site which began with this adapter has already; whole, if the run began with another
    one.
    """
    start = work.task.start
    if not start.seeded or fingerprint(first) != work.terms.first_adapter:
        return work
    flat, known = named_tensors(start.train), _beginning(start.train, first)
    same = {name: name in known and _alike(tensor, known[name]) for name, tensor in flat.items()}
    sides = tuple(side for side in start.seeded if all(same[name] for name in flat if tensor_side(name) == side))
    if not sides:
        return work
    void = {name: torch.zeros(()).expand(tensor.shape) for name, tensor in flat.items() if tensor_side(name) in sides}
    return _with(work, flat | void, sides)


def with_seeded_sides(work: TaskRequest, first: Adapter) -> TaskRequest:
    """The request with the sides that were left out, from the site's own first adapter. Raises Refused where that has others."""
    if not work.left_out:
        return work
    if fingerprint(first) != work.terms.first_adapter:
        raise Refused(
            "first", work.terms.first_adapter, "the adapter that was drawn here from the run's seed is another one"
        )
    train = work.task.start.train
    flat, known = named_tensors(train), _beginning(train, first)
    own = {name: known.get(name) for name in flat if tensor_side(name) in work.left_out}
    for name, tensor in own.items():
        if tensor is None or tensor.shape != flat[name].shape:
            raise Refused("model", work.terms.model, f"{name} was left out and has another size here: another model")
    return _with(work, flat | {name: tensor.contiguous() for name, tensor in own.items() if tensor is not None}, ())


def _with(work: TaskRequest, flat: dict[str, Tensor], sides: tuple[Side, ...]) -> TaskRequest:
    start = replace(work.task.start, train=from_tensors(work.task.start.train, flat))
    return replace(work, task=replace(work.task, start=start), left_out=sides)


def _beginning(train: Adapter, first: Adapter) -> dict[str, Tensor]:
    """The tensors of the first adapter at the ranks of `train`, as far as it has such layers."""
    shared = {name: factor.rank for name, factor in train.factors.items() if name in first.factors}
    return named_tensors(
        Adapter({name: cut_factor(first.factors[name], rank) for name, rank in shared.items()}, first.dense)
    )


def _alike(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are the same to the bit, with the order in memory, by which products round."""
    turned = [tensor.ndim == 2 and tensor.stride(0) < tensor.stride(1) for tensor in (one, other)]
    return one.shape == other.shape and turned[0] == turned[1] and torch.equal(one, other)
