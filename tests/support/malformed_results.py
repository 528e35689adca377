"""Malformed answers that a client in the same process could give, kind by kind."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache
from typing import Any, TypeAlias, TypeVar

import torch
from torch import Tensor

from fedloom.core.events import UpdateArrived
from fedloom.core.lora import Adapter, cut_factor, pad
from fedloom.core.types import Result, Task
from fedloom.core.validate_answer import MAX_NORM
from tests.support.scene import CLIENTS, Scene
from tests.support.tiny_models import RANKS

T = TypeVar("T")
Draw: TypeAlias = random.Random
Thrown: TypeAlias = UpdateArrived | bytes
Kind: TypeAlias = Callable[[Draw, Scene], Thrown]
Bend: TypeAlias = Callable[[Draw, T], object]

NAN, INFINITE = float("nan"), float("inf")
TENSORS = (("query", "down"), ("query", "up"), ("value", "down"), ("value", "up"), ("head", ""))
ODD: tuple[object, ...] = (None, "10", 10.0, True, [10], 10**5000, -(10**400), NAN, INFINITE)


# A good answer, bent in one place ------------------------------------------------------------------------------------


def answer(task: Task, result: object) -> UpdateArrived:
    """Any thing as the answer to a task."""
    return UpdateArrived(task.client, task.id, result)  # type: ignore[arg-type]


def in_result(bend: Bend[Result]) -> Kind:
    """A good answer, bent."""

    def make(draw: Draw, scene: Scene) -> Thrown:
        task = scene.some(draw)
        return answer(task, bend(draw, scene.good(task)))

    return make


def in_field(name: str, *values: object) -> Kind:
    """A good answer with one of these values in a field."""
    return in_result(lambda draw, good: replace(good, **{name: draw.choice(values)}))  # type: ignore[arg-type]


def in_adapter(bend: Bend[Adapter]) -> Kind:
    """The adapter of a good answer, bent."""
    return in_result(lambda draw, good: replace(good, adapter=bend(draw, good.adapter)))  # type: ignore[arg-type]


def in_tensor(bend: Bend[Tensor]) -> Kind:
    """One tensor of the adapter of a good answer, bent."""

    def change(draw: Draw, adapter: Adapter) -> Adapter:
        factors: dict[str, Any] = dict(adapter.factors)
        dense: dict[str, Any] = dict(adapter.dense)
        name, side = draw.choice(TENSORS)
        if side:
            factors[name] = replace(factors[name], **{side: bend(draw, getattr(factors[name], side))})
        else:
            dense[name] = bend(draw, dense[name])
        return Adapter(factors, dense)

    return in_adapter(change)


# Bent tensors --------------------------------------------------------------------------------------------------------


def entry(*values: float) -> Bend[Tensor]:
    """One entry of the tensor replaced by one of these values."""

    def bend(draw: Draw, whole: Tensor) -> Tensor:
        bent = whole.clone()
        bent.view(-1)[draw.randrange(bent.numel())] = draw.choice(values)
        return bent

    return bend


def huge(draw: Draw, whole: Tensor) -> Tensor:
    """Finite, and longer than the limit."""
    return whole * (MAX_NORM / float(whole.norm()) * 10 ** draw.uniform(0.01, 30))


def other_shape(draw: Draw, whole: Tensor) -> Tensor:
    """Rows too few, too many or none, dimensions too few or too many."""
    ways = [whole[:-1], torch.cat([whole, whole]), whole.unsqueeze(0), whole[:0], whole.sum(), whole.flatten()[:-1]]
    return draw.choice(ways).clone()


def other_dtype(draw: Draw, whole: Tensor) -> Tensor:
    """The same numbers in another type."""
    kinds = (torch.float64, torch.float16, torch.bfloat16, torch.int32, torch.int64, torch.bool, torch.complex64)
    return whole.to(draw.choice(kinds))


def with_gradient(draw: Draw, whole: Tensor) -> Tensor:
    """What training would leave if nobody detached it: a leaf, a parameter, or a tensor with a graph behind it."""
    leaf = whole.clone().requires_grad_()
    return draw.choice([leaf, torch.nn.Parameter(whole.clone()), leaf * 1.0])


def nested(draw: Draw, whole: Tensor) -> Tensor:
    """A strided tensor of type and dtype as asked for, which has no shape."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a prototype, torch says
        return torch.nested.nested_tensor([whole.flatten(), whole.flatten()[:1]])


def subclass(draw: Draw, whole: Tensor) -> object:
    """A parameter without requires_grad, one that has no shape yet, or a tensor that only pretends to hold data."""
    still = torch.nn.Parameter(whole.clone(), requires_grad=False)
    return draw.choice([still, torch.nn.UninitializedParameter(requires_grad=False), _pretence().from_tensor(whole)])


@cache
def _pretence() -> Any:
    from torch._subclasses.fake_tensor import FakeTensorMode  # slow to import

    return FakeTensorMode()


def no_tensor(draw: Draw, whole: Tensor) -> object:
    """Something else."""
    return draw.choice([None, whole.tolist(), whole.numpy(), float(whole.sum()), "tensor", b"\0", {}, object()])


# Bent adapters -------------------------------------------------------------------------------------------------------


