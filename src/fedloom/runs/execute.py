"""Carries out a job: the simulation, the logs, the checkpoints, the adapter and the report of its run folder."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from fedloom.core import files
from fedloom.core.errors import Refused
from fedloom.core.events import Command, Event
from fedloom.core.lora import Adapter, level, whole
from fedloom.core.policies import Evaluator, Observer
from fedloom.core.schema import plain
from fedloom.core.types import Model
from fedloom.hierarchy.tree import Tree, owners, places
from fedloom.report.page import write as write_report
from fedloom.runs.build_groups import devices
from fedloom.runs.final_scores import client_scores, sample_lines
from fedloom.runs.metrics import Metrics
from fedloom.runs.replay import UPDATES, Archive
from fedloom.runs.resume import LOGS, NAME, SECONDS, Keeper, Progress, claimed, given, log, restore
from fedloom.runs.slot_usage import Places
from fedloom.runs.trace import Trace
from fedloom.simulate.client_presence import Presence
from fedloom.simulate.simulation import Simulation
from fedloom.train.export import save
from fedloom.train.settings import PLAIN
from fedloom.train.trainer import PeftTrainer
from fedloom.train.workers.pool import Workers

if TYPE_CHECKING:
    pass
from fedloom.runs.job import Job, groups


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came out: the run folder, the scores of all versions in order, the final adapter."""

    folder: Path
    scores: tuple[Mapping[str, float], ...]
    adapter: Adapter


@dataclass(frozen=True, slots=True)
class Recording:
    """What a driver needs to carry out a job: how versions are scored, who is told each step, who writes checkpoints."""

    job: Job
    keeper: Keeper
    metrics: Metrics
    progress: Progress
    evaluate: Evaluator
    observe: Observer

    def going_on(self, *driver: object) -> None:
        """Checkpoints hold these values of the driver too; what the last one held is put back into all of them."""
        self.keeper.owners = (*owners(self.job.server), *driver, self.metrics, self.progress)
        restore(self.job.begun.values if self.job.begun else {}, self.keeper.owners)


def execute(
    job: Job,
    out: Path | None = None,
    observers: Sequence[Observer] = (),
    workers: int | str = 1,
    report: bool = True,
    checkpoint_seconds: float = SECONDS,
    keep_updates: bool = False,
) -> Outcome:
    """Simulate to the end and fill the run folder: a new one at `out`, or the one of the run that goes on.

    `workers` is who trains, which the numbers do not depend on: 1 this process, 2 or more local processes over one copy of the
    base, "ray" or "ray:ADDRESS" actors. A script that asks for processes needs the usual `if __name__ == "__main__":`.
    Without `report` its pictures, a second or two, are left to `fedloom report`.

    A checkpoint is written every `checkpoint_seconds` (0: after each event). With `keep_updates` the answers themselves are kept
    beside the trace, so that `fedloom replay` can repeat the server's part.

    Ctrl-C leaves a folder that says "interrupted" and can be reported on; any other failure one that says "failed". Both, and
    one that was killed, can go on: `prepare(run, resume=folder).execute()`.
    """
    asked = Workers.of(workers)
    drive = partial(_simulate, job, asked)
    return record(job, drive, out, observers, {"workers": str(asked)}, report, checkpoint_seconds, keep_updates)


