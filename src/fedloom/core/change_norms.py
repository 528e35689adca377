"""How far an answer moves the model, and how far it may: relative to what others of this run sent, and to what an optimiser can do.

Four parts are judged apart, so that none hides behind another: the products up @ down, which are what moves the model; the factors,
because a product stays the same when `up` is multiplied by a number and `down` divided by it, and a mean of factors does not; the
dense tensors; the control variate. A norm is over all layers of a part together.

Budgets differ. A norm grows with the root of how many numbers are trained, so the root mean square is compared; and with the steps
between their root (a random walk) and themselves (a straight line), so it is divided by steps ** 0.75, which is at most 3.2 times
off over hundredfold steps. Where the learning rate follows the rank, it is divided by the rate's multiple; a head keeps the run's.

Others are the latest accepted answers of at most `WINDOW` other clients, one a client, that were asked to train the same sides (a
method that alternates between `up` and `down` moves products unequally). Half of them can lie before the median does. With fewer than
`QUORUM` others nothing is compared; a client's largest step with its optimiser, where it is known, bounds the first answers too:
AdamW moves no number much further than the learning rate in a step (Kingma and Ba, "Adam", arXiv 1412.6980, section 2.1).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from statistics import median_high
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from fedloom.core.answer_change import product_change, sent_part, squared_change
from fedloom.core.lora import Adapter, Factor, lay_flat, named_tensors, same_buffers
from fedloom.core.types import ClientId, Result, Task, TaskStart

WINDOW, QUORUM = 32, 2
"""Other clients whose latest answers are compared with: at most, and at least."""
PARTS = ("products", "factors", "dense", "control")
Frame: TypeAlias = Literal["own", "merged", "rotated"]
"""Coordinates of an answer's factors: those that were sent, of a client that trained them; those of an edge, which merged several
answers; or any others, where it merges products.
"""


@dataclass(frozen=True, slots=True)
class ChangeNorms:
    """How far one answer moved: root mean squares over the numbers of each part.

    Fields:
        task: number of the task.
        steps: optimiser steps that the task allowed.
        products: Frobenius norm of the change of all products, over the root of the numbers in the factors.
        factors: root mean square of the change of the factors.
        dense: that of the dense tensors (0: there are none).
        control: that of the change of the control variate (0: there is none).
        rate: learning rate of the factors as a multiple of the run's.
    """

    task: int
    steps: int
    products: float
    factors: float
    dense: float = 0.0
    control: float = 0.0
    rate: float = 1.0


def norm(tensor: Tensor) -> float:
    """Return the Frobenius norm; in float64 where float32 could overflow."""
    size = float(torch.linalg.vector_norm(tensor, dtype=torch.float32))
    return size if size < 1e15 else float(torch.linalg.vector_norm(tensor, dtype=torch.float64))


def change_norms(task: Task, result: Result) -> ChangeNorms:
    """Return how far a valid answer moved from what was sent. Cost: a pass over the factors, and Grams of their rank."""
    new, sent = result.adapter, task.start.train
    flats = same_buffers(lay_flat(one, in_any_order=True) for one in (new, sent))
    products, factors = _squares_of_layers(task.start, new) if flats is None else squared_change(*flats)
    numbers = flats[0].layout.numbers(("dense",)) if flats else _numbers(new)
    root = math.sqrt(max(1, numbers))
    return ChangeNorms(
        task.id,
        task.budget.steps,
        math.sqrt(products) / root,
        math.sqrt(factors) / root,
        _rms({name: tensor - sent.dense[name] for name, tensor in new.dense.items()}),
        _rms(named_tensors(result.control) if result.control else {}),
        task.budget.rate_multiple,
    )


def _numbers(adapter: Adapter) -> int:
    return sum(factor.up.numel() + factor.down.numel() for factor in adapter.factors.values())


def _squares_of_layers(start: TaskStart, new: Adapter) -> tuple[float, float]:
    """Squared norms of the change of the products and of the factors, layer by layer; the answer may have fewer directions."""
    change, sent, factors = product_change(start, new), sent_part(start, new), 0.0
    for name, factor in new.factors.items():
        old = sent.factors[name]
        factors += norm(factor.up - old.up) ** 2 + norm(factor.down - old.down) ** 2
    return sum(_squares(factor.up, factor.down) for factor in change.products.values()), factors


@dataclass(frozen=True, slots=True)
class NormLimits:
    """How far an answer may move.

    Fields:
        ratio: times the median of the others (None: not compared).
        step_ratio: times a straight line of largest steps (None: not judged).
        largest_step: the largest change of one number in an optimiser step (None: not known).
    """

    ratio: float | None = None
    step_ratio: float | None = None
    largest_step: float | None = None

    def measured(self, task: Task, result: Result) -> ChangeNorms | None:
        """Return how far a valid answer moved; None where nothing is limited."""
        judged = self.ratio is not None or (self.step_ratio is not None and self.largest_step is not None)
        return change_norms(task, result) if judged else None

    def why_too_far(self, task: Task, mine: ChangeNorms, others: Sequence[ChangeNorms], frame: Frame) -> str | None:
        """Return why an answer moved further than it may beside these others; None: it did not."""
        return self._why_unreachable(task.start, mine, frame) or self.why_unlike(mine, others, frame)

    def why_unlike(self, mine: ChangeNorms, others: Sequence[ChangeNorms], frame: Frame) -> str | None:
        """Return why an answer moved too far beside these others; None: it did not, or there are too few of them."""
        if self.ratio is None or len(others) < QUORUM:
            return None
        for part in PARTS:
            own, usual = _per_step(mine, part), median_high(_per_step(one, part) for one in others)
            # in one step any number may move so far; products have no such measure
            free = self.largest_step if self.largest_step is not None and part in ("factors", "dense") else 0.0
            compared = usual > 0 and getattr(mine, part) > free and not (part == "factors" and frame == "rotated")
            if compared and own > self.ratio * usual:
                far = f"its {part} moved by {own:.3g} (root mean square, for a step)"
                return f"{far}, above {self.ratio:g} times {usual:.3g}, the median of others"
        return None

    def _why_unreachable(self, start: TaskStart, mine: ChangeNorms, frame: Frame) -> str | None:
        """Return why no optimiser moves so far in the task's steps; None: it can, or it is not known how far one does."""
        if self.step_ratio is None or self.largest_step is None:
            return None
        scales = max(1.0, start.rules.up_rate) * max(1.0, start.scaling or 1.0)
        far = self.step_ratio * self.largest_step * mine.steps * scales
        bounds = {"factors": far} if frame == "own" else {"products": _reach(start.train, far)}
        for part, most in {**bounds, "dense": far}.items():
            if (own := getattr(mine, part)) > most:
                return (
                    f"its {part} moved by {own:.3g} (root mean square), and {mine.steps} steps reach {most:.3g} at most"
                )
        return None


