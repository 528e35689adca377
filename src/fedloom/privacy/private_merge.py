"""Merging with noise: an aggregator is handed a noisy sum of clipped changes, and nothing else that a client's data had a part in.

A merge adds up sum_k w_k change_k, with the schedule's weights, each change shortened to a norm of at most S. Taking one client's
changes away moves that sum by at most S m_c, with m_c the weight of all its answers together; the noise on each entry has the
standard deviation z S m, with m the largest m_c. So a release is a Gaussian mechanism of mu = m_c / (m z) for each client in it,
whatever the schedule's weights and step are: they depend on who answered when, which is not what is hidden.

What the aggregator then merges are answers that changed nothing, and two stand-ins without a client: the noisy sum, with weight 1,
and nothing, with weight -1. Whatever a method or a wrapper does with them (a server's optimiser, a truncation, directions that are
drawn anew, a memory) is post-processing of what was released, and layers of mixed depth and ranks merge as ever.

In "factor" space the sum is that of factors, entry by entry. In "product" space it is that of products, whole: each layer's matrix
gets noise in every entry, and the truncation comes after it, as in the power method of private PCA (Hardt and Price 2014). The norm
of a change is that of the very numbers that are added, and not of factors or Gram matrices that they follow from: where large terms
cancel, these round otherwise, and would let a change through that is longer than S.

Source: McMahan et al., arXiv 1710.06963, 2018, Alg. 1 (clipping, noise in proportion to the largest weight); composition in any order
of arrival: Dong, Roth and Su, arXiv 1905.02383, and Smith and Thakurta, arXiv 2206.05902 (adaptive choice of the next release).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal, TypeAlias, cast

import torch
from torch import Tensor

from fedloom.aggregate.shared.merge_terms import held_directions
from fedloom.aggregate.shared.wrapper import trained_sides
from fedloom.core.answer_change import SIDES, factor_change, product_change, sent_part
from fedloom.core.errors import Refused
from fedloom.core.events import Release
from fedloom.core.limits import Limits
from fedloom.core.lora import Adapter, Factor, compact, named_tensors, server_rank
from fedloom.core.partial_depth import merge_by_layer
from fedloom.core.policies import Aggregator, Merge, Schedule, aggregator_layers
from fedloom.core.server_state import State
from fedloom.core.types import Budget, ClientId, Model, Result, Rules, Side, Task, TaskStart, Update
from fedloom.privacy.correlated_noise import correlated_normals, row_sensitivity
from fedloom.privacy.private import Private
from fedloom.privacy.secret_noise import GRID, SecretNoise, add_noise
from fedloom.schedule.shared.weights import uniform

PLAIN = "FedIT, FFA, RoLoRA, ProductDelta, FoldedDelta, HLoRA or FedSVD"
"""Methods that add plain means of changes."""
Tensors: TypeAlias = dict[str, Tensor]
"""A sum of changes, in float64, by flat names: `NAME.down` and `NAME.up`, or `NAME` for a layer's whole product, and `dense:NAME`."""


