"""The trainer: one task after the other on the shared base, each a function of its arguments alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fedloom.train import convert
from fedloom.train.base import Base
from fedloom.train.batches import batches
from fedloom.train.settings import Training
from fedloom.train.texts import Encoded
from fedloom.types import ClientId, Local, Result, Task


@dataclass(frozen=True, slots=True)
class PeftTrainer:
    """Trains the clients' shards (indices into `texts`) on one base."""

    base: Base
    texts: Encoded
    shards: Mapping[ClientId, tuple[int, ...]]
    training: Training

    def train(self, work: Sequence[tuple[Task, Local]]) -> list[tuple[Result, Local]]:
        """Each task in turn: load, train, read back. The base keeps nothing of it."""
        return [self._one(task, local) for task, local in work]

    def _one(self, task: Task, local: Local) -> tuple[Result, Local]:
        slot = self.base.put(task.start.train, task.start.scaling)
        weights = convert.parameters(self.base.model, slot)
        optimiser = self._optimiser(weights, local if local.basis == task.start.basis else Local())
        shard = self.shards[task.client]
        with torch.random.fork_rng():
            torch.manual_seed(task.seed)
            losses, tokens = self._steps(task, shard, list(weights.values()), optimiser)
        result = Result(
            adapter=convert.read(self.base.model, slot),
            examples=len(shard),
            tokens=tokens,
            steps=task.budget.steps,
            metrics={"loss": sum(losses) / len(losses), "first_loss": losses[0]},
        )
        moments = _moments(weights, optimiser) if self.training.keep_moments else {}
        return result, Local(task.start.basis, moments)

    def _steps(
        self, task: Task, shard: Sequence[int], weights: list[nn.Parameter], optimiser: torch.optim.Optimizer
    ) -> tuple[list[float], int]:
        """The optimiser steps of one task: losses, and tokens seen without padding."""
        model, lengths = self.base.model.train(), self.texts.lengths(shard)
        losses, tokens, steps = [], 0, task.budget.steps
        plan = batches(lengths, self.training.batch_size, steps, self.training.bucket, task.seed)
        for step, batch in enumerate(plan):
            for group in optimiser.param_groups:
                group["lr"] = self.training.rate(step, steps)
            loss = model(**self.texts.batch([shard[i] for i in batch], self.base.device)).loss
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(weights, self.training.clip)
            optimiser.step()
            losses.append(float(loss.detach()))
            tokens += sum(lengths[i] for i in batch)
        return losses, tokens

    def _optimiser(self, weights: Mapping[str, nn.Parameter], local: Local) -> torch.optim.AdamW:
        optimiser = torch.optim.AdamW(
            weights.values(), lr=self.training.learning_rate, weight_decay=self.training.weight_decay
        )
        for name, weight in weights.items():
            if name in local.moments:
                optimiser.state[weight] = {key: value.clone() for key, value in local.moments[name].items()}
        return optimiser


def _moments(weights: Mapping[str, nn.Parameter], optimiser: torch.optim.Optimizer) -> dict[str, dict[str, Tensor]]:
    return {
        name: {key: value.detach().clone() for key, value in optimiser.state[w].items()} for name, w in weights.items()
    }