def record(
    job: Job,
    drive: Callable[[Recording], str],
    out: Path | None = None,
    observers: Sequence[Observer] = (),
    about: Mapping[str, object] | None = None,
    report: bool = True,
    checkpoint_seconds: float = SECONDS,
    keep_updates: bool = False,
) -> Outcome:
    """Fill the run folder with what happens while `drive` carries the run out, which returns the reason of its end.

    `about` are more lines of the manifest, the rest is as for `execute`.
    """
    torch.set_num_threads(job.run.threads)
    out = _place(job, out)
    with claimed(out):
        said = {**job.about(), **(about or {})}
        files.write_json(out / "manifest.json", {**said, "status": "running", "status_reason": ""})
        status, reason, progress = "failed", "the process ended without a word", Progress()
        keeper = Keeper(out, given=given(job.run), seconds=checkpoint_seconds)
        try:
            with ExitStack() as opened:
                watching = [*observers, *_archive(job, out, keep_updates)]
                reason = drive(_recording(job, opened, keeper, watching, progress))
            status = "finished"
        except KeyboardInterrupt:
            status, reason = "interrupted", "stopped by Ctrl-C"
            raise
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
            raise
        finally:
            clients = {client: plain(profile) for client, profile in job.profiles.items()}
            now = {**groups(job.server), "clients": clients, "status": status, "status_reason": reason}
            _close(job, out, {**said, **now}, report)
    model = job.server.state.model
    return Outcome(out, tuple(progress.scores), whole(model.adapter, model.fold))


def _place(job: Job, out: Path | None) -> Path:
    """The folder to write: that of the run that goes on, or a new one."""
    if job.begun is None:
        return files.create(out or files.free(Path("runs"), job.run.name))
    if out not in (None, job.begun.folder):
        raise Refused("--out", str(out), f"a run goes on in its own folder, {job.begun.folder}")
    return job.begun.folder


def _archive(job: Job, out: Path, asked: bool) -> list[Observer]:
    """Who keeps the answers, if that is asked for now or was when the run was begun."""
    if not asked and not (out / UPDATES).is_dir():
        return []
    return [Archive.of(out / UPDATES, job.server)]


def _recording(
    job: Job, opened: ExitStack, keeper: Keeper, observers: Sequence[Observer], progress: Progress
) -> Recording:
    """The logs of the run, opened until the end of the block, and who writes them."""

    def evaluate(model: Model) -> Mapping[str, float]:
        progress.scores.append(job.evaluate(model))
        return progress.scores[-1]

    def observe(now: float, event: Event, commands: list[Command]) -> None:
        for observer in everyone:
            observer(now, event, commands)

    sizes = job.begun.sizes if job.begun else dict.fromkeys(LOGS, 0)
    keeper.logs = [opened.enter_context(log(keeper.folder / name, size)) for name, size in sizes.items()]
    edges = tuple(job.server.branches.edges) if isinstance(job.server, Tree) else ()
    metrics = Metrics(keeper.logs[1], Places(places(job.server)), edges)
    everyone: list[Observer] = [Trace(keeper.logs[0]), metrics, *observers]
    return Recording(job, keeper, metrics, progress, evaluate, observe)


def _simulate(job: Job, workers: Workers, recording: Recording) -> str:
    shards = {shard.client: shard.train for shard in job.shards}
    inner = PeftTrainer(job.base, job.train_texts, shards, job.run.training, job.run.engine or PLAIN)
    with workers.carrying_out(inner) as trainer:
        presence = Presence(job.stays, job.run.faults, job.run.seed)
        simulation = Simulation(
            job.server,
            trainer,
            devices(job.run),
            job.profiles,
            recording.evaluate,
            recording.observe,
            seed=job.run.seed,
            presence=presence,
            settled=recording.keeper,
        )
        recording.keeper.drain = simulation.drain
        recording.going_on(simulation, presence)
        reason = simulation.run()
        job.check_failures(reason)
        for line in (*client_scores(job, simulation.locals), *sample_lines(job)):
            recording.metrics.write(line)
    return reason


def _close(job: Job, out: Path, about: Mapping[str, object], report: bool) -> None:
    """The adapter of the last version, the final manifest, the report: also for a run that was cut short.

    The manifest says "finished" when all else is there, and until then the run can go on.
    """
    if job.server.state.version > 0:
        model = job.server.state.model
        save(job.base, level(whole(model.adapter, model.fold)), job.split.train.names, out / "adapter")
    files.write_json(out / "manifest.json", about)
    if about["status"] == "finished":
        (out / NAME).unlink(missing_ok=True)
    if report:
        write_report([out], out / "report.html")
