"""The terms of a run, as a server sends them, from the Run and the model that it begins with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from fedloom.core.codec import Summed
from fedloom.core.errors import Refused
from fedloom.core.fingerprint import fingerprint
from fedloom.core.lora import Adapter
from fedloom.core.types import Budget, Model, TaskStart
from fedloom.deploy.messages.messages import RunTerms
from fedloom.deploy.messages.sum_rules import why_coarse
from fedloom.hierarchy.secure_edge import Secure
from fedloom.privacy.private import client_level
from fedloom.privacy.record_draws import for_records
from fedloom.runs.record_budget import learned_steps
from fedloom.runs.run import Run
from fedloom.runs.start_adapter import has_fold
from fedloom.train.settings import ALL_LINEAR, PLAIN, largest_step

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

    Raises Refused for sums of numbers that are too coarse.
    """
    lora, start = run.lora, largest_start(run, first)
    if isinstance(lora.target_modules, str) and lora.target_modules.lower() != ALL_LINEAR:
        lora = replace(lora, target_modules=tuple(sorted(first.adapter.factors)))
    learned, secure = learned_steps(run), run.hierarchy.secure if run.hierarchy else None
    terms = RunTerms(
        run=run.name,
        run_hash=run_hash,
        model=run.model,
        rank=run.plan.rank.largest,
        lora=lora,
        training=run.training,
        engine=replace(run.engine or PLAIN, cache_dir=None),  # a folder of this machine, and no site's
        threads=run.threads or 1,
        seed=run.seed,
        labels=None if labels is None else tuple(labels),
        weights=weights,
        held_out=run.held_out,
        first_adapter=fingerprint(first.adapter),
        date=run.date,
        depth=None if learned or run.plan.depth is None else run.plan.depth.bounds[1],
        steps=max(run.plan.local_steps, learned),
        versions=run.limits.versions,
        evaluations=1 if run.held_out and not client_level(run.privacy) else 0,
        folds=start.fold is not None or depth_folds(run),
        controls=start.control is not None,
        privacy=_privacy_words(run),
        records=for_records(run.privacy),
        least_sum=secure.least if secure else 0,
        sum_threshold=(secure or Secure()).threshold,
        rates=run.plan.rates,
    )
    step = largest_step(run.training.learning_rate, lora.scaling, terms.rates) * max(1.0, start.rules.up_rate)
    bound = step * terms.steps
    if secure and (reason := why_coarse(terms, start, Summed(secure.bits, secure.bound or bound, 1))):
        raise Refused("hierarchy.secure.bits", secure.bits, reason)
    return terms


def largest_start(run: Run, first: Model) -> TaskStart:
    """Return the start of a task at rank 1, which brings all that a start of this run may bring: a fold, a control variate."""
    folded = replace(first, fold=first.fold or Adapter(first.adapter.factors)) if has_fold(run) else first
    return run.aggregator.start(folded, Budget(1, 1), 0)


def depth_folds(run: Run) -> bool:
    """Return whether tasks of less depth may bring the layers below as a fold: others train these, or they began trained."""
    depth = run.plan.depth
    varied = depth is not None and (run.start is not None or depth.bounds[0] != depth.bounds[1])
    return varied or learned_steps(run) > 0


def _privacy_words(run: Run) -> str:
    private = run.privacy
    if private is None or not client_level(private):
        return ""
    bounds = (
        f"clip {private.clip:g}, multiplier {private.multiplier:g}, at most {private.most_answers} answers of a client"
    )
    return f"the server adds noise to what it merges ({bounds})"[:LONGEST_WORDS]
