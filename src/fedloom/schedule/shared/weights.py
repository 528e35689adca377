"""Weights of clients in a merge, before staleness: plain functions of an update that a schedule takes as its field `weigh`.

`examples` of an accepted answer are those that its client registered when it joined (`core.registration`), whatever the answer says;
and `steps` are at most those of the task. `tokens` and the loss are the client's own word: weigh by them among clients you trust.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from fedloom.core.errors import Refused
from fedloom.core.types import Update

Weigh: TypeAlias = Callable[[Update], float]
"""Weight of an update, 0 or more; `normalised` makes the weights of a merge sum to 1."""


def by_examples(update: Update) -> float:
    """Weigh by the client's training examples: FedAvg's n_k."""
    return float(update.result.examples)


def by_tokens(update: Update) -> float:
    """Weigh by the tokens trained on in this task, padding not counted: at equal steps, by the length of the client's texts."""
    return float(update.result.tokens)


def by_text(update: Update) -> float:
    """Weigh by the tokens that the client holds, estimated from those it trained on: CLLoRA's p_k, by the sum of lengths.

    Examples times tokens per step. Source: Zhang et al., "CLLoRA", arXiv 2502.18910, 2025, whose aggregation is open;
    the weights are ours.
    """
    return update.result.examples * update.result.tokens / max(1, update.result.steps)


def by_work(update: Update) -> float:
    """Weigh by training examples times local steps: n_g times the steps of a group, ParallelSFL's N_c tau_c.

    Source: Liao et al., "ParallelSFL", arXiv 2410.01256, 2024, Eq. 18; for HierFedLoRA's groups, arXiv 2503.21213, 2025.
    """
    return float(update.result.examples * update.result.steps)


@dataclass(frozen=True, slots=True)
class ByQuality:
    """Weight by examples, discounted by how badly the client's texts fit the model: n_k exp(-`sharpness` loss_k).

    The loss is the mean one of local training as the client reports it, in nats. So with a sharpness of 1 the discount is the
    geometric mean of the chances that the model gave to the right answers. This number is all that the server knows of quality. It
    cannot distinguish bad texts from hard ones, nor an honest report from another. A client that reports none is not discounted.

    Fields:
        sharpness: how fast weight falls with the loss (0: by examples alone).
    """

    sharpness: float = 2.0

    def __post_init__(self) -> None:
        if not 0 <= self.sharpness < math.inf:
            raise Refused("schedule.weigh.sharpness", self.sharpness, "0 weighs by examples alone, 2 is a start")

    def __call__(self, update: Update) -> float:
        """Return the weight of this answer."""
        loss = max(
            0.0, update.result.metrics.get("loss", 0.0)
        )  # no cross-entropy is smaller, and nobody weighs more than n_k
        return update.result.examples * math.exp(-self.sharpness * loss)


def uniform(update: Update) -> float:
    """Weigh every client alike."""
    return 1.0


def normalised(updates: Sequence[Update], weigh: Weigh) -> tuple[tuple[float, Update], ...]:
    """Return (weight, update) pairs in task order, with weights that sum to 1; equal ones where all weigh nothing."""
    ordered = sorted(updates, key=lambda update: update.task.id)
    weights = [weigh(update) for update in ordered]
    total = sum(weights)
    shares = [weight / total if total > 0 else 1 / len(ordered) for weight in weights]
    return tuple(zip(shares, ordered, strict=True))
