"""The server's side of a deployment: a folder, a run file, a transport. What carries the messages is not known here."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

from fedloom.core import schema
from fedloom.core.errors import Refused
from fedloom.core.events import CanaryScored, ClientJoined, ClientLost, Event, ScoresReady, TaskFailed
from fedloom.core.files import LOCKED, private_folder, read_json
from fedloom.core.policies import Observer, require_fresh_answers
from fedloom.core.schema import jsonable
from fedloom.core.types import Budget, ClientId, Profile, TaskStart
from fedloom.data.examples import without_training_examples
from fedloom.deploy.link import Transport
from fedloom.deploy.messages.messages import RunTerms, check_codec
from fedloom.deploy.messages.terms import terms_of_run
from fedloom.deploy.region.region import run_region
from fedloom.deploy.server.config import RUN_FOLDER, DeploymentConfig, server_secret
from fedloom.deploy.server.driver import Deployment
from fedloom.deploy.server.evaluation import Evaluation, evaluation_lines
from fedloom.deploy.server.key_facts import read_facts
from fedloom.deploy.server.reply_events import REGION
from fedloom.deploy.server.run_end import announce_end
from fedloom.deploy.server.status import Status
from fedloom.hierarchy.hierarchy import need_lasting_groups
from fedloom.report.run_log import read_run_log
from fedloom.runs import manifest
from fedloom.runs.execute import RunRecorder
from fedloom.runs.final_scores import final_start, label_lines, next_ranks, sample_lines
from fedloom.runs.job import Job
from fedloom.runs.prepare import PreparedRun, assemble
from fedloom.runs.private_run import check_private, refuse_private_regions
from fedloom.runs.replay import recorded_steps
from fedloom.runs.resume import FIXED, unfinished_run, versions_made
from fedloom.runs.run import Run
from fedloom.runs.trackers.tracker import Tracker, open_trackers

SAME = tuple(section for section in FIXED if section not in ("clients", "partition", "groups"))
"""Sections of the manifest that are there before any client is."""


def run_deployment(
    transport: Transport,
    folder: Path,
    pause: Callable[[float], None] = time.sleep,
    clock: Callable[[], float] = time.monotonic,
) -> str:
    """Carry out the run of a deployment's folder, or go on with it; returns the reason of its end. Raises Refused."""
    config, target = DeploymentConfig.from_folder(folder), folder / RUN_FOLDER
    if config.above:
        return run_region(transport, folder, config, pause, clock)
    private_folder(target)
    reason, until = finish_reason(target), config.until
    if reason and (until is None or until <= versions_made(read_run_log(target))):
        return reason
    job, profiles = prepare_server(config.run(), target, config.min_clients, until if reason else None)
    last = recorded_steps(target, job.resumed_from.sizes[LOCKED], job.secret) if reason and job.resumed_from else []
    over_regions = job.run.hierarchy is not None
    deployment = Deployment(
        server=job.server,
        transport=transport,
        terms=run_terms(job),
        profiles=profiles,
        min_clients=config.min_clients,
        timeouts=config.timeouts,
        clock=clock,
        over_regions=over_regions,
        measured=not job.secret,
        facts_of=partial(read_facts, folder),
    )
    status = Status(folder, deployment, job.run.limits, job.baselines().get("majority"))
    between = status.pause_and_write(pause)

    def drive(recording: RunRecorder) -> str:
        deployment.evaluate, deployment.check = recording.evaluate, job.check
        deployment.observe, deployment.save = recording.observe, recording.checkpoints
        recording.track(deployment)
        if last:
            repeat_steps(deployment, last)
        elif later := recording.later_releases():
            deployment.handle(later)
        status.ended = reason = deployment.run(between)
        job.check_failures(reason)
        counted = label_lines(recording.progress.confusions)
        for line in (*counted, *held_out_lines(job, deployment, between), *sample_lines(job)):
            recording.metrics.write(line)
        return reason

    with status.exported(config.metrics_port):
        regions = {"regions": config.min_clients} if over_regions else {}
        about = {"deployed": True, **regions}
        watching: list[Observer | Tracker] = [status, *open_trackers(config.trackers)]
        kept = 10**6 * config.kept_megabytes
        job.record(drive, target, watching, about, checkpoint_seconds=0.0, keep_updates=kept)
        announce_end(deployment, finish_reason(target), between)
    return finish_reason(target)


