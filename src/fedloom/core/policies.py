"""Interfaces that a method implements: `Aggregator` (HOW), `Schedule` (WHEN), `BudgetRule` (HOW MUCH), `Trainer`.

A method is a frozen dataclass with the members of one of these protocols. It inherits from nothing and is registered nowhere, and all
that it may decide on comes in as an argument: a schedule and a budget rule see the `Fleet`, an aggregator sees the `Merge` that the
schedule decided on. A schedule never reads an adapter, an aggregator never sees staleness: so every schedule goes with every
aggregator.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, Protocol, TypeAlias, runtime_checkable

from fedloom.core.errors import Refused
from fedloom.core.events import Command, Event
from fedloom.core.indexed_dict import Indexed
from fedloom.core.lora import Adapter
from fedloom.core.model_shape import Shape
from fedloom.core.types import (
    Budget,
    ClientId,
    ClientState,
    GroupHistory,
    Model,
    Profile,
    Result,
    Task,
    TaskStart,
    Update,
)

# Policies ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Fleet:
    """Read-only view of a server, the one argument of schedules and budget rules.

    It holds the server's own tables, not copies, so that making one costs O(1).

    Fields:
        now: time of the event (s).
        version: number of the global version.
        seed: seed of the run.
        idle: profiles of clients without a task, by client.
        busy: outstanding tasks, by task number.
        arrived: accepted answers that wait to be merged, in order of arrival.
        shape: sizes of the base model: parameters, layers, blocks, hidden size.
        reported_examples: by client, the examples that counted for its last accepted answer.
        dispatched: by client, tasks sent to it so far.
        work_seconds: by client, seconds that it spent on tasks that have ended, answered or not.
        tasks: tasks sent so far; part of the name of a random stream, so that no draw is repeated.
        latest: client whose answer was just accepted (None: another event).
        retained: how many of `arrived` (the first ones) the last merge kept.
        first: model of version 0.
        outer: task that an edge works on (None: this is no edge).
        groups: at the root of a tree, what is known of the groups behind its clients, which are edges.
    """

    now: float
    version: int
    seed: int
    idle: Indexed[ClientId, Profile]
    busy: Mapping[int, Task]
    arrived: Sequence[Update]
    shape: Shape
    reported_examples: Mapping[ClientId, int] = field(default_factory=dict)
    dispatched: Mapping[ClientId, int] = field(default_factory=dict)
    work_seconds: Mapping[ClientId, float] = field(default_factory=dict)
    tasks: int = 0
    latest: ClientId | None = None
    retained: int = 0
    first: Model | None = None
    outer: Task | None = None
    groups: Mapping[ClientId, GroupHistory] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Merge:
    """Decision of a schedule: a linear combination of updates, without a word about LoRA.

    new model = (1 - step) model + step * sum(weight * client's model), or with `as_delta`
    new model = model + step * sum(weight * (client's model - what it started from)).

    Fields:
        weighted_updates: (weight, update) pairs; the schedule normalises the weights to sum to 1.
        step: server learning rate.
        as_delta: whether changes are added (second formula) instead of models averaged (first formula).
        retain: updates kept for a later merge.
        cancel: numbers of outstanding tasks whose answers no longer count.
        anchor: model in the place of `model` in the first formula (None: the server's; a window that began filled with the first
            model has that one).
        measured: whether the share of energy that is cut off is to be measured (`Model.discarded`).
    """

    weighted_updates: tuple[tuple[float, Update], ...]
    step: float = 1.0
    as_delta: bool = False
    retain: tuple[Update, ...] = ()
    cancel: tuple[int, ...] = ()
    anchor: Model | None = None
    measured: bool = True

    def map_updates(self, rule: Callable[[Update], Update]) -> Merge:
        """Return the merge with `rule(update)` in the place of each update."""
        return replace(self, weighted_updates=tuple((weight, rule(update)) for weight, update in self.weighted_updates))


class Aggregator(Protocol):
    """Merging of adapters (HOW), and the part of the model that each client receives. It never sees staleness.

    Optional attributes, which are read with getattr:
        inner: the wrapped method, of a wrapper.
        each_once: why an answer may be merged only once (a sentence; refused with a schedule that has `reuses_answers`).
        remembers_changes: True where changes of clients are kept between merges (refused with partial depth, and around another).
        rank: rank of the server, which is checked against the model.
        clients: number of clients, which is checked against the federation.
        personal: why the server's model is no model without what each client keeps (a sentence; such models are not averaged).
        has_fold: True where the model keeps in a fold, at any rank, what its adapter has no room for.
        plain_mean: True where what is added (entries, or products in "product" space) is the mean with the schedule's weights,
            whatever else is done with that mean.
        after_merge: True of a wrapper that works with the wrapped method's models alone, and never looks at an answer.
        not_summed: why a sum over clients cannot stand in the place of their answers (a clause; refused in groups that sum).
        summed_by_factors: why a merge of sums is only near that of the answers (a clause).
        judges_answers: True where single answers are weighed or left out (refused above groups that sum, and inside other wrappers).
        least_answers: fewest answers that it compares in a merge (a schedule with smaller merges is refused).
        trusted_client: client whose answers others are judged by (None: nobody's), which must be one of the federation.
        merges_all_depths: True where `merge` takes answers that hold different layers, and divides them itself.
    """

    @property
    def space(self) -> Literal["factor", "product"]:
        """Space in which addition happens. Elementwise wrappers need "factor": a product-space basis rotates at each merge."""
        ...

    @property
    def exempt(self) -> Mapping[int, str]:
        """Laws of `tests/laws` that this method breaks by design, by number, with the reason."""
        ...

    def init(self, start: Adapter) -> Model:
        """Return the first global model."""
        ...

    def merge(self, model: Model, merge: Merge) -> Model:
        """Return the next global model."""
        ...

    def start(self, model: Model, budget: Budget, seed: int) -> TaskStart:
        """Return what a client with this budget receives; `seed` is for random draws."""
        ...


class Schedule(Protocol):
    """Time of versions (WHEN), the updates in each, and the clients that start next. It never reads a model. Stateless.

    Optional attributes, which are read with getattr:
        reuses_answers: True where an answer is a part of more than one merge (refused with an aggregator that has `each_once`).
        answers_per_merge: the most answers in a merge (absent: not known).
    """

    @property
    def max_in_flight(self) -> int:
        """The largest number of clients that may work at once; a free slot is waiting time while a client is idle."""
        ...

    def merge(self, fleet: Fleet) -> Merge | None:
        """Return the merge that is due now, or None to keep waiting."""
        ...

    def start(self, fleet: Fleet) -> Sequence[ClientId]:
        """Return the idle clients to start now."""
        ...

    def wake(self, fleet: Fleet) -> float | None:
        """Return the next due time, at which to call again even if nothing happens (None: none); asking changes nothing."""
        ...


BudgetRule: TypeAlias = Callable[[Profile, Fleet], Budget]
"""Budget of a client's next task: HOW MUCH it may do."""


class Trainer(Protocol):
    """Runs tasks. Base model and shards are its constructor's business; a cohort may share one forward pass."""

    def train(self, work: Sequence[tuple[Task, ClientState]]) -> list[tuple[Result, ClientState]]:
        """Train the tasks of a cohort. A function of its arguments: the same work gives the same bytes."""
        ...


def aggregator_layers(aggregator: object) -> Iterator[object]:
    """Yield the aggregator, the one that it wraps, and so on inwards."""
    while aggregator is not None:
        yield aggregator
        aggregator = getattr(aggregator, "inner", None)


def require_fresh_answers(aggregator: Aggregator, schedule: Schedule) -> None:
    """Raise Refused where a schedule merges an answer more than once and the aggregator forbids it.

    A schedule says so by `reuses_answers`, an aggregator or wrapper by `each_once`, which is the reason as text.
    """
    if not getattr(schedule, "reuses_answers", False):
        return
    for layer in aggregator_layers(aggregator):
        if why := getattr(layer, "each_once", None):
            when, how = type(schedule).__name__, type(layer).__name__
            remedy = f"it merges every answer more than once, and with {how} {why}; use FedBuff, Immediate, FedAsync or Rounds"
            raise Refused("schedule", when, remedy)


def require_enough_answers(aggregator: Aggregator, schedule: Schedule) -> None:
    """Raise Refused where a schedule merges fewer answers together than the aggregator has to compare."""
    most = getattr(schedule, "answers_per_merge", None)
    for layer in aggregator_layers(aggregator):
        least = getattr(layer, "least_answers", 1)
        if most is not None and most < least:
            how = f"{type(layer).__name__}({type(getattr(layer, 'rule', None)).__name__})"
            remedy = f"a merge has at most {most} answers, and {how} compares {least} or more; larger merges, or rule=Trust(client)"
            raise Refused("schedule", type(schedule).__name__, remedy)


def require_trusted_client(aggregator: Aggregator, clients: Collection[ClientId]) -> None:
    """Raise Refused where others are judged by the answers of a client that there is not: nothing would ever be merged."""
    trusted = getattr(aggregator, "trusted_client", None)
    if trusted is not None and trusted not in clients:
        remedy = f"the trusted client is one of the federation: {', '.join(sorted(clients)[:5])}"
        raise Refused("aggregator.rule.client", trusted, remedy + (", ..." if len(clients) > 5 else ""))


PendingResult: TypeAlias = Callable[[], tuple[Result, ClientState]]
"""Function that waits for a task's answer, and raises what its training raised.

When nobody holds it any more, the task need not be trained.
"""


@runtime_checkable
class BackgroundTrainer(Trainer, Protocol):
    """Trainer that can begin with a task now and answer later, so that tasks of a simulation overlap."""

    def unchanged_result(self, task: Task) -> Result:
        """Return the answer if training changed nothing; `examples`, `tokens` and `steps` are those of the real one."""
        ...

    def begin(self, work: Sequence[tuple[Task, ClientState]], due: Sequence[float]) -> Sequence[PendingResult]:
        """Start the tasks of a cohort; the answers are those of `train`, needed in the order of `due` (virtual s)."""
        ...


Evaluator: TypeAlias = Callable[[Model], Mapping[str, float]]
"""Function that scores a global model: names and figures."""

ExampleScorer: TypeAlias = Callable[[Model], tuple[float, ...]]
"""Function that scores a global model on canary examples: a number for each, always in the same order."""

Observer: TypeAlias = Callable[[float, Event, list[Command]], None]
"""Function that is shown each (time, event, commands) after the server handled the event."""


def no_scores(model: Model) -> Mapping[str, float]:
    """Return no scores: an evaluator where nothing is scored."""
    return {}


def no_example_scores(model: Model) -> tuple[float, ...]:
    """Return no scores: where there are no canary examples."""
    return ()


def do_nothing() -> None:
    """Do nothing: the default of what a driver calls between two events."""
