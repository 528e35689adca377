"""The trainer: one task after the other on the shared base, each a function of its arguments alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from typing import TypeAlias

import torch
from torch import Tensor, nn

from fedloom.core.errors import Refused
from fedloom.core.lora import Adapter, map_tensors
from fedloom.core.policies import PendingResult
from fedloom.core.types import ClientId, ClientState, Result, Rules, TaskStart, Task
from fedloom.train import loss, objective, peft_weights
from fedloom.train.base_model import Base
from fedloom.train.engine import batched_clients, frozen_layers
from fedloom.train.engine.batched_clients import BatchedClient
from fedloom.train.engine.frozen_layers import Cache
from fedloom.train.objective import GradientChange, Weights, client_variate, start_directions, personal_adapter
from fedloom.train.settings import PLAIN, Engine, Training
from fedloom.train.tokenised import EncodedTexts, plan_batches

Group: TypeAlias = Sequence[tuple[Task, ClientState]]
Loss: TypeAlias = Callable[[Sequence[int]], Tensor]

TRIAL = 5
"""A client that must choose its directions spends one step in `TRIAL` on finding out which (LoRA-A2: one epoch of six)."""


@dataclass(frozen=True, slots=True)
class PeftTrainer:
    """Trains the clients' shards (indices into `texts`) on one base."""

    base: Base
    texts: EncodedTexts
    shards: Mapping[ClientId, tuple[int, ...]]
    training: Training
    engine: Engine = PLAIN
    cache: Cache = field(default_factory=Cache)

    def train(self, work: Sequence[tuple[Task, ClientState]]) -> list[tuple[Result, ClientState]]:
        """Load, train, read back: each task in turn, or a group in one pass. The base keeps nothing of it."""
        return [answer for group in self.groups(work) for answer in self.group(group)]

    def groups(self, work: Sequence[tuple[Task, ClientState]]) -> list[Group]:
        """The work, in its order, in groups that are trained in one pass; most often of one task each.

        A function of the work alone: whoever carries the groups out, and in which order, the results are the same.
        """
        found, last = list[list[tuple[Task, ClientState]]](), None
        for task, local in work:
            known = self._common(task)
            if known is not None and known == last and len(found[-1]) < self._most(found[-1][0][0]):
                found[-1].append((task, local))
            else:
                found.append([(task, local)])
            last = known
        return [*found]

    def unchanged_result(self, task: Task) -> Result:
        """The answer if training changed nothing."""
        tokens = sum(sum(self.texts.lengths(batch)) for batch in self._plan(task))
        examples = len(self.shards[task.client])
        return Result(task.start.train, examples, tokens, task.budget.steps, control=task.start.control)

    def begin(self, work: Sequence[tuple[Task, ClientState]], due: Sequence[float]) -> Sequence[PendingResult]:
        """Each group is trained when the first of its answers is asked for; one that nobody asks for is not."""
        groups = [(group, cache(partial(self.group, group))) for group in self.groups(work)]
        return [partial(_nth, answers, k) for group, answers in groups for k in range(len(group))]

    def group(self, work: Group) -> list[tuple[Result, ClientState]]:
        """Carry out one group."""
        if len(work) == 1:
            return [self._one(*work[0])]
        members = [BatchedClient(task, local, personal_adapter(task.start, local), self._plan(task)) for task, local in work]
        trained = batched_clients.train_together(self.base, self.texts, self.training, members)
        return [self._answer(m.task, m.local, m.plan, *one) for m, one in zip(members, trained, strict=True)]

    def _common(self, task: Task) -> object:
        """What tasks of one pass have in common; None for a task that must be trained alone."""
        alone = (
            self.engine.together == 1
            or self.training.proximal
            or frozen_layers.tower(self.base, [*task.start.train.factors])
        )
        return None if alone else batched_clients.pass_key(task)

    def _most(self, task: Task) -> int:
        lengths = self.texts.lengths(self.shards[task.client])
        return self.engine.together or batched_clients.clients_per_pass(
            self.base, min(len(lengths), self.training.batch_size) * sum(lengths) / len(lengths)
        )

    def _plan(self, task: Task) -> list[list[int]]:
        """The batches of a task, as examples."""
        shard, how = self.shards[task.client], self.training
        lengths, steps = self.texts.lengths(shard), task.budget.steps
        plan = plan_batches(lengths, how.batch_size, steps, how.bucket, task.seed, how.stratified)
        return [[shard[i] for i in batch] for batch in plan]

    def _one(self, task: Task, local: ClientState) -> tuple[Result, ClientState]:
        start, plan = task.start, self._plan(task)
        begin = personal_adapter(start, local)
        losses, chosen = list[float](), None
        if start.rules.select is not None and start.rules.select < sum(f.rank for f in begin.factors.values()):
            chosen = self._chosen(task, begin, local, plan, losses)
        trained, moments, control = self._run(task, begin, local, plan[len(losses) :], losses, chosen)
        return self._answer(task, local, plan, trained, moments, losses, control, chosen)

    def _answer(
        self,
        task: Task,
        local: ClientState,
        plan: Sequence[Sequence[int]],
        trained: Adapter,
        moments: Mapping[str, Mapping[str, Tensor]],
        losses: Sequence[float],
        control: Adapter | None = None,
        chosen: Mapping[str, Tensor] | None = None,
    ) -> tuple[Result, ClientState]:
        """What is sent back, and what stays at the client."""
        start, slots = task.start, start_directions(task.start)
        sent = objective.replace_sides(trained, start.train, start.rules.unchanged, chosen)
        if start.rules.pruning is not None:
            sent = objective.prune_tail(personal_adapter(start, local), sent, start.rules.pruning)
        result = Result(
            adapter=sent,
            examples=len(self.shards[task.client]),
            tokens=sum(sum(self.texts.lengths(batch)) for batch in plan),
            steps=task.budget.steps,
            metrics={"loss": sum(losses) / len(losses), "first_loss": losses[0]},
            control=control and map_tensors(torch.sub, control, client_variate(start, local)),
        )
        private = objective.put_directions(local.private, trained, slots) if start.rules.private else local.private
        mine = objective.put_directions(local.control, control, slots) if control else local.control
        return result, ClientState(start.basis, moments, private, mine)

    def _chosen(
        self, task: Task, begin: Adapter, local: ClientState, plan: Sequence[Sequence[int]], losses: list[float]
    ) -> dict[str, Tensor]:
        """The directions to train, after a trial on the first batches (LoRA-A2)."""
        if len(plan) < 2 or task.start.rules.select is None:
            raise Refused("plan.local_steps", len(plan), "choosing directions takes a step of its own: give at least 2")
        trial = plan[: max(1, len(plan) // TRIAL)]
        tried, _, _ = self._run(task, begin, ClientState(control=local.control), trial, losses)
        return objective.select_directions(begin, tried, task.start.rules.select)

    def _run(
        self,
        task: Task,
        begin: Adapter,
        local: ClientState,
        plan: Sequence[Sequence[int]],
        losses: list[float],
        chosen: Mapping[str, Tensor] | None = None,
    ) -> tuple[Adapter, dict[str, dict[str, Tensor]], Adapter | None]:
        """Train on these batches and add to `losses`; returns the adapter, optimiser moments, the new control variate."""
        start = task.start
        slot = self.base.activate(begin, start.scaling, start.fold)
        weights = released(peft_weights.slot_parameters(self.base.model, slot), start)
        loss_of = self._loss(task, [*begin.factors])
        optimiser = self._optimiser(weights, start, local)
        amends, control = list[GradientChange](), None
        if start.control is not None:
            shared = {name: w for name, w in weights.items() if objective.side_of(name) not in start.rules.private}
            own = objective.flatten_adapter(client_variate(start, local))
            control = objective.ControlVariate(shared, objective.flatten_adapter(start.control), own)
            amends.append(control)
        if self.training.proximal:
            amends.append(objective.proximal_pull(weights, self.training.proximal))
        if chosen is not None:
            amends.append(objective.mask_gradient(weights, chosen))
        with torch.random.fork_rng():  # after the slot was made, which draws
            torch.manual_seed(task.seed)
            losses += self._steps(plan, loss_of, weights, optimiser, amends, start.rules)
        after = objective.unflatten_adapter(control.next_variate(), start.control) if control and start.control else None
        moments = _moments(weights, optimiser) if self.training.keep_moments else {}
        self.cache.trim(self.engine.cache)
        return peft_weights.read_adapter(self.base.model, slot, begin.factors), moments, after

    def _loss(self, task: Task, trained: Sequence[str]) -> Loss:
        """The mean loss of a batch; where only the top layers are trained, from what comes out below them."""
        place = frozen_layers.tower(self.base, trained)
        if place is None:
            return lambda batch: loss.mean_loss(self.base, self.texts.batch(batch, self.base.device))
        room, shard = self.engine.cache, self.shards[task.client]
        below = frozen_layers.features(self.base, self.texts, place, shard, task.start.fold, self.cache, room)

        def fed(batch: Sequence[int]) -> Tensor:
            with place.fed(below.of(batch)):
                return loss.mean_loss(self.base, self.texts.batch(batch, self.base.device))

        return fed

    def _steps(
        self,
        plan: Sequence[Sequence[int]],
        loss_of: Loss,
        weights: Weights,
        optimiser: torch.optim.Optimizer,
        amends: Sequence[GradientChange],
        rules: Rules,
    ) -> list[float]:
        """One optimiser step a batch; returns the losses, without penalties."""
        self.base.model.train()
        losses = list[float]()
        factors = [group["lr"] for group in optimiser.param_groups]
        for step, batch in enumerate(plan):
            for group, factor in zip(optimiser.param_groups, factors, strict=True):
                group["lr"] = factor * self.training.rate(step, len(plan))
            found = loss_of(batch)
            losses.append(float(found.detach()))
            optimiser.zero_grad(set_to_none=True)
            extra = None if rules.pruning is None else objective.pruning_penalty(weights, rules.pruning)
            torch.autograd.backward(found if extra is None else found + extra)
            for amend in amends:
                amend()
            nn.utils.clip_grad_norm_(weights.values(), self.training.clip)
            optimiser.step()
        return losses

    def _optimiser(self, weights: Weights, start: TaskStart, local: ClientState) -> torch.optim.AdamW:
        """AdamW; a group's rate here is its multiple of the learning rate. Moments of the same basis go on."""
        groups: dict[float, list[nn.Parameter]] = {}
        for name, weight in weights.items():
            multiple = start.rules.up_rate if objective.side_of(name) == "up" else 1.0
            groups.setdefault(multiple, []).append(weight)
        optimiser = torch.optim.AdamW(
            [{"params": members, "lr": multiple} for multiple, members in groups.items()],
            weight_decay=self.training.weight_decay,
        )
        for name, weight in weights.items() if local.basis == start.basis else ():
            if name in local.moments:
                optimiser.state[weight] = {key: value.clone() for key, value in local.moments[name].items()}
        return optimiser


def _nth(answers: Callable[[], Sequence[tuple[Result, ClientState]]], number: int) -> tuple[Result, ClientState]:
    return answers()[number]


def released(weights: Weights, start: TaskStart) -> dict[str, nn.Parameter]:
    """The parameters that are trained, with gradients on for them and off for the others: frozen sides, layers not in the start."""
    sent = objective.flatten_adapter(start.train)
    for name, weight in weights.items():
        weight.requires_grad_(objective.side_of(name) not in start.rules.frozen and name in sent)
    return {name: weight for name, weight in weights.items() if weight.requires_grad}


def _moments(weights: Weights, optimiser: torch.optim.Optimizer) -> dict[str, dict[str, Tensor]]:
    return {
        name: {key: value.detach().clone() for key, value in optimiser.state[w].items()} for name, w in weights.items()
    }