def other_rank(draw: Draw, adapter: Adapter) -> Adapter:
    """Another rank than asked, in one layer or in all."""
    own = next(iter(adapter.factors.values())).rank
    rank = draw.choice([r for r in (1, *RANKS, 16) if r != own])
    chosen = draw.choice([list(adapter.factors), [draw.choice(list(adapter.factors))]])
    made = {
        n: (cut_factor(f, rank) if rank < own else pad(f, rank)) if n in chosen else f
        for n, f in adapter.factors.items()
    }
    return Adapter(made, adapter.dense)


def other_layers(draw: Draw, adapter: Adapter) -> Adapter:
    """A layer too few, too many, or under another name."""
    factors, name = dict(adapter.factors), draw.choice(list(adapter.factors))
    how = draw.randrange(4)
    if how in (1, 2):
        factors[draw.choice(["key", "", f"{name}.lora_A", f"{name}\0", "../../etc", "é" * 300])] = factors[name]
    if how in (0, 2):
        del factors[name]
    return Adapter({} if how == 3 else factors, adapter.dense)


def other_dense(draw: Draw, adapter: Adapter) -> Adapter:
    """A dense tensor too few or too many."""
    extra = {"pooler": torch.zeros(3), **adapter.dense}
    return Adapter(adapter.factors, draw.choice([{}, extra, {"Head": adapter.dense["head"]}]))


def no_factor(draw: Draw, adapter: Adapter) -> Adapter:
    """Something else under the name of a layer."""
    name = draw.choice(list(adapter.factors))
    whole = adapter.factors[name]
    odd: Any = draw.choice([None, whole.up, (whole.down, whole.up), {}, 1.0])
    return Adapter({**adapter.factors, name: odd}, adapter.dense)


def no_mapping(draw: Draw, adapter: Adapter) -> object:
    """Something else as the adapter, its factors, or its dense tensors."""
    odd: Any = draw.choice([None, [], 3, "query", list(adapter.factors.items())])
    return draw.choice([odd, Adapter(odd, adapter.dense), Adapter(adapter.factors, odd)])


# Good answers to the wrong task --------------------------------------------------------------------------------------


def no_result(draw: Draw, scene: Scene) -> UpdateArrived:
    """Something else as the answer."""
    task = scene.some(draw)
    return answer(task, draw.choice([None, {}, "done", scene.good(task).adapter, [scene.good(task)], type, task]))


def stale(draw: Draw, scene: Scene) -> UpdateArrived:
    """A good answer to a task of the last round: merged, or cancelled."""
    task = draw.choice(scene.closed)
    return answer(task, scene.good(task))


def duplicate(draw: Draw, scene: Scene) -> UpdateArrived:
    """A second answer to a task of this round, the same or another one."""
    task = draw.choice(scene.answered)
    return answer(task, replace(scene.good(task), examples=draw.choice([10, 1000])))


def foreign(draw: Draw, scene: Scene) -> UpdateArrived:
    """A good answer in the name of somebody else: busy, idle or unknown."""
    task, other = draw.sample(scene.open, 2)
    client = draw.choice([other.client, scene.answered[0].client, "nobody", "", f"{task.client} "])
    return UpdateArrived(client, task.id, scene.good(task))


def unknown_task(draw: Draw, scene: Scene) -> UpdateArrived:
    """A good answer under a number that no task has."""
    task = scene.some(draw)
    number = draw.choice([0, -1, -task.id, 10**6 + draw.randrange(100), 2**70, task.id + CLIENTS * 10])
    return UpdateArrived(task.client, number, scene.good(task))


RESULTS: Mapping[str, Kind] = {
    "NaN in a tensor": in_tensor(entry(NAN, -NAN)),
    "infinity in a tensor": in_tensor(entry(INFINITE, -INFINITE)),
    "huge norm": in_tensor(huge),
    "wrong shape": in_tensor(other_shape),
    "wrong dtype": in_tensor(other_dtype),
    "sparse tensor": in_tensor(lambda draw, whole: whole.to_sparse()),
    "tensor without data": in_tensor(lambda draw, whole: whole.to("meta")),
    "tensor with a gradient": in_tensor(with_gradient),
    "nested tensor": in_tensor(nested),
    "subclass of tensor": in_tensor(subclass),
    "no tensor": in_tensor(no_tensor),
    "wrong rank": in_adapter(other_rank),
    "layers missing or unknown": in_adapter(other_layers),
    "dense missing or extra": in_adapter(other_dense),
    "no factor": in_adapter(no_factor),
    "no mapping": in_adapter(no_mapping),
    "no result": no_result,
    "examples": in_field("examples", 0, -1, -(10**9), 10**13, *ODD),
    "tokens": in_field("tokens", -1, -(10**9), 10**16, *ODD),
    "steps": in_field("steps", 0, -1, 5, 10**9, *ODD),
    "metrics not finite": in_field("metrics", {"loss": NAN}, {"loss": 1.0, "x": INFINITE}, {"loss": -INFINITE}),
    "metrics no numbers": in_field("metrics", {"loss": "low"}, {"loss": None}, {"x": True}, {1: 1.0}, {"x": 10**400}),
    "metrics no mapping": in_field("metrics", None, [0.5], 0.5, "loss", {0.5}),
    "stale task": stale,
    "duplicate answer": duplicate,
    "foreign client": foreign,
    "unknown task": unknown_task,
}
"""Each kind makes an answer from random numbers and a scene."""
