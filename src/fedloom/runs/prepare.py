"""Builds the job of a run: the only place that wires parts together."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from fedloom.core import schema
from fedloom.core.policies import need_fresh_answers
from fedloom.core.seeds import derive
from fedloom.core.server import Server
from fedloom.data.examples import Split
from fedloom.data.partition import Shard, hold_out
from fedloom.runs import job_checks
from fedloom.runs.build_groups import devices, led
from fedloom.runs.execute import execute, record
from fedloom.runs.job import Job
from fedloom.runs.resume import Begun, begun
from fedloom.runs.run import Run
from fedloom.train.base_model import Base, check_length, initial, load
from fedloom.train.settings import PLAIN
from fedloom.train.tokenised import encode


class PreparedRun(Job):
    """A job that can be carried out: `prepare(run).execute(folder)`."""

    __slots__ = ()
    execute = execute
    record = record


def prepare(run: Run, resume: Path | None = None) -> PreparedRun:
    """Load, divide and check everything, for a new run or to go on with the unfinished one in the folder `resume`.

    Raises Refused with field, value and remedy; nothing is written.
    """
    schema.check(run)
    need_fresh_answers(run.aggregator, run.schedule)
    before = begun(resume, run) if resume else None
    split = run.data.load(run.seed)
    shards = hold_out(run.partition.split(split.train, run.seed), split.train, run.held_out, run.seed)
    job = made_ready(run, split, shards, before)
    if before:
        before.check(job.about())
    return job


def made_ready(run: Run, split: Split, shards: Sequence[Shard], before: Begun | None) -> PreparedRun:
    """The job over data that are divided already; without shards its clients are not known yet, and their data lie elsewhere."""
    torch.set_num_threads(run.threads)
    top = run.plan.rank.largest
    engine = before.engine(run.engine or PLAIN) if before else run.engine or PLAIN
    base = load(run.model, job_checks.labels(run, split), run.lora, top, derive(run.seed, "model"), run.device, engine)
    job_checks.check_aggregator(run, base, None if run.hierarchy or not shards else len(shards))
    train, test = (encode(part, base.tokenizer, run.training.max_length) for part in (split.train, split.test))
    check_length(base, run.training.max_length, max(len(ids) for ids in train.ids + test.ids))
    job_checks.check_depth(run, base, run.aggregator.init(initial(base, top)))
    sizes = {shard.client: len(shard.train) for shard in shards}
    profiles = {profile.client: profile for profile in devices(run).profiles(sizes, run.seed)} if shards else {}
    return PreparedRun(
        run=run,
        split=split,
        shards=tuple(shards),
        profiles=profiles,
        base=base,
        train_texts=train,
        test_texts=test,
        tested=job_checks.tested(len(split.test), run.test_limit, run.seed),
        server=led(run, _server(run, base, top), base, train, shards, len(split.train.names), profiles),
        stays=run.availability.of(sorted(sizes), run.seed) if run.availability else None,
        begun=before,
    )


def _server(run: Run, base: Base, rank: int) -> Server:
    """At version 0, without a hierarchy."""
    return Server(
        run.aggregator.init(initial(base, rank)),
        run.aggregator,
        run.schedule,
        run.plan,
        shape=base.shape(),
        limits=run.limits,
        seed=run.seed,
        transfer=run.transfer,
    )
