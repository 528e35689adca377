"""Vocabulary for writing down a paper's merge rule in dense float64, with no helper of the package; `oracles.py` uses them.

A side is kept with one row for each direction, "query.A" (r, d_in) and "query.B" (r, d_out), so that B A of the papers is
B^T A here; "query" is a dense matrix, the whole change of a layer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import torch
from hypothesis import assume
from torch import Tensor

from fedloom.core.lora import Adapter
from fedloom.core.policies import Merge
from fedloom.core.types import Model

Values: TypeAlias = dict[str, Tensor]
"""Both sides of every layer ("query.A", "query.B") and the dense tensors ("head"), in float64."""

PARTS = {"down": "A", "up": "B", "dense": "head"}


@dataclass(frozen=True)
class Client:
    """A participant: weight, what it `gave` back and had `got`, the sides it was `free` to change, the directions it holds.

    `chose`: which of these it trained was left to it.
    """

    p: float
    gave: Values
    got: Values
    free: frozenset[str]
    held: tuple[int, ...]
    rank: int
    control: Values
    name: str
    chose: bool


@dataclass(frozen=True)
class Round:
    """One merge: the server's adapter, the dense fold, what wrappers remember, the participants, the form of the merge."""

    own: Values
    fold: Values
    memory: Mapping[str, Values]
    clients: Sequence[Client]
    step: float
    delta: bool

    @property
    def layers(self) -> list[str]:
        """Names of the adapted layers."""
        return [key.removesuffix(".A") for key in self.own if key.endswith(".A")]

    @property
    def rank(self) -> int:
        """The server's rank."""
        return max(len(self.own[f"{layer}.A"]) for layer in self.layers)


def values(of: Adapter) -> Values:
    """An adapter as float64 sides."""
    found = {f"{n}.A": f.down.double() for n, f in of.factors.items()}
    return (
        found
        | {f"{n}.B": f.up.double().T for n, f in of.factors.items()}
        | {n: t.double() for n, t in of.dense.items()}
    )


def round_of(model: Model, merge: Merge) -> Round:
    """What the package's words say, as an oracle reads them."""
    clients = []
    for p, update in merge.weighted_updates:
        start, given = update.task.start, update.result
        free = frozenset(PARTS.values()) - {PARTS[side] for side in (*start.rules.frozen, *start.rules.private)}
        held = tuple(start.directions or range(max(f.rank for f in start.train.factors.values())))
        control = values(given.control) if given.control else {}
        rank, chose = update.task.budget.rank, start.rules.select is not None
        gave, got = values(given.adapter), values(start.train)
        clients.append(Client(p, gave, got, free, held, rank, control, update.task.client, chose))
    fold = {n: f.up.double() @ f.down.double() for n, f in model.fold.factors.items()} if model.fold else {}
    memory = {name: values(kept) for name, kept in model.memory.items()}
    return Round(values(model.adapter), fold, memory, clients, merge.step, merge.as_delta)


# Small words ------------------------------------------------------------------------------------------------------------


def product(of: Values, layer: str) -> Tensor:
    """B A."""
    return of[f"{layer}.B"].T @ of[f"{layer}.A"]


def best(matrix: Tensor, rank: int) -> Tensor:
    """The truncated SVD. Where the first value that is cut is nearly the last that is kept, float32 cannot know it: no case."""
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    assume(rank >= len(s) or not 0.9 * s[rank - 1] < s[rank])
    return (u[:, :rank] * s[:rank]) @ v[:rank]


def at(held: Sequence[int], rows: Tensor, like: Tensor) -> Tensor:
    """Rows put at the directions that they belong to, zero elsewhere; what is no side of a factor (the head) as it is."""
    if like.dim() == 1:
        return rows
    spread = torch.zeros_like(like)
    spread[list(held[: len(rows)])] = rows
    return spread


def mean(r: Round, key: str, delta: bool | None = None) -> Tensor:
    """FedAvg with zero-padding: (1 - step) w + step sum p_k w_k; as delta w + step sum p_k (w_k - what k got)."""
    delta, total = r.delta if delta is None else delta, torch.zeros_like(r.own[key])
    for c in r.clients:
        total += c.p * at(c.held, c.gave[key], total)
        total -= c.p * at(c.held, c.got[key], total) if delta else 0.0
    return (1.0 if delta else 1.0 - r.step) * r.own[key] + r.step * total