@dataclass(frozen=True, slots=True)
class PrivateMerge:
    """Gaussian mechanism over the merges of a server whose clients are single clients.

    Fields:
        private: bounds and noise.
        noise: where noise comes from.
    """

    private: Private
    noise: SecretNoise

    def release(self, aggregator: Aggregator, state: State, merge: Merge) -> tuple[Model, Release]:
        """Return the next model, and what it tells of whom."""
        private, sides, shares = self.private, trained_sides(merge), shares_of(merge)
        largest, space = max(shares.values()), added_in(aggregator)
        exact = sum_clipped_changes(space, state.model, merge, private.clip, sides)
        release = self._release(state, exact, {client: share / largest for client, share in shares.items()}, largest)
        scale = private.clip * largest
        normals = correlated_normals(partial(self._normals, exact, state, release), private.apart, len(state.releases))
        noisy = add_noise(exact, normals, private.multiplier * scale, GRID * scale)
        after = merge_by_layer(aggregator, state.model, noisy_merge(space, state.model, merge, noisy, sides))
        if private.noise == "banded":
            state.releases.append(release)
        return after, release

    def _release(self, state: State, exact: Tensors, relative: Mapping[ClientId, float], largest: float) -> Release:
        """What this version tells of whom, under a name that follows from all that the version depends on.

        The same draws with another multiplier, scale, or other correlated noise could be told apart: all of it is in the name.
        """
        private, version, task = self.private, state.version + 1, state.outer.id if state.outer else 0
        earlier = state.releases[-1].value if state.releases else ""
        scales = repr((float(private.clip), float(private.multiplier), float(largest)))  # 1 and 1.0 are one number
        facts = (private.noise, private.apart, scales, earlier)
        value = self.noise.digest(exact, "version", task, version, *facts)
        spent = self._spent(relative, state.releases)
        return Release(version, task, private.noise, private.clip, private.multiplier, relative, spent, value)

    def _normals(self, exact: Tensors, state: State, release: Release, at: int) -> Iterator[Tensor]:
        """Standard normal numbers of the shapes of a sum, those of the `at`-th release of this run."""
        value = [*state.releases, release][at].value
        for name, tensor in sorted(exact.items()):  # each has a stream of its own, whichever others are in a version
            yield from self.noise.normals({name: tensor}, "noise", value, name)

    def _spent(self, relative: Mapping[ClientId, float], earlier: Sequence[Release]) -> dict[ClientId, float]:
        """By client, how far the version moves with its answers, in standard deviations of the noise (mu)."""
        if self.private.noise == "independent":
            return {client: share / self.private.multiplier for client, share in relative.items()}
        now, band = len(earlier), self.private.apart
        at = {number: one.shares for number, one in enumerate(earlier[-band:], max(0, now - band))} | {now: relative}
        clients = sorted({client for shares in at.values() for client in shares})
        rows = {
            c: row_sensitivity(band, now, {k: shares[c] for k, shares in at.items() if c in shares}) for c in clients
        }
        return {client: row / self.private.multiplier for client, row in rows.items() if row}


def require_plain_merge(aggregator: Aggregator, schedule: Schedule, field: str = "aggregator") -> None:
    """Raise Refused for a method or a schedule whose merges are not what noise on a sum of changes makes private, or of no use then.

    `field` names the aggregator in the message.
    """
    *wrappers, method = aggregator_layers(aggregator)
    for layer in wrappers:
        if not getattr(layer, "after_merge", False):
            remedy = "it looks at single answers, and with `privacy` nobody does after they are clipped; take the wrapper off"
            raise Refused(field, type(layer).__name__, remedy)
    if not getattr(method, "plain_mean", False):
        remedy = (
            "it merges by more than the mean of changes with the schedule's weights, which is what gets noise; use "
        )
        raise Refused(field, type(method).__name__, f"{remedy}{PLAIN}")
    if getattr(schedule, "reuses_answers", False):
        remedy = "each of its answers is in several versions, and is counted in one; use window=1, or another schedule"
        raise Refused("schedule", type(schedule).__name__, remedy)
    weigh = getattr(schedule, "weigh", None)
    if weigh is not None and weigh is not uniform:
        remedy = "weights by what clients hold or report tell of their data; give weigh=uniform"
        raise Refused("schedule.weigh", getattr(weigh, "__name__", type(weigh).__name__), remedy)


def require_plain_start(rules: Rules, method: str) -> None:
    """Raise Refused where clients would send, or show by what they send, more than a change that is clipped and noised."""
    why = ""
    if rules.private:
        why = "its clients keep what they train, and the server has nothing to add noise to"
    elif rules.pruning is not None:
        why = "the rank after pruning would tell of a client's data; give prune=False"
    elif rules.select is not None:
        why = "which directions a client chose would tell of its data"
    if why:
        raise Refused("aggregator", method, f"{why}; use {PLAIN}")


def private_limits(limits: Limits) -> Limits:
    """Return the limits of a server that clips: how far others moved is not looked at, since a refusal would tell of their data."""
    return replace(limits, norm_ratio=None, step_ratio=None)


def added_in(aggregator: Aggregator) -> Literal["factor", "product"]:
    """Return the space in which the method adds, whatever is wrapped around it."""
    *_, method = aggregator_layers(aggregator)
    return cast(Aggregator, method).space


def shares_of(merge: Merge) -> dict[ClientId, float]:
    """Return each client's weight in a merge, all its answers together."""
    shares = dict[ClientId, float]()
    for weight, update in merge.weighted_updates:
        shares[update.task.client] = shares.get(update.task.client, 0.0) + weight
    return shares


