"""The root of a hierarchy: a server whose clients are edges, in the same process or elsewhere.

It wraps a plain `Server` and adds what only edges tell: who their members are (`EdgeJoined`), and with an answer which layers were
trained and how the work went (`EdgeReported`). Both are written down before the server decides, so that its plan knows them.

State. Only that of the server, with what is known of each group in `State.groups`; a checkpoint needs nothing else. The server's
state is changed through its methods alone (`set_group`, `narrow_task`).

Callers. `Tree`, which holds the edges itself, and the driver of a deployment, whose clients are regions. Both deliver events through
`handle(now, event)`, and carry out the commands of the server, which are addressed to edges.

What may fail. Edges in one process are `trusted`. Others are not: it is checked whether a member is somebody else's, then an answer,
then the statistics, then whether the plan has a budget for the group as it would be known from now on. The first that fails refuses
the whole event with a `Reject`.

Promises. A refused event changes nothing: neither the model nor what is known of any group. A report counts once. What was
known of an edge that was away is still known when it joins again. The task of an accepted report is the part of it that was
trained, so layers that no member trained have no part in the next version.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from fedloom.core.change_norms import NormLimits
from fedloom.core.errors import Refused
from fedloom.core.events import Command, EdgeJoined, EdgeReported, Event, Reject
from fedloom.core.model_shape import Shape
from fedloom.core.policies import BudgetRule, Fleet
from fedloom.core.server import Server
from fedloom.core.server_state import State
from fedloom.core.types import ClientId, GroupHistory, Profile
from fedloom.core.validate_answer import why_invalid_statistics
from fedloom.hierarchy.edge import trained_part
from fedloom.hierarchy.group_statistics import with_statistics


def no_listener(edge: ClientId) -> None:
    """Do nothing about statistics that were written down."""


class RootServer:
    """A server over edges, as a `Coordinator`."""

    def __init__(self, server: Server, trusted: bool, learned: Callable[[ClientId], None] = no_listener) -> None:
        """Wrap `server`, which has done nothing yet.

        Args:
            server: holds the global model and the policies of the root.
            trusted: the edges are part of this process, and what they report is not checked: they judged each answer of a member, and
                a merge of few low ranks may rightly move the factors further than training does.
            learned: called with an edge whose statistics were written down, before the server plans with them.
        """
        self.server, self.trusted, self.learned = server, trusted, learned
        if trusted:
            server.norm_limits = NormLimits()

    @property
    def state(self) -> State:
        """The server's state."""
        return self.server.state

    @property
    def shape(self) -> Shape:
        """Sizes of the model."""
        return self.server.shape

    @property
    def max_in_flight(self) -> int:
        """The most edges that may be at work at once."""
        return self.server.max_in_flight

    @property
    def edges(self) -> tuple[ClientId, ...]:
        """Empty: the edges are clients, and number no tasks here."""
        return ()

    def handle(self, now: float, event: Event) -> list[Command]:
        """Return what to do about `event`. Raises ValueError if time runs backwards."""
        self.server.advance(now)
        if not self.state.stopped and (rejected := self._learn(event)):
            return [rejected]
        return self.server.handle(now, event)

    def wake(self) -> float | None:
        """Return the latest time at which to call `handle` again."""
        return self.server.wake()

    def fleet(self) -> Fleet:
        """Return the view that policies get."""
        return self.server.fleet()

    def parts_to_save(self) -> tuple[State]:
        """Return the server's state."""
        return self.server.parts_to_save()

    def manifest_sections(self) -> dict[str, Any]:
        """Return the members of each edge, as far as edges have said who they are."""
        groups = self.state.groups
        members = {edge: [profile.client for profile in groups[edge].members] for edge in sorted(groups)}
        return {"groups": members} if members else {}

    def task_of(self, edge: ClientId) -> int:
        """Return the number of the task that this edge works on; 0: none."""
        working = self.state.working
        return working[edge][1] if edge in working else 0

    def _learn(self, event: Event) -> Reject | None:
        """Write down what the event tells of a group, or refuse the event."""
        if isinstance(event, EdgeJoined):
            edge = event.profile.client
            reason = self._why_led_elsewhere(edge, event.members) or self._why_cannot_join(event)
            return Reject(edge, 0, reason) if reason else None
        if isinstance(event, EdgeReported) and event.task == self.task_of(event.client) != 0:
            reason = self._why_not_accepted(event)
            return Reject(event.client, event.task, reason) if reason else None
        return None

    def _why_cannot_join(self, event: EdgeJoined) -> str | None:
        """Write down edge and members, unless the plan has nothing for them: then return why."""
        edge = event.profile
        history = self.state.groups.get(edge.client, GroupHistory(edge, ()))
        return self._why_not_planned(replace(history, edge=edge, members=event.members or history.members))

    def _why_not_accepted(self, event: EdgeReported) -> str | None:
        """Write down a report and narrow its task, unless something of it is wrong: then return what."""
        task, statistics = self.state.busy[event.task], event.statistics
        trained, history = trained_part(task, event.result), self.state.groups.get(event.client)
        if not self.trusted and (reason := self.server.why_refused(trained, event)):
            return reason
        if reason := self._why_led_elsewhere(event.client, event.members):
            return reason
        if statistics is not None and history is not None:
            if not self.trusted and (reason := why_invalid_statistics(task, statistics, self.shape)):
                return reason
            history = replace(history, members=event.members or history.members)
            if reason := self._why_not_planned(with_statistics(history, statistics)):
                return reason
            self.learned(event.client)
        self.server.narrow_task(trained)
        return None

    def _why_led_elsewhere(self, edge: ClientId, members: Sequence[Profile]) -> str | None:
        """Return which of these members is one of somebody else who is here, or a client here itself; None: none is.

        Each site works for one region: where two name it, it is that of the one that joined first.
        """
        if self.trusted:
            return None
        names = [edge, *(member.client for member in members if member.client != edge)]
        if len(set(names)) < len(names):
            return "it names a site twice"
        for other in {*self.state.idle, *self.state.working} - {edge}:
            led = {other, *(member.client for member in self.state.groups[other].members)}
            if twice := led.intersection(names):
                name = min(twice)
                return (
                    f"{name!r} is a client here"
                    if name == other
                    else f"{name!r} is a site of {other!r}, and of one region only"
                )
        return None

    def _why_not_planned(self, history: GroupHistory) -> str | None:
        """Write down what is known of a group, unless the plan has no budget for it: then return why."""
        if not self.trusted and (reason := why_unplanned(self.server.budget_rule, self.fleet(), history)):
            return reason
        self.server.set_group(history.edge.client, history)
        return None


def why_unplanned(plan: BudgetRule, fleet: Fleet, history: GroupHistory) -> str | None:
    """Return why a plan has no budget for a group among the others of the fleet; None: it has one."""
    try:
        plan(history.edge, replace(fleet, groups={**fleet.groups, history.edge.client: history}))
    except Refused as error:
        return str(error)
    return None
