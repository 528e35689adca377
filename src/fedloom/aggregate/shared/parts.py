"""Sums over clients: which part of an answer is added up, and what a method makes of a sum that it has no single answer of.

The part of an answer is what it changed of the factors and dense tensors that its client was sent (`factor_change`). Clients of one
group start from the first directions of one adapter, each from as many as its rank, so changes of one direction are about the same
direction and can be added. A method that is linear in them needs nothing else: give each client, in the place of its answer, the
mean over those who hold a direction, cut to its rank; then any rule for absent directions comes out as it would of the answers:

    a vote for the server's value   sum_k (sent + mean) / K over holders = sent + sum_k change_k / K
    counted as zero                 sum_k (sent + mean) / K over holders = sum_k answer_k / K
    left out                        the mean over holders

so the method's own `merge` reads the sum, and wrappers around it that look at the merged model alone go with it. All clients weigh
alike: with weights of its choice a server could let one of them count alone.

A method for which that is no merge of the answers says why in `not_summed`; one whose sum is near but not equal, because it adds
products and a product of means is not the mean of products, says so in `summed_by_factors`. tests/laws hold every method to it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fedloom.aggregate.shared.wrapper import Wrapper
from fedloom.core.answer_change import factor_change, with_change
from fedloom.core.codec import Summed
from fedloom.core.fingerprint import fingerprint
from fedloom.core.lora import Adapter, Factor, cut_adapter, map_tensors, named_tensors, pad, revive, server_rank
from fedloom.core.policies import Aggregator, Merge, aggregator_layers
from fedloom.core.seeds import derive
from fedloom.core.types import Budget, Model, Result, Task, TaskStart
from fedloom.core.validate_answer import why_invalid


@dataclass(frozen=True, slots=True)
class CommonStart(Wrapper):
    """Another method whose clients all start from the first directions of one adapter, also those that are drawn anew.

    A merge of products can leave directions empty, which a start fills at random so that they can learn. They are filled here, from
    the name of the basis and before they are cut, so that they are the same for clients of any rank.

    Fields:
        inner: the method.
    """

    inner: Aggregator

    def start(self, model: Model, budget: Budget, seed: int) -> TaskStart:
        """Hand out what the method does of the model without empty directions."""
        if self.space != "product":
            return self.inner.start(model, budget, seed)
        factors = {
            name: revive(factor, factor.rank, derive(model.basis, name))
            for name, factor in model.adapter.factors.items()
        }
        return self.inner.start(replace(model, adapter=Adapter(factors, model.adapter.dense)), budget, seed)

    def merge(self, model: Model, merge: Merge) -> Model:
        """Merge as the method does."""
        return self.inner.merge(model, merge)


def why_not_summed(aggregator: Aggregator, model: Model) -> str | None:
    """Return why a method cannot merge a sum in the place of answers to starts from this model, as a clause; None: it can."""
    for layer in aggregator_layers(aggregator):
        if why := getattr(layer, "not_summed", None):
            return f"{type(layer).__name__}: {why}"
    method, top = CommonStart(aggregator), server_rank(model.adapter)
    ranks = sorted({1, (top + 1) // 2, top})
    starts = [method.start(model, Budget(rank, 1), seed) for seed, rank in enumerate(ranks)]
    name = next(type(layer).__name__ for layer in aggregator_layers(aggregator))
    if any(start.control is not None or start.rules.pruning for start in starts):
        return f"{name}: its clients answer with more than their change, or prune what they change"
    if any(start.rules.private for start in starts):
        return (
            f"{name}: its clients keep a side of their own, and a server could have all but one begin with a dead one"
        )
    if any(start.scaling is not None or not _is_part(start.train, starts[-1].train) for start in starts):
        return f"{name}: its clients do not start from the same directions, so that their changes cannot be added"
    return None


def summed_by_factors(aggregator: Aggregator) -> str | None:
    """Return why the merge of a sum is only near that of the answers, as a clause; None: it is the same."""
    reasons = (getattr(layer, "summed_by_factors", None) for layer in aggregator_layers(aggregator))
    return next(filter(None, reasons), None)


def is_summed(task: Task) -> bool:
    """Whether the answer to this task is only summed."""
    return isinstance(task.start.codec, Summed)


def part_or_reason(task: Task, result: Result) -> Adapter | str:
    """Return the part of an answer, or why it is none: what a server would refuse, the client itself has to."""
    return why_invalid(task, result) or integer_parts(task.start, result.adapter)


def integer_parts(start: TaskStart, answer: Adapter) -> Adapter:
    """Return the part of an answer as whole numbers (int64), by the start's codec; zero on sides that may not change."""
    if not isinstance(start.codec, Summed):
        raise ValueError("a task whose answer is not summed has no parts")
    return map_tensors(start.codec.integers, factor_change(start, answer))


