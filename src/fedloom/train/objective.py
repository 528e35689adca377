"""Changes of a client's plain gradient (proximal pull, control variate, mask), the pruning penalty, and its sides and directions.

A gradient change acts on `.grad` between the backward pass and clipping, on parameters by the names of
`peft_weights.slot_parameters`. The other functions put together what a client trains and what it sends: its private sides, its
control variate and the directions of the server that its task holds. Only torch is imported here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import torch
from torch import Tensor, nn

from fedloom.core.lora import Adapter, Factor, cut_factor, map_tensors, pad, server_rank, take_sides
from fedloom.core.types import ClientState, Pruning, Side, Task, TaskStart

Weights: TypeAlias = Mapping[str, nn.Parameter]
GradientChange: TypeAlias = Callable[[], None]


def side_of(name: str) -> Side:
    """Return the side to which a parameter of this name belongs."""
    match name.rpartition(".")[2]:
        case "down":
            return "down"
        case "up":
            return "up"
        case _:
            return "dense"


def rate_of(side: Side, task: Task) -> float:
    """Return the learning rate of a side of a task's adapter, as a multiple of the run's."""
    if side == "dense":
        return 1.0
    return task.budget.rate_multiple * (task.start.rules.up_rate if side == "up" else 1.0)


def proximal_pull(weights: Weights, strength: float) -> GradientChange:
    """Make FedProx's gradient change (Li et al., arXiv 1812.06127, Eq. 2): it adds the gradient of strength / 2 * |w - w0|^2,
    w0 the weights at the start of the task.
    """
    origin = {name: weight.detach().clone() for name, weight in weights.items()}

    def amend() -> None:
        for name, weight in weights.items():
            if weight.grad is not None:
                weight.grad.add_(weight.detach() - origin[name], alpha=strength)

    return amend


@dataclass(slots=True)
class ControlVariate:
    """SCAFFOLD's gradient change (Karimireddy et al., arXiv 1910.06378, Alg. 1): g - c_i + c; the mean of g is the next c_i.

    Fields:
        weights: the trained parameters by name.
        server: c, the server's control variate, by the same names.
        client: c_i, the client's.
        gradient_sum: the sum of the plain gradients so far.
        steps: how many gradients were added.
    """

    weights: Weights
    server: Mapping[str, Tensor]
    client: Mapping[str, Tensor]
    gradient_sum: dict[str, Tensor] = field(default_factory=dict)
    steps: int = 0

    def __call__(self) -> None:
        """Add the plain gradient to the sum, then correct it."""
        self.steps += 1
        for name, weight in self.weights.items():
            if weight.grad is not None:
                self.gradient_sum[name] = (
                    self.gradient_sum[name] + weight.grad if name in self.gradient_sum else weight.grad.clone()
                )
                weight.grad.add_((self.server[name] - self.client[name]).to(weight.grad))

    def next_variate(self) -> dict[str, Tensor]:
        """Return c_i of the next task: the mean gradient; where nothing was trained, the old one."""
        return {
            n: (self.gradient_sum[n] / self.steps).cpu() if n in self.gradient_sum else self.client[n]
            for n in self.client
        }


def mask_gradient(weights: Weights, chosen: Mapping[str, Tensor]) -> GradientChange:
    """Make a gradient change that trains only chosen directions; `chosen` holds a mask (rank,) for each layer."""

    def amend() -> None:
        for name, weight in weights.items():
            layer, _, last = name.rpartition(".")
            if weight.grad is not None and layer in chosen and side_of(name) != "dense":
                keep = chosen[layer].to(weight.grad)
                weight.grad.mul_(keep[:, None] if last == "down" else keep)

    return amend


def most_moved_directions(before: Adapter, after: Adapter, count: int) -> dict[str, Tensor]:
    """Choose the `count` directions, over all layers together, that a trial moved most (LoRA-A2, arXiv 2410.22815).

    A direction's score is |d up| |down| + |up| |d down|: with one side frozen that is the norm of the product's change.
    """
    scores = {}
    for name, old in before.factors.items():
        new = after.factors[name]
        risen = (new.up - old.up).norm(dim=0) * old.down.norm(dim=1)
        turned = old.up.norm(dim=0) * (new.down - old.down).norm(dim=1)
        scores[name] = risen + turned
    flat = torch.cat([*scores.values()])
    keep = torch.zeros(len(flat), dtype=torch.bool)
    keep[torch.sort(flat, descending=True, stable=True).indices[:count]] = True
    parts = torch.split(keep, [len(score) for score in scores.values()])
    return dict(zip(scores, parts, strict=True))


def pruning_penalty(weights: Weights, pruning: Pruning) -> Tensor:
    """Return strength * sum over layers of |up[:, t:]| |down[t:]| (HetLoRA, arXiv 2401.06432), t the beginning of the tail."""
    total = torch.zeros(())
    for name, down in weights.items():
        if side_of(name) == "down":
            up, first = weights[f"{name.removesuffix('.down')}.up"], pruning.rank_after(down.shape[0])
            total = total.to(down.device) + up[:, first:].norm() * down[first:].norm()
    return pruning.strength * total


def prune_tail(before: Adapter, after: Adapter, pruning: Pruning) -> Adapter:
    """Cut the tail off `after` if it has become smaller than that of `before` (HetLoRA); otherwise return `after`."""

    def size(adapter: Adapter) -> float:
        tails = [
            (f.up[:, pruning.rank_after(f.rank) :], f.down[pruning.rank_after(f.rank) :])
            for f in adapter.factors.values()
        ]
        return sum(float(up.norm() * down.norm()) for up, down in tails)

    if not size(after) < size(before):
        return after
    return Adapter({n: cut_factor(f, pruning.rank_after(f.rank)) for n, f in after.factors.items()}, after.dense)


def flatten_adapter(adapter: Adapter) -> dict[str, Tensor]:
    """Return an adapter's tensors by the names of the parameters that they belong to."""
    found = {f"{name}.{part}": getattr(f, part) for name, f in adapter.factors.items() for part in ("down", "up")}
    return found | dict(adapter.dense)


