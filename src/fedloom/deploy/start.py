"""The server's side of a deployment: a folder, a run file, a link. What carries the messages is not known here."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from fedloom.core import schema
from fedloom.core.fingerprint import fingerprint
from fedloom.core.policies import require_fresh_answers
from fedloom.core.schema import jsonable
from fedloom.core.types import ClientId, Profile
from fedloom.data.examples import without_training_examples
from fedloom.deploy.link import Transport
from fedloom.deploy.messages.messages import RunTerms, check_codec
from fedloom.deploy.region import region
from fedloom.deploy.server.config import RUN_FOLDER, DeploymentConfig
from fedloom.deploy.server.driver import Deployment
from fedloom.deploy.server.evaluation import held_out_lines
from fedloom.deploy.server.status import Status
from fedloom.hierarchy.hierarchy import need_lasting_groups
from fedloom.runs import manifest
from fedloom.runs.execute import RunRecorder
from fedloom.runs.final_scores import sample_lines
from fedloom.runs.job import Job
from fedloom.runs.prepare import PreparedRun, assemble
from fedloom.runs.resume import FIXED, unfinished_run
from fedloom.runs.run import Run
from fedloom.train.settings import PLAIN

SAME = tuple(section for section in FIXED if section not in ("clients", "partition", "groups"))
"""Sections of the manifest that are there before any client is."""


def run_deployment(
    link: Transport, folder: Path, pause: Callable[[float], None] = time.sleep, clock: Callable[[], float] = time.monotonic
) -> str:
    """Carry out the run of a deployment's folder, or go on with it; returns the reason of its end. Raises Refused."""
    order, target = DeploymentConfig.of(folder), folder / RUN_FOLDER
    if order.above:
        region.run_region(link, folder, order, pause, clock)
    if reason := finish_reason(target):
        return reason
    job, profiles = prepare_server(order.run(), target, order.min_clients)
    over = job.run.hierarchy is not None
    deployment = Deployment(job.server, link, run_terms(job), profiles, order.min_clients, order.timeouts, clock, over_regions=over)
    status = Status(folder, deployment, job.run.limits)

    def drive(recording: RunRecorder) -> str:
        deployment.evaluate, deployment.observe, deployment.save = (
            recording.evaluate,
            recording.observe,
            recording.checkpoints,
        )
        recording.track(deployment)
        reason = deployment.run(status.between(pause))
        job.check_failures(reason)
        for line in (*held_out_lines(job, deployment, status.between(pause)), *sample_lines(job)):
            recording.metrics.write(line)
        return reason

    with status.exported(order.metrics_port):
        regions = {"regions": order.min_clients} if over else {}
        about = {"deployed": True, **regions}
        job.record(drive, target, [status], about, checkpoint_seconds=0.0, keep_updates=True)
    return finish_reason(target)


def finish_reason(target: Path) -> str:
    """The reason for which the run in this folder ended, "" if it has not."""
    path = target / "manifest.json"
    about = json.loads(path.read_bytes()) if path.is_file() else {}
    return str(about["status_reason"]) if about.get("status") == "finished" else ""


def prepare_server(value: Run, target: Path, clients: int = 1) -> tuple[PreparedRun, dict[ClientId, Profile]]:
    """The job without clients or their data, new or going on in the folder, and the table that its clients will stand in.

    Where the run has a hierarchy, its clients are that many regions.
    """
    schema.check_fields(value)
    check_codec(value.transfer)
    need_lasting_groups(value.hierarchy)
    require_fresh_answers(value.aggregator, value.schedule)
    before = unfinished_run(target, value, (Deployment,)) if (target / "manifest.json").is_file() else None
    profiles = dict[ClientId, Profile]()
    job = assemble(value, without_training_examples(value.data, value.seed), (), before, regions=clients)
    job = replace(job, profiles=profiles)
    if before:
        before.check(job.describe(), SAME)
    return job, profiles


def run_terms(job: Job) -> RunTerms:
    """What a site must know of the run."""
    value, names = job.run, job.split.train.names
    return RunTerms(
        run=value.name,
        run_hash=manifest.settings_hash(jsonable(value)),
        model=value.model,
        lora=value.lora,
        training=value.training,
        engine=value.engine or PLAIN,
        threads=value.threads,
        seed=value.seed,
        labels=None if job.base.labels is None else names,
        rank=value.plan.rank.largest,
        weights=job.base.fingerprint(),
        held_out=value.held_out,
        first_adapter=fingerprint(job.server.state.first.adapter),
    )
