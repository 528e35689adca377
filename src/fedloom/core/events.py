"""(to be written)"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeAlias

from fedloom.core.types import ClientId, Model, Profile, Result, Task, GroupStatistics, Update

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

    told: GroupStatistics | None = None
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
    told: GroupStatistics | None = None


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
