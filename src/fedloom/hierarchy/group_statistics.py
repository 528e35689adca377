"""Statistics that an edge collects of its members while they work, and reports to the root: times, layers, disagreement."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from fedloom.aggregate.shared.product_space import energy_shares
from fedloom.core.lora import product_difference, product_norm
from fedloom.core.types import Budget, ClientId, GroupHistory, GroupStatistics, MemberWork, Model, Update

REMEMBERED_TASKS = 8
"""Tasks of a group that the root remembers: moving averages with a gain of 0.2 have forgotten the others."""


@dataclass(slots=True)
class StatisticsCollector:
    """Statistics of one task of an edge, so far; the names are those of `GroupStatistics`, with `work` by member."""

    work: dict[ClientId, MemberWork] = field(default_factory=dict)
    mass: Mapping[str, float] = field(default_factory=dict)
    spread: float = 0.0

    def add_answer(self, update: Update) -> None:
        """Count an answer that is in a version for the first time."""
        budget, result, client = update.task.budget, update.result, update.task.client
        loss = result.metrics.get("loss")
        before = self.work.get(client, MemberWork(client, 0, None, 0, 0, 0.0, 0.0, 0.0, loss))
        down, train, up = (result.metrics.get(f"seconds_{part}", 0.0) for part in ("down", "train", "up"))
        self.work[client] = replace(
            before,
            rank=budget.rank,
            depth=budget.depth,
            answers=before.answers + 1,
            steps=before.steps + result.steps,
            down=before.down + down,
            train=before.train + train,
            up=before.up + up,
            last_loss=loss,
        )

    def add_version(self, model: Model, updates: Sequence[Update]) -> None:
        """Add a version and the answers in it: how much each layer changed, and how much of that is left in the version."""
        changes = [squared_changes(update) for update in updates]
        sizes = [float(update.result.examples) for update in updates]
        mass, common, whole = dict(self.mass), 0.0, 0.0
        for name in dict.fromkeys(name for own in changes for name in own):
            held = [(size, k) for k, size in enumerate(sizes) if name in changes[k]]
            total = sum(size for size, _ in held)
            mass[name] = sum(size * changes[k][name] / updates[k].result.steps for size, k in held) / total
            whole += sum(size * changes[k][name] for size, k in held) / total
            before = updates[held[0][1]].base
            common += (
                product_norm(product_difference(model.adapter.factors[name], before.adapter.factors[name])) ** 2
                if before
                else 0.0
            )
        heads = [{n: v / one.result.steps for n, v in squared_head_changes(one).items()} for one in updates]
        for name in heads[0]:
            mass[name] = sum(size * head[name] for size, head in zip(sizes, heads, strict=True)) / sum(sizes)
        self.mass = mass
        if whole > 0 and all(update.base and update.base.fold is model.fold for update in updates):
            self.spread = max(0.0, 1.0 - common / whole)

    def summary(self, budget: Budget, model: Model, loss: float | None) -> GroupStatistics:
        """Return what the edge reports with its answer."""
        return GroupStatistics(
            budget, tuple(self.work.values()), self.mass, self.spread, tuple(energy_shares(model)), loss
        )


def squared_changes(update: Update) -> dict[str, float]:
    """Return the squared Frobenius norm of what a client changed in each layer."""
    sent = update.task.start.train.factors
    return {
        name: product_norm(product_difference(new, sent[name])) ** 2
        for name, new in update.result.adapter.factors.items()
    }


def squared_head_changes(update: Update) -> dict[str, float]:
    """Return the squared norm of what a client changed in each tensor that is trained whole (the head)."""
    sent = update.task.start.train.dense
    return {name: float((new - sent[name]).norm()) ** 2 for name, new in update.result.adapter.dense.items()}


def with_statistics(history: GroupHistory, statistics: GroupStatistics) -> GroupHistory:
    """Return what the root knows of a group after this report."""
    return replace(history, statistics=(*history.statistics, statistics)[-REMEMBERED_TASKS:])


def with_task_seconds(statistics: GroupStatistics, metrics: Mapping[str, float]) -> GroupStatistics:
    """Return the statistics with the seconds of the task that the root saw, which are metrics of the answer."""
    return replace(statistics, seconds=metrics["seconds"], down=metrics["seconds_down"], up=metrics["seconds_up"])
