"""Memory of the last change of every client of a federation, in the server's directions, for CA2FL and ACE.

One adapter per client in `Model.memory`, zero where it has trained nothing so far, their sum and, for each direction and side,
the number of clients to divide it by: all that do or may train it. A client that has not answered yet counts with a change of zero,
as in the papers; one that has answered and never trained this direction does not count there.

The sum is kept up to date and not added up anew: a merge then costs as much as its answers, not as the federation. It does not
drift, because changes are float32 and the sum is float64: what is taken away is what was added, and 29 spare bits keep sums exact
as long as an entry's changes are within a factor of 2^29 / clients of each other. Memory: one float32 adapter a client.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fedloom.aggregate.shared.merge_terms import held_directions
from fedloom.aggregate.shared.wrapper import require_factors
from fedloom.core.errors import Refused
from fedloom.core.lora import Adapter, Factor, cut_factor, map_tensors
from fedloom.core.policies import Aggregator, Merge, aggregator_layers
from fedloom.core.types import Model, Update

SUM, COUNT, CHANGE, TRAINED = "sum of last changes", "clients in the sum", "last change of ", "trained by "


@dataclass(frozen=True, slots=True)
class ClientChange:
    """Change of the model by one answer.

    Fields:
        update: the answer.
        by: the change, at the server's rank.
        where: 1 for each direction and side that the client trained, else 0.
    """

    update: Update
    by: Adapter
    where: Adapter


def require_changes(wrapper: str, inner: Aggregator, clients: int) -> None:
    """Raise Refused where a client's change cannot be kept entry by entry, or must not be."""
    require_factors(wrapper, inner, "a client's last change is kept entry by entry")
    for layer in aggregator_layers(inner):
        name = type(layer).__name__
        if getattr(layer, "remembers_changes", False):
            remedy = "it remembers each client's last change too, and one correction is enough; leave one out"
            raise Refused(f"aggregator ({wrapper}).inner", name, remedy)
    if clients < 1:
        raise Refused("aggregator.clients", clients, "the number of clients of the federation")


def with_empty_memory(model: Model, clients: int) -> Model:
    """Return the model with a memory in which no client of the federation has changed anything."""
    return replace(model, memory={**model.memory, **_empty_memory(model.adapter, clients)})


def _empty_memory(like: Adapter, clients: int) -> dict[str, Adapter]:
    zeros = map_tensors(lambda x: torch.zeros_like(x, dtype=torch.float64), like)
    return {SUM: zeros, COUNT: _marks(like, float(clients))}


def mean_last_change(memory: Mapping[str, Adapter]) -> Adapter:
    """Return the mean of the last changes, in float64."""
    return map_tensors(lambda sum_, count: sum_ / count.clamp_min(1.0), memory[SUM], memory[COUNT])


def last_change(memory: Mapping[str, Adapter], one: ClientChange) -> Adapter:
    """Return the last change before this answer, of the client that answers."""
    return memory.get(CHANGE + one.update.task.client) or map_tensors(torch.zeros_like, one.by)


def measure_changes(model: Model, merge: Merge) -> dict[int, ClientChange]:
    """Return the changes by task, without answers that were trained before the basis was last drawn anew."""
    updates = [
        update for _, update in merge.weighted_updates if update.base is None or update.base.basis == model.basis
    ]
    return {update.task.id: measure_change(update, model.adapter) for update in updates}


def measure_change(update: Update, like: Adapter) -> ClientChange:
    """Return what this answer changed. Directions that a client could select and left alone count as not trained."""
    start, received = update.task.start, update.result.adapter
    by, where = {}, {}
    for name, factor in like.factors.items():
        returned = received.factors[name]
        sent, held = (
            cut_factor(start.train.factors[name], returned.rank),
            held_directions(start, returned.rank).to(factor.up.device),
        )
        down = torch.zeros_like(factor.down).index_copy(0, held, returned.down - sent.down)
        up = torch.zeros_like(factor.up).index_copy(1, held, returned.up - sent.up)
        trained = factor.up.new_zeros(factor.rank).index_fill(0, held, 1.0)
        of_down, of_up = (trained * (side not in start.rules.unchanged) for side in ("down", "up"))
        if start.rules.select is not None:
            of_down, of_up = of_down * down.any(1), of_up * up.any(0)
        by[name], where[name] = Factor(down, up), Factor(of_down[:, None], of_up[None])
    dense = {name: received.dense[name] - start.train.dense[name] for name in like.dense}
    free = {name: x.new_full((), float("dense" not in start.rules.unchanged)) for name, x in like.dense.items()}
    return ClientChange(update, Adapter(by, dense), Adapter(where, free))


def replace_change(one: ClientChange, by: Adapter) -> Update:
    """Return the answer as if it had changed by this, where its client trained."""
    start, received = one.update.task.start, one.update.result.adapter
    moved, factors = map_tensors(lambda b, w: b * w, by, one.where), {}
    for name, returned in received.factors.items():
        sent, held = (
            cut_factor(start.train.factors[name], returned.rank),
            held_directions(start, returned.rank).to(returned.up.device),
        )
        down = sent.down.double() + moved.factors[name].down[held]
        up = sent.up.double() + moved.factors[name].up[:, held]
        factors[name] = Factor(down.to(returned.down), up.to(returned.up))
    dense = {name: (start.train.dense[name].double() + moved.dense[name]).to(x) for name, x in received.dense.items()}
    return replace(one.update, result=replace(one.update.result, adapter=Adapter(factors, dense)))


def remember_changes(memory: Mapping[str, Adapter], answers: Iterable[ClientChange]) -> dict[str, Adapter]:
    """Return the memory with these answers; of two answers of one client the later task is its last."""
    new = {key: entry for key, entry in memory.items() if _ours(key)}
    for one in sorted(answers, key=lambda one: one.update.task.id):
        client, old = one.update.task.client, last_change(new, one)
        trained_before = new.get(TRAINED + client)
        now = map_tensors(lambda d, o, w: torch.where(w > 0, d, o), one.by, old, one.where)
        trained = map_tensors(torch.maximum, trained_before, one.where) if trained_before else one.where
        counted = trained_before or _marks(one.by, 1.0)
        new[SUM] = map_tensors(lambda s, o, n: s - o.double() + n.double(), new[SUM], old, now)
        new[COUNT] = map_tensors(lambda c, o, n: c - o + n, new[COUNT], counted, trained)
        new[CHANGE + client], new[TRAINED + client] = now, trained
    return new


def store_memory(after: Model, before: Model, memory: Mapping[str, Adapter], clients: int) -> Model:
    """Return `after` with this memory, or with an empty one where its basis was drawn anew: entries then mean something else."""
    others = {key: entry for key, entry in after.memory.items() if not _ours(key)}
    entries = memory if after.basis == before.basis else _empty_memory(after.adapter, clients)
    return replace(after, memory={**others, **entries})


def _ours(key: str) -> bool:
    return key in (SUM, COUNT) or key.startswith((CHANGE, TRAINED))


def _marks(like: Adapter, value: float) -> Adapter:
    """One number for each direction of a side and each dense tensor."""

    def mark(x: Tensor, *shape: int) -> Tensor:
        return x.new_full(shape, value)

    factors = {name: Factor(mark(f.down, f.rank, 1), mark(f.up, 1, f.rank)) for name, f in like.factors.items()}
    return Adapter(factors, {name: mark(x) for name, x in like.dense.items()})
