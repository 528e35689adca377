"""What training and scoring take on this machine: measured on a few passes and examples of a run, and summed over all of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass, field, replace
from statistics import fmean

import torch

from fedloom.core.lora import map_tensors
from fedloom.core.partial_depth import exact_start
from fedloom.core.seeds import derive, rng
from fedloom.core.transfer import encode_start
from fedloom.core.types import ClientState, Task
from fedloom.report.numbers import evenly
from fedloom.runs.dry_run.untrained import Clock, LargestStep, MemberTask, Pass, UntrainedRun, padded_tokens
from fedloom.runs.job import Job
from fedloom.train import evaluate
from fedloom.train.base_model import Base
from fedloom.train.engine.frozen_layers import ActivationCache
from fedloom.train.settings import Decay, Generation
from fedloom.train.tokenised import EncodedTexts
from fedloom.train.trainer import PeftTrainer

PASSES, STEPS = 2, 6
"""Passes that are measured at a depth, and steps of each; the first of them begins the pass, and counts for it alone."""

WARM_UP = 2
"""Steps that are made before others are measured: the first is slower, and a client that chooses its directions needs two."""

SCORED_TOKENS = 4096
"""Tokens of test examples that are scored to measure what a score takes."""

WRITTEN = 8
"""Tokens of an answer that are generated to measure what one takes."""


@dataclass(slots=True)
class StepTimes:
    """A decay of the learning rate that notes when it is asked: once a step.

    Fields:
        decay: the run's own.
        base: the model, whose device is waited for.
        clock: tells the time.
        times: when each step began.
        progress: the last one that was asked for; the groups of an optimiser ask one after the other.
    """

    decay: Decay
    base: Base
    clock: Clock
    times: list[float] = field(default_factory=list)
    progress: float | None = None

    def __call__(self, progress: float) -> float:
        """Return the decay at this share of the task."""
        if progress != self.progress:
            self.times.append(_now(self.base, self.clock))
            self.progress = progress
        return self.decay(progress)


@dataclass(frozen=True, slots=True)
class PassTime:
    """Time of a pass.

    Fields:
        fixed: seconds beside its steps: adapters are written and read, activations of frozen layers looked up.
        by_token: seconds of a step by its tokens.
        total: seconds of what was measured, as a whole.
    """

    fixed: float
    by_token: float
    total: float


@dataclass(frozen=True, slots=True)
class DepthTime:
    """Time at a depth: that of a pass, and seconds to compute the activations below the trained blocks, by token."""

    fixed: float
    by_token: float
    frozen_by_token: float

    def between(self, other: DepthTime, share: float) -> DepthTime:
        """Return what lies at this share of the way to another depth."""
        pairs = zip(astuple(self), astuple(other), strict=True)
        return DepthTime(*(one + share * (two - one) for one, two in pairs))


def training_seconds(job: Job, trainer: PeftTrainer, passes: Sequence[Pass], clock: Clock) -> float:
    """Return the seconds of all passes, from those that are measured here."""
    by_depth: dict[int, list[Pass]] = {}
    for one in passes:
        by_depth.setdefault(one.depth or job.server.shape.layers, []).append(one)
    low, high = min(by_depth), max(by_depth)
    measured = {depth: _measure(job, trainer, by_depth[depth], clock) for depth in {low, high}}
    total = 0.0
    for depth, own in by_depth.items():
        at = measured[low].between(measured[high], (depth - low) / max(1, high - low))
        total += sum(at.fixed + at.by_token * one.tokens * one.steps for one in own)
        total += at.frozen_by_token * frozen_tokens(trainer, own, job.server.shape.hidden)
    return total


def _measure(job: Job, trainer: PeftTrainer, passes: Sequence[Pass], clock: Clock) -> DepthTime:
    """Return the time of passes of one depth, from those whose steps are nearest to the mean."""
    mean = sum(one.tokens * one.steps for one in passes) / sum(one.steps for one in passes)
    chosen = sorted(passes, key=lambda one: abs(one.tokens - mean))[:PASSES]
    times, frozen, tokens = list[PassTime](), 0.0, 0
    partial = (chosen[0].depth or job.server.shape.layers) < job.server.shape.layers
    for one in chosen:
        own = replace(trainer, cache=ActivationCache())
        anew = _time_pass(job, own, one, clock, STEPS if partial else WARM_UP)
        computed = {i for entry in own.cache.entries.values() for i in entry}
        # from the second task of a client on activations are kept, but for what other clients change
        times.append(_time_pass(job, own, one, clock, moved=True))
        frozen += max(0.0, anew.total - times[-1].total) if computed else 0.0
        tokens += sum(trainer.texts.lengths([*computed]))
    fixed, by_token = (fmean(values) for values in zip(*((one.fixed, one.by_token) for one in times), strict=True))
    return DepthTime(fixed, by_token, frozen / max(1, tokens))


def _time_pass(
    job: Job, trainer: PeftTrainer, one: Pass, clock: Clock, steps: int = STEPS, moved: bool = False
) -> PassTime:
    """Train the first steps of a pass, of a model that others have `moved` since, and return what it takes."""
    noted = StepTimes(trainer.training.decay, job.base, clock)
    trainer = replace(trainer, training=replace(trainer.training, decay=noted, warmup=0.0))
    work = [(_task(job, member, steps, moved), ClientState()) for member in one.members]
    plans = [trainer.batches(task) for task, _ in work]
    tokens = [max(1, padded_tokens(trainer.texts, batches)) for batches in zip(*plans, strict=True)]
    began = _now(job.base, clock)
    trainer.train_group(work)
    total, count = _now(job.base, clock) - began, len(noted.times) - 1
    if count < 1:
        return PassTime(0.0, total / sum(tokens), total)
    by_token = (noted.times[-1] - noted.times[0]) / sum(tokens[:count])
    return PassTime(max(0.0, total - by_token * sum(tokens)), by_token, total)


def _task(job: Job, member: MemberTask, steps: int, moved: bool = False) -> Task:
    """Return a task as the run would send it, of at most so many steps, on the model that the job's server has now."""
    run, server, budget = job.run, job.server, member.budget
    budget = replace(budget, steps=min(budget.steps, steps))
    model = server.state.model
    if moved:
        model = replace(model, adapter=map_tensors(lambda tensor: 1.5 * tensor, model.adapter))
    start = exact_start(run.aggregator, model, budget, derive(run.seed, "start", member.task), server.shape, None)
    return Task(member.task, member.client, server.state.version, encode_start(start, run.transfer), budget, 0.0)


