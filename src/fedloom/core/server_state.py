"""State of a server: everything that a checkpoint must save, and nothing that follows from the run's settings."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from fedloom.core.canary import CanaryRecord
from fedloom.core.change_norms import ChangeNorms
from fedloom.core.events import Release
from fedloom.core.indexed_dict import IndexedTable
from fedloom.core.model_shape import Shape
from fedloom.core.policies import Fleet
from fedloom.core.types import ClientId, GroupHistory, Model, Profile, Task, Update

CLIENT_TABLES = ("registered", "reported_examples", "dispatched", "work_seconds", "pruned", "merged", "last_merged")
"""Tables of `State` that keep a client's entry after it leaves."""


@dataclass(slots=True)
class State:
    """Mutable state of a server: everything that a checkpoint must save.

    Fields:
        model: the global model.
        first: the model of version 0.
        now: time of the last event (s).
        version: number of the global version.
        next_task: number of the next task.
        has_new_clients: whether clients have joined since the last decision.
        stopped: whether the run is over.
        last_evaluated: last version that was sent to evaluation (-1: none).
        failures: consecutive tasks that failed or were lost, or whose answers were set aside.
        last_failure: reason of the last of them.
        idle: clients without a task.
        working: by client with a task, its profile and the number of the task.
        busy: outstanding tasks by number.
        bases: by outstanding task, the model that it was cut from.
        arrived: accepted answers that wait to be merged, in order of arrival.
        retained: how many of `arrived` (the first ones) the last merge kept.
        latest: client of the last event, if that was an accepted answer (None: another event).
        registered: by client, the examples with which it joined (`registration.register`).
        reported_examples: by client, the examples that counted for its last accepted answer.
        dispatched: by client, tasks sent to it so far.
        work_seconds: by client, seconds of its tasks that have ended.
        pruned: by client, the rank to which it pruned itself: the cap of its later ranks.
        merged: by client, its answers that are in versions, where the server counts them (`participation`).
        last_merged: by client, the last version that an answer of it is in, where they are counted.
        resting: clients without a task that may not be given one now, by name.
        releases: what was released so far, where the noise of a version depends on that of earlier ones.
        recent_changes: by the sides that were trained, how far the latest accepted answers of some clients moved, oldest first.
        outer: task that this server works on as an edge (None: it is no edge).
        groups: at the root of a tree, what is known of the groups of its edges.
        canary: canary scores so far, and the model that is being scored.
    """

    model: Model
    first: Model
    now: float = 0.0
    version: int = 0
    next_task: int = 1
    has_new_clients: bool = False
    stopped: bool = False
    last_evaluated: int = -1
    failures: int = 0
    last_failure: str = ""
    idle: IndexedTable[ClientId, Profile] = field(default_factory=IndexedTable)
    working: dict[ClientId, tuple[Profile, int]] = field(default_factory=dict)
    busy: dict[int, Task] = field(default_factory=dict)
    bases: dict[int, Model] = field(default_factory=dict)
    arrived: list[Update] = field(default_factory=list)
    retained: int = 0
    latest: ClientId | None = None
    registered: dict[ClientId, int] = field(default_factory=dict)
    reported_examples: dict[ClientId, int] = field(default_factory=dict)
    dispatched: dict[ClientId, int] = field(default_factory=dict)
    work_seconds: dict[ClientId, float] = field(default_factory=dict)
    pruned: dict[ClientId, int] = field(default_factory=dict)
    merged: dict[ClientId, int] = field(default_factory=dict)
    last_merged: dict[ClientId, int] = field(default_factory=dict)
    resting: dict[ClientId, Profile] = field(default_factory=dict)
    releases: list[Release] = field(default_factory=list)
    recent_changes: dict[str, dict[ClientId, ChangeNorms]] = field(default_factory=dict)
    outer: Task | None = None
    groups: dict[ClientId, GroupHistory] = field(default_factory=dict)
    canary: CanaryRecord = field(default_factory=CanaryRecord)

    def fleet(self, shape: Shape, seed: int) -> Fleet:
        """Return the read-only view that policies get; O(1)."""
        return Fleet(
            now=self.now,
            version=self.version,
            seed=seed,
            tasks=self.next_task - 1,
            idle=self.idle,
            busy=MappingProxyType(self.busy),
            arrived=self.arrived,
            shape=shape,
            reported_examples=MappingProxyType(self.reported_examples),
            dispatched=MappingProxyType(self.dispatched),
            work_seconds=MappingProxyType(self.work_seconds),
            latest=self.latest,
            retained=self.retained,
            first=self.first,
            outer=self.outer,
            groups=MappingProxyType(self.groups),
        )

    def drop_arrived(self, tasks: Collection[int]) -> None:
        """Take the waiting answers to these tasks out, as if they had never arrived."""
        kept = [update.task.id not in tasks for update in self.arrived]
        self.retained = sum(kept[: self.retained])
        self.arrived = [update for update, stays in zip(self.arrived, kept, strict=True) if stays]

    def take_record(self, client: ClientId) -> dict[str, Any]:
        """Remove and return the table entries of a client that moves away."""
        tables: dict[str, dict[ClientId, Any]] = {name: getattr(self, name) for name in CLIENT_TABLES}
        return {name: table.pop(client) for name, table in tables.items() if client in table}

    def add_record(self, client: ClientId, record: Mapping[str, Any]) -> None:
        """Add the entries of a client that moved here."""
        for name, value in record.items():
            getattr(self, name)[client] = value
