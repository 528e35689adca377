"""What a deployment is doing: a file for `fedloom status` and for `fedloom serve`, figures for Prometheus."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from logging import getLogger
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Group
from rich.markup import escape
from rich.table import Table

from fedloom.core import files
from fedloom.core.errors import Refused
from fedloom.core.events import Command, Event, Publish, Reject, ScoresReady, TaskFailed, UpdateArrived
from fedloom.core.server import Limits
from fedloom.core.types import Task
from fedloom.deploy.server.driver import Deployment

LOG = getLogger("fedloom.core.server")
NAME = "status.json"
EVERY = 1.0
"""Seconds between two writings of the file."""
HEADINGS = {"since": "for s", "stale": "versions behind"}


@dataclass(slots=True)
class Status:
    """An observer that counts what happens, and writes it down beside what the deployment waits for."""

    folder: Path
    deployment: Deployment
    limits: Limits
    accepted: int = 0
    rejected: int = 0
    failed: int = 0
    merged: int = 0
    stale: int = 0
    scores: Mapping[str, float] = field(default_factory=dict)
    by_client: dict[str, int] = field(default_factory=dict)
    written: float = 0.0

    def __call__(self, now: float, event: Event, commands: list[Command]) -> None:
        """As any observer."""
        rejects = sum(isinstance(command, Reject) for command in commands)
        self.rejected += rejects
        self.failed += isinstance(event, TaskFailed)
        if isinstance(event, UpdateArrived) and not rejects:
            self.accepted += 1
            self.by_client[event.client] = self.by_client.get(event.client, 0) + 1
        if isinstance(event, ScoresReady):
            self.scores = dict(event.metrics)
        for command in commands:
            if isinstance(command, Publish):
                self.merged += len(command.updates)
                self.stale += sum(command.version - 1 - update.task.version for update in command.updates)

    def snapshot(self) -> dict[str, Any]:
        """All of it as plain data."""
        running, state = self.deployment, self.deployment.server.state
        work = {task.client: task for task in running.tasks.values()}
        here = {
            client: {
                "reached": client not in running.nodes.missing,
                "answers": self.by_client.get(client, 0),
                "task": work[client].id if client in work else None,
                "since": round(running.elapsed - work[client].sent, 1) if client in work else None,
                "rank": work[client].budget.rank if client in work else None,
                **(region_budget(work.get(client)) if running.over_regions else {}),
                "stale": state.version - work[client].version if client in work else None,
            }
            for client in sorted(running.clients)
        }
        return {
            "run": running.terms.run,
            "version": state.version,
            "versions": self.limits.versions,
            "seconds": round(running.elapsed, 1),
            "incarnation": running.incarnation,
            "waits": self.waits(),
            "accepted": self.accepted,
            "rejected": self.rejected,
            "failed": self.failed,
            "mean_staleness": round(self.stale / self.merged, 3) if self.merged else None,
            "scores": {name: round(value, 6) for name, value in self.scores.items()},
            "clients": here,
            "traffic": asdict(running.traffic),
        }

    def waits(self) -> str:
        """What it waits for, in words."""
        running = self.deployment
        if running.nodes.scoring:
            return f"for what the last version reaches at {', '.join(running.nodes.scoring)}"
        resting = [
            f"{node.client or node.name or number}: {node.why}"
            for number, node in running.nodes.nodes.items()
            if node.why
        ]
        why = f"; left alone for a while: {', '.join(resting)}" if resting else ""
        if not running.opened:
            there = ", ".join(sorted(running.clients)) or "nobody"
            return f"for {running.min_clients - len(running.clients)} more of {running.min_clients} clients; there: {there}{why}"
        if missing := sorted(running.nodes.missing):
            why += f"; cannot be reached: {', '.join(missing)}"
        if running.tasks:
            return f"for answers of {', '.join(sorted(task.client for task in running.tasks.values()))}{why}"
        return f"for a client that may be started{why}"

    def between(self, pause: Callable[[float], None]) -> Callable[[float], None]:
        """The pause between two turns, in which the file is written now and then."""

        def paused(seconds: float) -> None:
            if time.monotonic() >= self.written + EVERY:
                self.write()
            pause(seconds)

        return paused

    def write(self) -> None:
        """The file, at once or not at all. A full disk does not stop the run here: the next checkpoint will say so."""
        self.written = time.monotonic()
        try:
            files.write_json(self.folder / NAME, {**self.snapshot(), "at": time.time()})
        except OSError as error:
            LOG.warning("%s cannot be written: %s", NAME, error)

    @contextmanager
    def exported(self, port: int | None) -> Iterator[None]:
        """Inside, Prometheus can ask for the figures at this port of this machine."""
        if port is None:
            yield
            self.write()
            return
        from prometheus_client import CollectorRegistry, start_http_server

        registry = CollectorRegistry()
        registry.register(PrometheusFigures(self))
        try:
            server, thread = start_http_server(port, "127.0.0.1", registry)
        except OSError as error:
            raise Refused("metrics_port", port, f"it cannot be listened at: {error}; choose a free one") from error
        try:
            yield
            self.write()
        finally:
            server.shutdown()
            thread.join()


@dataclass(frozen=True, slots=True)
class PrometheusFigures:
    """Collected when asked for, so that nothing is counted twice."""

    status: Status

    def collect(self) -> Iterator[Any]:
        """The figures in Prometheus' words."""
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        told = self.status.snapshot()
        yield GaugeMetricFamily("fedloom_version", "Global version", told["version"])
        yield GaugeMetricFamily("fedloom_run_seconds", "Seconds of the run", told["seconds"])
        yield GaugeMetricFamily("fedloom_clients", "Clients that the server counts on", len(told["clients"]))
        reached = sum(client["reached"] for client in told["clients"].values())
        yield GaugeMetricFamily("fedloom_clients_reached", "Clients that can be reached", reached)
        working = sum(client["task"] is not None for client in told["clients"].values())
        yield GaugeMetricFamily("fedloom_tasks_outstanding", "Tasks dispatched and not answered", working)
        if told["mean_staleness"] is not None:
            yield GaugeMetricFamily(
                "fedloom_staleness_mean", "Versions, over all merged updates", told["mean_staleness"]
            )
        for name in ("accepted", "rejected", "failed"):
            yield CounterMetricFamily(f"fedloom_answers_{name}", f"Answers {name} since the server started", told[name])
        for name, value in told["traffic"].items():
            yield CounterMetricFamily(f"fedloom_link_{name}", "Of messages, since the server started", value)
        scores = GaugeMetricFamily("fedloom_score", "Of the last version scored", labels=["figure"])
        for name, value in told["scores"].items():
            scores.add_metric([name], value)
        yield scores
        answers = CounterMetricFamily("fedloom_client_answers", "Accepted answers", labels=["client"])
        for name, client in told["clients"].items():
            answers.add_metric([name], client["answers"])
        yield answers


