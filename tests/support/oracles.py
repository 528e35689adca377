"""Oracles: every merge rule of `aggregate/` a second time, from the papers' equations, in the vocabulary of `equations.py`.

A new method brings its own: a function `oracle(method, round) -> Values` in `tests/aggregate/test_<module>.py`.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import replace
from math import sqrt
from typing import Any, TypeAlias

import torch
from torch import Tensor

from fedloom.aggregate.adam import Adam
from fedloom.aggregate.clip import Clip
from fedloom.aggregate.fedex import FedEx
from fedloom.aggregate.fedit import FedIT
from fedloom.aggregate.fedplora import FedPLoRA
from fedloom.aggregate.fedsa import FedSA
from fedloom.aggregate.fedsvd import FedSVD
from fedloom.aggregate.ffa import FFA
from fedloom.aggregate.flexlora import FlexLoRA
from fedloom.aggregate.flora import FLoRA
from fedloom.aggregate.folded_delta import FoldedDelta
from fedloom.aggregate.hetlora import HetLoRA
from fedloom.aggregate.hlora import HLoRA
from fedloom.aggregate.lora_a2 import LoRAA2
from fedloom.aggregate.momentum import Momentum
from fedloom.aggregate.product_delta import ProductDelta
from fedloom.aggregate.raflora import RaFLoRA
from fedloom.aggregate.rolora import RoLoRA
from fedloom.aggregate.scaffold import Scaffold
from tests.support.equations import Client, Round, Values, at, best, changed, factored, heads, mean, product, voted

Oracle: TypeAlias = Callable[[Any, Round], Values]


# Factor space -----------------------------------------------------------------------------------------------------------


def fedit(_: FedIT, r: Round) -> Values:
    """FedIT: A = sum p_k A_k, B = sum p_k B_k."""
    return factored(r, {key: mean(r, key) for key in r.own})


def hetlora(_: HetLoRA, r: Round) -> Values:
    """arXiv 2401.06432: p_k ~ |B_k A_k| (here times the schedule's weight), zero-padded A and B."""
    sizes = [c.p * sqrt(sum(float(product(c.gave, n).square().sum()) for n in r.layers)) for c in r.clients]
    shares = [size / sum(sizes) for size in sizes] if sum(sizes) else [c.p for c in r.clients]
    by_norm = replace(r, clients=[replace(c, p=p) for c, p in zip(r.clients, shares, strict=True)])
    return fedit(FedIT(), by_norm) | heads(r)


def ffa(_: FFA, r: Round) -> Values:
    """arXiv 2403.12313: B = sum p_k B_k, A stays."""
    return factored(r, r.own | {f"{n}.B": voted(r, f"{n}.B") for n in r.layers} | heads(r))


def rolora(_: RoLoRA, r: Round) -> Values:
    """arXiv 2409.02346: B = sum p_k B_k in odd rounds, A = sum p_k A_k in even ones; each client moves the side it trained."""
    return factored(r, {key: voted(r, key) for key in r.own if "." in key} | heads(r))


def lora_a2(_: LoRAA2, r: Round) -> Values:
    """arXiv 2410.22815: X + sum w_k dX_k."""
    return factored(r, {key: voted(r, key, delta=True) for key in r.own if "." in key} | heads(r, delta=True))


def fedsa(_: FedSA, r: Round) -> Values:
    """arXiv 2410.01463: A = sum p_k A_k, row by row over those who hold it; B and the head are the clients' own."""
    return r.own | {f"{n}.A": voted(r, f"{n}.A", divide=True) for n in r.layers}


def fedplora(_: FedPLoRA, r: Round) -> Values:
    """arXiv 2602.16936: B_j = mean over Q_j of B_ij, A_j likewise; untouched where Q_j is empty."""
    return factored(r, {key: voted(r, key, divide=True) for key in r.own if "." in key} | heads(r))


# Product space ----------------------------------------------------------------------------------------------------------


def sums(r: Round, layer: str, scaled: Callable[[Client], float] = lambda c: 1.0) -> Tensor:
    """(1 - step) W + step sum p_k B_k A_k; as delta W + step sum p_k (B_k A_k - what k got)."""
    own = (1.0 if r.delta else 1.0 - r.step) * (product(r.own, layer) + r.fold.get(layer, 0.0))
    for c in r.clients:
        own = own + r.step * c.p * scaled(c) * (product(c.gave, layer) - product(c.got, layer) * r.delta)
    return own


def hlora(m: HLoRA, r: Round) -> Values:
    """arXiv 2503.00813: svd_r(sum p_k B_k A_k). As published, clients run alpha / r_k and the server alpha / r: factor r_k / r."""
    top = m.rank or r.rank
    scaled = (lambda c: 1.0) if m.published_alpha is None else (lambda c: c.rank / top)
    return heads(r) | {n: best(sums(r, n, scaled), top) for n in r.layers}


def flexlora(m: FlexLoRA, r: Round) -> Values:
    """arXiv 2402.11505: W = sum p_k B_k A_k, whole; or as in arXiv 2506.09199 the least svd_p of it with energy >= m.energy."""
    after = {n: sums(r, n) for n in r.layers}
    if m.energy is not None:
        after = {n: best(w, enough(w, m.energy)) for n, w in after.items()}
    return heads(r) | after


def enough(matrix: Tensor, share: float) -> int:
    """min {p : sum_{i <= p} sigma_i^2 >= share sum_i sigma_i^2}."""
    energies = torch.linalg.svdvals(matrix) ** 2
    return next(p for p in range(1, len(energies) + 1) if float(energies[:p].sum()) >= share * float(energies.sum()))


def raflora(m: RaFLoRA, r: Round) -> Values:
    """arXiv 2602.13486, Eq. 8: direction h is the mean over C_h = {k : r_k >= h}, the server's where C_h is empty."""
    after = heads(r)
    for n in r.layers:
        total = torch.zeros_like(product(r.own, n))
        for h in range(max(r.rank, *(len(c.gave[f"{n}.A"]) for c in r.clients))):
            in_c = [c for c in r.clients if len(c.gave[f"{n}.A"]) > h and c.p > 0]
            total += direction(r.own, n, h) * (1.0 if r.delta or not in_c else 1.0 - r.step)
            for c in in_c:
                change = direction(c.gave, n, h) - r.delta * direction(c.got, n, h)
                total += r.step * c.p / sum(c.p for c in in_c) * change
        after[n] = best(total, m.rank or r.rank)
    return after


def direction(of: Values, layer: str, h: int) -> Tensor:
    """B[:, h] A[h], zero beyond the rank."""
    return of[f"{layer}.B"][h : h + 1].T @ of[f"{layer}.A"][h : h + 1]


def product_delta(m: ProductDelta | FoldedDelta, r: Round) -> Values:
    """W + sum p_k (B_k A_k - what k got), cut; what is folded into a client's base cancels out."""
    whole = {n: product(r.own, n) + r.step * changed(r, n) for n in r.layers}
    return heads(r, delta=True) | {n: best(w, m.rank or r.rank) for n, w in whole.items()}


def fedsvd(_: FedSVD, r: Round) -> Values:
    """arXiv 2505.12805: B + sum p_k dB_k at a shared A, then A = V^T, B = U S."""
    return heads(r, delta=True) | {n: best(product(r.own, n) + r.step * changed(r, n), r.rank) for n in r.layers}


def flora(_: FLoRA, r: Round) -> Values:
    """arXiv 2409.05976: W0 + [B_1, B_2, ...] [p_1 A_1; p_2 A_2; ...]; the adapter begins at zero again."""
    terms = {n: torch.stack([c.p * product(c.gave, n) for c in r.clients]).sum(0) for n in r.layers}
    return heads(r) | {n: r.fold.get(n, 0.0) + r.step * term for n, term in terms.items()}


def fedex(_: FedEx, r: Round) -> Values:
    """arXiv 2410.09432: A = sum p_k A_k, B = sum p_k B_k, W0 + sum p_k B_k A_k - B A; clients' changes, where W0 is shared."""
    sides = {key: voted(r, key) for key in r.own if "." in key}
    return sides | heads(r) | {n: product(r.own, n) + r.fold.get(n, 0.0) + r.step * changed(r, n) for n in r.layers}


# Wrappers ---------------------------------------------------------------------------------------------------------------


def clip(m: Clip, r: Round) -> Values:
    """arXiv 1710.06963: what k changed times min(1, S / |change|), over all entries together."""
    clients = []
    for c in r.clients:
        size = sqrt(sum(float((c.gave[key] - c.got[key]).square().sum()) for key in c.gave))
        by = min(1.0, m.norm / size) if size else 1.0
        clients.append(replace(c, gave={key: c.got[key] + by * (x - c.got[key]) for key, x in c.gave.items()}))
    return oracle_of(m.inner)(m.inner, replace(r, clients=clients))


def free_sides(r: Round) -> frozenset[str]:
    """Sides that somebody trained."""
    return frozenset().union(*(c.free for c in r.clients))


def dead(r: Round, after: Values) -> bool:
    """A direction is zero on both sides: the server draws it anew, and wrappers forget."""
    lengths = [after[f"{n}.A"].norm(dim=1) + after[f"{n}.B"].norm(dim=1) for n in r.layers]
    return any(bool((length == 0).any()) for length in lengths)


def stepped(r: Round, after: Values, by: Callable[[str, Tensor], tuple[Tensor, Values]]) -> Values:
    """`by` says where a trained side goes and what is remembered of it; the others stay as they are."""
    if dead(r, after):
        return after
    moved, remembered = dict(r.own), Values()
    for key in r.own:
        new, kept = by(key, after[key] - r.own[key])
        remembered |= kept
        if key.rpartition(".")[2] in free_sides(r):
            moved[key] = new
    return factored(r, moved) | remembered


def momentum(m: Momentum, r: Round) -> Values:
    """arXiv 1909.06335: v <- beta v + change, w <- w + eta v."""

    def by(key: str, change: Tensor) -> tuple[Tensor, Values]:
        old = r.memory.get("momentum", {}).get(key, torch.zeros_like(change))
        v = m.beta * old + change if key.rpartition(".")[2] in free_sides(r) else old
        return r.own[key] + m.learning_rate * v, {f"momentum:{key}": v}

    return stepped(r, oracle_of(m.inner)(m.inner, r), by)


def adam(m: Adam, r: Round) -> Values:
    """arXiv 2003.00295, Alg. 2: m <- b1 m + (1 - b1) d, v <- b2 v + (1 - b2) d^2 (tau^2 at first), w += eta m / (sqrt(v) + tau).

    The schedule's step is in eta and not in d.
    """

    def by(key: str, change: Tensor) -> tuple[Tensor, Values]:
        d = change / r.step
        first = r.memory.get("adam mean", {}).get(key, torch.zeros_like(d))
        second = r.memory.get("adam square", {}).get(key, torch.full_like(d, m.tau**2))
        if key.rpartition(".")[2] in free_sides(r):
            first, second = m.beta1 * first + (1 - m.beta1) * d, m.beta2 * second + (1 - m.beta2) * d**2
        new = r.own[key] + r.step * m.learning_rate * first / (second.sqrt() + m.tau)
        return new, {f"adam mean:{key}": first, f"adam square:{key}": second}

    return stepped(r, oracle_of(m.inner)(m.inner, r), by)


def scaffold(m: Scaffold, r: Round) -> Values:
    """arXiv 1910.06378, Alg. 1: c <- c + (1/N) sum (c_i+ - c_i); the model is the wrapped method's."""
    after = oracle_of(m.inner)(m.inner, r)
    for key, c in r.memory["control"].items():
        grown = torch.stack([at(one.held, one.control[key], c) for one in r.clients]).sum(0)
        after[f"control:{key}"] = c + grown / m.clients
    return after


ORACLES: dict[type, Oracle] = {
    Adam: adam, Clip: clip, FedEx: fedex, FedIT: fedit, FedPLoRA: fedplora, FedSA: fedsa, FedSVD: fedsvd, FFA: ffa,
    FlexLoRA: flexlora, FLoRA: flora, FoldedDelta: product_delta, HetLoRA: hetlora, HLoRA: hlora, LoRAA2: lora_a2,
    Momentum: momentum, ProductDelta: product_delta, RaFLoRA: raflora, RoLoRA: rolora, Scaffold: scaffold,
}  # fmt: skip


def oracle_of(method: object) -> Oracle:
    """The equation of this method: from here, or from the tests of its own module."""
    if type(method) in ORACLES:
        return ORACLES[type(method)]
    name = type(method).__module__.rpartition(".")[2]
    module = f"tests.aggregate.test_{name}"
    oracle = getattr(importlib.import_module(module), "oracle", None) if importlib.util.find_spec(module) else None
    assert oracle, (
        f"{type(method).__name__} has no oracle: define oracle(method, round) in tests/aggregate/test_{name}.py"
    )
    return oracle
