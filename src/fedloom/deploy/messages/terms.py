"""The terms of a run, as a server sends them, from the Run and the model that it begins with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from fedloom.core.fingerprint import fingerprint
from fedloom.core.lora import Adapter
from fedloom.core.policies import aggregator_layers
from fedloom.core.types import Budget, Model, TaskStart
from fedloom.deploy.messages.messages import RunTerms
from fedloom.runs.run import Run
from fedloom.runs.start_adapter import has_fold
from fedloom.train.settings import ALL_LINEAR, PLAIN

LONGEST_WORDS = 500
"""Characters in which a method says what it does for privacy."""


def terms_of_run(run: Run, first: Model, labels: Sequence[str] | None, run_hash: str, weights: str) -> RunTerms:
    """Return what a site must know of a run. A regular expression for layers is resolved here: none travels to a site.

    Args:
        run: the run.
        first: the model that it begins with.
        labels: names that the model chooses from (None: it writes text).
        run_hash: names its settings.
        weights: fingerprint of the base model ("": it has none).
    """
    lora, start = run.lora, largest_start(run, first)
    if isinstance(lora.target_modules, str) and lora.target_modules.lower() != ALL_LINEAR:
        lora = replace(lora, target_modules=tuple(sorted(first.adapter.factors)))
    learned = learned_steps(run)
    return RunTerms(
        run=run.name,
        run_hash=run_hash,
        model=run.model,
        rank=run.plan.rank.largest,
        lora=lora,
        training=run.training,
        engine=run.engine or PLAIN,
        threads=run.threads,
        seed=run.seed,
        labels=None if labels is None else tuple(labels),
        weights=weights,
        held_out=run.held_out,
        first_adapter=fingerprint(first.adapter),
        date=run.date,
        depth=None if learned or run.plan.depth is None else run.plan.depth.bounds[1],
        steps=max(run.plan.local_steps, learned),
        versions=run.limits.versions,
        evaluations=1 if run.held_out else 0,
        folds=start.fold is not None or depth_folds(run),
        controls=start.control is not None,
        privacy=_privacy_words(run),
    )


def largest_start(run: Run, first: Model) -> TaskStart:
    """Return the start of a task at rank 1, which brings all that a start of this run may bring: a fold, a control variate."""
    folded = replace(first, fold=first.fold or Adapter(first.adapter.factors)) if has_fold(run) else first
    return run.aggregator.start(folded, Budget(1, 1), 0)


def depth_folds(run: Run) -> bool:
    """Return whether tasks of less depth may bring the layers below as a fold: others train these, or they began trained."""
    depth = run.plan.depth
    varied = depth is not None and (run.start is not None or depth.bounds[0] != depth.bounds[1])
    return varied or learned_steps(run) > 0


def learned_steps(run: Run) -> int:
    """Return the largest number of steps that a plan over regions gives a site (0: there is no such plan)."""
    rule = getattr(run.hierarchy.plan, "rule", None) if run.hierarchy else None
    while rule is not None and not hasattr(rule, "steps"):
        rule = getattr(rule, "inner", None)
    return int(rule.steps) if rule is not None else 0


def _privacy_words(run: Run) -> str:
    noise = [layer for layer in aggregator_layers(run.aggregator) if getattr(layer, "adds_noise", False)]
    # never the layer as a whole: the seed of its noise is the server's secret
    said = [f"{type(layer).__name__}, multiplier {getattr(layer, 'multiplier', '?')}" for layer in noise]
    return f"the server adds noise to what it merges ({'; '.join(said)})"[:LONGEST_WORDS] if said else ""
