"""Status of a deployment: a file that `fedloom status` and `fedloom serve` read, and figures for Prometheus."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from logging import getLogger
from pathlib import Path
from typing import Any

from fedloom.core import files
from fedloom.core.errors import Refused
from fedloom.core.events import Command, Event, SetAside
from fedloom.core.limits import Limits
from fedloom.core.registration import counted_examples
from fedloom.core.schema import Decoder, Malformed
from fedloom.core.text import list_some
from fedloom.core.types import Task
from fedloom.deploy.server.config import CONFIG_FILE
from fedloom.deploy.server.driver import Deployment
from fedloom.deploy.server.nodes import LinkTraffic, Node
from fedloom.report.numbers import plural
from fedloom.runs.observation import RunObservation, TaskAnswered, staleness_in

LOG = getLogger("fedloom.deploy.server")
STATUS_FILE = "status.json"
REFUSALS_FILE = "refusals.json"
"""Beside it, from `fedloom serve`: by site, the calls that the gate has refused since the server was started."""
WRITE_EVERY = 1.0
"""Seconds between two writings of the file."""
SHOWN = 8
"""Names in a sentence; of more, their number is said."""
_FIGURE = float | None
_COUNT = int | None
_FIELDS: Mapping[str, Any] = {
    **dict.fromkeys(("version", "versions", "incarnation", "accepted", "rejected", "failed"), int),
    **dict.fromkeys(("run", "state", "waits", "ended"), str),
    **dict.fromkeys(("seconds", "at"), float),
    "mean_staleness": _FIGURE,
    "scores": dict[str, _FIGURE],
    "connected": list[str],
    "set_aside": dict[str, str],
    "calls_refused": dict[str, int],
    "clients": dict[str, dict[str, bool | float | str | None]],
    "traffic": dict[str, float],
}
_CLIENT_FIELDS: Mapping[str, Any] = {
    "reached": bool,
    "answers": int,
    "task": _COUNT,
    "since": _FIGURE,
    "rank": _COUNT,
    "stale": _COUNT,
}
_TRAFFIC_FIELDS: Mapping[str, Any] = dict.fromkeys(("bytes_down", "bytes_up", "resent"), int)
"""The fields of the file that its readers count on, with their kinds."""


@dataclass(slots=True)
class Status:
    """An observer that counts what happens, and writes it to a file together with what the deployment waits for.

    Fields:
        folder: of the deployment.
        deployment: the driver.
        limits: when the run ends.
        majority: accuracy of always answering the commonest label, shown beside scores (None: unknown, or text is written).
        observation: what has happened so far.
        by_client: accepted answers of each client.
        why_set_aside: by client of which the canary set answers aside, the reason of the last time.
        other_examples: by client, the examples that its last answer told of, where these are not those that it registered.
        written: when the file was written last (s of the monotonic clock).
        ended: why the run has ended ("": it goes on).
    """

    folder: Path
    deployment: Deployment
    limits: Limits
    majority: float | None = None
    observation: RunObservation = field(default_factory=RunObservation)
    by_client: dict[str, int] = field(default_factory=dict)
    why_set_aside: dict[str, str] = field(default_factory=dict)
    other_examples: dict[str, int] = field(default_factory=dict)
    written: float = 0.0
    ended: str = ""

    def __call__(self, now: float, event: Event, commands: list[Command]) -> None:
        """Count one step."""
        for fact in self.observation.read(now, event, commands):
            if isinstance(fact, TaskAnswered) and not fact.refused:
                self.by_client[fact.client] = self.by_client.get(fact.client, 0) + 1
                if fact.result is not None:
                    self._note_examples(fact.client, fact.result.examples)
            if isinstance(fact, SetAside):
                self.why_set_aside[fact.client] = fact.reason
                LOG.warning("an answer of %s is set aside: %s", fact.client, fact.reason)

    def _note_examples(self, client: str, answered: int) -> None:
        """Write down that an answer tells of other examples than its client registered; what counts is not changed by it."""
        registered = self.deployment.server.state.registered.get(client, answered)
        # a region may have heard of some of its sites only
        self.other_examples.pop(client, None)
        if answered > registered or (answered < registered and not self.deployment.over_regions):
            self.other_examples[client] = answered
            LOG.warning("%s answers with %d examples, and registered %d: these count", client, answered, registered)

    def snapshot(self) -> dict[str, Any]:
        """Return the status as plain data, as the file has it."""
        running, state, seen = self.deployment, self.deployment.server.state, self.observation
        nodes = running.nodes.reachable
        work = {task.client: task for task in running.tasks.values()}
        clients = {
            client: {
                "reached": client not in running.nodes.missing,
                "examples": state.registered.get(client, profile.examples),
                "counted": counted_examples(state.registered, profile) if client in state.registered else None,
                "told": self.other_examples.get(client),
                "answers": self.by_client.get(client, 0),
                "task": work[client].id if client in work else None,
                "since": round(running.elapsed - work[client].sent, 1) if client in work else None,
                "rank": work[client].budget.rank if client in work else None,
                **(region_budget(work.get(client)) if running.over_regions else {}),
                "stale": staleness_in(work[client], state.version + 1) if client in work else None,
            }
            for client, profile in sorted(running.clients.items())
        }
        beside = {} if self.majority is None or not seen.scores else {"base_accuracy": self.majority}
        return {
            "run": running.terms.run,
            "version": state.version,
            "versions": self.limits.versions,
            "seconds": round(running.elapsed, 1),
            "incarnation": running.incarnation,
            "state": self.state(),
            "waits": self.waits(),
            "connected": sorted(node.client or node.name or f"node {number}" for number, node in nodes.items()),
            "ended": self.ended,
            "accepted": seen.accepted,
            "rejected": seen.rejected,
            "failed": seen.failed,
            "mean_staleness": None if seen.mean_staleness is None else round(seen.mean_staleness, 3),
            "scores": {name: round(value, 6) for name, value in (*seen.scores.items(), *beside.items())},
            "set_aside": {
                client: f"{plural(seen.set_aside.get(client, 1), 'answer')} set aside; the last time {reason}"
                for client, reason in sorted(self.why_set_aside.items())
            },
            "calls_refused": read_refusals(self.folder),
            "clients": clients,
            "traffic": asdict(running.traffic),
        }

    def state(self) -> str:
        """Return whether the run is "waiting" to begin, "running", "evaluating" its last version at the sites, or "finished"."""
        running = self.deployment
        if running.evaluation and running.evaluation.awaited():
            return "evaluating"
        if self.ended:
            return "finished"
        return "running" if running.opened else "waiting"

    def waits(self) -> str:
        """Return what the deployment waits for, in words that follow "waiting"; "" once the run has ended."""
        running, state = self.deployment, self.state()
        if state == "finished":
            return ""
        if running.evaluation and (awaited := running.evaluation.awaited()):
            return f"for the evaluation of the last version on {list_some([*awaited], SHOWN)}"
        if state == "waiting":
            return self._waits_to_begin()
        clauses = []
        if running.tasks:
            clauses.append(
                f"for answers of {list_some(sorted({task.client for task in running.tasks.values()}), SHOWN)}"
            )
        else:
            clauses.append("for a client that can be given a task" if running.clients else "for a client to connect")
        if paused := self._paused():
            clauses.append(f"paused for now: {list_some(paused, SHOWN)}")
        if missing := sorted(running.nodes.missing):
            clauses.append(f"not connected: {list_some(missing, SHOWN)}")
        return "; ".join(clauses)

    def _waits_to_begin(self) -> str:
        """Return for whom the run waits before it begins: who is ready, and of who is connected only, why it is not ready."""
        running = self.deployment
        kind, ready = "region" if running.over_regions else "site", sorted(running.clients)
        clauses = [f"for {running.min_clients - len(ready)} more of {plural(running.min_clients, kind)}"]
        if ready:
            clauses.append(f"ready: {list_some(ready, SHOWN)}")
        paused = self._paused()
        loading = sorted(name for node, name in self._unknown() if not node.why)
        if loading:
            clauses.append(f"connected, loading model and data: {list_some(loading, SHOWN)}")
        if paused:
            clauses.append(f"connected, but not ready: {list_some(paused, SHOWN)}")
        return "; ".join(clauses if len(clauses) > 1 else [*clauses, "none is connected"])

    def _unknown(self) -> list[tuple[Node, str]]:
        """Return the nodes that have not registered yet, with what they can be called."""
        nodes = self.deployment.nodes.reachable.items()
        return [(node, node.name or f"node {number}") for number, node in nodes if node.client is None]

    def _paused(self) -> list[str]:
        """Return who is not asked for now, each with the reason."""
        running = self.deployment
        known = [(node, node.client) for node in running.nodes.reachable.values() if node.client is not None]
        resting = [(node, name) for node, name in known if node.resting_until > running.elapsed]
        return sorted(f"{name} ({node.why})" for node, name in (*self._unknown(), *resting) if node.why)

    def pause_and_write(self, pause: Callable[[float], None]) -> Callable[[float], None]:
        """Return a pause between two turns that writes the file now and then."""

        def paused(seconds: float) -> None:
            if time.monotonic() >= self.written + WRITE_EVERY:
                self.write()
            pause(seconds)

        return paused

    def write(self) -> None:
        """Write the file, whole or not at all. A full disk does not stop the run here: the next checkpoint will say so."""
        self.written = time.monotonic()
        try:
            files.write_json(self.folder / STATUS_FILE, {**self.snapshot(), "at": time.time()})
        except OSError as error:
            LOG.warning("%s cannot be written: %s", STATUS_FILE, error)

    @contextmanager
    def exported(self, port: int | None) -> Iterator[None]:
        """Let Prometheus ask for the figures at this port of this machine, until the end of the block; then write the file."""
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
    """Figures of a `Status` for Prometheus, collected when asked for, so that nothing is counted twice."""

    status: Status

    def collect(self) -> Iterator[Any]:
        """Yield the figures in Prometheus' types."""
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        status = self.status.snapshot()
        yield GaugeMetricFamily("fedloom_version", "Global version", status["version"])
        yield GaugeMetricFamily("fedloom_run_seconds", "Seconds of the run", status["seconds"])
        yield GaugeMetricFamily("fedloom_clients", "Clients that the server counts on", len(status["clients"]))
        reached = sum(client["reached"] for client in status["clients"].values())
        yield GaugeMetricFamily("fedloom_clients_reached", "Clients that can be reached", reached)
        working = sum(client["task"] is not None for client in status["clients"].values())
        yield GaugeMetricFamily("fedloom_tasks_outstanding", "Tasks dispatched and not answered", working)
        if status["mean_staleness"] is not None:
            yield GaugeMetricFamily(
                "fedloom_staleness_mean", "Versions, over all merged updates", status["mean_staleness"]
            )
        for name in ("accepted", "rejected", "failed"):
            yield CounterMetricFamily(
                f"fedloom_answers_{name}", f"Answers {name} since the server started", status[name]
            )
        for name, value in status["traffic"].items():
            yield CounterMetricFamily(f"fedloom_link_{name}", "Of messages, since the server started", value)
        scores = GaugeMetricFamily("fedloom_score", "Of the last version scored", labels=["figure"])
        for name, value in status["scores"].items():
            scores.add_metric([name], value)
        yield scores
        refused = CounterMetricFamily("fedloom_calls_refused", "Calls that the gate refused", labels=["client"])
        for name, calls in status["calls_refused"].items():
            refused.add_metric([name], calls)
        yield refused
        answers = CounterMetricFamily("fedloom_client_answers", "Accepted answers", labels=["client"])
        for name, client in status["clients"].items():
            answers.add_metric([name], client["answers"])
        yield answers


