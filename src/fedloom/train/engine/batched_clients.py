"""Several clients in one forward and backward pass over one frozen base, each with its own adapter, loss, clipping and AdamW state.

The adapters are stacked, padded with zeros to the highest rank: a padded direction gets no gradient and stays zero. Rows of a batch
are grouped by client, so a layer adds its clients' products in one `bmm`. Gradients are those of training one after the other, to
rounding; dropout draws other numbers. It pays where a step is so small that calling operators costs more than their arithmetic.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn
from torch.func import functional_call, vmap

from fedloom.core.lora import Adapter, Factor, cut_factor, map_tensors, pad
from fedloom.core.types import ClientState, Task
from fedloom.train import loss, objective, peft_weights
from fedloom.train.base_model import Base
from fedloom.train.engine.dropout import training_mode
from fedloom.train.engine.trial_texts import FAILURES, trial_texts
from fedloom.train.settings import Training
from fedloom.train.tokenised import EncodedTexts, copy_to

TOKENS_PER_PASS = {"cpu": 2048}
"""Tokens in one pass up to which a common pass was measured to gain on a CPU; elsewhere 16384, which keeps memory small."""

SMALL_STEP = {"cpu": 32768}
"""Tokens times hidden size of one client's step above which its own products keep a CPU busy: 256 tokens of bert-tiny."""

LOGITS_PER_PASS = 2**28
"""Logits in one pass at most, tokens times vocabulary: a gigabyte."""

LEAST_CLIENTS, MOST_CLIENTS = 4, 16
"""Clients in one pass, at least and at most: with fewer, a CPU gained less than a tenth; more gained nothing."""

ROUNDING = {torch.float32: 1e-3}
"""Largest relative difference of gradients that is still rounding, by the type of the frozen layers; in others 0.05."""

BETAS, EPSILON = (0.9, 0.999), 1e-8
"""Defaults of `torch.optim.AdamW`."""

Moments = dict[str, dict[str, Tensor]]


@dataclass(frozen=True, slots=True)
class BatchedClient:
    """Task of a common pass: the client's state, the adapter it starts from, and the examples of its batches (`plan`)."""

    task: Task
    local: ClientState
    adapter: Adapter
    plan: Sequence[Sequence[int]]


def clients_per_pass(base: Base, tokens: float) -> int:
    """Return how many clients to train in one pass if a step of one has this many tokens: 1 where a common pass gains nothing."""
    if tokens * base.hidden > SMALL_STEP.get(base.device.type, math.inf):
        return 1
    room = int(min(TOKENS_PER_PASS.get(base.device.type, 16384), LOGITS_PER_PASS / base.vocabulary) / max(1.0, tokens))
    return min(MOST_CLIENTS, room) if room >= LEAST_CLIENTS else 1


def pass_key(task: Task) -> object:
    """Return a key that is equal for tasks that may share a pass; None if a task must be trained alone."""
    rules, start = task.start.rules, task.start
    if rules.select is not None or rules.pruning is not None or start.control is not None:
        return None
    return task.budget.steps, id(start.fold), rules.frozen, rules.up_rate, tuple(start.train.factors)


def can_share_pass(base: Base) -> bool:
    """Whether clients can share a pass of this model: each must get the losses and gradients of its own adapter. Tried once.

    Their adapters are told apart by the place of a row in the batch. A layer that has no rows of clients in front is something
    else: a projection of positions that all clients share (DeBERTa), tokens before rows (XLNet), tokens by expert. Nor may it
    matter how far a row is padded, as it does where tokens are mixed without a mask (FNet).
    """
    if "common pass" not in base.trials:
        in_front, ignores_padding = _try_rows(base)
        base.trials["common pass"] = ignores_padding and (in_front or _gives_each_its_own(base))
    return bool(base.trials["common pass"])


@torch.no_grad()
def _try_rows(base: Base) -> tuple[bool, bool]:
    """Whether the rows of the batch are the first axis of what each adapted layer and head gets, and whether padding is ignored."""
    texts = trial_texts(base.model.get_base_model(), base.tokenizer, base.labels)
    training, found = base.model.training, list[bool]()
    layers: list[Any] = [*peft_weights.lora_layers(base.model).values()]
    layers += [m for m in base.model.modules() if isinstance(m, ModulesToSaveWrapper)]
    rows = range(len(texts.ids))
    padded = min(rows, key=lambda i: len(texts.ids[i]))

    def see(_: nn.Module, args: tuple[Any, ...]) -> None:
        found.append(bool(args) and len(args[0]) == len(rows))

    base.model.eval()
    try:
        with ExitStack() as hooks:
            for layer in layers:
                hooks.callback(layer.register_forward_pre_hook(see).remove)
            together = loss.example_losses(base, texts.batch(rows, base.device))[padded]
        alone = loss.example_losses(base, texts.batch([padded], base.device))[0]
    except FAILURES:
        return False, False
    finally:
        base.model.train(training)
    return all(found), float((together - alone).abs()) <= rounding(base) * (1.0 + float(alone.abs()))


