"""Who can be reached, whatever the server believes: availability and drop-outs, turned into events for the server.

The heap of the simulation holds changes of clients besides the server's own events; here it is decided which events the server gets
of them. All state is in two small tables; every draw is named by seed, client and task, so that no random stream has to be saved.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import TypeAlias

from fedloom.core.coordinator import StateView
from fedloom.core.events import ClientJoined, ClientLost, Event, TaskFailed
from fedloom.core.types import ClientId, Profile, Task
from fedloom.simulate.availability import Stays
from fedloom.simulate.faults import Faults, Vanished


@dataclass(frozen=True, slots=True)
class AvailabilityChanged:
    """A window of availability opens or closes for this client."""

    client: ClientId


@dataclass(frozen=True, slots=True)
class AbsenceNoticed:
    """The server finds out that this client vanished in this task."""

    client: ClientId
    task: int


@dataclass(frozen=True, slots=True)
class Returned:
    """A client that vanished can be reached again."""

    client: ClientId


ClientChange: TypeAlias = AvailabilityChanged | Vanished | AbsenceNoticed | Returned


@dataclass(frozen=True, slots=True)
class Consequences:
    """Consequences of a change of a client.

    Fields:
        events: for the server, now.
        scheduled: events and changes to come, with their times.
        dropped_task: the task whose work is lost (None: no task).
        back: when the client can be reached again (virtual seconds).
    """

    events: tuple[Event, ...] = ()
    scheduled: tuple[tuple[float, Event | ClientChange], ...] = ()
    dropped_task: int | None = None
    back: float = 0.0


NOTHING = Consequences()


@dataclass(slots=True)
class Presence:
    """Presence of clients: reachable, away, or vanished in the middle of a task.

    Fields:
        stays: periods of availability (None: everybody is always available).
        faults: what goes wrong with tasks (None: nothing).
        seed: that of the run.
        periods: changes of availability of each client so far; an even number means that it is available.
        vanished_in: the task in which a client vanished, for those that have not come back.
    """

    stays: Stays | None = None
    faults: Faults | None = None
    seed: int = 0
    periods: dict[ClientId, int] = field(default_factory=dict)
    vanished_in: dict[ClientId, int] = field(default_factory=dict)

    def apply(self, now: float, what: ClientChange, profile: Profile, state: StateView) -> Consequences:
        """Carry out a change of the client with this profile; `state` is what the server believes."""
        client = profile.client
        match what:
            case AvailabilityChanged():
                return self._switch(now, profile, state)
            case Vanished(_, number) if self.faults:
                self.vanished_in[client] = number
                back = now + self.faults.outage(client, number, self.seed)
                notice = now + self.faults.notice
                return Consequences(
                    (), ((notice, AbsenceNoticed(client, number)), (back, Returned(client))), number, back
                )
            case AbsenceNoticed(_, number) if self.vanished_in.get(client) == number:
                return _lose(client, state, now)
            case Returned():
                del self.vanished_in[client]
                return _join(profile, state) if self._available(client) else NOTHING
        return NOTHING

    def interruption(self, task: Task, seconds: float) -> tuple[float, TaskFailed | Vanished] | None:
        """Return what stops this task of so many seconds, and after how many (None: nothing does)."""
        return self.faults.interruption(task, seconds, self.seed) if self.faults else None

    def comes_late(self, client: ClientId, task: int) -> bool:
        """Whether the answer to this task is sent although it was dropped."""
        return self.faults is not None and self.faults.comes_late(client, task, self.seed)

    def _switch(self, now: float, profile: Profile, state: StateView) -> Consequences:
        """Go on to the next period that has a length."""
        client, length = profile.client, 0.0 if self.stays else math.inf
        while self.stays and not length:
            self.periods[client] = self.periods.get(client, -1) + 1
            length = self.stays.stay(client, self.periods[client])
        scheduled = ((now + length, AvailabilityChanged(client)),)
        if not self._available(client):
            return replace(_lose(client, state, now + length), scheduled=scheduled)
        reachable = client not in self.vanished_in and not _known_to_server(client, state)
        return Consequences((ClientJoined(profile),) if reachable else (), scheduled)

    def _available(self, client: ClientId) -> bool:
        return self.periods.get(client, 0) % 2 == 0


def _known_to_server(client: ClientId, state: StateView) -> bool:
    return client in state.working or client in state.idle or client in state.resting


def _join(profile: Profile, state: StateView) -> Consequences:
    """Let a client join. It has lost the task that the server believes it at work on, and says so."""
    if profile.client not in state.working:
        return Consequences((ClientJoined(profile),))
    _, number = state.working[profile.client]
    failed = TaskFailed(profile.client, number, "the client was cut off and has lost its work")
    return Consequences((ClientJoined(profile), failed))


def _lose(client: ClientId, state: StateView, back: float) -> Consequences:
    if not _known_to_server(client, state):
        return NOTHING
    number = state.working[client][1] if client in state.working else None
    return Consequences((ClientLost(client),), (), number, back)
