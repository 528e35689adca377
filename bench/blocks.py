"""One block of a language model of 8 billion parameters, merged by a server: what was stacked before, lifted answers, a window.

Seven linear layers at rank 16, ten answers to starts that were rounded to float16, cut from ten versions (an asynchronous server).
*Before*: the model, each answer, what was sent and each version are stacked. *Lifted*: an answer is its exact start plus what it
changed, so that all but the answers cancels; lifting all ten is counted. *Window*: nine of the ten answers were merged before.
Ways are interleaved; CPU seconds of the process, the least of some repeats.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from math import sqrt

import torch
from torch import Tensor

from fedloom.aggregate.product_delta import ProductDelta
from fedloom.aggregate.shared.merge_terms import base_offsets, offset_terms
from fedloom.core.codec import HALF
from fedloom.core.lora import Adapter, Factor, map_tensors, scale_product, stack, truncate
from fedloom.core.policies import Merge
from fedloom.core.transfer import encode_start, lift_answer
from fedloom.core.truncated_svd import grams, svd
from fedloom.core.types import Budget, Model, Result, Task, Update

RANK, ANSWERS, MOVED = 16, 10, 0.1
SIZES = {
    "q": (4096, 4096),
    "k": (1024, 4096),
    "v": (1024, 4096),
    "o": (4096, 4096),
    "gate": (14336, 4096),
    "up": (14336, 4096),
    "down": (4096, 14336),
}
Product = tuple[Tensor, Tensor]
"""`up` and `down` in float64."""


def first_version(draw: torch.Generator) -> Model:
    """A sorted model with a falling spectrum."""
    factors = {}
    for name, (d_out, d_in) in SIZES.items():
        left, right = (torch.linalg.qr(torch.randn(size, RANK, generator=draw))[0] for size in (d_out, d_in))
        factors[name] = Factor(right.T.contiguous(), left * 0.7 ** torch.arange(RANK))
    return Model(Adapter(factors))


def trained(start: Adapter, draw: torch.Generator, by: float) -> Adapter:
    """An answer whose tensors moved by this share of their norms."""

    def move(tensor: Tensor) -> Tensor:
        step = torch.randn(tensor.shape, generator=draw)
        moved: Tensor = tensor + by * step * (tensor.norm() / step.norm())
        return moved

    return map_tensors(move, start)


def answered(method: ProductDelta, base: Model, number: int, draw: torch.Generator) -> Update:
    """An answer as it arrives: to a start that was rounded, cut from this version."""
    start = encode_start(method.start(base, Budget(RANK, 1), number), HALF)
    task = Task(number, f"c{number}", 0, start, Budget(RANK, 1), 0.0)
    return Update(task, Result(trained(start.train, draw, MOVED), 1, 1, 1), base)


def lifted(method: ProductDelta, update: Update) -> Update:
    """The answer as a server keeps it."""
    base = update.base
    assert base is not None
    return lift_answer(update, method.start(base, update.task.budget, update.task.id).train)


def merge_before(model: Model, merge: Merge) -> dict[str, Factor]:
    """The rule before: everything is stacked, and the energy comes from Gram matrices of the stack."""
    found, offsets = {}, base_offsets(model, merge)
    for name, factor in model.adapter.factors.items():
        terms = [(1.0, factor)]
        for weight, update in merge.weighted_updates:
            terms.append((1.0, scale_product(update.result.adapter.factors[name], weight)))
            terms.append((1.0, scale_product(update.task.start.train.factors[name], -weight)))
        sum_ = stack([*terms, *offset_terms(name, offsets)])
        near, _ = grams(sum_.up, sum_.down)
        left, values, right = svd(sum_.up, sum_.down, RANK, near)
        found[name] = Factor(right, left * values)
    return found


def cpu(call: Callable[[], object]) -> float:
    """CPU seconds."""
    begun = time.process_time()
    call()
    return time.process_time() - begun


def optimum(merge: Merge, name: str) -> tuple[Product, Tensor]:
    """The weighted sum of the answers of one layer as orthonormal bases around a core, and the core, in float64."""
    pairs = [(weight, update.result.adapter.factors[name]) for weight, update in merge.weighted_updates]
    left = torch.linalg.qr(torch.cat([weight * factor.up.double() for weight, factor in pairs], 1))
    right = torch.linalg.qr(torch.cat([factor.down.double() for _, factor in pairs]).T)
    return (left.Q, right.Q), left.R @ right.R.T


def gap(merge: Merge, found: Adapter) -> float:
    """Error over the least possible error, minus 1; the worst layer. The answers of `merge` are lifted, so that all else cancels."""
    worst = 0.0
    for name, factor in found.factors.items():
        (left, right), core = optimum(merge, name)
        up, down = factor.up.double(), factor.down.double()
        least = float(torch.linalg.svdvals(core)[RANK:].square().sum())
        inside = (left.T @ up) @ (down @ right)
        outside = float(((up.T @ up) * (down @ down.T)).sum()) - float(inside.square().sum())
        worst = max(worst, sqrt((float((core - inside).square().sum()) + max(0.0, outside)) / least) - 1.0)
    return worst


def again(update: Update) -> Update:
    """The same answer with tensors of its own, of which nobody remembers anything."""
    fresh = map_tensors(torch.clone, update.result.adapter)
    return replace(update, result=replace(update.result, adapter=fresh))


def same_bits(one: Adapter, other: Adapter) -> bool:
    """Whether two adapters hold the same numbers."""
    return all(
        factor.up.equal(other.factors[name].up) and factor.down.equal(other.factors[name].down)
        for name, factor in one.factors.items()
    )


def run_block(repeats: int) -> dict[str, object]:
    """Measure, print a table and return the figures."""
    draw, method = torch.Generator().manual_seed(0), ProductDelta()
    versions = [first_version(draw)]
    while len(versions) < ANSWERS:
        moved = trained(versions[-1].adapter, draw, MOVED / 2)
        cut = {name: truncate(factor, RANK) for name, factor in moved.factors.items()}
        versions.append(Model(Adapter(cut), basis=len(versions)))
    arrived = [answered(method, base, number, draw) for number, base in enumerate(versions, 1)]
    model, weights = versions[-1], [(number + 5) / 105 for number in range(1, ANSWERS + 1)]

    def merge(updates: list[Update], *, window: bool = False) -> Merge:
        pairs = tuple(zip(weights, updates, strict=True))
        return Merge(pairs, retain=tuple(updates) if window else ())

    held = [lifted(method, update) for update in arrived]
    method.merge(model, merge(held, window=True))  # what the window remembers

    def upload() -> Model:
        return method.merge(model, merge([*held[:-1], lifted(method, arrived[-1])], window=True))

    ways: dict[str, Callable[[], object]] = {
        "before": lambda: merge_before(model, merge(arrived)),
        "lifted": lambda: method.merge(model, merge([lifted(method, update) for update in arrived])),
        "window": upload,
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, call in ways.items():
            times[name].append(cpu(call))
    least = {name: min(found) for name, found in times.items()}
    print("\none block of an 8B model, rank 16, ten answers from ten versions: CPU seconds (least - most)")
    for name, found in times.items():
        print(f"  {name:8s} {least[name]:.3f} - {max(found):.3f}   {least['before'] / least[name]:.1f}x")
    whole, window = merge(held), merge(held, window=True)
    remembered = method.merge(model, window).adapter
    forgotten = method.merge(model, window.map_updates(again)).adapter
    return {
        "lifted_8b_block_async_ratio": round(least["before"] / least["lifted"], 2),
        "window_8b_block_ratio": round(least["before"] / least["window"], 2),
        "lifted_8b_block_gap": gap(whole, method.merge(model, whole).adapter),
        "window_8b_block_gap": gap(whole, remembered),
        "same_bits_from_empty_memo": same_bits(remembered, forgotten),
    }
