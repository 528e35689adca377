"""A dry run: what a run will cost, found out before it starts.

1. The run is carried out without its training and scoring (`untrained`): that gives its tasks, messages and virtual time.
2. A few of its passes are trained, and some test examples scored, to measure what a step and a score take on this machine. For each
   depth ten steps are measured; of more than two depths the lowest and the highest.
3. The real time is the sum over all tasks and scores. The memory is the most that this process has held meanwhile: the step that
   needs most of it is among those that are trained.
"""

from __future__ import annotations

import sys
import textwrap
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fedloom.core.errors import Refused
from fedloom.report.numbers import format_bytes, format_duration, percent, plural
from fedloom.runs.dry_run.step_times import frozen_tokens, scoring_seconds, train_largest, training_seconds
from fedloom.runs.dry_run.untrained import Clock, Pass, assumptions_of, run_untrained
from fedloom.runs.execute import simulated_trainer
from fedloom.runs.final_scores import next_ranks
from fedloom.runs.job import Job
from fedloom.runs.prepare import prepare
from fedloom.runs.run import Run
from fedloom.train.chat_template import fit_notes
from fedloom.train.trainer import PeftTrainer

PATIENCE = 30.0
"""Seconds for the run without its training; a longer one is cut, and what it costs follows from the part that was seen."""

WIDTH, INDENT = 80, 20
"""Letters of a line of the table, and of these the ones before its second column."""


@dataclass(frozen=True, slots=True)
class CostEstimate:
    """What a run will cost. Printing it gives a table.

    Fields:
        name: name of the run.
        clients: number of clients.
        ranks: number of clients by the rank of their first task.
        versions: global versions that it makes.
        tasks: tasks that are sent to clients.
        steps: optimiser steps of the tasks that are trained, not of those that are cancelled before.
        tokens: tokens that are trained on, padding not counted.
        bytes_up: bytes from clients to the server.
        bytes_down: bytes from the server to clients.
        virtual_seconds: length of the run on the simulated devices (s).
        loading_seconds: real time to load data and model, as it was now (s; 0: not measured).
        training_seconds: real time to train, with one worker (s).
        scoring_seconds: real time to score versions and clients, and to write sample answers (s).
        server_seconds: real time of the server and its logs (s).
        memory: most memory of the process (bytes; None: not known on this system).
        accelerator_memory: most memory of the accelerator (bytes; None: there is none).
        client_memory: most memory that a client needs to train, by the model's sizes (bytes).
        short_of_memory: clients that need more than their simulated device has.
        cut: what of the examples the model does not read: sentences.
        majority: share of the test examples that have the commonest label (None: text is written).
        majority_label: that label (None: text is written).
        simulated_share: share of the run that was simulated; below 1 all counts are estimates.
        assumptions: what was assumed where the run decides by what is learnt; where there are any, counts are estimates.
    """

    name: str
    clients: int
    ranks: Mapping[int, int]
    versions: int
    tasks: int
    steps: int
    tokens: int
    bytes_up: int
    bytes_down: int
    virtual_seconds: float
    loading_seconds: float
    training_seconds: float
    scoring_seconds: float
    server_seconds: float
    memory: int | None
    accelerator_memory: int | None
    client_memory: int
    short_of_memory: int
    cut: tuple[str, ...]
    majority: float | None
    majority_label: str | None
    simulated_share: float
    assumptions: tuple[str, ...]

    @property
    def real_seconds(self) -> float:
        """Real time of the run on this machine with one worker, without loading and without the report (s)."""
        return self.training_seconds + self.scoring_seconds + self.server_seconds

    @property
    def exact(self) -> bool:
        """Whether tasks, bytes and virtual time are those of the run.

        A row of few numbers, such as a bias, may come back from training as it was sent. Then it is not sent, and the upload is
        smaller by that row.
        """
        return self.simulated_share == 1.0 and not self.assumptions

    def rows(self) -> list[tuple[str, str]]:
        """Return the table: what, and how much."""
        about = "" if self.exact else "about "
        ranks = ", ".join(f"{many:,} of rank {rank}" for rank, many in self.ranks.items())
        work = [plural(self.tasks, "task"), plural(self.steps, "step"), plural(self.tokens, "token")]
        spans = {"training": self.training_seconds, "scoring": self.scoring_seconds, "server": self.server_seconds}
        found = [
            ("Clients", f"{self.clients:,}: {ranks}"),
            ("Global versions", f"{about}{self.versions:,}"),
            ("Training", f"{about}{', '.join(work)}"),
            ("Upload", f"{about}{format_bytes(self.bytes_up)} from all clients ({self.bytes_up:,} bytes)"),
            ("Download", f"{about}{format_bytes(self.bytes_down)} to all clients ({self.bytes_down:,} bytes)"),
            ("Virtual time", f"{about}{format_duration(self.virtual_seconds)} on the simulated devices"),
            ("Real time", f"about {format_duration(self.real_seconds)} on this machine, with one worker"),
            ("", ", ".join(f"{name} {format_duration(span)}" for name, span in spans.items())),
            *([("", f"loading took {format_duration(self.loading_seconds)}")] if self.loading_seconds else []),
            *self._memory_rows(),
        ]
        if self.majority is not None:
            always = f"always {self.majority_label!r}"
            found.append(("Majority", f"{always} is right for {percent(self.majority)} of the test examples"))
        found += [("Cut", sentence) for sentence in self.cut]
        if self.simulated_share < 1.0:
            found.append(("Estimated", f"from the first {percent(self.simulated_share)} of the run"))
        return found + [("Assumed", sentence) for sentence in self.assumptions]

    def _memory_rows(self) -> list[tuple[str, str]]:
        found = [] if self.memory is None else [("Memory", f"about {format_bytes(self.memory)} in this process")]
        if self.accelerator_memory is not None:
            found.append(("", f"about {format_bytes(self.accelerator_memory)} on the accelerator"))
        short = f"; {self.short_of_memory:,} of {self.clients:,} devices have less" if self.short_of_memory else ""
        return [*found, ("Memory of a client", f"up to about {format_bytes(self.client_memory)}{short}")]

    def __repr__(self) -> str:
        lines = list[str]()
        for name, text in self.rows():
            lines += textwrap.wrap(text, WIDTH, initial_indent=f"{name:{INDENT}s}", subsequent_indent=" " * INDENT)
        return "\n".join(lines)