def read_status(folder: Path) -> Mapping[str, Any]:
    """Return the status that was written last; of a server that has written none yet, that it is starting. Raises Refused."""
    path = folder / STATUS_FILE
    try:
        status = files.read_json(path) if path.exists() else _starting(folder)
        status = {"state": "finished" if status.get("ended") else "running", "connected": [], **status}
        _check(_FIELDS, status)
        _check(_TRAFFIC_FIELDS, status["traffic"])
        for client in status["clients"].values():
            _check(_CLIENT_FIELDS, client)
    except (OSError, ValueError) as error:
        damaged = (
            f"its {STATUS_FILE} cannot be read ({type(error).__name__})" if path.exists() else "no server has used it"
        )
        raise Refused("DIR", str(folder), f"{damaged}; give the folder of `fedloom serve`") from error
    return status


def _starting(folder: Path) -> dict[str, Any]:
    """Return the status of a server that has read no run file yet. Raises OSError where there is no deployment in the folder."""
    config = files.read_json(folder / CONFIG_FILE)
    zeros: dict[str, Any] = dict.fromkeys(("version", "versions", "incarnation", "accepted", "rejected", "failed"), 0)
    nobody: dict[str, Any] = {"scores": {}, "set_aside": {}, "calls_refused": {}, "clients": {}, "mean_staleness": None}
    return {
        **zeros,
        **nobody,
        "run": Path(str(config.get("runfile"))).stem,
        "state": "starting",
        "waits": "for the server's processes",
        "ended": "",
        "seconds": 0.0,
        "at": (folder / CONFIG_FILE).stat().st_mtime,
        "traffic": asdict(LinkTraffic()),
    }


def read_refusals(folder: Path) -> dict[str, int]:
    """Return by site how many of its calls the gate has refused, as far as `fedloom serve` has written it down."""
    try:
        counts: dict[str, int] = Decoder(finite=True).read(dict[str, int], files.read_json(folder / REFUSALS_FILE))
    except (OSError, ValueError):
        return {}
    return counts


def _check(kinds: Mapping[str, Any], data: Mapping[str, Any]) -> None:
    """Raise Malformed where a field is missing or of another kind."""
    decoder = Decoder(finite=True)
    for name, kind in kinds.items():
        if name not in data:
            raise Malformed(f"it has no {name}")
        decoder.read(kind, data[name])


def region_budget(task: Task | None) -> dict[str, object]:
    """Return the budget of a region's task, and why it is so."""
    if task is None:
        return dict.fromkeys(("depth", "rounds", "steps", "why"))
    budget = task.budget
    return {"depth": budget.depth or "all", "rounds": budget.rounds, "steps": budget.steps, "why": budget.why}
