"""The words of the system as plain data: profiles, tasks, events, commands, merges, and the four protocols.

Everything here is frozen and free of behaviour, so that a schedule can be tested with a table, a run can be written down
as a trace, and a policy can be printed as a manifest. Times are virtual or real seconds (the core does not know which),
links are bits per second, memory and payloads bytes, compute FLOP per second.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol, TypeAlias

from torch import Tensor

from fedloom.codec import Codec
from fedloom.cost import Shape
from fedloom.indexed import Indexed
from fedloom.lora import Adapter

ClientId: TypeAlias = str
Side: TypeAlias = Literal["down", "up", "dense"]
"""A part of an adapter: one of the two factors of every layer, or all dense tensors (the head)."""


@dataclass(frozen=True, slots=True)
class Budget:
    """What one task may cost: the LoRA rank to train at and the number of local optimiser steps.

    `depth` is how many transformer blocks are trained, counted from the output, with all that is adapted above them (None: all
    that is adapted). What is not trained runs as a part of the base. `rounds` are the versions that an edge makes of one task before
    it reports: its members share the steps out among them. `why` says in a sentence what decided, where a rule weighed something.
    """

    rank: int
    steps: int
    depth: int | None = None
    rounds: int = 1
    why: str = ""


@dataclass(frozen=True, slots=True)
class Profile:
    """What the server knows of a client before it has trained: its data size, its speed, its links, its memory.

    `most` is the largest rank, depth and number of steps that it lets a task have (None: whatever the plan says).
    """

    client: ClientId
    examples: int
    flops: float = 1e10
    up_bps: float = 1e7
    down_bps: float = 1e7
    memory: float = 8e9
    tier: str = "default"
    most: Budget | None = None


@dataclass(frozen=True, slots=True)
class Pruning:
    """Rank self-pruning (HetLoRA): the last directions are penalised, and given up when they have become smaller.

    The loss gains `strength` * |up[:, t:]| * |down[t:]| for each layer (`up` without the scaling, as PEFT has it), t =
    floor(`keep` * rank); if the sum of these products is smaller after training than before, the client answers with
    max(`least`, t) directions and is never asked for more again.
    """

    strength: float = 1e-3
    keep: float = 0.99
    least: int = 1

    def tail(self, rank: int) -> int:
        """The first direction of the tail, which is the rank after pruning."""
        return max(self.least, int(self.keep * rank))


@dataclass(frozen=True, slots=True)
class Rules:
    """How a client trains what it received. The plain case is all defaults.

    `frozen` sides are neither trained nor sent back; `private` ones are trained, stay at the client and take the place of what the
    server sends the next time. `select` is the number of directions, over all layers together, that the client trains: those
    that moved most in a trial (LoRA-A2). `up_rate` is the learning rate of `up` relative to that of `down`.
    """

    frozen: tuple[Side, ...] = ()
    private: tuple[Side, ...] = ()
    select: int | None = None
    up_rate: float = 1.0
    pruning: Pruning | None = None

    @property
    def kept(self) -> frozenset[Side]:
        """Sides that must come back as they were sent."""
        return frozenset((*self.frozen, *self.private))


@dataclass(frozen=True, slots=True)
class Start:
    """What a client receives to train.

    `basis` names the coordinate system of the factors: while it stays the same, optimiser moments of an earlier task are
    still meaningful; when a merge rotated the factors it changes and they must be dropped. `scaling` is the alpha/r with
    which the client should parametrise; None, the rule, means the run's constant (a scaling that changes with the rank
    makes one adapter mean different functions on different clients). `fold` is added to the frozen base and not trained.
    `slots` are the server's directions that `train` holds (None: the first ones). `seeded` sides follow from the run's seed, so
    that nobody has to send them. `control` is the server's control variate (SCAFFOLD), of the shape of `train`. `codec` is how
    the numbers of the task travel (None: float32), and has been applied to what is here.
    """

    train: Adapter
    basis: str
    scaling: float | None = None
    fold: Adapter | None = None
    slots: tuple[int, ...] | None = None
    seeded: tuple[Side, ...] = ()
    control: Adapter | None = None
    rules: Rules = Rules()
    codec: Codec | None = None


@dataclass(frozen=True, slots=True)
class Task:
    """One piece of work for one client; `id` is never used twice, `sent` is the time of dispatch."""

    id: int
    client: ClientId
    version: int
    start: Start
    budget: Budget
    seed: int
    sent: float


@dataclass(frozen=True, slots=True)
class Result:
    """What a client returns: its trained adapter and what it took; `control`: the change of its control variate, if asked for."""

    adapter: Adapter
    examples: int
    tokens: int
    steps: int
    metrics: Mapping[str, float] = field(default_factory=dict)
    control: Adapter | None = None


@dataclass(frozen=True, slots=True)
class Update:
    """A result together with the task that it answers.

    `base` is the global model that the task was cut from (None: the one that is merged into). What the client means is that model
    with its change, even where it trained a part only and the server has gone on since.
    """

    task: Task
    result: Result
    base: Model | None = None


@dataclass(frozen=True, slots=True)
class Local:
    """What stays at a client between its tasks and is never sent.

    Optimiser `moments` and the `residual` of error feedback (what packing lost of earlier answers), valid for one `basis`; the
    trained adapter of which `private` sides are used again; the client's own `control` variate. These two are kept by the server's
    directions (`Start.slots`), also those that one task does not hold.
    """

    basis: str = ""
    moments: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)
    private: Adapter | None = None
    control: Adapter | None = None
    residual: Adapter | None = None


@dataclass(frozen=True, slots=True)
class Spent:
    """What a member did in one task of its edge, all its answers together: seconds on its links and in training, by what it did.

    `began` and `ended` are the loss of its first and of its last answer; None: it told none.
    """

    client: ClientId
    rank: int
    depth: int | None
    answers: int
    steps: int
    down: float
    train: float
    up: float
    began: float | None = None
    ended: float | None = None


@dataclass(frozen=True, slots=True)
class Told:
    """What an edge tells the root beside its answer to a task with this `budget`, for plans that learn.

    `mass` is, by layer, the squared change of a member a step; `spread` the share of the members' squared changes that cancels in
    their mean; both of the last inner version. `energy` is that of each direction of the answer, largest first; `loss` the
    members' mean. `seconds` are those of the whole task, and of them `down` and `up` on the link of the edge, as the root saw them.
    """

    budget: Budget
    spent: tuple[Spent, ...]
    mass: Mapping[str, float]
    spread: float
    energy: tuple[float, ...]
    loss: float | None
    seconds: float = 0.0
    down: float = 0.0
    up: float = 0.0


@dataclass(frozen=True, slots=True)
class GroupLog:
    """What the root knows of a group: its edge and its members before training, and what the edge told last, oldest first.

    `past` is what members who came from another group did before; in `told` a line of a member who has left names nobody.
    """

    edge: Profile
    members: tuple[Profile, ...]
    told: tuple[Told, ...] = ()
    past: Mapping[ClientId, tuple[Spent, ...]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Model:
    """The global model: base + fold + adapter.

    `basis` counts how often the adapter's basis was rotated, `phase` the merges of a method that trains its sides in turn.
    `discarded` is the share of energy that the last merge cut off. `fold` belongs to the model but is not trained any more;
    `memory` is what a wrapper carries from merge to merge (momentum, control variates).
    """

    adapter: Adapter
    basis: int = 0
    discarded: float = 0.0
    phase: int = 0
    fold: Adapter | None = None
    memory: Mapping[str, Adapter] = field(default_factory=dict)


# Events: what happened outside ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ClientJoined:
    """A client is reachable and idle. Joining decides nothing: the next event or timer does, see `Server.wake`."""

    profile: Profile


@dataclass(frozen=True, slots=True)
class ClientLost:
    """A client is gone; its outstanding task is dropped."""

    client: ClientId


@dataclass(frozen=True, slots=True)
class UpdateArrived:
    """A client answers a task."""

    client: ClientId
    task: int
    result: Result


@dataclass(frozen=True, slots=True)
class TaskFailed:
    """A client says that it could not do a task."""

    client: ClientId
    task: int
    reason: str


@dataclass(frozen=True, slots=True)
class TimerFired:
    """The time that `Server.wake` asked for has come."""


@dataclass(frozen=True, slots=True)
class Scored:
    """An evaluation of a version is ready."""

    version: int
    metrics: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class TaskReceived:
    """To an edge: the task that its members are to do together."""

    task: Task


@dataclass(frozen=True, slots=True)
class EdgeLost:
    """An edge died. `kept`: it comes back with its last inner version and goes on; else all that it did of its task is lost."""

    edge: ClientId
    kept: bool = False


@dataclass(frozen=True, slots=True)
class EdgeReturned:
    """An edge that died is there again."""

    edge: ClientId


@dataclass(frozen=True, slots=True)
class EdgeJoined(ClientJoined):
    """An edge that is elsewhere is reachable, and idle; `members` are those that it leads, if it says who they are."""

    members: tuple[Profile, ...] = ()


@dataclass(frozen=True, slots=True)
class EdgeReported(UpdateArrived):
    """An edge that is elsewhere answers a task, with the layers that a member trained, and what it `told` beside (None: nothing).

    `members` are those that it leads now (empty: it does not say).
    """

    told: Told | None = None
    members: tuple[Profile, ...] = ()


Event: TypeAlias = (
    ClientJoined
    | ClientLost
    | UpdateArrived
    | EdgeJoined
    | EdgeReported
    | TaskFailed
    | TimerFired
    | Scored
    | TaskReceived
    | EdgeLost
    | EdgeReturned
)


# Commands: what the driver must do -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Dispatch:
    """Send this task to its client. The dispatches of one `handle` are a cohort and may be trained together."""

    task: Task


@dataclass(frozen=True, slots=True)
class Cancel:
    """The answer to this task will not count; the client may stop."""

    task: int
    client: ClientId


@dataclass(frozen=True, slots=True)
class Publish:
    """A new global version, and the updates that it was made of."""

    version: int
    model: Model
    updates: tuple[Update, ...]


@dataclass(frozen=True, slots=True)
class Evaluate:
    """Score this version and answer with `Scored`."""

    version: int
    model: Model


@dataclass(frozen=True, slots=True)
class Reject:
    """Something from outside was not accepted, and the state is as if it had not come.

    An outstanding task stays outstanding: a driver that expects no better answer follows with `TaskFailed`.
    """

    client: ClientId
    task: int
    reason: str


@dataclass(frozen=True, slots=True)
class Stop:
    """The run is over."""

    reason: str


@dataclass(frozen=True, slots=True)
class Report:
    """Of an edge: its answer to the task that it received, and what it `told` beside it, if the root's plan learns."""

    result: Result
    told: Told | None = None