def voted(r: Round, key: str, divide: bool = False, delta: bool | None = None) -> Tensor:
    """Who does not hold a direction, or was not to train this side, votes for the server's value; or, `divide`, has no vote."""
    own, delta = r.own[key], r.delta if delta is None else delta
    total, weight = torch.zeros_like(own), torch.zeros(len(own), dtype=torch.float64)
    for c in r.clients:
        rows = list(c.held[: len(c.gave[key])])
        weight[rows] += c.p
        if key.rpartition(".")[2] in c.free:
            total[rows] += c.p * (c.gave[key] - (c.got[key] if delta else own[rows]))
    by = torch.where(weight > 0, weight, 1.0) if divide else torch.ones_like(weight)
    return own + r.step * total / by[:, None]


def changed(r: Round, layer: str) -> Tensor:
    """sum p_k (B_k A_k - what k got)."""
    return torch.stack([c.p * (product(c.gave, layer) - product(c.got, layer)) for c in r.clients]).sum(0)


def factored(r: Round, after: Values) -> Values:
    """Sides and head, and the whole change of each layer, B A + fold."""
    return after | {layer: product(after, layer) + r.fold.get(layer, 0.0) for layer in r.layers}


def heads(r: Round, delta: bool | None = None) -> Values:
    """The head is a plain mean."""
    return {key: mean(r, key, delta) for key in r.own if "." not in key}


# What clients changed last, for CA2FL and ACE -------------------------------------------------------------------------------


def where(c: Client, key: str, like: Tensor) -> Tensor:
    """1 where this client trained, direction by direction; where the choice was its own, those that it moved."""
    free = float(key.rpartition(".")[2] in c.free)
    if like.dim() == 1:
        return torch.full_like(like, free)
    moved = c.gave[key] - c.got[key][: len(c.gave[key])]
    trained = moved.any(1).double() if c.chose else torch.ones(len(moved), dtype=torch.float64)
    return free * at(c.held, trained[:, None].expand_as(moved), like)


def delta(c: Client, key: str, like: Tensor) -> Tensor:
    """Delta_k at the server's directions."""
    return at(c.held, c.gave[key] - c.got[key][: len(c.gave[key])], like)


def last_change(r: Round, name: str, key: str) -> Tensor:
    """h_i: zero for a client not heard of."""
    return r.memory.get(f"last change of {name}", {}).get(key, torch.zeros_like(r.own[key]))


def redirected(r: Round, wanted: Callable[[Client, str], Tensor]) -> Round:
    """The same round, had each client changed by what is wanted where it trained."""
    clients = []
    for c in r.clients:
        gave = {}
        for key, x in c.gave.items():
            by = where(c, key, r.own[key]) * wanted(c, key)
            gave[key] = c.got[key][: len(x)] + (by if x.dim() == 1 else by[list(c.held[: len(x)])])
        clients.append(replace(c, gave=gave))
    return replace(r, clients=clients)


def mean_of_last(own: Values, changes: Mapping[str, Values], trained: Mapping[str, Values], clients: int) -> Values:
    """Their sum over all clients but those who were heard of and have never trained this direction."""
    found = {}
    for key, like in own.items():
        sum_ = sum((one[key] for one in changes.values()), start=torch.zeros_like(like))
        out = sum((1.0 - one[key].expand_as(like) for one in trained.values()), start=torch.zeros_like(like))
        found[key] = sum_ / (clients - out).clamp_min(1.0)
    return found


def memory_values(r: Round, before: str) -> dict[str, Values]:
    """What is remembered under these words, by client."""
    return {name.removeprefix(before): kept for name, kept in r.memory.items() if name.startswith(before)}


def now_last(r: Round) -> dict[str, Values]:
    """h_k <- Delta_k, where it trained."""
    found = {}
    for c in r.clients:
        on = {key: where(c, key, own) for key, own in r.own.items()}
        found[c.name] = {
            key: torch.where(on[key] > 0, delta(c, key, own), last_change(r, c.name, key)) for key, own in r.own.items()
        }
    return found
