"""How a schedule's places are used: seconds of work, of waiting, and of being held back for the next version.

A place is one of the `max_in_flight` tasks that a schedule lets be under way at once. Integrals are over virtual or real time, so
what is free for a moment only, between two events of one time, counts nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from fedloom.core.events import (
    Cancel,
    ClientJoined,
    ClientLost,
    Command,
    Discard,
    Dispatch,
    Event,
    Moved,
    Publish,
    Stop,
    TaskFailed,
    UpdateArrived,
    Within,
)
from fedloom.core.types import ClientId


@dataclass(slots=True)
class Places:
    """Who works in the `total` places, who is idle, and who is `held`: idle, with an answer that is in no version yet.

    The tables tell the task of who works or is held, and since when who is idle. `working_seconds` is the integral over time of
    the clients at work, `waiting_seconds` of min(free places, idle clients), `held_seconds` of min(free places, held clients): a
    round that is not closed holds whoever answered, and a place whose client failed waits without holding anybody. Work and waiting
    together are what the places could have done. Memory: O(clients).
    """

    total: int
    now: float = 0.0
    working_seconds: float = 0.0
    waiting_seconds: float = 0.0
    held_seconds: float = 0.0
    idle: dict[ClientId, float] = field(default_factory=dict)
    working: dict[ClientId, int] = field(default_factory=dict)
    held: dict[ClientId, int] = field(default_factory=dict)
    stopped: bool = False

    def take(self, now: float, event: Event, refused: bool) -> None:
        """The time since the last step, and what happened then."""
        if self.stopped:
            return
        self._passed(now)
        if not refused:
            self._taken(event)

    def _passed(self, now: float) -> None:
        span, self.now = now - self.now, now
        free = self.total - len(self.working)
        self.working_seconds += span * len(self.working)
        self.waiting_seconds += span * min(free, len(self.idle))
        self.held_seconds += span * min(free, len(self.held))

    def _taken(self, event: Event) -> None:
        match event:
            case ClientJoined(profile) if profile.client not in self.working:
                self.idle.setdefault(profile.client, self.now)
            case ClientLost(client):
                self.idle.pop(client, None)
                self.working.pop(client, None)
                self.held.pop(client, None)
            case UpdateArrived(client, number, _):
                self._released(client)
                self.held[client] = number
            case TaskFailed(client):
                self._released(client)

    def follow(self, command: Command) -> None:
        """What the server decided on it, command by command."""
        match command:
            case Dispatch(task):
                del self.idle[task.client]
                self.held.pop(task.client, None)
                self.working[task.client] = task.id
            case Cancel(_, client):
                self._released(client)
            case Publish(_, _, updates) | Within(_, _, Publish(_, _, updates)):
                for update in updates:
                    if self.held.get(update.task.client) == update.task.id:
                        del self.held[update.task.client]
            case Within(_, _, Discard(number, client, _)) if self.held.get(client) == number:
                del self.held[client]
            case Moved(_, places):
                self.total = places
            case Stop():
                self.stopped = True

    def _released(self, client: ClientId) -> None:
        del self.working[client]
        self.idle[client] = self.now
