"""How the slots of a schedule are used: seconds of work, of waiting, and of being held back for the next version.

A slot is one of the `max_in_flight` tasks that a schedule lets be under way at once. Integrals are over virtual or real time, so
what is free for a moment only, between two events of one time, counts nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from fedloom.core.events import ClientJoined, ClientLost, Moved, Stop
from fedloom.core.types import ClientId
from fedloom.runs.observation import Fact, TaskAnswered, TaskEnded, TaskSent


@dataclass(slots=True)
class SlotUsage:
    """Integrals over time of the clients at work and of the slots that are free.

    A round that is not closed holds whoever answered; a slot whose client failed waits without holding anybody. Work and waiting
    together are what the slots could have done. Memory: O(clients).

    Fields:
        total: slots.
        now: until when it is counted (seconds).
        working_seconds: integral of the clients at work.
        waiting_seconds: integral of min(free slots, idle clients).
        held_seconds: integral of min(free slots, held clients).
        idle: clients without a task, and since when.
        working: the task of each client at work.
        held: idle clients whose answer is in no version yet, and its task.
        stopped: whether the run is over.
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

    def advance(self, now: float) -> None:
        """Count the time since the last step; to be called before the facts of a step are followed."""
        if self.stopped:
            return
        span, self.now = now - self.now, now
        free = self.total - len(self.working)
        self.working_seconds += span * len(self.working)
        self.waiting_seconds += span * min(free, len(self.idle))
        self.held_seconds += span * min(free, len(self.held))

    def follow(self, fact: Fact) -> None:
        """Take in one fact of the step."""
        if self.stopped:
            return
        match fact:
            case TaskSent(task):
                del self.idle[task.client]
                self.held.pop(task.client, None)
                self.working[task.client] = task.id
            case TaskAnswered(client, number) if not fact.refused:
                self._release(client)
                self.held[client] = number
            case TaskEnded() if not fact.by_edge:
                self._end(fact)
            case ClientJoined(profile) if profile.client not in self.working:
                self.idle.setdefault(profile.client, self.now)
            case ClientLost(client):
                self.idle.pop(client, None)
                self.working.pop(client, None)
                self.held.pop(client, None)
            case Moved(_, max_in_flight):
                self.total = max_in_flight
            case Stop():
                self.stopped = True

    def _end(self, ended: TaskEnded) -> None:
        client, number = ended.open.task.client, ended.open.task.id
        if ended.status in ("failed", "cancelled"):
            self._release(client)
        elif self.held.get(client) == number:
            del self.held[client]

    def _release(self, client: ClientId) -> None:
        del self.working[client]
        self.idle[client] = self.now
