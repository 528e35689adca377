"""Robust: answers are judged by how alike their changes are, before they are merged; liars weigh less, or nothing.

A rule (`shared.robust_rules`) sees the cosines and lengths of the clients' changes (`shared.likeness`) and gives weights; the wrapped
method merges as always. So every method, every mixture of ranks and every schedule with a set of answers goes with every rule:
the answers of a round, of FedBuff's buffer or of FedFa's window. What a rule takes off the whole merge goes into its step.

Source: Blanchard et al., "Machine Learning with Adversaries", NeurIPS 2017, and later rules, each named at its rule. Judging products
of mixed ranks by Gram matrices, and on what two clients both trained, is ours.

It stands outermost: the answers are judged as they came, all layers together, also where clients train to different depths. Answers
that weigh nothing are taken out of the merge, so that no memory of a wrapped method learns of them. Cost: the Gram matrix of the
answers, (d_in + d_out) R^2 a layer with R the sum of the ranks; products of the size of a layer are never formed.

What it does not stop: liars who move as the others do and add little (a back door that is not scaled, "a little is enough", arXiv
1902.06156), half of the clients or more, and clients with rare data, who look like liars and are left out with them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor

from fedloom.aggregate.product_delta import ProductDelta
from fedloom.aggregate.shared.likeness import Space, compare_changes, measured_change
from fedloom.aggregate.shared.robust_rules import MultiKrum, Rule
from fedloom.aggregate.shared.wrapper import Wrapper, drop_memory, require_method
from fedloom.core.errors import Refused
from fedloom.core.lora import Adapter, Factor, map_tensors, take_sides
from fedloom.core.partial_depth import merge_by_layer
from fedloom.core.policies import Aggregator, Merge, aggregator_layers
from fedloom.core.types import ClientId, Model, Update

SCORES, WEIGHTS, TRUSTED = "robust scores", "robust weights", "trusted change"


@dataclass(frozen=True, slots=True)
class Robust(Wrapper):
    """Another method, on answers weighed by a rule that looks for liars.

    Fields:
        inner: the wrapped method, with all its other wrappers.
        rule: how clients are weighed: MultiKrum(), Trust(client), GeometricMedian() or CentredClipping().
    """

    inner: Aggregator = field(default_factory=ProductDelta)
    rule: Rule = field(default_factory=MultiKrum)
    judges_answers: ClassVar[bool] = True
    merges_all_depths: ClassVar[bool] = True
    not_summed: ClassVar[str] = "it compares single answers, which nobody sees in a secure group"

    def __post_init__(self) -> None:
        require_method("Robust", self.inner)
        if not hasattr(self.rule, "weigh"):
            remedy = "MultiKrum(), Trust(client), GeometricMedian() or CentredClipping()"
            raise Refused("aggregator.rule", type(self.rule).__name__, remedy)

    @property
    def exempt(self) -> Mapping[int, str]:
        """Laws broken by the wrapped method and by the rule, by number, with the reason."""
        return {**self.inner.exempt, **self.rule.exempt}

    @property
    def least_answers(self) -> int:
        """The fewest answers in a merge that the rule can compare."""
        return self.rule.fewest

    @property
    def trusted_client(self) -> ClientId | None:
        """The client whose changes others are judged by."""
        return self.rule.client

    def merge(self, model: Model, merge: Merge) -> Model:
        """Return the wrapped merge with the rule's weights; the model as it is where nobody has any."""
        space: Space = [*aggregator_layers(self)][-1].space  # type: ignore[attr-defined]  # the method below all wrappers
        bare, reference = drop_memory(model, SCORES, WEIGHTS, TRUSTED), self._reference(model, merge, space)
        likeness = compare_changes(merge.weighted_updates, space, reference)
        known = model.memory[SCORES].dense if SCORES in model.memory else {}
        weights, scores = self.rule.weigh(likeness, known)
        factors = dict(zip(likeness.clients, (weights / likeness.shares).tolist(), strict=True))
        judged = _reweighed(merge, factors)
        after = merge_by_layer(self.inner, bare, judged) if judged else replace(bare, discarded=0.0)
        if space == "factor" and after.basis != model.basis:
            reference = None  # its directions mean something else now
        memory = {SCORES: Adapter({}, scores), WEIGHTS: Adapter({}, _as_tensors(factors)), TRUSTED: reference}
        kept = {name: entry for name, entry in memory.items() if entry is not None and (entry.dense or entry.factors)}
        return replace(after, memory={**after.memory, **kept})

    def _reference(self, model: Model, merge: Merge, space: Space) -> Adapter | None:
        """Return the latest change of the trusted client; sides that it trained in an earlier phase are from then."""
        before = model.memory.get(TRUSTED)
        answers = [update for _, update in merge.weighted_updates if update.task.client == self.rule.client]
        for update in sorted(answers, key=lambda update: update.task.id):
            now = measured_change(update, space)
            if space == "factor" and before and _same_shapes(now, before):
                now = take_sides({"down", "up", "dense"} - update.task.start.rules.unchanged, now, before)
            before = now
        return before


def left_out(model: Model) -> list[ClientId] | None:
    """Return the clients that the last merge of this model left out, sorted (None: none was judged)."""
    entry = model.memory.get(WEIGHTS)
    return sorted(client for client, factor in entry.dense.items() if not float(factor)) if entry else None


def _reweighed(merge: Merge, factors: Mapping[ClientId, float]) -> Merge | None:
    """Return the merge with each client's weight times its factor; None where nothing is left, itself where all are 1.

    The weights sum to 1 again, and what is missing from that goes into the step. A control variate counts by the same factor.
    """
    if all(abs(factor - 1.0) < 1e-9 for factor in factors.values()):
        return merge
    parts = [
        (weight * factors[update.task.client], _with_control(update, factors[update.task.client]))
        for weight, update in merge.weighted_updates
        if factors[update.task.client] > 0
    ]
    total = sum(weight for weight, _ in parts)
    if total <= 0:
        return None
    step = merge.step * (total if total < 1.0 - 1e-9 else 1.0)
    return replace(merge, weighted_updates=tuple((weight / total, update) for weight, update in parts), step=step)


def _with_control(update: Update, factor: float) -> Update:
    control = update.result.control
    if control is None or factor >= 1.0:
        return update
    shorter = map_tensors(lambda one: one * factor, control)
    return replace(update, result=replace(update.result, control=shorter))


def _as_tensors(factors: Mapping[ClientId, float]) -> dict[str, Tensor]:
    return {client: torch.tensor(factor, dtype=torch.float64) for client, factor in factors.items()}


def _same_shapes(one: Adapter, other: Adapter) -> bool:
    def shapes(factor: Factor) -> tuple[torch.Size, torch.Size]:
        return factor.down.shape, factor.up.shape

    return one.factors.keys() == other.factors.keys() and all(
        shapes(factor) == shapes(other.factors[name]) for name, factor in one.factors.items()
    )