@dataclass(frozen=True, slots=True)
class Discard:
    """An answer that was accepted, and is in no version, will be in none."""

    task: int
    client: ClientId
    reason: str


@dataclass(frozen=True, slots=True)
class Within:
    """What happens inside a tree of servers, about the outer `task` of this edge: it is told, and nobody has to do anything.

    `Dispatch` and `Cancel` of the outer task, an edge's own `Publish`, `Discard` and `Report`, what the root rejects of it, and
    `Stop`, where an edge ends its task without an answer.
    """

    edge: ClientId
    task: int
    what: Dispatch | Cancel | Publish | Discard | Report | Reject | Stop


@dataclass(frozen=True, slots=True)
class Move:
    """A client goes from its `edge` `to` another one."""

    client: ClientId
    edge: ClientId
    to: ClientId


@dataclass(frozen=True, slots=True)
class Regroup:
    """After this version the groups were made anew, since clients' times had drifted by more than `threshold`: these are to move.

    `drift` is `group.drift` of the times now from those at which the groups were made before.
    """

    version: int
    drift: float
    threshold: float
    moves: tuple[Move, ...]


@dataclass(frozen=True, slots=True)
class Moved:
    """This move is done; `places` are the most clients that may be at work at once from now on."""

    move: Move
    places: int


Command: TypeAlias = (
    Dispatch | Cancel | Publish | Evaluate | Reject | Stop | Report | Discard | Within | Regroup | Moved
)


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