def unflatten_adapter(tensors: Mapping[str, Tensor], like: Adapter) -> Adapter:
    """Reverse `flatten_adapter`; `like` has the layers."""
    factors = {name: Factor(tensors[f"{name}.down"], tensors[f"{name}.up"]) for name in like.factors}
    return Adapter(factors, {name: tensors[name] for name in like.dense})


def take_directions(stored: Adapter, like: Adapter, directions: Sequence[int]) -> Adapter:
    """Take these directions of the server out of what a client has stored, in the layers of `like`; zeros where it has none."""
    held, factors = torch.tensor(list(directions)), {}
    for name, factor in like.factors.items():
        own = stored.factors.get(name, Factor(factor.down[:0], factor.up[:, :0]))
        full = pad(own, max(own.rank, max(directions) + 1))
        factors[name] = Factor(full.down[held], full.up[:, held])
    return Adapter(factors, stored.dense)


def put_directions(stored: Adapter | None, new: Adapter, directions: Sequence[int]) -> Adapter:
    """Put `new` at these directions of the server into what a client has stored; other directions and layers stay."""
    held, known = torch.tensor(list(directions)), stored.factors if stored else {}
    factors = dict(known)
    for name, factor in new.factors.items():
        before = known.get(name, Factor(factor.down[:0], factor.up[:, :0]))
        full = pad(before, max(before.rank, max(directions) + 1))
        factors[name] = Factor(full.down.index_copy(0, held, factor.down), full.up.index_copy(1, held, factor.up))
    if new.flat is None:
        return Adapter(factors, new.dense)
    # a view would keep the whole buffer, here and in every checkpoint
    return Adapter(factors, {name: tensor.clone() for name, tensor in new.dense.items()})


def replace_sides(
    own: Adapter, other: Adapter, sides: frozenset[Side], chosen: Mapping[str, Tensor] | None = None
) -> Adapter:
    """Return `own` with these sides, and with the directions outside `chosen`, taken from `other`."""
    found = take_sides(sides, other, own)
    if chosen is None:
        return found
    factors = {}
    for name, factor in found.factors.items():
        before, keep = other.factors[name], chosen[name]
        factors[name] = Factor(
            torch.where(keep[:, None], factor.down, before.down), torch.where(keep, factor.up, before.up)
        )
    return Adapter(factors, found.dense)


def personal_adapter(start: TaskStart, local: ClientState) -> Adapter:
    """Return the adapter that the client runs: the one it received, with its private sides in place if it has some already."""
    if local.private is None or not start.rules.private:
        return start.train
    own = take_directions(local.private, start.train, start_directions(start))
    return replace_sides(start.train, own, frozenset(start.rules.private))


def start_directions(start: TaskStart) -> Sequence[int]:
    """Return the numbers of the server's directions that a start holds."""
    return range(server_rank(start.train)) if start.directions is None else start.directions


def client_variate(start: TaskStart, local: ClientState) -> Adapter:
    """Return the client's control variate in the directions of this start; zero where it has none yet."""
    assert start.control is not None
    if local.control is None:
        return map_tensors(torch.zeros_like, start.control)
    return take_directions(local.control, start.control, start_directions(start))
