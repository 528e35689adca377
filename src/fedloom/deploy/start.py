"""The server's side of a deployment: a folder, a run file, a link. What carries the messages is not known here."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from fedloom.core import schema
from fedloom.core.fingerprint import fingerprint
from fedloom.core.policies import need_fresh_answers
from fedloom.core.schema import plain
from fedloom.core.server import Server
from fedloom.core.types import ClientId, Profile
from fedloom.data.test_split import scored
from fedloom.deploy.link import Link
from fedloom.deploy.messages.messages import Terms, check_codec
from fedloom.deploy.region import region
from fedloom.deploy.server.config import RUN, Order
from fedloom.deploy.server.driver import Deployment
from fedloom.deploy.server.evaluation import held_out_lines
from fedloom.deploy.server.status import Status
from fedloom.hierarchy.hierarchy import need_lasting_groups
from fedloom.runs import manifest
from fedloom.runs.execute import Recording
from fedloom.runs.final_scores import sample_lines
from fedloom.runs.job import Job
from fedloom.runs.prepare import PreparedRun, made_ready
from fedloom.runs.resume import FIXED, begun
from fedloom.runs.run import Run
from fedloom.train.settings import PLAIN

SAME = tuple(section for section in FIXED if section not in ("clients", "partition", "groups"))
"""Sections of the manifest that are there before any client is."""


def run(
    link: Link, folder: Path, pause: Callable[[float], None] = time.sleep, clock: Callable[[], float] = time.monotonic
) -> str:
    """Carry out the run of a deployment's folder, or go on with it; returns the reason of its end. Raises Refused."""
    order, target = Order.of(folder), folder / RUN
    if order.above:
        region.run(link, folder, order, pause, clock)
    if reason := finished(target):
        return reason
    job, profiles = made_for_serving(order.run(), target, order.clients)
    assert isinstance(job.server, Server)
    over = job.run.hierarchy is not None
    deployment = Deployment(job.server, link, terms(job), profiles, order.clients, order.patience, clock, over=over)
    status = Status(folder, deployment, job.run.limits)

    def drive(recording: Recording) -> str:
        deployment.evaluate, deployment.observe, deployment.settled = (
            recording.evaluate,
            recording.observe,
            recording.keeper,
        )
        recording.going_on(deployment)
        reason = deployment.run(status.between(pause))
        job.check_failures(reason)
        for line in (*held_out_lines(job, deployment, status.between(pause)), *sample_lines(job)):
            recording.metrics.write(line)
        return reason

    with status.exported(order.metrics_port):
        regions = {"regions": order.clients} if over else {}
        about = {"deployed": True, **regions}
        job.record(drive, target, [status], about, checkpoint_seconds=0.0, keep_updates=True)
    return finished(target)


def finished(target: Path) -> str:
    """The reason for which the run in this folder ended, "" if it has not."""
    path = target / "manifest.json"
    about = json.loads(path.read_bytes()) if path.is_file() else {}
    return str(about["status_reason"]) if about.get("status") == "finished" else ""


def made_for_serving(value: Run, target: Path, clients: int = 1) -> tuple[PreparedRun, dict[ClientId, Profile]]:
    """The job without clients or their data, new or going on in the folder, and the table that its clients will stand in.

    Where the run has a hierarchy, its clients are that many regions.
    """
    schema.check(value)
    check_codec(value.transfer)
    need_lasting_groups(value.hierarchy)
    need_fresh_answers(value.aggregator, value.schedule)
    before = begun(target, value, (Deployment,)) if (target / "manifest.json").is_file() else None
    profiles = dict[ClientId, Profile]()
    job = replace(made_ready(value, scored(value.data, value.seed), (), before), profiles=profiles)
    if value.hierarchy:
        assert isinstance(job.server, Server)
        job = replace(job, server=value.hierarchy.over_regions(job.server, clients))
    if before:
        before.check(job.about(), SAME)
    return job, profiles


def terms(job: Job) -> Terms:
    """What a site must know of the run."""
    value, names = job.run, job.split.train.names
    return Terms(
        run=value.name,
        run_hash=manifest.digest(plain(value)),
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
        first=fingerprint(job.server.state.first.adapter),
    )