def read_status(folder: Path) -> Mapping[str, Any]:
    """What was written last. Raises Refused."""
    path = folder / NAME
    try:
        told: Mapping[str, Any] = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        remedy = f"there is no readable {NAME} in it ({type(error).__name__}); give the folder of `fedloom serve`"
        raise Refused("DIR", str(folder), remedy) from error
    return told


def shown(told: Mapping[str, Any], age: float) -> Group:
    """For the terminal; `age` is for how many seconds nothing was written."""
    traffic, scores = told["traffic"], told["scores"]
    lines = [
        f"[bold]{escape(told['run'])}[/bold]  version {told['version']} of {told['versions']}, {told['seconds']:,.0f} s, "
        f"start {told['incarnation']} of the server",
        f"Waits {escape(told['waits'])}",
        f"{told['accepted']} answers accepted, {told['rejected']} refused, {told['failed']} tasks failed, "
        f"mean staleness {told['mean_staleness'] or 0:g}",
        f"{traffic['bytes_down'] / 1e6:,.1f} MB down, {traffic['bytes_up'] / 1e6:,.1f} MB up, {traffic['resent']} tasks sent again",
    ]
    if scores:
        lines.append("Scores " + ", ".join(f"{name} {value:.4g}" for name, value in scores.items()))
    if age > 60:
        lines.append(f"[yellow]Nothing was written for {age:,.0f} s: is the server still running?[/yellow]")
    why = [f"{escape(name)}: {escape(client['why'])}" for name, client in told["clients"].items() if client.get("why")]
    return Group(*lines, _table(told["clients"]), *why)


def _table(clients: Mapping[str, Mapping[str, Any]]) -> Table:
    """A row a client, or a region."""
    table, over = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0)), any("rounds" in one for one in clients.values())
    keys = ("answers", "task", "since", "rank", *(("depth", "rounds", "steps") if over else ()), "stale")
    for heading in ("region" if over else "client", "reached", *keys):
        table.add_column(HEADINGS.get(heading, heading), justify="right" if heading in ("reached", *keys) else "left")
    for name, client in clients.items():
        cells = (str(client[key]) if isinstance(client[key], str) else _number(client[key]) for key in keys)
        table.add_row(escape(name), "yes" if client["reached"] else "no", *cells)
    return table


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:g}"


def region_budget(task: Task | None) -> dict[str, object]:
    """What a region was asked for, and why."""
    if task is None:
        return dict.fromkeys(("depth", "rounds", "steps", "why"))
    budget = task.budget
    return {"depth": budget.depth or "all", "rounds": budget.rounds, "steps": budget.steps, "why": budget.why}
