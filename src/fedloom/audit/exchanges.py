"""What could be seen of a run: the tasks and answers of a curious server, and the versions that members receive.

`SeenRun` is an observer: of a simulation while it is carried out, or of a replay of its trace with the answers that it kept.
`AuditScene` puts the truth beside it, by which attacks are judged: which rows each client trained on, and which were left out.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from fedloom.core.events import Command, Dispatch, Event, InsideEdge, Publish, UpdateArrived
from fedloom.core.lora import Adapter
from fedloom.core.seeds import rng
from fedloom.core.types import ClientId, Model, Task, TaskStart
from fedloom.train.base_model import Base
from fedloom.train.tokenised import EncodedTexts
from fedloom.train.trainer import PeftTrainer

MOST_CLIENTS, MOST_VERSIONS, MOST_HEADS, LONGEST = 24, 12, 200, 1000
"""What is held in memory: the latest answer of each of so many clients, the latest versions, and of the first so many answers the
vectors of the head that are no longer than this."""
ROWS = 20
"""Rows of a client that are scored are twice as many at most: trained on, or left out."""

Rows = tuple[int, ...]
"""Positions of rows among the run's texts."""


@dataclass(frozen=True, slots=True)
class Exchange:
    """A task as it was sent, and what came back.

    Fields:
        task: the task, with what its client started from.
        answer: the adapter that came back, decoded.
    """

    task: Task
    answer: Adapter


@dataclass(frozen=True, slots=True)
class Step:
    """One version: the model before it, the model that it is, and whose answers made it.

    Fields:
        before: model of the version before.
        after: model of this version.
        clients: clients whose answers were merged.
    """

    before: Model
    after: Model
    clients: tuple[ClientId, ...]


@dataclass(slots=True)
class SeenRun:
    """Observer that holds what an adversary of a run would hold.

    Fields:
        first: model of version 0.
        latest: the latest exchange of each client, of at most `MOST_CLIENTS`.
        heads: exchanges with nothing in them but the vectors of the head, in order.
        steps: the latest versions, each with the clients whose answers are in it.
        merged: clients whose answers are in a version, of the run or of an edge.
        outstanding: tasks without an answer so far, by client and number.
    """

    first: Model
    latest: dict[ClientId, Exchange] = field(default_factory=dict)
    heads: list[Exchange] = field(default_factory=list)
    steps: deque[Step] = field(default_factory=lambda: deque(maxlen=MOST_VERSIONS))
    merged: set[ClientId] = field(default_factory=set)
    outstanding: dict[tuple[ClientId, int], Task] = field(default_factory=dict)

    def __call__(self, now: float, event: Event, commands: list[Command]) -> None:
        """Take from one step what the adversaries see of it."""
        if isinstance(event, UpdateArrived):
            task = self.outstanding.pop((event.client, event.task), None)
            if task is not None and len(self.heads) < MOST_HEADS:
                light = TaskStart(head_vectors(task.start.train), task.start.basis)
                self.heads.append(Exchange(replace(task, start=light), head_vectors(event.result.adapter)))
            if task is not None and (event.client in self.latest or len(self.latest) < MOST_CLIENTS):
                self.latest[event.client] = Exchange(task, event.result.adapter)
        for command in commands:
            if isinstance(command, Dispatch):
                self.outstanding[command.task.client, command.task.id] = command.task
            elif isinstance(command, Publish):
                before = self.steps[-1].after if self.steps else self.first
                self.steps.append(Step(before, command.model, self._count(command)))
            elif isinstance(command, InsideEdge) and isinstance(command.command, Publish):
                self._count(command.command)

    def _count(self, made: Publish) -> tuple[ClientId, ...]:
        clients = tuple(dict.fromkeys(update.task.client for update in made.updates))
        self.merged.update(clients)
        return clients

    @property
    def last(self) -> Model:
        """The last version."""
        return self.steps[-1].after if self.steps else self.first


def head_vectors(adapter: Adapter) -> Adapter:
    """Return the short vectors among the dense tensors, which is where the bias of a head is."""
    short = {name: one for name, one in adapter.dense.items() if one.ndim == 1 and one.numel() <= LONGEST}
    return Adapter({}, short)


@dataclass(frozen=True, slots=True)
class AuditScene:
    """What was seen of a run, and the truth.

    Fields:
        trainer: trains a task as a client of the run does; holds the model, the texts, and which rows each client trains on.
        left_out: rows of each client that it did not train on, drawn from its rows at random.
        seen: what the adversaries saw.
        took_part: clients with an answer in a version.
        last: the published model.
        seed: of the audit's own draws.
    """

    trainer: PeftTrainer
    left_out: Mapping[ClientId, Rows]
    seen: SeenRun
    took_part: tuple[ClientId, ...]
    last: Model
    seed: int

    @property
    def base(self) -> Base:
        """Return the base model."""
        return self.trainer.base

    @property
    def texts(self) -> EncodedTexts:
        """Return all rows of all clients, tokenised."""
        return self.trainer.texts

    def known_steps(self) -> list[Step]:
        """Return the versions that were made of answers whose clients' rows are known: not those of edges."""
        return [step for step in self.seen.steps if step.clients and {*step.clients} <= self.trainer.shards.keys()]

    def sampled_rows(self, client: ClientId, most: int = ROWS) -> tuple[list[int], list[int]]:
        """Draw at most twice so many rows of a client, whatever it did with them; return those trained on, and those left out."""
        trained, others = {*self.trainer.shards[client]}, self.left_out.get(client, ())
        rows = sorted({*trained, *others})
        drawn = rng(self.seed, "audit", client).sample(rows, min(2 * most, len(rows)))
        return [row for row in drawn if row in trained], [row for row in drawn if row not in trained]
