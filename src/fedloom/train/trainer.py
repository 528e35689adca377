"""The trainer: local training of clients' tasks on one shared base model.

How tasks are trained:

1. `groups` divides the tasks that it is given, in their order, into groups. Most groups hold one task. Tasks that may share a pass
   (same steps, same layers, no FedProx, no pruning, no control variate) form a larger group where the engine says that this pays.
2. A task alone (`_train_one`): batches are drawn from the client's secret. The received adapter, with the client's private sides, is
   written into the base model's slot. AdamW makes one step per batch; the adapter is read back.
   With LoRA-A2 a short trial before that chooses the directions that are trained.
   A larger group goes through `engine.batched_clients` in one forward and backward pass per step.
3. With `records` each task is trained alone by DP-SGD: the client draws each step's batch by coins, and the optimiser sees noisy sums
   of clipped gradients and nothing else of the data. So all that follows is private too: moments, pruning, the choice of directions,
   the pull of FedProx, a control variate.
4. `_result` separates what is sent from what stays: an answer (with sides that were not trained as they came, pruned where the method
   prunes), and the next `ClientState`: optimiser moments, private sides and control variate.

A result depends only on task, client state, shard, secret and settings, to the byte. The base model keeps nothing between groups,
so neither their order nor the process that trains them matters (law 9).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial
from typing import TypeAlias

import torch
from torch import Tensor, nn

from fedloom.core.errors import Refused
from fedloom.core.lora import Adapter, lay_flat, map_tensors
from fedloom.core.policies import PendingResult
from fedloom.core.seeds import SecretOf, keyed_seed
from fedloom.core.types import ClientId, ClientState, Result, Rules, Task, TaskStart
from fedloom.privacy.private import Private
from fedloom.privacy.record_draws import RecordDraws, sampling_rate
from fedloom.train import loss, objective, peft_weights
from fedloom.train.base_model import Base
from fedloom.train.engine import batched_clients, frozen_layers, record_gradients
from fedloom.train.engine.batched_clients import BatchedClient
from fedloom.train.engine.dropout import training_mode
from fedloom.train.engine.frozen_layers import ActivationCache
from fedloom.train.engine.record_gradients import ExamplePass
from fedloom.train.objective import GradientChange, Weights, client_variate, personal_adapter, start_directions
from fedloom.train.settings import PLAIN, Engine, Training, trial_steps
from fedloom.train.tokenised import EncodedTexts, plan_batches
from fedloom.train.workers.worker import TaskGroup

STATE_BEGIN = 24
"""Bytes of the state of torch's CPU generator before its words, which take 8 bytes each: seed, left, seeded, next."""
LossOf: TypeAlias = Callable[[Base, dict[str, Tensor]], Tensor]
BatchLoss: TypeAlias = Callable[[Sequence[int]], Tensor]
BatchGradient: TypeAlias = Callable[[int, Sequence[int]], list[Tensor]]
"""Writes the gradient of a batch, of this number in its task, into `.grad`; returns its loss (a tensor without axes, so that no step
waits for its device), or nothing where it is not told."""


@dataclass(frozen=True, slots=True)
class TrainedClient:
    """State of one client after its optimiser steps.

    Fields:
        adapter: the adapter as it was trained.
        moments: the optimiser's state by parameter and name.
        losses: the loss of each batch, without penalties (none where records are private).
        control: the client's new control variate (None: the method has none).
        chosen: masks (rank,) of the directions that were trained, by layer (None: all).
    """

    adapter: Adapter
    moments: Mapping[str, Mapping[str, Tensor]]
    losses: Sequence[float]
    control: Adapter | None = None
    chosen: Mapping[str, Tensor] | None = None


