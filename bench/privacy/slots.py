"""How far the merge of summed parts is from the mean of products, against the exact merge at the same rank. No bar.

Answers are those of a simulation (ranks 2, 4 and 8; 8 companies of generated tickets, 6 a round), merged twice from the same model:
seen one by one, and as the sum of their whole numbers of 16 bits. `excess` is the distance of the merge to the mean of products over
that of the best approximation of its rank, minus 1; `wrong` the distance of the two merges over the size of the mean change. Methods
that freeze a side have neither: their sums are exact but for the rounding.

    quick: a tiny BERT with random weights, one seed; whole: MiniLM, three seeds.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import mean

from fedloom import FFA, Limits, ProductDelta, Rounds, prepare, uniform
from fedloom.aggregate.shared.parts import CommonStart, add_part, block_part, empty_sums, integer_parts, summed_answers
from fedloom.cli.demo import demo_run
from fedloom.core.codec import Summed
from fedloom.core.events import Command, Event, Publish
from fedloom.core.lora import product_difference, product_norm, server_rank, stack
from fedloom.core.policies import Aggregator, Merge
from fedloom.core.types import Model, Update
from fedloom.train.settings import largest_step
from tests.support.tiny_models import tiny_encoder

BITS = 16


def figures(quick: bool) -> Mapping[str, object]:
    """Merge the answers of each version both ways."""
    excess, wrong, one_side = list[float](), list[float](), list[float]()
    for seed in (0,) if quick else (0, 1, 2):
        for method in (ProductDelta(), FFA()):
            for number, (model, merge, bound) in enumerate(recorded(method, seed, quick)):
                far, share = distances(method, model, merge, bound)
                print(
                    f"   seed {seed} {type(method).__name__:12s} version {number}: excess {far:7.2%} wrong {share:.2e}"
                )
                if isinstance(method, FFA):
                    one_side.append(share)
                else:
                    excess.append(far)
                    wrong.append(share)
    return {
        "secure_excess_percent": round(100 * mean(excess), 2),
        "summed_wrong_percent": round(100 * mean(wrong), 2),
        "summed_wrong_percent_one_side": round(100 * max(one_side), 5),
    }


@dataclass
class Merges:
    """The models and the answers that were merged into them."""

    model: Model
    found: list[tuple[Model, Merge]] = field(default_factory=list)

    def __call__(self, now: float, event: Event, commands: list[Command]) -> None:
        """An observer."""
        for command in commands:
            if isinstance(command, Publish):
                share = 1 / len(command.updates)
                self.found.append((self.model, Merge(tuple((share, update) for update in command.updates))))
                self.model = command.model


def recorded(method: Aggregator, seed: int, quick: bool) -> Sequence[tuple[Model, Merge, float]]:
    """The merges of a run in which all members weigh alike, with the bound of a number."""
    with tempfile.TemporaryDirectory() as folder:
        run = replace(
            demo_run(),
            aggregator=CommonStart(method),
            schedule=Rounds(cohort_size=6, weigh=uniform),
            limits=Limits(versions=2 if quick else 3, evaluate_every=0),
            seed=seed,
            threads=1,
            transfer=None,
        )
        if quick:
            plan = replace(run.plan, local_steps=4)
            run = replace(run, model=str(tiny_encoder(Path(folder) / "model")), plan=plan)
        job = prepare(run)
        merges = Merges(job.server.state.model)
        job.execute(Path(folder) / "out", [merges], report=False)
    step = largest_step(run.training.learning_rate, run.lora.scaling)
    return [(model, merge, step * run.plan.local_steps) for model, merge in merges.found]


def distances(method: Aggregator, model: Model, merge: Merge, bound: float) -> tuple[float, float]:
    """Excess and wrong share of a merge of sums, over all layers together."""
    updates = [update for _, update in merge.weighted_updates]
    exact, summed = (
        method.merge(model, merge),
        method.merge(model, replace(merge, weighted_updates=_summed(updates, bound))),
    )
    best = far = apart = change = 0.0
    for name, factor in model.adapter.factors.items():
        terms = [(1.0, factor)]
        for weight, update in merge.weighted_updates:
            terms.append((weight, update.result.adapter.factors[name]))
            terms.append((-weight, update.task.start.train.factors[name]))
        whole, seen, blind = stack(terms), exact.adapter.factors[name], summed.adapter.factors[name]
        best += product_norm(product_difference(seen, whole)) ** 2
        far += product_norm(product_difference(blind, whole)) ** 2
        apart += product_norm(product_difference(blind, seen)) ** 2
        change += product_norm(product_difference(whole, factor)) ** 2
    return (far / best) ** 0.5 - 1 if best > 1e-12 * change else 0.0, (apart / change) ** 0.5


def _summed(updates: Sequence[Update], bound: float) -> tuple[tuple[float, Update], ...]:
    """The updates with the answers that stand for the sum of their whole numbers."""
    codec = Summed(BITS, bound, len(updates))
    largest = max(updates, key=lambda update: server_rank(update.task.start.train))
    sums = empty_sums(largest.task.start)
    for update in updates:
        whole = integer_parts(replace(update.task.start, codec=codec), update.result.adapter)
        add_part(sums, block_part(whole, 0, server_rank(whole)), 0)
    answers = summed_answers([update.task for update in updates], sums, codec.step)
    blind = (replace(one, result=replace(one.result, adapter=answers[one.task.id])) for one in updates)
    return tuple((1 / len(updates), one) for one in blind)
