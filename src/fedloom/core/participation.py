"""Privacy as the server enforces it: how often a client may take part, how far apart, and by which mechanism versions are released.

A client that may not start now rests: it is neither idle nor at work, so no schedule sees it. Whether it may follows from its answers
that were merged, and from those that wait to be. Answers that are never merged (late ones of a round) do not count, because nothing
is released of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from fedloom.core.events import Release, ReleasesCounted, SetAside
from fedloom.core.policies import Aggregator, Merge
from fedloom.core.server_state import State
from fedloom.core.types import ClientId, Model, Profile, Update


@dataclass(frozen=True, slots=True)
class Participation:
    """Largest number of a client's answers, and the least distance of their merges.

    Fields:
        most_answers: answers of one client that may be merged in the whole run.
        apart: versions from one merge of a client to its next, at least; above 1 one version holds one answer of a client.
        tasks: whether tasks are counted that were handed out, merged or not (for answers that are releases themselves).
    """

    most_answers: int
    apart: int = 1
    tasks: bool = False

    def may_start(self, state: State, client: ClientId) -> bool:
        """Return whether this client may be given a task now: no answer to it can be one too many, or too early."""
        if self.tasks:
            return state.dispatched.get(client, 0) < self.most_answers
        waiting = sum(update.task.client == client for update in state.arrived)
        if state.merged.get(client, 0) + waiting >= self.most_answers:
            return False
        if self.apart == 1:
            return True
        # an answer is in the version after this one at the earliest
        early = client in state.last_merged and state.version + 1 - state.last_merged[client] < self.apart
        return not waiting and not early

    def why_nobody_starts(self, state: State) -> str | None:
        """Return why a run cannot go on: nobody works, and nobody who ever joined may start; None if it can."""
        if state.busy or state.idle or not state.resting:
            return None
        if any(self.may_start(state, client) for client in state.registered):  # it is away, and may come back
            return None
        if self.apart > 1 and any(state.merged.get(client, 0) < self.most_answers for client in state.resting):
            return f"no client may be merged before {self.apart} versions have passed, and none can be made without one"
        return f"every client has given the {self.most_answers} answers that the run's privacy allows it"


class Mechanism(Protocol):
    """Privacy mechanism of a server: it stands between answers and aggregator, and bounds what a version tells of a client."""

    def release(self, aggregator: Aggregator, state: State, merge: Merge) -> tuple[Model, Release]:
        """Return the next model, and what it tells of whom."""
        ...


def count_releases(
    participation: Participation, state: State, counted: ReleasesCounted
) -> tuple[list[SetAside], list[int]]:
    """Count releases that this state does not know, and return what must not be merged any more.

    These are waiting answers that were taken out, and numbers of outstanding tasks, of clients that would be merged too often or
    too early with them.
    """
    aside, tasks = list[SetAside](), list[int]()
    for client, times in counted.merged.items():
        state.merged[client] = state.merged.get(client, 0) + times
        state.last_merged[client] = max(counted.last[client], state.last_merged.get(client, 0))
        waiting = [update.task.id for update in state.arrived if update.task.client == client]
        working = [state.working[client][1]] if client in state.working else []
        too_many = state.merged[client] + len(waiting) + len(working) > participation.most_answers
        if too_many or participation.apart > 1:
            reason = "it may be in a version that was released before the server was started anew"
            aside += [SetAside(client, number, reason) for number in waiting]
            tasks += working
    state.drop_arrived({one.task for one in aside})
    for profile in [profile for client, profile in state.idle.items() if client in counted.merged]:
        state.idle.take(profile.client)
        place_client(participation, state, profile)
    return aside, tasks


def place_client(participation: Participation | None, state: State, profile: Profile) -> None:
    """Make a client without a task idle, or let it rest."""
    if participation is None or participation.may_start(state, profile.client):
        state.resting.pop(profile.client, None)
        state.idle.put(profile.client, profile)
    else:
        state.resting[profile.client] = profile


def count_merged(participation: Participation, state: State, updates: Sequence[Update]) -> None:
    """Count the answers in the version that was just made, and wake the clients that may start now."""
    for update in updates:
        client = update.task.client
        state.merged[client] = state.merged.get(client, 0) + 1
        state.last_merged[client] = state.version
    for profile in list(state.resting.values()):
        place_client(participation, state, profile)