@dataclass(frozen=True, slots=True)
class PeftTrainer:
    """Trains clients' tasks on one base model.

    Fields:
        base: the model.
        texts: all examples, tokenised.
        shards: each client's examples, as indices into `texts`.
        training: settings of local training.
        secret_of: each client's secret, of which batches and dropout are drawn: the server that gives the tasks does not know them.
        engine: how it is computed.
        cache: activations below the trained layers, kept from task to task.
        run: names the run in the draws, so that tasks of one number in two runs draw apart ("": a simulation, where they draw alike).
        records: trains by DP-SGD, so that what is sent tells little of any one example (None: plain training).
    """

    base: Base
    texts: EncodedTexts
    shards: Mapping[ClientId, tuple[int, ...]]
    training: Training
    secret_of: SecretOf
    engine: Engine = PLAIN
    cache: ActivationCache = field(default_factory=ActivationCache)
    run: str = ""
    records: Private | None = None

    def __post_init__(self) -> None:
        if self.records is not None:
            require_private_records(self.base, self.training)
        if self.base.labels is None and self.base.device.type != "cpu":
            loss.reads_padding(self.base)  # tried now: inside a task a pass may have hooks on the model

    def train(self, work: Sequence[tuple[Task, ClientState]]) -> list[tuple[Result, ClientState]]:
        """Train the tasks, group by group, and return their results in order."""
        return [answer for group in self.groups(work) for answer in self.train_group(group)]

    def groups(self, work: Sequence[tuple[Task, ClientState]]) -> list[TaskGroup]:
        """Divide the tasks, in their order, into groups that are trained in one pass; most often of one task each.

        It depends only on the tasks: whoever trains the groups, and in which order, the results are the same.
        """
        groups, last_key = list[list[tuple[Task, ClientState]]](), None
        for task, client_state in work:
            key = self._pass_key(task)
            if key is not None and key == last_key and len(groups[-1]) < self._clients_per_pass(groups[-1][0][0]):
                groups[-1].append((task, client_state))
            else:
                groups.append([(task, client_state)])
            last_key = key
        return [*groups]

    def unchanged_result(self, task: Task) -> Result:
        """Return the result if training changed nothing."""
        tokens, examples = self._tokens(task, self.batches(task)), len(self.shards[task.client])
        return Result(task.start.train, examples, tokens, task.budget.steps, control=task.start.control)

    def _tokens(self, task: Task, plan: Sequence[Sequence[int]]) -> int:
        """Return the tokens that are trained on; of private records, as many as there may be: which were drawn is not told."""
        if self.records is None:
            return sum(sum(self.texts.lengths(batch)) for batch in plan)
        rows = min(self.training.batch_size, len(self.shards[task.client]))
        return task.budget.steps * rows * self.training.token_limit

    def begin(self, work: Sequence[tuple[Task, ClientState]], due: Sequence[float]) -> Sequence[PendingResult]:
        """Return one callable per result; the first call for a group trains it, and a group without a call is not trained."""
        groups = [(group, cache(partial(self.train_group, group))) for group in self.groups(work)]
        return [partial(_result_of, answers, k) for group, answers in groups for k in range(len(group))]

    def train_group(self, work: TaskGroup) -> list[tuple[Result, ClientState]]:
        """Train one group: a single task, or several in one pass."""
        if len(work) == 1:
            return [self._train_one(*work[0])]
        members = [
            BatchedClient(task, client_state, personal_adapter(task.start, client_state), self.batches(task))
            for task, client_state in work
        ]
        seed = self.seed(work[0][0], "dropout")
        trained = batched_clients.train_together(self.base, self.texts, self.training, members, seed)
        return [
            self._result(m.task, m.local, m.plan, TrainedClient(*one)) for m, one in zip(members, trained, strict=True)
        ]

    def _pass_key(self, task: Task) -> object:
        """Return what tasks of one pass must have in common; None for a task that must be trained alone."""
        alone = (
            self.engine.together == 1
            or self.records
            or self.training.proximal
            or frozen_layers.lowest_trained(self.base, [*task.start.train.factors])
        )
        return None if alone else batched_clients.pass_key(task)

    def _clients_per_pass(self, task: Task) -> int:
        if not batched_clients.can_share_pass(self.base):
            return 1
        lengths = self.texts.lengths(self.shards[task.client])
        return self.engine.together or batched_clients.clients_per_pass(
            self.base, min(len(lengths), self.training.batch_size) * sum(lengths) / len(lengths)
        )

    def seed(self, task: Task, purpose: str) -> int:
        """Return the seed of what the client draws in a task for one purpose: "batches" or "dropout"."""
        return keyed_seed(self.secret_of(task.client), "task", self.run, task.id, purpose)

    def batches(self, task: Task) -> list[list[int]]:
        """Return the batches of a task, as indices into `texts`."""
        shard, training = self.shards[task.client], self.training
        if self.records is not None:
            draws, rate = self._draws(task), sampling_rate(len(shard), training.batch_size)
            return [[shard[i] for i in draws.batch(step, len(shard), rate)] for step in range(task.budget.steps)]
        lengths, steps = self.texts.lengths(shard), task.budget.steps
        seed = self.seed(task, "batches")
        plan = plan_batches(lengths, training.batch_size, steps, training.bucket, seed, training.stratified)
        return [[shard[i] for i in batch] for batch in plan]

    def _draws(self, task: Task) -> RecordDraws:
        return RecordDraws(self.secret_of(task.client), self.run, task.id)

    def _train_one(self, task: Task, client_state: ClientState) -> tuple[Result, ClientState]:
        start, plan = task.start, self.batches(task)
        adapter = personal_adapter(start, client_state)
        losses, chosen, done = list[float](), None, 0
        if start.rules.select is not None and start.rules.select < sum(f.rank for f in adapter.factors.values()):
            chosen, losses = self._choose_directions(task, adapter, client_state, plan)
            done = trial_steps(len(plan))
        trained = self._run_steps(task, adapter, client_state, plan[done:], chosen, done)
        return self._result(task, client_state, plan, replace(trained, losses=[*losses, *trained.losses]))

    def _result(
        self, task: Task, client_state: ClientState, plan: Sequence[Sequence[int]], trained: TrainedClient
    ) -> tuple[Result, ClientState]:
        """Return the answer that is sent, and the client state that stays."""
        start, held = task.start, start_directions(task.start)
        sent = objective.replace_sides(trained.adapter, start.train, start.rules.unchanged, trained.chosen)
        if start.rules.pruning is not None:
            sent = objective.prune_tail(personal_adapter(start, client_state), sent, start.rules.pruning)
        result = Result(
            adapter=lay_flat(sent),
            examples=len(self.shards[task.client]),
            tokens=self._tokens(task, plan),
            steps=task.budget.steps,
            metrics=_loss_metrics(trained.losses),
            control=trained.control and map_tensors(torch.sub, trained.control, client_variate(start, client_state)),
        )
        private, control = client_state.private, client_state.control
        if start.rules.private:
            private = objective.put_directions(private, trained.adapter, held)
        if trained.control:
            control = objective.put_directions(control, trained.control, held)
        return result, ClientState(start.basis, trained.moments, private, control)

    def _choose_directions(
        self, task: Task, adapter: Adapter, client_state: ClientState, plan: Sequence[Sequence[int]]
    ) -> tuple[dict[str, Tensor], list[float]]:
        """Choose the directions to train by a trial on the first batches (LoRA-A2); also return the losses of the trial."""
        if len(plan) < 2 or task.start.rules.select is None:
            raise Refused("plan.local_steps", len(plan), "choosing directions takes a step of its own: give at least 2")
        trial = plan[: trial_steps(len(plan))]
        tried = self._run_steps(task, adapter, ClientState(control=client_state.control), trial)
        return objective.most_moved_directions(adapter, tried.adapter, task.start.rules.select), [*tried.losses]

    def _run_steps(
        self,
        task: Task,
        adapter: Adapter,
        client_state: ClientState,
        plan: Sequence[Sequence[int]],
        chosen: Mapping[str, Tensor] | None = None,
        done: int = 0,
    ) -> TrainedClient:
        """Train the adapter on these batches, of a task of which `done` steps were made before."""
        start = task.start
        slot = self.base.put(adapter, start.scaling, start.fold)
        weights = enable_gradients(peft_weights.slot_parameters(self.base.model, slot), start)
        gradient = self._gradient(task, slot, weights, done)
        optimiser = self._optimiser(weights, task, client_state)
        changes, control = list[GradientChange](), None
        if start.control is not None:
            shared = {name: w for name, w in weights.items() if objective.side_of(name) not in start.rules.private}
            client = objective.flatten_adapter(client_variate(start, client_state))
            control = objective.ControlVariate(shared, objective.flatten_adapter(start.control), client)
            changes.append(control)
        if self.training.proximal:
            changes.append(objective.proximal_pull(weights, self.training.proximal))
        if chosen is not None:
            changes.append(objective.mask_gradient(weights, chosen))
        mode = training_mode(self.base.model, self.training.has_base_dropout(self.base.labels))
        with torch.random.fork_rng(), mode:  # after the slot was made, which draws random numbers
            self._seed_dropout(task, done)
            losses = self._optimise(plan, gradient, weights, optimiser, changes)
        variate = None
        if control and start.control:
            variate = objective.unflatten_adapter(control.next_variate(), start.control)
        moments = _moments(weights, optimiser) if self.training.keep_moments else {}
        self.cache.trim(self.engine.cache)
        trained = peft_weights.read_adapter(self.base.model, slot, adapter.factors)
        return TrainedClient(trained, moments, losses, variate, chosen)

    def _seed_dropout(self, task: Task, done: int) -> None:
        """Seed what dropout draws; where records are private, the CPU's generator with all bits that it holds, and an accelerator's
        with the 63 of a seed.
        """
        torch.manual_seed(self.seed(task, "dropout" if self.records is None else f"dropout {done}"))
        if self.records is not None:
            state, words = torch.get_rng_state(), self._draws(task).dropout_words(done)
            state[STATE_BEGIN : STATE_BEGIN + 8 * len(words)].view(torch.int64).copy_(words)
            torch.set_rng_state(state)

    def _gradient(self, task: Task, slot: str, weights: Weights, done: int) -> BatchGradient:
        """Make the function that writes the gradient of a batch into `.grad`; plain, or a noisy one where records are private."""
        layers, rules = [*task.start.train.factors], task.start.rules
        if self.records is None:
            return partial(_plain_gradient, self._batch_loss(task, layers, loss.mean_loss), weights, rules)
        sent, scaling = objective.flatten_adapter(task.start.train), task.start.scaling or self.base.lora.scaling
        every = peft_weights.slot_parameters(self.base.model, slot)
        adapter = {name: weight for name, weight in every.items() if name in sent}
        examples = ExamplePass(self.base, slot, adapter, weights, scaling)
        losses_of = self._batch_loss(task, layers, loss.example_losses)
        return partial(self._private_gradient, task, examples, losses_of, done)

    def _private_gradient(
        self, task: Task, examples: ExamplePass, losses_of: BatchLoss, done: int, step: int, batch: Sequence[int]
    ) -> list[Tensor]:
        """Write the noisy mean of the batch's clipped gradients. The data are seen here and nowhere else; no loss is told."""
        assert self.records is not None
        size, rows = self.training.batch_size, len(self.shards[task.client])
        clipped = examples.clipped_sum(losses_of, batch, self.records.clip, size + 2 * math.isqrt(size))
        noisy = self._draws(task).noisy_mean(done + step, clipped, self.records, min(size, rows))
        for name, slope in noisy.items():
            examples.weights[name].grad = slope.to(examples.weights[name])
        if task.start.rules.pruning is not None:
            trained = {name: examples.weights[name] for name in examples.trained}
            torch.autograd.backward(objective.pruning_penalty(trained, task.start.rules.pruning))
        return []

    def _batch_loss(self, task: Task, trained: Sequence[str], loss_of: LossOf) -> BatchLoss:
        """Make the function of a batch's loss.

        Where only top layers are trained, it starts from the kept output below them, if the engine keeps any and the model allows it.
        """
        split = frozen_layers.split_layers(self.base, trained)
        if split is None:
            return lambda batch: loss_of(self.base, self.texts.batch(batch, self.base.device))
        shard, fold, limit = self.shards[task.client], task.start.fold, self.engine.cache
        features = (
            frozen_layers.frozen_features(self.base, self.texts, split, shard, (fold,), self.cache, limit)
            if split.form and limit
            else None
        )

        def batch_loss(batch: Sequence[int]) -> Tensor:
            with features.starting_from(batch) if features else split.plain():
                return loss_of(self.base, self.texts.batch(batch, self.base.device))

        return batch_loss

    def _optimise(
        self,
        plan: Sequence[Sequence[int]],
        gradient: BatchGradient,
        weights: Weights,
        optimiser: torch.optim.Optimizer,
        changes: Sequence[GradientChange],
    ) -> list[float]:
        """Make one optimiser step per batch; return the losses, without penalties, that may be told."""
        losses = list[Tensor]()
        factors = [group["lr"] for group in optimiser.param_groups]
        for step, batch in enumerate(plan):
            for group, factor in zip(optimiser.param_groups, factors, strict=True):
                group["lr"] = factor * self.training.rate(step, len(plan))
            optimiser.zero_grad(set_to_none=True)
            losses += gradient(step, batch)
            for change in changes:
                change()
            if self.records is None:  # else each example's gradient was clipped
                nn.utils.clip_grad_norm_(weights.values(), self.training.clip)
            optimiser.step()
        return torch.stack(losses).tolist() if losses else []

    def _optimiser(self, weights: Weights, task: Task, client_state: ClientState) -> torch.optim.AdamW:
        """Make AdamW, with moments of the same basis carried over. A group's rate is, for now, its multiple of the learning rate."""
        groups: dict[float, list[nn.Parameter]] = {}
        for name, weight in weights.items():
            groups.setdefault(objective.rate_of(objective.side_of(name), task), []).append(weight)
        optimiser = torch.optim.AdamW(
            [{"params": members, "lr": multiple} for multiple, members in groups.items()],
            weight_decay=self.training.weight_decay,
        )
        for name, weight in weights.items() if client_state.basis == task.start.basis else ():
            if name in client_state.moments:
                optimiser.state[weight] = {key: value.clone() for key, value in client_state.moments[name].items()}
        return optimiser


