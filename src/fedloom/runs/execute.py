"""Execution of a job: drives it to its end and fills its run folder.

How a run is carried out:

1. `record` creates the run folder, or reopens that of the run that goes on. A lock in it keeps other processes out; it ends with
   this process, so a run that was killed leaves no lock behind.
2. It writes `manifest.json` with the status "running" and opens the logs: `trace.jsonl` (every step) and `metrics.jsonl`.
3. It hands a `RunRecorder` to `drive`, a function that runs a driver until the server stops: `execute` simulates on a virtual clock
   (`Simulation`), `fedloom.deploy.start` talks to sites (`Deployment`). The driver delivers events to the job's server, carries out
   its commands, scores versions with `evaluate`, shows each step `(now, event, commands)` to `observe`, and calls `checkpoints`
   between two steps. Before its first step `drive` calls `track` with the driver's own values: they are restored from the last
   checkpoint, and saved in the next one.
4. However the driver ends, the adapter of the last version that observers were shown, the final manifest and the report are written;
   of a private run that is the last one in its ledger. The manifest says
   "finished", "interrupted" (Ctrl-C) or "failed". It says "finished" only when all else is there; until then the run can go on
   with `prepare(run, resume=folder).execute()`, to the same bytes as an undisturbed run. The last checkpoint of a finished run stays:
   `prepare(run, resume=folder, more=n).execute()` goes on from it.

What may fail: Refused for a folder that exists or is in use, and for a run in which so many tasks failed in a row that its limit
was reached. Any other exception of a driver or an observer passes through, after the folder was closed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TextIO

import torch

from fedloom.core import files
from fedloom.core.coordinator import Coordinator
from fedloom.core.errors import Refused
from fedloom.core.events import Command, Event, ReleasesCounted
from fedloom.core.lora import compact_with_fold, pad_to_one_rank
from fedloom.core.policies import Evaluator, Observer
from fedloom.core.schema import jsonable
from fedloom.core.seeds import simulated_secret
from fedloom.core.types import Model
from fedloom.privacy.ledger import LEDGER, read_ledger
from fedloom.privacy.record_draws import for_records
from fedloom.report.page import write_report
from fedloom.runs.archive import UPDATES, Archive
from fedloom.runs.final_scores import client_scores, label_lines, sample_lines
from fedloom.runs.job import Job
from fedloom.runs.metrics import Metrics
from fedloom.runs.observation import RunObservation
from fedloom.runs.record_budget import task_recorders
from fedloom.runs.release_recorder import later_releases, release_recorders
from fedloom.runs.resume import (
    CHECKPOINT_SECONDS,
    LOGS,
    CheckpointWriter,
    Progress,
    locked,
    open_log,
    restore_fields,
)
from fedloom.runs.run_result import RunResult
from fedloom.runs.slot_usage import SlotUsage
from fedloom.runs.state_files import STATES, StateFiles
from fedloom.runs.trace import Trace
from fedloom.runs.trackers.tracker import Tracker, split_observers
from fedloom.simulate.client_presence import Presence
from fedloom.simulate.client_states import ClientStates
from fedloom.simulate.simulation import Simulation
from fedloom.train.export import save_adapter
from fedloom.train.settings import PLAIN
from fedloom.train.trainer import PeftTrainer
from fedloom.train.workers.pool import open_pool
from fedloom.train.workers.worker import Workers


@dataclass(slots=True)
class ShownVersion:
    """An observer that keeps the last version of a step that is recorded. The server may hold a later one, which must not leave it.

    A step fails before it is recorded where its release is refused, where the disk is full, and at Ctrl-C.

    Fields:
        server: the server of the run.
        version: number of the version.
        model: its model (None: no step was shown).
    """

    server: Coordinator
    version: int = 0
    model: Model | None = None

    def __call__(self, now: float, event: Event, commands: list[Command]) -> None:
        """Keep the version with which a step ended."""
        self.version, self.model = self.server.state.version, self.server.state.model


@dataclass(frozen=True, slots=True)
class RunRecorder:
    """Means of a driver to carry out a job: scoring, observers and checkpoints.

    Fields:
        job: the job.
        checkpoints: writes a checkpoint if it is time; to be called between two steps.
        metrics: the observer that writes `metrics.jsonl`; the driver adds lines to it at the end.
        progress: scores so far.
        shown: the version that may leave the run.
        evaluate: scores a version.
        observe: shows a step to all observers.
    """

    job: Job
    checkpoints: CheckpointWriter
    metrics: Metrics
    progress: Progress
    shown: ShownVersion
    evaluate: Evaluator
    observe: Observer

    def track(self, *driver: object) -> None:
        """Save these values of the driver in checkpoints too, and restore them, the server and the metrics from the last one."""
        self.checkpoints.owners = (*self.job.server.parts_to_save(), *driver, self.metrics, self.progress)
        restore_fields(self.job.resumed_from.values if self.job.resumed_from else {}, self.checkpoints.owners)
        self.shown.version, self.shown.model = self.job.server.state.version, self.job.server.state.model

    def later_releases(self) -> ReleasesCounted | None:
        """Return the event that counts the releases behind the last checkpoint; a run that makes them again does not need it."""
        if not self.job.secret or self.job.resumed_from is None:
            return None
        return later_releases(read_ledger(self.checkpoints.folder / LEDGER, self.job.resumed_from.ledger))


def execute(
    job: Job,
    out: str | Path | None = None,
    observers: Sequence[Observer | Tracker] = (),
    workers: int | str = 1,
    report: bool = True,
    checkpoint_seconds: float = CHECKPOINT_SECONDS,
    keep_updates: bool | int = False,
) -> RunResult:
    """Simulate a job to its end and fill its run folder.

    Ctrl-C leaves a folder that says "interrupted" and can be reported on; any other failure one that says "failed". These runs, and
    a killed one, continue with `prepare(run, resume=folder).execute()`.

    Args:
        out: the run folder, which must not exist yet (None: `runs/NAME`, numbered; or the folder of the resumed run).
        observers: each is called with every step; trackers among them get the figures of each version.
        workers: which processes train; results do not depend on it: 1 this process, 2 or more local processes over one copy of the
            base, "ray" or "ray:ADDRESS" actors. A script that asks for processes needs the usual `if __name__ == "__main__":`.
        report: whether to write report.html, which takes a few seconds; `fedloom report` can do it later.
        checkpoint_seconds: time between two checkpoints (seconds; 0: after each event).
        keep_updates: whether to keep the answers themselves besides the trace, so that `fedloom replay` can repeat the server's part
            and `fedloom rollback` leave a site out; a number: at most so many bytes of them, the latest.
    """
    pool = Workers.parse(workers)
    drive = partial(_simulate, job, pool)
    return record(job, drive, out, observers, {"workers": str(pool)}, report, checkpoint_seconds, keep_updates)


def record(
    job: Job,
    drive: Callable[[RunRecorder], str],
    out: str | Path | None = None,
    observers: Sequence[Observer | Tracker] = (),
    extra_manifest: Mapping[str, object] | None = None,
    report: bool = True,
    checkpoint_seconds: float = CHECKPOINT_SECONDS,
    keep_updates: bool | int = False,
) -> RunResult:
    """Fill the run folder with what happens while `drive` carries the job out; `drive` returns the reason of the end.

    `extra_manifest` is added to the manifest; the other arguments are those of `execute`.
    """
    torch.set_num_threads(job.run.threads or 1)
    out = _run_folder(job, None if out is None else Path(out))
    with locked(out):
        manifest = {**job.describe(), **(extra_manifest or {})}
        files.write_json(out / "manifest.json", {**manifest, "status": "running", "status_reason": ""})
        status, reason, progress = "failed", "the process ended without giving a reason", Progress()
        checkpoints = CheckpointWriter(out, seconds=checkpoint_seconds, secret=job.secret)
        checkpoints.profiles = job.profiles if job.shards else {}
        shown = ShownVersion(job.server)
        watching, tracking = split_observers(observers)
        try:
            with ExitStack() as opened:
                logs = checkpoints.logs = _open_logs(job, out, opened)
                all_observers = [*watching, *_archive(job, out, keep_updates, logs[0])]
                recorder = _recorder(job, opened, checkpoints, all_observers, progress, shown)
                tracking.begin(out, manifest, job.resumed_from.version if job.resumed_from else 0)
                recorder.metrics.listener = tracking.take if tracking.trackers else None
                reason = drive(recorder)
            status = "finished"
        except KeyboardInterrupt as stop:
            status, reason = "interrupted", str(stop) or "stopped by Ctrl-C"
            raise
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
            raise
        finally:
            clients = {client: jsonable(profile) for client, profile in job.profiles.items()}
            if checkpoints.states:
                checkpoints.states.remove_others()
            end = {**job.server.manifest_sections(), "clients": clients, "status": status, "status_reason": reason}
            _close(job, out, {**manifest, **end}, report, shown)
            tracking.end(status)
    model = job.server.state.model
    return RunResult(out, tuple(progress.scores), compact_with_fold(model.adapter, model.fold))


def _run_folder(job: Job, out: Path | None) -> Path:
    """Return the folder to write: that of the run that goes on, or a new one."""
    if job.resumed_from is None:
        return files.create_folder(out or files.numbered_path(Path("runs"), job.run.name))
    if out not in (None, job.resumed_from.folder):
        raise Refused("--out", str(out), f"a run continues in its own folder, {job.resumed_from.folder}")
    return job.resumed_from.folder


def _open_logs(job: Job, out: Path, opened: ExitStack) -> list[TextIO]:
    """Open the logs until the end of the block: the trace and the metrics.

    A run that goes on cuts them to what they held at the checkpoint; what was written after it is written again.
    """
    sizes = job.resumed_from.sizes if job.resumed_from else dict.fromkeys(LOGS, 0)
    packed = {files.LOCKED: job.run.compress_trace}
    return [opened.enter_context(open_log(out / name, size, packed.get(name, False))) for name, size in sizes.items()]


def _archive(job: Job, out: Path, wanted: bool | int, trace: TextIO) -> list[Observer]:
    """Return an observer that keeps the answers, if that is wanted now or was when the run began."""
    if not wanted and not (out / UPDATES).is_dir():
        return []
    resumed_at = job.resumed_from.sizes[files.LOCKED] if job.resumed_from else 0
    most = None if isinstance(wanted, bool) else wanted
    return [Archive.of(out / UPDATES, job.server, most, resumed_at, job.secret, trace)]


def _recorder(
    job: Job,
    opened: ExitStack,
    checkpoints: CheckpointWriter,
    observers: Sequence[Observer],
    progress: Progress,
    shown: ShownVersion,
) -> RunRecorder:
    """Return what writes the logs, and what else is open until the end of the block."""

    def evaluate(model: Model) -> Mapping[str, float]:
        return progress.add(job.server.state.version, job.score(model), len(job.tested))

    def observe(now: float, event: Event, commands: list[Command]) -> None:
        for observer in all_observers:
            observer(now, event, commands)

    trace, lines = checkpoints.logs
    rows = {shard.client: len(shard.train) for shard in job.shards}
    slots, majority = SlotUsage(job.server.max_in_flight), job.baselines().get("majority")
    metrics = Metrics(lines, slots, RunObservation(job.server.edges), majority=majority)
    # The ledger comes first: what is released is in it before anybody sees it, or `shown` lets it be written. Then the trace: it has
    # the step even if another observer fails on it.
    all_observers: list[Observer] = [
        *release_recorders(job, checkpoints.folder, opened),
        *task_recorders(job.run, rows, checkpoints.folder, opened),
        shown,
        Trace(trace, job.secret),
        metrics,
        *observers,
    ]
    return RunRecorder(job, checkpoints, metrics, progress, shown, evaluate, observe)


def simulated_trainer(job: Job) -> PeftTrainer:
    """Return the trainer of a simulation: it has the data of all clients."""
    shards = {shard.client: shard.train for shard in job.shards}
    secret_of = partial(simulated_secret, job.run.seed)
    engine, records = job.run.engine or PLAIN, for_records(job.run.privacy)
    return PeftTrainer(
        job.base,
        job.train_texts,
        shards,
        job.run.training,
        secret_of,
        engine,
        job.cache.emptied(),
        run=job.draws,
        records=records,
    )


def _simulate(job: Job, workers: Workers, recorder: RunRecorder) -> str:
    """Drive the job on the virtual clock, then score the final model for each client; returns the reason of the end."""
    with open_pool(simulated_trainer(job), workers) as pool:
        presence = Presence(job.stays, job.run.faults, job.run.seed)
        store = StateFiles(recorder.checkpoints.folder / STATES, job.secret)
        states = ClientStates(store, rotates=job.run.aggregator.space == "product")
        simulation = Simulation(
            job.server,
            pool,
            job.devices,
            job.profiles,
            recorder.evaluate,
            recorder.observe,
            check=job.check,
            seed=job.run.seed,
            presence=presence,
            client_states=states,
            measured=not job.secret,
            after_step=recorder.checkpoints,
        )
        recorder.checkpoints.drain = simulation.drain
        recorder.track(simulation, states, presence)
        store.needed = simulation.stored_states
        store.reopen()
        recorder.checkpoints.states = store
        reason = simulation.run()
        job.check_failures(reason)
        counted = label_lines(recorder.progress.confusions)
        # what a client holds out is data of it, and its scores on that are exact
        scores = [] if job.secret else client_scores(job, states.state_of)
        for line in (*counted, *scores, *sample_lines(job)):
            recorder.metrics.write(line)
    return reason


def _close(job: Job, out: Path, manifest: Mapping[str, object], report: bool, shown: ShownVersion) -> None:
    """Write the adapter of the last version shown, the final manifest and the report, also for a run that was cut short.

    A run that is made longer, and cut short before it has come to where it had ended, leaves the adapter that is there.
    """
    written = job.resumed_from.written_version if job.resumed_from else 0
    if shown.model is not None and shown.version >= max(1, written):
        adapter = pad_to_one_rank(compact_with_fold(shown.model.adapter, shown.model.fold))
        files.clear_for_libraries(files.sub_folder(out / "adapter"))
        save_adapter(job.base, adapter, job.split.train.names, out / "adapter", job.run.date)
    files.write_json(out / "manifest.json", manifest)
    if report:
        write_report([out], out / "report.html")
