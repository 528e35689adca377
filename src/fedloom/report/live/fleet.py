"""Clients of a run, and the stream of its events, followed in the lines of `trace.jsonl`: who is at work, who waits, who was refused.

Memory grows with the clients and not with the lines: of events and refusals only the last are there.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, TypeAlias

from fedloom.core.text import list_some
from fedloom.report.facts import label
from fedloom.report.numbers import percent, plural, short, to_float

LAST_EVENTS = 200
LAST_REFUSALS = 50
LAST_REASONS = 50
"""Lines of each list that a page has."""
REASON = 240
"""Characters of a reason."""
LONGEST_EVENT = 400
"""Characters of an event."""
NAMED = 3
"""Clients that an event names."""

Activity: TypeAlias = Literal["training", "answered", "idle", "offline"]


class EventLine(NamedTuple):
    """An event as a page lists it: its time (s of the run), its kind and what happened."""

    time: float
    kind: str
    text: str


class RefusalLine(NamedTuple):
    """An answer or a task that came to nothing: when, whose, what happened and why."""

    time: float
    client: str
    what: str
    reason: str


@dataclass(slots=True)
class LiveClient:
    """What a client does now.

    Fields:
        activity: "training", "answered" (it waits for the version that its answer will be in), "idle" or "offline".
        since: when it began that (s of the run).
        task, version, rank, depth, steps: its last task, and the version that this started from (None: it has had none).
        merged, refused: its tasks that ended in a version, and those that were refused or failed.
        staleness, loss: of its last merged task.
    """

    activity: Activity = "idle"
    since: float = 0.0
    task: int | None = None
    version: int | None = None
    rank: int | None = None
    depth: int | None = None
    steps: int | None = None
    merged: int = 0
    refused: int = 0
    staleness: float | None = None
    loss: float | None = None


@dataclass(slots=True)
class LiveFleet:
    """Clients by name, as the events of a run leave them.

    Fields:
        clients: of the run; one that is first named by an event is added.
        events: the last events.
        counted: events so far, also those that are not listed any more.
        refusals: the last answers that were refused and tasks that failed.
        reasons: by client or edge, the last budget that a plan gave a reason for.
        ended: why the run ended ("": it goes on).
    """

    clients: dict[str, LiveClient] = field(default_factory=dict)
    events: deque[EventLine] = field(default_factory=lambda: deque(maxlen=LAST_EVENTS))
    counted: int = 0
    refusals: deque[RefusalLine] = field(default_factory=lambda: deque(maxlen=LAST_REFUSALS))
    reasons: dict[str, Mapping[str, Any]] = field(default_factory=dict)
    ended: str = ""
    _answered: dict[int, str] = field(default_factory=dict)

    def add(self, names: Sequence[str]) -> None:
        """Add clients that are known before anything happens."""
        for name in names:
            self.clients.setdefault(name, LiveClient())

    def activities(self) -> Counter[str]:
        """Return how many clients do what."""
        return Counter(client.activity for client in self.clients.values())

    def take_step(self, step: Mapping[str, Any]) -> None:
        """Follow one step of the run: a line of the trace."""
        now, event, commands = to_float(step["time"]), step["event"], step["commands"]
        if not any(command["type"] == "Reject" for command in commands):  # else it is as if the event had not come
            self._take_event(now, event)
        sent = [command["task"] for command in commands if command["type"] == "Dispatch"]
        for command in commands:
            self._take_command(now, command)
        for task in sent:
            self._send(now, task)
        if sent:
            names = [label(task["client"]) for task in sent]
            self._note_event(now, "sent", f"{plural(len(sent), 'task')} sent to {list_some(names, NAMED)}")

    def take_task(self, line: Mapping[str, Any]) -> None:
        """Count a task that ended: a line of the metrics."""
        client = self._client(line["client"])
        if line["status"] == "merged":
            client.merged += 1
            client.staleness, client.loss = line.get("staleness"), line.get("loss")
        elif line["status"] in ("failed", "lost", "unused"):
            client.refused += 1

    def _client(self, name: str) -> LiveClient:
        return self.clients.setdefault(name, LiveClient())

    def _note_event(self, now: float, kind: str, text: str) -> None:
        self.events.append(EventLine(now, kind, label(text, LONGEST_EVENT)))
        self.counted += 1

    def _set(self, now: float, name: str, activity: Activity) -> None:
        client = self._client(name)
        client.activity, client.since = activity, now

    def _send(self, now: float, task: Mapping[str, Any]) -> None:
        client, budget = self._client(task["client"]), task["budget"]
        client.activity, client.since = "training", now
        client.task, client.version = task["id"], task["version"]
        client.rank, client.depth, client.steps = budget["rank"], budget["depth"], budget["steps"]
        self._note_reason(task)

    def _note_reason(self, task: Mapping[str, Any]) -> None:
        """Remember the reason that a plan gave for a budget, if it gave one."""
        if task["budget"]["why"]:
            self.reasons.pop(task["client"], None)
            self.reasons[task["client"]] = task["budget"]
            if len(self.reasons) > LAST_REASONS:
                del self.reasons[next(iter(self.reasons))]

    def _refuse(self, now: float, client: str, what: str, reason: str) -> None:
        text = label(reason, REASON)
        self.refusals.append(RefusalLine(now, client, what, text))
        self._note_event(now, "refused", f"{label(client)}: {what}: {text}")

    def _take_event(self, now: float, event: Mapping[str, Any]) -> None:
        match event["type"]:
            case "ClientJoined" | "EdgeJoined":
                self._set(now, event["profile"]["client"], "idle")
                self._note_event(now, "joined", f"{label(event['profile']['client'])} joined")
            case "ClientLost":
                self._set(now, event["client"], "offline")
                self._note_event(now, "lost", f"{label(event['client'])} is disconnected")
            case "UpdateArrived" | "EdgeReported" | "PartsReady":
                self._set(now, event["client"], "answered")
                self._answered[event["task"]] = event["client"]
                if len(self._answered) > 2 * len(self.clients):  # some of them came to nothing
                    del self._answered[next(iter(self._answered))]
                self._note_event(now, "answer", f"{label(event['client'])} answered task {event['task']}")
            case "TaskFailed":
                self._set(now, event["client"], "idle")
                text, last = label(event["reason"], REASON), self.refusals[-1] if self.refusals else None
                if last is None or (last.client, last.reason) != (event["client"], text):  # not refused right before
                    self._refuse(now, event["client"], "task failed", event["reason"])
            case "ScoresReady":
                self._note_event(now, "score", f"version {event['version']} scored: {_figures(event['metrics'])}")

    def _take_command(self, now: float, command: Mapping[str, Any]) -> None:
        match command["type"]:
            case "Publish":
                self._publish(now, command["updates"])
                updates = plural(len(command["updates"]), "update")
                self._note_event(now, "version", f"version {command['version']} made of {updates}")
            case "Reject":
                self._refuse(now, command["client"], "answer refused", command["reason"])
            case "SetAside":
                self._refuse(now, command["client"], "answer set aside", command["reason"])
            case "Cancel":
                self._answered.pop(command["task"], None)
                self._set(now, command["client"], "idle")
                self._note_event(now, "cancelled", f"task {command['task']} of {label(command['client'])} cancelled")
            case "Regroup":
                self._note_event(now, "groups", f"groups made again, {plural(len(command['moves']), 'client')} to move")
            case "InsideEdge":
                self._take_inside(now, command["edge"], command["command"])
            case "Stop":
                self.ended = label(command["reason"], REASON)
                self._note_event(now, "end", f"the run ended: {self.ended}")

    def _take_inside(self, now: float, edge: str, command: Mapping[str, Any]) -> None:
        """A command inside an edge: about its own version or its outer task."""
        match command["type"]:
            case "Dispatch":
                self._note_reason(command["task"])
            case "Publish":
                self._publish(now, command["updates"])
                self._note_event(now, "inner version", f"{label(edge)} made version {command['version']} of its own")
            case "Report":
                self._note_event(now, "answer", f"{label(edge)} reported")
            case "Reject":
                self._refuse(now, edge, "answer refused", command["reason"])

    def _publish(self, now: float, updates: Sequence[int]) -> None:
        """The answers of these tasks are in a version: their clients wait for nothing any more."""
        for task in updates:
            name = self._answered.pop(task, "")
            if name and self.clients[name].activity == "answered":
                self._set(now, name, "idle")


def _figures(metrics: Mapping[str, Any]) -> str:
    accuracy, perplexity = to_float(metrics.get("accuracy")), to_float(metrics.get("perplexity"))
    words = f"perplexity {short(perplexity)}, " if perplexity == perplexity else ""
    return f"{words}accuracy {percent(accuracy)}"