def start_digest(start: TaskStart) -> str:
    """Return the sha256 of all that decides on what is learnt from a start; equal for members of one rank in a round."""
    adapters = [one and fingerprint(one) for one in (start.train, start.fold, start.control)]
    facts = (*adapters, start.scaling, start.rules, start.seeded, start.directions, start.codec)
    return hashlib.sha256(repr(facts).encode()).hexdigest()


def block_part(whole: Adapter, first: int, last: int) -> Adapter:
    """Return the directions `first` to `last` - 1 of every layer; with the first of them also the dense tensors."""
    factors = {name: Factor(one.down[first:last], one.up[:, first:last]) for name, one in whole.factors.items()}
    return Adapter(factors, {} if first else whole.dense)


def add_part(sums: Adapter, part: Adapter, first: int) -> None:
    """Add a part of `block_part` to the sums, in place."""
    for name, one in part.factors.items():
        last = first + one.rank
        sums.factors[name].down[first:last] += one.down
        sums.factors[name].up[:, first:last] += one.up
    for name, tensor in part.dense.items():
        sums.dense[name].add_(tensor)


def empty_sums(start: TaskStart) -> Adapter:
    """Return sums of nothing, of the shapes of this start (int64)."""
    return map_tensors(lambda one: torch.zeros_like(one, dtype=torch.int64), start.train)


def flat_part(start: TaskStart, part: Adapter) -> Tensor:
    """Return the numbers of the sides that may change in one row, in order of name, directions first."""
    rows = [(part_of.T if name.endswith(".up") else part_of).flatten() for name, part_of in _trained(start, part)]
    return torch.cat(rows) if rows else torch.zeros(0, dtype=torch.int64)


def part_from_flat(start: TaskStart, like: Adapter, numbers: Tensor) -> Adapter:
    """Return the part of `flat_part` with the shapes of `like`; zero on the other sides."""
    part, at = map_tensors(lambda one: torch.zeros_like(one, dtype=numbers.dtype), like), 0
    for name, tensor in _trained(start, part):
        view = tensor.T if name.endswith(".up") else tensor
        view.copy_(numbers[at : at + tensor.numel()].view(view.shape))
        at += tensor.numel()
    return part


def summed_answers(tasks: Sequence[Task], sums: Adapter, step: float) -> dict[int, Adapter]:
    """Return by task an answer that, weighed alike, merges as the members' own answers would. Members of one rank share it.

    Args:
        tasks: tasks of the members whose answers are in the sum.
        sums: sums of their whole numbers; directions beyond its rank were not summed, and count as not changed.
        step: the change that the whole number 1 stands for.
    """
    ranks = [server_rank(task.start.train) for task in tasks]
    of_rank = dict[int, Adapter]()
    for task, rank in zip(tasks, ranks, strict=True):
        if rank not in of_rank:
            held = torch.tensor([sum(other > i for other in ranks) for i in range(rank)], dtype=torch.float64)
            change = _mean(cut_adapter(sums, rank), held, len(tasks), step)
            factors = {name: pad(change.factors[name], one.rank) for name, one in task.start.train.factors.items()}
            change = Adapter(factors, change.dense)
            of_rank[rank] = with_change(task.start, task.start.train, change)
    return {task.id: of_rank[rank] for task, rank in zip(tasks, ranks, strict=True)}


def _mean(sums: Adapter, held: Tensor, members: int, step: float) -> Adapter:
    """Return sums as means: each direction over those who hold it, dense tensors over all; directions not summed are zero."""
    factors = {}
    for name, one in sums.factors.items():
        share = step / held[: one.rank]
        factors[name] = Factor(one.down.double() * share[:, None], one.up.double() * share)
    return Adapter(factors, {name: tensor.double() * (step / members) for name, tensor in sums.dense.items()})


def _is_part(one: Adapter, whole: Adapter) -> bool:
    """Whether an adapter holds the first directions of another one."""
    expected = named_tensors(cut_adapter(whole, server_rank(one)))
    return all(torch.allclose(tensor, expected[name]) for name, tensor in named_tensors(one).items())


def _trained(start: TaskStart, part: Adapter) -> list[tuple[str, Tensor]]:
    """Return the tensors of the sides that may change, in order of name."""
    unchanged = start.rules.unchanged
    tensors = sorted(named_tensors(part).items())
    return [(name, tensor) for name, tensor in tensors if _side(name) not in unchanged]


def _side(name: str) -> str:
    return "dense" if name.startswith("dense:") else name.rpartition(".")[2]