def _result_of(answers: Callable[[], Sequence[tuple[Result, ClientState]]], number: int) -> tuple[Result, ClientState]:
    return answers()[number]


def _plain_gradient(
    loss_of: BatchLoss, weights: Weights, rules: Rules, step: int, batch: Sequence[int]
) -> list[Tensor]:
    """Write the gradient of the batch's mean loss, with the penalty where the method prunes."""
    batch_loss = loss_of(batch)
    told = batch_loss.detach()
    if rules.pruning is not None:
        batch_loss = batch_loss + objective.pruning_penalty(weights, rules.pruning)
    torch.autograd.backward(batch_loss)
    for weight in weights.values():
        if weight.grad is None:  # the model does not use its layer: the cross-attention of a decoder alone
            weight.grad = torch.zeros_like(weight)
    return [told]


def _loss_metrics(losses: Sequence[float]) -> dict[str, float]:
    return {"loss": sum(losses) / len(losses), "first_loss": losses[0]} if losses else {}


def require_private_records(base: Base, training: Training) -> None:
    """Raise Refused where single examples cannot be protected: by this model, or in batches that are not drawn by coins."""
    if training.stratified:
        remedy = "where records are private each example comes by a coin of its own; leave it out"
        raise Refused("training.stratified", True, remedy)
    if batched_clients.rounding(base) > batched_clients.ROUNDING[torch.float32]:
        remedy = "a row's gradient then depends on who shares its pass, in the third digit, and its clip is no bound; leave it out"
        raise Refused("engine", "frozen layers in bfloat16 or 4 bits", remedy)
    if not record_gradients.tells_examples_apart(base):
        name = type(base.model.get_base_model()).__name__
        remedy = (
            "its examples cannot be told apart in a pass: what one adds would depend on others. Choose another model"
        )
        raise Refused("privacy.unit", "record", f"{name}: {remedy}, or unit client")