def _gives_each_its_own(base: Base) -> bool:
    """Whether two clients with random adapters get in one pass what each gets alone; the model is left as it was."""
    texts = trial_texts(base.model.get_base_model(), base.tokenizer, base.labels, copies=2)
    half = len(texts.ids) // 2
    plan, alone = [range(half), range(half, 2 * half)], []
    try:
        with trial_adapters(base, 2) as (slot, adapters):
            weights = peft_weights.slot_parameters(base.model, slot)
            for adapter, rows in zip(adapters, plan, strict=True):
                base.put(adapter, fold=base.fold)
                for weight in weights.values():
                    weight.requires_grad_(True)
                losses = loss.example_losses(base, texts.batch(rows, base.device))
                alone.append(gradients_of(losses / half, weights))
            scalings = [base.lora.scaling] * 2
            stacked = {name: w.requires_grad_(True) for name, w in _stack(adapters, scalings, base.device).items()}
            with stacked_layers(base, slot, stacked, scalings):
                common = gradients_of(_losses(base, texts, plan), stacked)
    except FAILURES:
        return False
    return all(
        same_gradients({name: both[k] for name, both in common.items()}, slopes, rounding(base))
        for k, slopes in enumerate(alone)
    )


@contextmanager
def trial_adapters(base: Base, count: int) -> Iterator[tuple[str, list[Adapter]]]:
    """Yield a slot and so many random adapters for it, to try the model with, in eval mode; afterwards the model is as it was."""
    slot, training = next(iter(base.model.peft_config)), base.model.training
    changed = [*peft_weights.slot_parameters(base.model, slot).values(), *base.model.buffers()]
    before = [tensor.detach().clone() for tensor in changed]
    like, draw = peft_weights.read_adapter(base.model, slot), torch.Generator().manual_seed(0)
    made = [
        map_tensors(lambda t: torch.randn(t.shape, generator=draw) / t.shape[-1] ** 0.5, like) for _ in range(count)
    ]
    base.model.eval()
    try:
        yield slot, made
    finally:
        base.model.train(training)
        with torch.no_grad():
            for tensor, value in zip(changed, before, strict=True):
                if not torch.equal(tensor, value):
                    tensor.copy_(value)


def same_gradients(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], error: float) -> bool:
    """Whether gradients are equal up to this relative error; what is a thousandth of the largest of them, or less, hardly counts."""
    least = max(float(slope.norm()) for slope in expected.values()) / 1000
    return all(
        float((found[name] - slope).norm()) <= error * (float(slope.norm()) + least) for name, slope in expected.items()
    )


def rounding(base: Base) -> float:
    """Return the largest relative difference of this model's gradients that is still rounding."""
    layers = peft_weights.lora_layers(base.model).values()
    return max(ROUNDING.get(peft_weights.base_weight(layer).dtype, 0.05) for layer in layers)