def train_largest(job: Job, trainer: PeftTrainer, largest: LargestStep) -> None:
    """Make the optimiser step that needs most memory, on its examples alone."""
    alone = replace(trainer, shards={largest.member.client: largest.batch}, cache=ActivationCache())
    alone.train_group([(_task(job, largest.member, WARM_UP), ClientState())])


def frozen_tokens(trainer: PeftTrainer, passes: Sequence[Pass], hidden: int) -> int:
    """Return the tokens whose activations below the trained blocks are computed in these passes: of each client once, if room holds
    them, else in each task.
    """
    lengths = {
        member.client: sum(trainer.texts.lengths(trainer.shards[member.client]))
        for one in passes
        for member in one.members
    }
    if 4 * hidden * sum(lengths.values()) <= trainer.engine.cache:
        return sum(lengths.values())
    return sum(lengths[member.client] for one in passes for member in one.members)


def _now(base: Base, clock: Clock) -> float:
    """Return the time when the device has done all it was asked for."""
    if base.device.type != "cpu":
        torch.accelerator.synchronize()
    return clock()


# What a score takes ---------------------------------------------------------------------------------------------------


def scoring_seconds(job: Job, seen: UntrainedRun, clock: Clock) -> float:
    """Return the seconds to score versions, canaries and clients, and to write the sample answers."""
    texts, model = job.test_texts, job.server.state.model
    by_length = sorted(job.tested, key=lambda i: len(texts.ids[i]))
    mean = max(1.0, fmean(texts.lengths(by_length)))
    sample = replace(job, tested=tuple(evenly(by_length, max(1, int(SCORED_TOKENS / mean)))), cache=ActivationCache())
    held_out = [i for shard in job.shards for i in shard.held_out]
    pairs = [(of, _longest(of, rows)) for of, rows in ((texts, job.tested), (job.train_texts, held_out))]
    of, rows = max(pairs, key=lambda pair: _padded(*pair))
    evaluate.score(job.base, model.adapter, of, rows, model.fold)  # the batch that needs most memory
    first, again = (_seconds_of(lambda: sample.score(model), job.base, clock) for _ in range(2))
    tokens = _padded(texts, sample.tested)
    final = _padded(job.train_texts, held_out) * (first + (again if job.base.labels is None else 0.0))
    versions = _padded(texts, job.tested) * (first + max(0, seen.scored / seen.share - 1) * again)
    canaries = _padded(texts, job.canaries) * again * seen.checked / seen.share
    return (final + versions + canaries) / tokens + _writing_seconds(job, clock)


def _longest(texts: EncodedTexts, rows: Sequence[int]) -> list[int]:
    """Return the longest of these examples, as many as are scored together."""
    return sorted(rows, key=lambda i: len(texts.ids[i]))[-evaluate.BATCH :]


def _writing_seconds(job: Job, clock: Clock) -> float:
    """Return the seconds to write the sample answers: before training until they are cut, afterwards as long as the right ones."""
    settings, texts = job.run.generation or Generation(), job.test_texts
    if texts.answer_starts is None or not settings.examples:
        return 0.0
    chosen = sorted(rng(job.run.seed, "samples").sample(job.tested, min(settings.examples, len(job.tested))))

    def write(most: int) -> float:
        return _seconds_of(lambda: evaluate.generate_answers(job.base, None, texts, chosen, most), job.base, clock)

    write(1)
    begun, some = write(1), write(1 + WRITTEN)
    longest = min(settings.max_new_tokens, max(map(texts.target_count, chosen)))
    return 2 * begun + (settings.max_new_tokens + longest - 2) * max(0.0, some - begun) / WRITTEN


def _padded(texts: EncodedTexts, rows: Sequence[int]) -> int:
    """Return the tokens of these examples in the batches in which they are scored, padding included."""
    order = sorted(rows, key=lambda i: len(texts.ids[i]))
    batches = [order[start : start + evaluate.BATCH] for start in range(0, len(order), evaluate.BATCH)]
    return sum(padded_tokens(texts, [batch]) for batch in batches)


def _seconds_of(call: Callable[[], object], base: Base, clock: Clock) -> float:
    began = _now(base, clock)
    call()
    return _now(base, clock) - began