def engine_notes(base: Base, engine: Engine, depths: tuple[int, int | None] | None) -> tuple[str, ...]:
    """Say what the engine cannot do with this model; `depths` are the lowest and the highest of a run (None: full depth)."""
    name, notes = type(base.model.get_base_model()).__name__, list[str]()
    if engine.together != 1 and not batched_clients.can_share_pass(base):
        why = "its layers do not keep rows apart by client, or padding changes what it computes"
        notes.append(f"engine.together: {name} trains one client after the other, since {why}.")
    if depths and engine.cache and not frozen_layers.keeps_activations(base, *depths):
        why = "a pass that begins above them gives other logits"
        notes.append(f"engine.cache: {name} computes the blocks below the trained ones in each step, since {why}.")
    return tuple(notes)


def enable_gradients(weights: Weights, start: TaskStart) -> dict[str, nn.Parameter]:
    """Turn gradients on for the trained parameters, which are returned, and off for frozen sides and layers not in the start."""
    sent = objective.flatten_adapter(start.train)
    for name, weight in weights.items():
        weight.requires_grad_(objective.side_of(name) not in start.rules.frozen and name in sent)
    return {name: weight for name, weight in weights.items() if weight.requires_grad}


def _moments(weights: Weights, optimiser: torch.optim.Optimizer) -> dict[str, dict[str, Tensor]]:
    return {
        name: {key: value.detach().clone() for key, value in optimiser.state[w].items()} for name, w in weights.items()
    }