def gradients_of(losses: Tensor, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Gradients of the sum of these losses; zero for a layer that the model does not use (the cross-attention of a decoder alone)."""
    slopes = torch.autograd.grad(losses.sum(), [*weights.values()], allow_unused=True, materialize_grads=True)
    return dict(zip(weights, slopes, strict=True))


def train_together(
    base: Base, texts: EncodedTexts, training: Training, members: Sequence[BatchedClient], seed: int
) -> list[tuple[Adapter, Moments, list[float]]]:
    """Train clients with the same `pass_key`; return the adapter, the optimiser's moments and the losses of each."""
    start = members[0].task.start
    slot = base.put(members[0].adapter, start.scaling, start.fold)
    scalings = [_scaling(base, member) for member in members]
    weights = _stack([member.adapter for member in members], scalings, base.device)
    for name, weight in weights.items():
        weight.requires_grad_(objective.side_of(name) not in start.rules.frozen)
    trained = {name: weight for name, weight in weights.items() if weight.requires_grad}
    optimiser = _AdamW(training, trained, members)
    losses = list[Tensor]()
    mode = training_mode(base.model, training.has_base_dropout(base.labels))
    with torch.random.fork_rng(), stacked_layers(base, slot, weights, scalings), mode:
        torch.manual_seed(seed)
        for step in range(len(members[0].plan)):
            each = _losses(base, texts, [member.plan[step] for member in members])
            losses.append(each.detach())  # no step waits for it
            optimiser.step(gradients_of(each, trained), training.rate(step, len(members[0].plan)))
    adapters = _unstack(weights, members, base)
    moments = optimiser.moments(members) if training.keep_moments else [{} for _ in members]
    told = torch.stack(losses).T.tolist()
    return [(adapters[k], moments[k], told[k]) for k in range(len(members))]


def _scaling(base: Base, member: BatchedClient) -> float:
    return member.task.start.scaling or base.lora.scaling


def _rank(member: BatchedClient) -> int:
    return max(factor.rank for factor in member.adapter.factors.values())


def _stack(adapters: Sequence[Adapter], scalings: Sequence[float], device: torch.device) -> dict[str, Tensor]:
    """Stack adapters by the names of `slot_parameters`, clients first; `up` without the scaling, as PEFT stores it."""
    stacked, first = dict[str, Tensor](), adapters[0]
    top = max(factor.rank for adapter in adapters for factor in adapter.factors.values())
    for name in first.factors:
        wide = [pad(adapter.factors[name], top) for adapter in adapters]
        stacked[f"{name}.down"] = torch.stack([f.down for f in wide]).to(device)
        stacked[f"{name}.up"] = torch.stack([f.up / s for f, s in zip(wide, scalings, strict=True)]).to(device)
    return stacked | {name: torch.stack([a.dense[name] for a in adapters]).to(device) for name in first.dense}


def _unstack(weights: Mapping[str, Tensor], members: Sequence[BatchedClient], base: Base) -> list[Adapter]:
    """Reverse `_stack`, each client at its own rank."""
    flat, adapters = {name: weight.detach().cpu() for name, weight in weights.items()}, []
    for k, member in enumerate(members):
        factors = {
            name: cut_factor(
                Factor(flat[f"{name}.down"][k], flat[f"{name}.up"][k] * _scaling(base, member)), factor.rank
            )
            for name, factor in member.adapter.factors.items()
        }
        factors_of_client = {name: Factor(f.down.clone(), f.up.contiguous().clone()) for name, f in factors.items()}
        adapters.append(Adapter(factors_of_client, {name: flat[name][k].clone() for name in member.adapter.dense}))
    return adapters


@contextmanager
def stacked_layers(base: Base, slot: str, weights: Mapping[str, Tensor], scalings: Sequence[float]) -> Iterator[None]:
    """Inside, the model computes with the stacked adapters and heads instead of PEFT's."""
    scales, clients = torch.tensor(scalings, device=base.device)[:, None, None], len(scalings)
    with ExitStack() as stack:
        stack.enter_context(base.model.disable_adapter())  # type: ignore[no-untyped-call]
        for name, layer in peft_weights.lora_layers(base.model).items():
            if f"{name}.down" in weights:
                down, up, drop = weights[f"{name}.down"], weights[f"{name}.up"], layer.lora_dropout[slot]

                def add(_: Any, args: Any, out: Tensor, down: Any = down, up: Any = up, drop: Any = drop) -> Tensor:
                    rows = drop(args[0]).reshape(clients, -1, down.shape[2])
                    product = rows @ down.mT.to(rows.dtype) @ up.mT.to(rows.dtype) * scales
                    return cast(Tensor, out + product.reshape(out.shape).to(out.dtype))

                stack.callback(cast(nn.Module, layer).register_forward_hook(add).remove)
        for name, head in base.model.get_base_model().named_modules():
            if isinstance(head, ModulesToSaveWrapper):
                inner = head.modules_to_save[slot]
                own = {key: weights[f"{name}.{key}"] for key, _ in inner.named_parameters()}

                def instead(_: Any, args: Any, out: Tensor, inner: nn.Module = inner, own: Any = own) -> Tensor:
                    rows = args[0].reshape(clients, -1, *args[0].shape[1:])
                    found = vmap(lambda p, x: functional_call(inner, p, (x,)), randomness="different")(own, rows)
                    return cast(Tensor, found.reshape(-1, *found.shape[2:]))

                stack.callback(head.register_forward_hook(instead).remove)
        yield


def _losses(base: Base, texts: EncodedTexts, plan: Sequence[Sequence[int]]) -> Tensor:
    """Return each client's mean loss (clients,) on its batch; a smaller batch is filled up with rows that do not count."""
    size = max(len(batch) for batch in plan)
    inputs = texts.batch([i for batch in plan for i in [*batch, *[batch[0]] * (size - len(batch))]], base.device)
    each = loss.example_losses(base, inputs).view(len(plan), size)
    counts = copy_to(torch.tensor([len(batch) for batch in plan]), base.device)
    counted = torch.arange(size, device=base.device) < counts[:, None]
    return (each * counted).sum(1) / counts


class _AdamW:
    """Clipping and AdamW for stacked weights: a norm and a count of steps for each client, as if each had its own."""

    def __init__(self, training: Training, weights: Mapping[str, Tensor], members: Sequence[BatchedClient]) -> None:
        self.training, self.weights = training, weights
        rates = {name: [objective.rate_of(objective.side_of(name), m.task) for m in members] for name in weights}
        self.rates = {name: _for_each_client(each, weights[name]) for name, each in rates.items()}
        known = [m.local.moments if m.local.basis == m.task.start.basis else {} for m in members]
        self.counts = {n: tuple(float(k[n]["step"]) if n in k else 0.0 for k in known) for n in weights}
        self.mean = {
            n: _stack_moments(w, [k[n]["exp_avg"] if n in k else None for k in known]) for n, w in weights.items()
        }
        self.square = {
            n: _stack_moments(w, [k[n]["exp_avg_sq"] if n in k else None for k in known]) for n, w in weights.items()
        }

    @torch.no_grad()
    def step(self, slopes: Mapping[str, Tensor], rate: float) -> None:
        """Make one step of every client at learning rate `rate`."""
        norms = torch.stack([slope.flatten(1).square().sum(1) for slope in slopes.values()]).sum(0).sqrt()
        shrink = (self.training.clip / (norms + 1e-6)).clamp(max=1.0)
        corrections = dict[
            tuple[float, ...], list[Tensor]
        ]()  # of the mean and the square; most weights have the same counts
        for name, weight in self.weights.items():
            shape = (-1, *[1] * (weight.ndim - 1))
            slope, lr = slopes[name] * shrink.view(shape), rate * self.rates[name]
            counts = self.counts[name] = tuple(count + 1 for count in self.counts[name])
            if counts not in corrections:
                both = [torch.tensor([1 - beta**count for count in counts]) for beta in BETAS]
                corrections[counts] = [copy_to(one, weight.device) for one in both]
            first, second = (one.view(shape) for one in corrections[counts])
            self.mean[name].lerp_(slope, 1 - BETAS[0])
            self.square[name].mul_(BETAS[1]).addcmul_(slope, slope, value=1 - BETAS[1])
            weight.mul_(1 - lr * self.training.weight_decay)
            weight.sub_(lr / first * self.mean[name] / ((self.square[name] / second).sqrt() + EPSILON))

    def moments(self, members: Sequence[BatchedClient]) -> list[Moments]:
        """Return the state of each client at its own rank, in the form of `torch.optim.AdamW`."""
        return [
            {
                name: {
                    "step": torch.tensor(self.counts[name][k]),
                    "exp_avg": _at_client_rank(name, self.mean[name][k], _rank(member)),
                    "exp_avg_sq": _at_client_rank(name, self.square[name][k], _rank(member)),
                }
                for name in self.weights
            }
            for k, member in enumerate(members)
        ]


def _for_each_client(values: Sequence[float], weight: Tensor) -> float | Tensor:
    """Return what a stacked weight is multiplied by: one number where it is the same for all clients."""
    if len(set(values)) == 1:
        return values[0]
    return copy_to(torch.tensor(values), weight.device).view(-1, *[1] * (weight.ndim - 1))


def _stack_moments(like: Tensor, client_moments: Sequence[Tensor | None]) -> Tensor:
    """Stack the clients' moments in the shape of `like`, each in the corner of its rank, zeros elsewhere."""
    found = torch.zeros_like(like, requires_grad=False)
    for row, tensor in zip(found, client_moments, strict=True):
        if tensor is not None:
            row[tuple(slice(0, n) for n in tensor.shape)] = tensor.to(row)
    return found


def _at_client_rank(name: str, tensor: Tensor, rank: int) -> Tensor:
    match objective.side_of(name):
        case "down":
            return tensor[:rank].clone()
        case "up":
            return tensor[:, :rank].clone()
        case _:
            return tensor.clone()