def dry_run(run: Run, patience: float = PATIENCE, workers: int | str = 1) -> CostEstimate:
    """Return what a run will cost, without carrying it out; nothing is written.

    Data and model are loaded. Some steps are trained to see how long they take here.

    Args:
        run: the run.
        patience: seconds for the run without its training; if it takes longer, its counts are estimated from the part seen.
        workers: as the run will be given: they share the cores, where it leaves its threads open. The real time is that of one.

    Raises:
        Refused: the run could not be carried out either; the message has the field, its value and what was expected.
    """
    began = time.perf_counter()
    job = prepare(run, workers=workers)
    return estimate_cost(job, time.perf_counter() - began, patience)


def estimate_cost(
    job: Job, loading_seconds: float = 0.0, patience: float = PATIENCE, clock: Clock = time.perf_counter
) -> CostEstimate:
    """Return what a prepared job will cost. Its server is at the end of the run afterwards, so that the job cannot be carried out.

    Args:
        job: a new run, not one that goes on.
        loading_seconds: time that it took to prepare the job.
        patience: as of `dry_run`.
        clock: measures real time; `time.process_time` gives processor seconds instead.

    Raises:
        Refused: the run goes on from another one, or its server gives up.
    """
    if job.resumed_from is not None:
        raise Refused("--dry-run", str(job.resumed_from.folder), "it is about a whole run; leave --resume out")
    about: Mapping[str, Any] = job.describe()
    trainer, assumptions = simulated_trainer(job), assumptions_of(job)
    ranks = Counter(next_ranks(job.run.plan, job.server, job.profiles).values())
    seen = run_untrained(job, trainer, patience, clock)
    needs, passes = seen.clients.needs, seen.clients.passes
    if job.base.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    train_largest(job, trainer, max(needs.values(), key=lambda step: step.memory))
    training = training_seconds(job, trainer, passes, clock)
    scoring = scoring_seconds(job, seen, clock)
    counts = {"training": job.train_texts.fit_counts, "test": job.test_texts.fit_counts}
    peak, activations = _peak_memory(), _kept_bytes(job, trainer, passes)
    accelerator = torch.cuda.max_memory_allocated() if job.base.device.type == "cuda" else None

    def whole(part: float) -> int:
        return round(part / seen.share)

    return CostEstimate(
        name=job.run.name,
        clients=len(job.profiles),
        ranks=dict(sorted(ranks.items())),
        versions=whole(seen.versions),
        tasks=whole(seen.clients.tasks),
        steps=whole(sum(len(one.members) * one.steps for one in passes)),
        tokens=whole(seen.clients.tokens),
        bytes_up=whole(seen.traffic.up),
        bytes_down=whole(seen.traffic.down),
        virtual_seconds=seen.now / seen.share,
        loading_seconds=loading_seconds,
        training_seconds=training / seen.share,
        scoring_seconds=scoring,
        server_seconds=seen.server_seconds / seen.share,
        memory=None if peak is None else round(peak + activations * (accelerator is None)),
        accelerator_memory=None if accelerator is None else round(accelerator + activations),
        client_memory=round(max(step.memory for step in needs.values())),
        short_of_memory=sum(step.memory > job.profiles[client].memory for client, step in needs.items()),
        cut=tuple(fit_notes(job.run.training.token_limit, counts)),
        majority=about["baselines"].get("majority"),
        majority_label=about["metrics"].get("majority_label"),
        simulated_share=seen.share,
        assumptions=assumptions,
    )


# What memory it takes -------------------------------------------------------------------------------------------------


def _kept_bytes(job: Job, trainer: PeftTrainer, passes: Sequence[Pass]) -> float:
    """Return the bytes of activations that the run keeps and that were not kept here."""
    depths = [one.depth for one in passes if one.depth is not None and one.depth < job.server.shape.layers]
    if not depths:
        return 0.0
    hidden, room = job.server.shape.hidden, trainer.engine.cache
    tested = 4 * hidden * sum(job.test_texts.lengths(job.tested))
    return min(room, 4 * hidden * frozen_tokens(trainer, passes, hidden)) + min(room, tested)


def _peak_memory() -> int | None:
    """Return the most bytes that this process has held in memory so far; None on a system that does not say."""
    if sys.platform == "win32":
        return None
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
