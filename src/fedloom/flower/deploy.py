"""The server's side of a deployment: a folder, a run file, a link. What carries the messages is not known here."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from fedloom import kinds, manifest
from fedloom.aggregate.wrap import need_fresh_answers
from fedloom.data.elsewhere import scored
from fedloom.errors import Refused
from fedloom.flower.driver import Deployment, Patience
from fedloom.flower.link import Link
from fedloom.flower.message import Terms
from fedloom.flower.status import Status
from fedloom.job import Job, Recording, made_ready
from fedloom.override import override
from fedloom.resume import FIXED, begun
from fedloom.run import Run
from fedloom.runfile import run_of
from fedloom.samples import sample_lines
from fedloom.train.settings import PLAIN
from fedloom.types import ClientId, Profile

ORDER, RUN = "deployment.json", "run"
SAME = tuple(section for section in FIXED if section not in ("clients", "partition"))
"""Sections of the manifest that are there before any client is."""


@dataclass(frozen=True, slots=True)
class Order:
    """What is to be deployed: the run file with its `--set` settings, the clients to wait for before it begins, how long to wait.

    `metrics_port` is where the server tells its figures to Prometheus, on this machine only (None: nowhere).
    """

    runfile: str
    settings: tuple[str, ...] = ()
    clients: int = 1
    patience: Patience = field(default_factory=Patience)
    metrics_port: int | None = None

    @classmethod
    def of(cls, folder: Path) -> Order:
        """From the folder of a deployment. Raises Refused where there is none."""
        path = folder / ORDER
        try:
            told: Mapping[str, Any] = json.loads(path.read_bytes())
            patience = Patience(**told.get("patience", {}))
            port, settings = told.get("metrics_port"), tuple(told.get("settings", ()))
            return cls(told["runfile"], settings, int(told.get("clients", 1)), patience, port)
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            raise Refused(
                "folder", str(folder), f"it holds no usable {ORDER} ({error}); `fedloom serve` writes one"
            ) from error

    def run(self) -> Run:
        """The Run value."""
        return override(run_of(Path(self.runfile)), self.settings)


def run(
    link: Link, folder: Path, pause: Callable[[float], None] = time.sleep, clock: Callable[[], float] = time.monotonic
) -> str:
    """Carry out the run of a deployment's folder, or go on with it; returns the reason of its end. Raises Refused."""
    order, target = Order.of(folder), folder / RUN
    if reason := finished(target):
        return reason
    job, profiles = made_for_serving(order.run(), target)
    deployment = Deployment(job.server, link, terms(job), profiles, order.clients, order.patience, clock)
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
        for line in sample_lines(job):
            recording.metrics.write(line)
        return reason

    with status.exported(order.metrics_port):
        job.record(drive, target, [status], {"deployed": True}, checkpoint_seconds=0.0, keep_updates=True)
    return finished(target)


def finished(target: Path) -> str:
    """The reason for which the run in this folder ended, "" if it has not."""
    path = target / "manifest.json"
    about = json.loads(path.read_bytes()) if path.is_file() else {}
    return str(about["status_reason"]) if about.get("status") == "finished" else ""


def made_for_serving(value: Run, target: Path) -> tuple[Job, dict[ClientId, Profile]]:
    """The job without clients or their data, new or going on in the folder, and the table that its clients will stand in."""
    kinds.check(value)
    need_fresh_answers(value.aggregator, value.schedule)
    if value.hierarchy:
        raise Refused(
            "hierarchy",
            value.hierarchy,
            "groups need all clients before the run begins; deploy it without, or simulate",
        )
    before = begun(target, value, (Deployment,)) if (target / "manifest.json").is_file() else None
    profiles = dict[ClientId, Profile]()
    job = replace(made_ready(value, scored(value.data, value.seed), (), before), profiles=profiles)
    if before:
        before.check(job.about(), SAME)
    return job, profiles


def terms(job: Job) -> Terms:
    """What a site must know of the run."""
    value, names = job.run, job.split.train.names
    return Terms(
        run=value.name,
        run_hash=manifest.digest(manifest.plain(value)),
        model=value.model,
        lora=value.lora,
        training=value.training,
        engine=value.engine or PLAIN,
        threads=value.threads,
        seed=value.seed,
        labels=None if job.base.labels is None else names,
        rank=value.plan.rank.largest,
        weights=job.base.fingerprint(),
    )
