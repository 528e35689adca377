"""Groups of a running tree made anew: when members' times have drifted, who moves, when, and what of a client moves along.

HierFedLoRA (Liu et al., arXiv 2503.21213, 2025) and ParallelSFL (arXiv 2410.01256, 2024) make groups from measured times. When they
are made again, and how members change over, is our own choice (docs/decisions/0026).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean

from fedloom.core.events import Move, Regroup
from fedloom.core.model_shape import Shape
from fedloom.core.server import State
from fedloom.core.types import ClientId, GroupLog, MemberWork
from fedloom.hierarchy.group_statistics import KEPT
from fedloom.hierarchy.grouping import Grouping, Groups, Member, checked, drift, matched
from fedloom.hierarchy.joint_plan.joint_plan import history
from fedloom.hierarchy.tree_state import Branches, Roster
from fedloom.plan.client_cost import moving

Logs = dict[ClientId, GroupLog]


@dataclass(frozen=True, slots=True)
class Compared:
    """By what clients are compared: all that a grouping was told of them, and the task whose seconds it was told.

    It is one of so many steps at this rank and the full depth, with `tokens` in all of them together.
    """

    members: tuple[Member, ...]
    rank: int
    steps: int
    tokens: int

    def seconds(self, spent: Sequence[MemberWork], shape: Shape) -> float:
        """Of such a task, by what a member did last, oldest first: each part a moving average of what it would have taken.

        Training is as long as its FLOP, messages as their bytes in float32, whatever rank and depth a task had. 0: it did nothing.
        """
        flops = [shape.train_flops(self.tokens, one.rank, one.depth) for one in spent]
        work, size = self.steps * shape.train_flops(self.tokens, self.rank), shape.payload(self.rank)
        train = moving(work * one.train / (one.steps * own) for one, own in zip(spent, flops, strict=True))
        down = moving(size * one.down / (one.answers * shape.payload(one.rank)) for one in spent)
        up = moving(size * one.up / (one.answers * shape.payload(one.rank, one.depth)) for one in spent)
        return train + down + up


@dataclass(frozen=True, slots=True)
class Regrouping:
    """Asks `grouping` again when the drift of times is above `threshold`."""

    grouping: Grouping
    threshold: float
    compared: Compared
    seed: int

    def learn(self, logs: Logs, branches: Branches, edge: ClientId, shape: Shape) -> None:
        """After the root heard from this edge: lines of members who have left go to where they are now, and times are new."""
        members = histories(logs[edge])
        for one in logs[edge].told[-1].work:
            did: Sequence[MemberWork] = members[one.client]
            if (here := branches.edge_of[one.client]) != edge:
                logs[here] = _remembering(logs[here], one.client, (one,))
                logs[edge] = _without(logs[edge], one.client)
                did = history(logs[here], one.client)
            if (took := self.compared.seconds(did, shape)) > 0:
                branches.seconds[one.client] = took

    def ask(self, logs: Logs, branches: Branches, version: int) -> Regroup | None:
        """Make groups anew after this version, if it is time; who moves is `leaving` then. Raises Refused for what are no groups."""
        now = estimated(branches.grouped, branches.seconds)
        if not (found := drift(branches.grouped, now)) > self.threshold:
            return None
        members = [replace(one, seconds=now[one.client]) for one in self.compared.members]
        before = wanted(branches)
        after = matched(before, checked(self._groups(before, members), members))
        homes = {client: edge for edge, group in zip(branches.edges, after, strict=True) for client in group}
        branches.grouped = now
        branches.leaving = {one: homes[one] for one in sorted(homes) if homes[one] != branches.edge_of[one]}
        moves = tuple(Move(one, branches.edge_of[one], to) for one, to in branches.leaving.items())
        return Regroup(version, found, self.threshold, moves)

    def _groups(self, before: Groups, members: Sequence[Member]) -> Groups:
        """From those before, where the grouping can do that."""
        again = getattr(self.grouping, "again", None)
        found: Groups = again(before, members, self.seed) if again else self.grouping(members, self.seed)
        return found


def wanted(branches: Branches) -> Groups:
    """The groups as they were made last, also where a member has not moved yet: their sizes are those that were asked for."""
    groups: dict[ClientId, list[ClientId]] = {edge: [] for edge in branches.edges}
    for client, edge in branches.edge_of.items():
        groups[branches.leaving.get(client, edge)].append(client)
    return tuple(map(tuple, groups.values()))


def histories(log: GroupLog) -> dict[ClientId, list[MemberWork]]:
    """What each member did, as `history` has it, of all at once."""
    found = {client: list(spent) for client, spent in log.past.items()}
    for told in log.told:
        for one in told.work:
            found.setdefault(one.client, []).append(one)
    return found


def estimated(before: Mapping[ClientId, float], measured: Mapping[ClientId, float]) -> dict[ClientId, float]:
    """All clients' seconds now. Of one not measured what was known before, times what the others turned out to take of theirs.

    So a unit that all have in common (shorter texts, smaller messages) is no drift.
    """
    ratios = [math.log(max(took, 1e-9) / max(before[one], 1e-9)) for one, took in measured.items()]
    common = math.exp(fmean(ratios)) if ratios else 1.0
    return {one: measured[one] if one in measured else common * was for one, was in before.items()}


def ready(logs: Logs, branches: Branches) -> list[Move]:
    """The moves that can be done now, all together: from edges without a task, so that nothing of a member is under way or waits.

    No edge loses its last member, nor the last of those that can be reached.
    """
    moves = [
        Move(client, branches.edge_of[client], to)
        for client, to in branches.leaving.items()
        if branches.edges[branches.edge_of[client]].server.outer is None
    ]
    while late := _last(moves, logs, branches):
        moves.remove(late)
    return moves


def _last(moves: Sequence[Move], logs: Logs, branches: Branches) -> Move | None:
    """One of these moves that leaves an edge without a member, or without one that can be reached."""
    reached = [one for one in moves if one.client in branches.edges[one.edge].server.idle]
    for who, there in (
        (moves, {edge: len(log.members) for edge, log in logs.items()}),
        (reached, {edge: len(state.server.idle) for edge, state in branches.edges.items()}),
    ):
        after = Counter(there)
        after.update(one.to for one in who)
        after.subtract(one.edge for one in who)
        if late := next((one for one in who if not after[one.edge]), None):
            return late
    return None


def change(root: State, branches: Branches, roster: Roster, move: Move) -> None:
    """Who belongs to which edge, what both edges and the root know of the client and its groups."""
    old, new = branches.edges[move.edge].server, branches.edges[move.to].server
    for table in ("seen", "dispatched", "worked", "pruned"):
        if move.client in getattr(old, table):
            getattr(new, table)[move.client] = getattr(old, table).pop(move.client)
    before, after = root.groups[move.edge], root.groups[move.to]
    (profile,) = (one for one in before.members if one.client == move.client)
    after = replace(_remembering(after, move.client, history(before, move.client)), members=(*after.members, profile))
    before = replace(
        _without(before, move.client), members=tuple(one for one in before.members if one.client != move.client)
    )
    for edge, log in ((move.edge, before), (move.to, after)):
        root.groups[edge] = replace(log, edge=roster.profile(edge, log.members)) if log.members else log
    branches.edge_of[move.client] = move.to
    del branches.leaving[move.client]


def _remembering(log: GroupLog, client: ClientId, spent: Sequence[MemberWork]) -> GroupLog:
    """With what a client did elsewhere."""
    past = (*log.past.get(client, ()), *spent)[-KEPT:]
    return replace(log, past={**log.past, client: past}) if past else log


def _without(log: GroupLog, client: ClientId) -> GroupLog:
    """With the work of a client who has left, but not whose it was."""
    told = tuple(
        replace(one, work=tuple(replace(line, client="") if line.client == client else line for line in one.work))
        for one in log.told
    )
    return replace(log, told=told, past={name: past for name, past in log.past.items() if name != client})