def sum_clipped_changes(space: str, model: Model, merge: Merge, norm: float, sides: frozenset[Side]) -> Tensors:
    """Return sum_k w_k change_k in float64, each change of at most this norm, over the layers and sides that somebody trained."""
    total = Tensors()
    for weight, update in merge.weighted_updates:
        if not _is_finite(update.result.adapter):
            update = replace(update, result=_nothing(update))  # a change that is not finite counts as none
        change = _products(update) if space == "product" else _factors(model, update, sides)
        if "dense" not in sides:
            change = {name: tensor for name, tensor in change.items() if not name.startswith("dense:")}
        length = math.hypot(*(float(torch.linalg.vector_norm(tensor)) for tensor in change.values()))
        share = min(1.0, norm / length) if length else 1.0
        for name, tensor in change.items():
            part = weight * share * tensor
            total[name] = total[name].add_(part) if name in total else part
    return total


def _factors(model: Model, update: Update, sides: frozenset[Side]) -> Tensors:
    """One answer's change of factors, at the server's ranks."""
    change, added = factor_change(update.task.start, update.result.adapter), Tensors()
    for name, factor in change.factors.items():
        like, held = model.adapter.factors[name], held_directions(update.task.start, factor.rank).to(factor.down.device)
        if "down" in sides:
            added[f"{name}.down"] = torch.zeros_like(like.down, dtype=torch.float64).index_add_(0, held, factor.down)
        if "up" in sides:
            added[f"{name}.up"] = torch.zeros_like(like.up, dtype=torch.float64).index_add_(1, held, factor.up)
    return added | {f"dense:{name}": tensor for name, tensor in change.dense.items()}


def _products(update: Update) -> Tensors:
    """One answer's change of products, each layer's matrix whole."""
    start, answer = update.task.start, update.result.adapter
    change = product_change(replace(start, train=_double(sent_part(start, answer))), _double(answer))
    added = {name: factor.up @ factor.down for name, factor in change.products.items()}
    return added | {f"dense:{name}": tensor for name, tensor in change.dense.items()}


def _is_finite(adapter: Adapter) -> bool:
    return all(bool(tensor.isfinite().all()) for tensor in named_tensors(adapter).values())


def _double(adapter: Adapter) -> Adapter:
    """The adapter in float64."""
    factors = {name: Factor(factor.down.double(), factor.up.double()) for name, factor in adapter.factors.items()}
    return Adapter(factors, {name: tensor.double() for name, tensor in adapter.dense.items()})


def noisy_merge(space: str, model: Model, merge: Merge, noisy: Tensors, sides: frozenset[Side]) -> Merge:
    """Return a merge of answers that changed nothing, and of a stand-in whose change is the noisy sum.

    The stand-in holds the layers that somebody trained. Its weight is 1; a second one that changed nothing has -1, so that the
    weights add up to what they were, in a mean of models too.
    """
    unchanged = merge.map_updates(lambda update: replace(update, result=_nothing(update)))
    train, answer = _stand_in(space, model, noisy)
    rank = server_rank(model.adapter)
    rules = Rules(frozen=tuple(side for side in SIDES if side not in sides))
    task = Task(0, "", 0, TaskStart(train, "", rules=rules), Budget(rank, 1), 0.0)
    pair = ((1.0, Update(task, Result(answer, 0, 0, 0))), (-1.0, Update(task, Result(train, 0, 0, 0))))
    return replace(unchanged, weighted_updates=(*unchanged.weighted_updates, *pair))


def _nothing(update: Update) -> Result:
    """The answer of a client that changed nothing, and says nothing of its data."""
    return Result(sent_part(update.task.start, update.result.adapter), update.result.examples, 0, update.result.steps)


def _stand_in(space: str, model: Model, noisy: Tensors) -> tuple[Adapter, Adapter]:
    """A start of zeros, and an answer that differs from it by the noisy sum, on the layers that are in it."""
    zeros, moved = dict[str, Factor](), dict[str, Factor]()
    for name, like in model.adapter.factors.items():
        if space == "product" and name in noisy:
            moved[name] = compact(noisy[name].to(like.up))
        elif f"{name}.down" in noisy or f"{name}.up" in noisy:
            down, up = (noisy.get(f"{name}.{side}", torch.zeros(())) for side in ("down", "up"))
            moved[name] = Factor(down.expand_as(like.down).to(like.down), up.expand_as(like.up).to(like.up))
        else:
            continue
        zeros[name] = Factor(torch.zeros_like(moved[name].down), torch.zeros_like(moved[name].up))
    nothing = {name: torch.zeros_like(tensor) for name, tensor in model.adapter.dense.items()}
    dense = {name: noisy.get(f"dense:{name}", zero).to(zero) for name, zero in nothing.items()}
    return Adapter(zeros, nothing), Adapter(moved, dense)
