"""Weights of updates in a merge, as plain functions that a schedule takes as a field."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

from fedloom.types import Update

Weigh: TypeAlias = Callable[[Update], float]


def by_examples(update: Update) -> float:
    """The client's training examples: FedAvg's weight n_k."""
    return float(update.result.examples)


def by_tokens(update: Update) -> float:
    """Tokens trained on in this task, padding not counted."""
    return float(update.result.tokens)


def by_work(update: Update) -> float:
    """Training examples times the local steps done with each: n_g times the steps of a group, ParallelSFL's N_c tau_c.

    Source: Liao et al., "ParallelSFL", arXiv 2410.01256, 2024, Eq. 18; for HierFedLoRA's groups, arXiv 2503.21213, 2025.
    """
    return float(update.result.examples * update.result.steps)


def uniform(update: Update) -> float:
    """Every client alike."""
    return 1.0


def normalised(updates: Sequence[Update], weigh: Weigh) -> tuple[tuple[float, Update], ...]:
    """(weight, update) in task order with weights that sum to 1; where all weigh nothing, every client alike."""
    ordered = sorted(updates, key=lambda update: update.task.id)
    weights = [weigh(update) for update in ordered]
    total = sum(weights)
    shares = [weight / total if total > 0 else 1 / len(ordered) for weight in weights]
    return tuple(zip(shares, ordered, strict=True))
