"""Who is really there, whatever the server believes: windows of availability and drop-outs, turned into events for the server.

The heap of the simulation holds what happens to clients beside the server's own events; here it is decided what the server is told
of it. All state is in two small tables; every draw is named, so nothing of a stream has to be saved.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import TypeAlias

from fedloom.core.events import ClientJoined, ClientLost, Event, TaskFailed
from fedloom.core.server import State
from fedloom.core.types import ClientId, Profile, Task
from fedloom.hierarchy.tree_state import Whole
from fedloom.simulate.availability import Stays
from fedloom.simulate.faults import Faults, Vanished


@dataclass(frozen=True, slots=True)
class Switched:
    """A client's window of availability opens or closes."""

    client: ClientId


@dataclass(frozen=True, slots=True)
class Noticed:
    """The server finds out that this client vanished in this task."""

    client: ClientId
    task: int


@dataclass(frozen=True, slots=True)
class Returned:
    """A client that vanished can be reached again."""

    client: ClientId


Happening: TypeAlias = Switched | Vanished | Noticed | Returned


@dataclass(frozen=True, slots=True)
class After:
    """What follows: events for the server, what is to come, and the task whose work is lost with a client away until `back`."""

    told: tuple[Event, ...] = ()
    ahead: tuple[tuple[float, Event | Happening], ...] = ()
    dropped: int | None = None
    back: float = 0.0


NOTHING = After()


@dataclass(slots=True)
class Presence:
    """`periods` counts the changes of availability of each client (even: a window is open), `out` names the task that a client
    vanished in. Without `stays` everybody is always available, without `faults` nothing goes wrong.
    """

    stays: Stays | None = None
    faults: Faults | None = None
    seed: int = 0
    periods: dict[ClientId, int] = field(default_factory=dict)
    out: dict[ClientId, int] = field(default_factory=dict)

    def happens(self, now: float, what: Happening, profile: Profile, state: State | Whole) -> After:
        """Carry it out; `profile` is the client's, `state` what the server believes."""
        client = profile.client
        match what:
            case Switched():
                return self._switch(now, profile, state)
            case Vanished(_, number) if self.faults:
                self.out[client] = number
                back = now + self.faults.outage(client, number, self.seed)
                notice = now + self.faults.notice
                return After((), ((notice, Noticed(client, number)), (back, Returned(client))), number, back)
            case Noticed(_, number) if self.out.get(client) == number:
                return _lost(client, state, now)
            case Returned():
                del self.out[client]
                return _joined(profile, state) if self._available(client) else NOTHING
        return NOTHING

    def befalls(self, task: Task, seconds: float) -> tuple[float, TaskFailed | Vanished] | None:
        """What stops this task of so many seconds, and after how many; None: nothing does."""
        return self.faults.befalls(task, seconds, self.seed) if self.faults else None

    def comes_late(self, client: ClientId, task: int) -> bool:
        """Whether the answer to this task is sent although it was dropped."""
        return self.faults is not None and self.faults.comes_late(client, task, self.seed)

    def _switch(self, now: float, profile: Profile, state: State | Whole) -> After:
        """Into the next period that has a length."""
        client, length = profile.client, 0.0 if self.stays else math.inf
        while self.stays and not length:
            self.periods[client] = self.periods.get(client, -1) + 1
            length = self.stays.stay(client, self.periods[client])
        ahead = ((now + length, Switched(client)),)
        if not self._available(client):
            return replace(_lost(client, state, now + length), ahead=ahead)
        reachable = client not in self.out and not _known(client, state)
        return After((ClientJoined(profile),) if reachable else (), ahead)

    def _available(self, client: ClientId) -> bool:
        return self.periods.get(client, 0) % 2 == 0


def _known(client: ClientId, state: State | Whole) -> bool:
    return client in state.working or client in state.idle


def _joined(profile: Profile, state: State | Whole) -> After:
    """Who is back knows nothing of a task that the server believes it at work on, and says so."""
    if profile.client not in state.working:
        return After((ClientJoined(profile),))
    _, number = state.working[profile.client]
    failed = TaskFailed(profile.client, number, "the client was cut off and has lost its work")
    return After((ClientJoined(profile), failed))


def _lost(client: ClientId, state: State | Whole, back: float) -> After:
    if not _known(client, state):
        return NOTHING
    number = state.working[client][1] if client in state.working else None
    return After((ClientLost(client),), (), number, back)
