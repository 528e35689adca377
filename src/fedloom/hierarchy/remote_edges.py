"""The root of a hierarchy whose edges are elsewhere: a server that learns what they tell with their reports, as the root of a tree.

An edge in the same process is trusted; one that is elsewhere is not. So what it says of its group is checked here before it is
written down, also whether the plan has an answer to it, and refused with the report that it came with.
"""

from __future__ import annotations

from dataclasses import replace

from fedloom.core.errors import Refused
from fedloom.core.events import EdgeJoined, EdgeReported, Event, Reject
from fedloom.core.policies import Assign, Fleet
from fedloom.core.server import Server
from fedloom.core.types import GroupLog
from fedloom.core.validate_answer import fault, untellable
from fedloom.hierarchy.edge_model import narrowed
from fedloom.hierarchy.group_statistics import learnt


class OverRegions(Server):
    """A server whose clients are edges: `EdgeJoined` says who they lead, `EdgeReported` what their plan is to learn."""

    def _take(self, event: Event) -> Reject | None:
        """What is new of a group, then as any server."""
        if isinstance(event, EdgeJoined) and (reason := self._joined(event)):
            return Reject(event.profile.client, 0, reason)
        if isinstance(event, EdgeReported) and self._awaited(event) and (reason := self._reported(event)):
            return Reject(event.client, event.task, reason)
        return Server._take(self, event)

    def _awaited(self, event: EdgeReported) -> bool:
        working = self.state.working
        return event.client in working and working[event.client][1] == event.task

    def _joined(self, event: EdgeJoined) -> str | None:
        """What an edge told before it was away is still known."""
        edge = event.profile
        known = self.state.groups.get(edge.client, GroupLog(edge, ()))
        return self._known(replace(known, edge=edge, members=event.members or known.members))

    def _reported(self, event: EdgeReported) -> str | None:
        """Also, the task is now the one that was answered: without the layers that no member trained."""
        asked = self.state.busy[event.task]
        task, group = narrowed(asked, event.result), self.state.groups.get(event.client)
        if reason := fault(task, event.result):
            return reason
        if event.told is not None and group is not None:
            if reason := untellable(asked, event.told, self.shape):
                return reason
            if reason := self._known(learnt(replace(group, members=event.members or group.members), event.told)):
                return reason
        self.state.busy[event.task] = task
        return None

    def _known(self, group: GroupLog) -> str | None:
        """Write down what is known of a group, unless the plan has nothing for it: then why."""
        reason = unplanned(self.assign, self.fleet(), group)
        if reason is None:
            self.state.groups[group.edge.client] = group
        return reason


def unplanned(assign: Assign, fleet: Fleet, group: GroupLog) -> str | None:
    """Why a plan has nothing for a group, beside the others of the fleet; None: it has."""
    try:
        assign(group.edge, replace(fleet, groups={**fleet.groups, group.edge.client: group}))
    except Refused as error:
        return str(error)
    return None
