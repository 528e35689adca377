"""Events and commands: the two languages that the server and its drivers speak.

An event says what happened outside (`Event`: somebody joined, an answer arrived, a timer fired), a command what the driver must
do (`Command`: send a task, evaluate a version, stop). Both are plain frozen values: a run's trace is the list of (time, event,
commands), and replaying the events through a fresh server must give the same commands. The last few of each kind belong to the
hierarchy, where an edge is a client of the root and a server of its members.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

from fedloom.core.codec import Summed
from fedloom.core.lora import Adapter
from fedloom.core.types import ClientId, GroupStatistics, Model, Profile, Result, Task, Update

# Events: what happened outside ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ClientJoined:
    """A client is reachable and idle.

    Joining decides nothing: the next event or timer does, see `Server.wake`.

    Fields:
        profile: what the server knows of the client.
    """

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
    """A client reports that it could not do a task."""

    client: ClientId
    task: int
    reason: str


@dataclass(frozen=True, slots=True)
class PartsReady:
    """A client has done a task whose answer is only summed, and holds its parts. They are not here: the server never sees them."""

    client: ClientId
    task: int


@dataclass(frozen=True, slots=True)
class SlotBlock:
    """Directions that the same clients hold.

    Fields:
        first: index of the first direction.
        last: index after the last one.
        tasks: tasks of the clients that hold them.
    """

    first: int
    last: int
    tasks: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class SumOpened:
    """The sum over the members of a group is known, and nothing else about them.

    Fields:
        task: number of the `OpenSum` that asked for it.
        blocks: what was summed, with the tasks that are in the sum; dense tensors go with the first block.
        sums: sums of the whole numbers of `Summed.integers`, int64, at the rank of the last block; 0 where nothing was summed.
    """

    task: int
    blocks: tuple[SlotBlock, ...]
    sums: Adapter


@dataclass(frozen=True, slots=True)
class SumFailed:
    """A sum could not be opened; no part of it is known.

    Fields:
        task: number of the `OpenSum` that asked for it.
        reason: why not.
    """

    task: int
    reason: str


@dataclass(frozen=True, slots=True)
class ReleasesCounted:
    """A server that was killed goes on from a state without its last releases, which are in its ledger and count.

    Fields:
        merged: by client, how many of these releases it is in.
        last: by client, the version of the last of them.
    """

    merged: Mapping[ClientId, int]
    last: Mapping[ClientId, int]


@dataclass(frozen=True, slots=True)
class TimerFired:
    """The time that `Server.wake` asked for has come."""


@dataclass(frozen=True, slots=True)
class ScoresReady:
    """The evaluation of a version is ready."""

    version: int
    metrics: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class CanaryScored:
    """A model was scored on the canary examples.

    Fields:
        check: number of the `CheckCanary` that asked for it.
        scores: of each example, higher is better; always in the same order.
    """

    check: int
    scores: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class TaskReceived:
    """An edge received the task that its members are to do together."""

    task: Task


@dataclass(frozen=True, slots=True)
class EdgeLost:
    """An edge died.

    Fields:
        edge: name of the edge.
        resumes: whether it comes back with its last inner version and goes on; else all work on its task is lost.
    """

    edge: ClientId
    resumes: bool = False


@dataclass(frozen=True, slots=True)
class EdgeReturned:
    """An edge that died is reachable again."""

    edge: ClientId


@dataclass(frozen=True, slots=True)
class EdgeJoined(ClientJoined):
    """A remote edge, in another process, is reachable and idle.

    Fields:
        profile: what the root knows of the edge.
        members: clients that it leads (empty: it does not say).
    """

    members: tuple[Profile, ...] = ()


@dataclass(frozen=True, slots=True)
class EdgeReported(UpdateArrived):
    """A remote edge answers a task, with the layers that a member trained.

    Fields:
        client: name of the edge.
        task: number of the task.
        result: the answer.
        statistics: what a plan may learn from, where the root's plan learns.
        members: clients that it leads now (empty: it does not say).
    """

    statistics: GroupStatistics | None = None
    members: tuple[Profile, ...] = ()


Event: TypeAlias = (
    ClientJoined
    | ClientLost
    | UpdateArrived
    | EdgeJoined
    | EdgeReported
    | TaskFailed
    | PartsReady
    | SumOpened
    | SumFailed
    | ReleasesCounted
    | TimerFired
    | ScoresReady
    | CanaryScored
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
class Release:
    """The version that follows tells something of these clients' data: to be written down, and synced, before anything goes out.

    Fields:
        version: number of the version that is released, at an edge its inner one.
        task: number of the outer task that an edge works on (0: this is no edge).
        mechanism: how its noise depends on that of other versions.
        norm: largest norm of a client's change (S).
        multiplier: standard deviation of the noise over the most that one client can change here (z).
        shares: by client whose answers are in the version, its weight over the largest weight of a client.
        spent: by client, how far the version moves with its answers, at most, in standard deviations of the noise (mu); also of
            clients in earlier versions, where noise is correlated.
        value: keyed digest of the exact sum: a version that is made again has the same, another one at the same place has not.
    """

    version: int
    task: int
    mechanism: Literal["independent", "banded"]
    norm: float
    multiplier: float
    shares: Mapping[ClientId, float]
    spent: Mapping[ClientId, float]
    value: str


@dataclass(frozen=True, slots=True)
class Publish:
    """A new global version exists.

    Fields:
        version: its number.
        model: the model.
        updates: accepted answers that it was made of.
    """

    version: int
    model: Model
    updates: tuple[Update, ...]


@dataclass(frozen=True, slots=True)
class Evaluate:
    """Evaluate this version and answer with `ScoresReady`."""

    version: int
    model: Model


@dataclass(frozen=True, slots=True)
class CheckCanary:
    """Score this model on the canary examples and answer with `CanaryScored`.

    Fields:
        check: number of the check.
        version: number that the model will have if it is published.
        model: the model.
        without: sites whose answers were left out of it.
    """

    check: int
    version: int
    model: Model
    without: tuple[ClientId, ...] = ()


@dataclass(frozen=True, slots=True)
class SetAside:
    """An accepted answer is taken out of all that is merged from now on: a version with it fails the canary.

    Fields:
        client, task: whose it is, and the number of its task.
        reason: the scores, in words.
    """

    client: ClientId
    task: int
    reason: str


@dataclass(frozen=True, slots=True)
class Reject:
    """A message from outside was not accepted, and the state is as if it had not come.

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
    """An edge answers the task that it received.

    Fields:
        result: the answer.
        statistics: what a plan may learn from, where the root's plan learns.
    """

    result: Result
    statistics: GroupStatistics | None = None