def answer_kind(start: TaskStart) -> str:
    """Return a name of the sides that are trained: answers of one kind move alike."""
    return "+".join(side for side in ("down", "up", "dense") if side not in start.rules.unchanged)


def remember(recent: MutableMapping[ClientId, ChangeNorms], client: ClientId, norms: ChangeNorms) -> None:
    """Add an accepted answer in the place of the client's earlier one; the oldest leaves."""
    recent.pop(client, None)
    recent[client] = norms
    if len(recent) > WINDOW + 1:
        del recent[next(iter(recent))]


def _per_step(norms: ChangeNorms, part: str) -> float:
    value: float = getattr(norms, part) / (norms.rate if part in ("products", "factors") else 1.0)
    return float(value / max(1, norms.steps) ** 0.75)


def _rms(tensors: Mapping[str, Tensor]) -> float:
    numbers = sum(tensor.numel() for tensor in tensors.values())
    return math.sqrt(sum(norm(tensor) ** 2 for tensor in tensors.values()) / max(1, numbers))


def _squares(up: Tensor, down: Tensor) -> float:
    """Squared Frobenius norm of a product, from the Gram matrices of its factors."""
    return max(0.0, float(((up.T @ up).double() * (down @ down.T).double()).sum()))


def _reach(start: Adapter, far: float) -> float:
    """How far the products can move where each number of the factors moves by `far`, as `ChangeNorms.products`."""
    squares = 0.0
    for factor in start.factors.values():
        squares += _product_reach(factor, far) ** 2
    return math.sqrt(squares / max(1, _numbers(start)))


def _product_reach(factor: Factor, far: float) -> float:
    up, down = far * math.sqrt(factor.up.numel()), far * math.sqrt(factor.down.numel())
    return up * norm(factor.down) + norm(factor.up) * down + up * down
