"""(to be written)"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol, TypeAlias, runtime_checkable

from fedloom.core.errors import Refused
from fedloom.core.events import (
    Command,
    Event,
)
from fedloom.core.indexed_dict import Indexed
from fedloom.core.lora import Adapter
from fedloom.core.model_shape import Shape
from fedloom.core.types import Budget, ClientId, GroupLog, Local, Model, Profile, Result, Start, Task, Update

# Policies ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Fleet:
    """The one read-only argument of every policy: who is idle, who is busy with what, which answers wait to be merged.

    A view of the server's own tables, so that making one costs nothing, however many clients there are. `seen` are the
    examples that each client reported with its last accepted answer, `dispatched` the tasks sent to each client so far, `tasks`
    their sum: who draws from a stream named after it never draws the same twice. `worked` are the seconds that each client spent on
    tasks that have ended, answered or not. `latest` is the client whose accepted answer this
    is about (None: something else happened), `retained` how many of `arrived` (the first ones) the last merge kept, `first` the
    model of version 0. `outer` is the task that an edge is working on (None: this is no edge), `groups` what the root of a tree knows
    of those behind its clients, which are edges.
    """

    now: float
    version: int
    seed: int
    idle: Indexed[ClientId, Profile]
    busy: Mapping[int, Task]
    arrived: Sequence[Update]
    shape: Shape
    seen: Mapping[ClientId, int] = field(default_factory=dict)
    dispatched: Mapping[ClientId, int] = field(default_factory=dict)
    worked: Mapping[ClientId, float] = field(default_factory=dict)
    tasks: int = 0
    latest: ClientId | None = None
    retained: int = 0
    first: Model | None = None
    outer: Task | None = None
    groups: Mapping[ClientId, GroupLog] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Merge:
    """A schedule's decision: a linear combination of updates, without a word about LoRA.

    new model = (1 - step) model + step * sum(weight * client's model), or with `as_delta`
    new model = model + step * sum(weight * (client's model - what it started from)).
    Weights are normalised by the schedule to sum to 1. `retain` are updates kept for a later merge, `cancel` are tasks
    whose answers no longer count. `anchor` takes the place of the model in the first formula (a window that began filled with
    the first model).
    """

    parts: tuple[tuple[float, Update], ...]
    step: float = 1.0
    as_delta: bool = False
    retain: tuple[Update, ...] = ()
    cancel: tuple[int, ...] = ()
    anchor: Model | None = None


class Aggregator(Protocol):
    """HOW adapters are added and handed out. It never sees staleness."""

    @property
    def space(self) -> Literal["factor", "product"]:
        """Where addition happens. Elementwise wrappers need "factor": a product-space basis rotates at each merge."""
        ...

    @property
    def exempt(self) -> Mapping[int, str]:
        """Laws that this method breaks by design, with the reason."""
        ...

    def init(self, start: Adapter) -> Model:
        """The first global model."""
        ...

    def merge(self, model: Model, merge: Merge) -> Model:
        """The next global model."""
        ...

    def start(self, model: Model, budget: Budget, seed: int) -> Start:
        """What a client with this budget receives."""
        ...


class Schedule(Protocol):
    """WHEN a version is made, from which updates, and who starts next. It never looks into a model. Stateless."""

    @property
    def max_in_flight(self) -> int:
        """The largest number of clients that it lets work at once: a place that is free beside an idle client is waiting time."""
        ...

    def merge(self, fleet: Fleet) -> Merge | None:
        """The merge that is due now, or None to keep waiting."""
        ...

    def start(self, fleet: Fleet) -> Sequence[ClientId]:
        """Idle clients to start now."""
        ...

    def wake(self, fleet: Fleet) -> float | None:
        """The next moment at which to look again even if nothing happens; a level, not a command."""
        ...


Assign: TypeAlias = Callable[[Profile, Fleet], Budget]
"""How much a client may do in its next task."""


class Trainer(Protocol):
    """Runs tasks. Base model and shards are its constructor's business; a cohort may share one forward pass."""

    def train(self, work: Sequence[tuple[Task, Local]]) -> list[tuple[Result, Local]]:
        """A function of its arguments: the same work gives the same bytes."""
        ...


def layers(aggregator: object) -> Iterator[object]:
    """The aggregator, what it wraps, and so on inwards."""
    while aggregator is not None:
        yield aggregator
        aggregator = getattr(aggregator, "inner", None)


def need_fresh_answers(aggregator: Aggregator, schedule: Schedule) -> None:
    """Raise Refused where a schedule merges an answer more than once (`reuses_answers`) and a layer forbids it (`each_once`: why)."""
    if not getattr(schedule, "reuses_answers", False):
        return
    for layer in layers(aggregator):
        if why := getattr(layer, "each_once", None):
            when, how = type(schedule).__name__, type(layer).__name__
            remedy = f"it merges every answer more than once, and with {how} {why}; use FedBuff, Immediate, FedAsync or Rounds"
            raise Refused("schedule", when, remedy)


Answer: TypeAlias = Callable[[], tuple[Result, Local]]
"""Waits for a task's answer, and raises what its training raised. Nobody holds it any more: the task need not be trained."""


@runtime_checkable
class Overlapping(Trainer, Protocol):
    """A trainer that can begin with a task now and answer later."""

    def least(self, task: Task) -> Result:
        """The answer if training changed nothing: `examples`, `tokens` and `steps` are those of the real one."""
        ...

    def begin(self, work: Sequence[tuple[Task, Local]], due: Sequence[float]) -> Sequence[Answer]:
        """The answers of a cohort, as `train` would give them; those are waited for first that are `due` (virtual s) first."""
        ...


Evaluator: TypeAlias = Callable[[Model], Mapping[str, float]]
Observer: TypeAlias = Callable[[float, Event, list[Command]], None]


def nothing() -> None:
    """Between two events there is nothing to do."""