@dataclass(frozen=True, slots=True)
class Discarded:
    """An accepted answer is in no version and will be in none."""

    task: int
    client: ClientId
    reason: str


@dataclass(frozen=True, slots=True)
class InsideEdge:
    """Something happened inside a tree of servers, about the outer task of one edge. Nobody has to do anything.

    Fields:
        edge: name of the edge.
        task: number of the edge's outer task.
        command: `Dispatch` or `Cancel` of the outer task; the edge's own `Release`, `Publish`, `Discarded` or `Report`; `Reject`, of
            what the root refused; `Stop`, where an edge ends its task without an answer.
    """

    edge: ClientId
    task: int
    command: Dispatch | Cancel | Release | Publish | Discarded | Report | Reject | Stop


@dataclass(frozen=True, slots=True)
class Move:
    """A client goes from one edge to another.

    Fields:
        client: name of the client.
        edge: edge that it leaves.
        to: edge that it goes to.
    """

    client: ClientId
    edge: ClientId
    to: ClientId


@dataclass(frozen=True, slots=True)
class OpenSum:
    """Sum the parts of these members, so that nobody sees those of one, and answer with `SumOpened` or `SumFailed`.

    Fields:
        task: number of the sum, which is that of its first task.
        blocks: what is to be summed over whose tasks.
        least: fewest members whose sum may be opened, block by block; a block of fewer is left out.
        threshold: share of the members that have to agree to the opening.
        codec: how the parts are whole numbers.
    """

    task: int
    blocks: tuple[SlotBlock, ...]
    least: int
    threshold: float
    codec: Summed


@dataclass(frozen=True, slots=True)
class Regroup:
    """Groups were made anew after this version, since the clients' times had drifted.

    Fields:
        version: global version after which the groups were made.
        drift: change of the clients' times since the last grouping, see `grouping.time_drift`.
        threshold: drift above which groups are made anew.
        moves: clients that are to move.
    """

    version: int
    drift: float
    threshold: float
    moves: tuple[Move, ...]


@dataclass(frozen=True, slots=True)
class Moved:
    """A move is done.

    Fields:
        move: the move.
        max_in_flight: largest number of clients that may be at work at once from now on.
    """

    move: Move
    max_in_flight: int


Command: TypeAlias = (
    Dispatch
    | Cancel
    | Release
    | Publish
    | Evaluate
    | CheckCanary
    | SetAside
    | Reject
    | Stop
    | Report
    | Discarded
    | InsideEdge
    | OpenSum
    | Regroup
    | Moved
)