def repeat_steps(running: Deployment, steps: Iterable[tuple[float, Event]]) -> None:
    """Handle recorded steps once more, before the first turn: those after the last checkpoint of a run that is made longer.

    What follows from commands (scores, the failure of a refused answer) is made again and not taken from the record.
    """
    for now, event in steps:
        running.elapsed = now
        match event:
            case ScoresReady() | CanaryScored():
                continue
            case TaskFailed(_, number) if number not in running.tasks:
                continue
            case ClientLost(client) if running.clients.pop(client, None) is None:
                continue
            case ClientJoined(profile):
                running.clients[profile.client] = running.profiles[profile.client] = profile
                running.members[profile.client], running.opened = getattr(event, "members", ()), True
        running.handle(event)
    running.save()


def evaluate_sites(
    running: Deployment,
    ranks: Mapping[ClientId, int],
    start_at: Callable[[int], TaskStart],
    seconds: float,
    pause: Callable[[float], None] = time.sleep,
) -> Evaluation:
    """Evaluate after the end of the run: take turns until each client has replied or is waited for no longer.

    The last checkpoint stays as it is, so that a server which is killed here comes to the same end again. No reply is expected
    to what was in flight, and a node need not rest any more.
    """
    running.ended, running.changed, running.tasks = True, False, {}
    running.nodes.give_up(running.nodes.reachable.keys())
    for node in running.nodes.reachable.values():
        node.resting_until = 0.0
    evaluation = running.begin_evaluation(ranks, start_at, seconds)
    while evaluation.awaited():
        running.turn()
        pause(running.timeouts.poll)
    return evaluation


def held_out_lines(job: Job, running: Deployment, pause: Callable[[float], None]) -> Iterator[dict[str, object]]:
    """Have each client evaluate the last model, at the rank of its next task; a region at the largest, which it cuts for its sites.

    Yields a line for each client that ever was there. A site has as long as a task may take.
    """
    if not job.run.held_out or job.secret:  # what a client holds out is data of it, and its scores on that are exact
        return
    regions = {client for client, one in job.profiles.items() if job.run.hierarchy and one.tier == REGION}
    largest = Budget(job.run.plan.rank.largest, 1)
    ranks = {client: largest.at_most(job.profiles[client].most).rank for client in regions}
    sites = {client: one for client, one in job.profiles.items() if client not in regions}
    ranks |= next_ranks(job.run.plan, job.server, sites)
    seconds = running.timeouts.task or running.timeouts.doubt
    evaluation = evaluate_sites(running, ranks, partial(final_start, job), seconds, pause)
    yield from evaluation_lines(evaluation, job.profiles, job.base.labels is None)


def finish_reason(target: Path) -> str:
    """Return the reason for which the run in this folder ended, "" if it has not."""
    path = target / "manifest.json"
    about = read_json(path) if path.is_file() else {}
    return str(about["status_reason"]) if about.get("status") == "finished" else ""


def prepare_server(
    value: Run, target: Path, clients: int = 1, until: int | None = None
) -> tuple[PreparedRun, dict[ClientId, Profile]]:
    """Prepare the job without clients or their data, new or going on in the folder, and the table for the clients that join.

    Where the run has a hierarchy, its clients are that many regions. A finished run goes on `until` this version.
    """
    schema.check_fields(value)
    check_codec(value.transfer)
    need_lasting_groups(value.hierarchy)
    check_private(value)
    refuse_private_regions(value)
    require_fresh_answers(value.aggregator, value.schedule)
    begun = (target / "manifest.json").is_file()
    secret = server_secret(value, target.parent)
    before = unfinished_run(target, value, (Deployment,), until, secret) if begun else None
    if before and before.extended and not before.values:
        remedy = f"its last checkpoint is missing; start a new run with --set start={target}"
        raise Refused("--more", str(target), remedy)
    profiles = dict[ClientId, Profile]()
    job = assemble(value, without_training_examples(value.data, value.seed), (), before, clients, secret)
    job = replace(job, profiles=profiles)
    if before:
        before.check_unchanged(job.describe(), SAME)
    return job, profiles


def run_terms(job: Job) -> RunTerms:
    """Return what a site must know of the run."""
    labels = None if job.base.labels is None else job.split.train.names
    run_hash = job.resumed_from.first_hash if job.resumed_from else manifest.settings_hash(jsonable(job.run))
    return terms_of_run(job.run, job.server.state.first, labels, run_hash, job.base.fingerprint())
