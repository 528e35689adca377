"""Groups of a running tree made again: when members' times have drifted, who moves, when, and what of a client moves along.

HierFedLoRA (Liu et al., arXiv 2503.21213, 2025) and ParallelSFL (arXiv 2410.01256, 2024) make groups from measured times. When they
are made again, and how members change over, is our own choice (docs/decisions/0026).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import TypeAlias

from fedloom.core.events import Move, Regroup
from fedloom.core.model_shape import Shape
from fedloom.core.types import ClientId, GroupHistory, MemberWork
from fedloom.hierarchy.group_statistics import REMEMBERED_TASKS
from fedloom.hierarchy.grouping import Grouping, Groups, Member, match_groups, time_drift, validate_groups
from fedloom.hierarchy.joint_plan.joint_plan import member_history
from fedloom.hierarchy.tree_state import Topology, TreeState
from fedloom.plan.client_cost import moving_mean

Histories: TypeAlias = Mapping[ClientId, GroupHistory]
"""What the root knows of each group, by edge."""


@dataclass(frozen=True, slots=True)
class Compared:
    """Basis on which clients are compared: what a grouping knows of them, and the task whose seconds it knows.

    Fields:
        members: the clients as the grouping saw them first.
        rank: rank of the task, which has the full depth.
        steps: optimiser steps of the task.
        tokens: tokens in all its steps together.
    """

    members: tuple[Member, ...]
    rank: int
    steps: int
    tokens: int

    def seconds(self, history: Sequence[MemberWork], shape: Shape) -> float:
        """Return the seconds that such a task would take a member, from its work so far, oldest first; 0: it did nothing.

        Each part is a moving average of what it would have taken: training is as long as its FLOP, messages as their bytes in
        float32, whatever rank and depth a task had.
        """
        flops = [shape.train_flops(self.tokens, work.rank, work.depth) for work in history]
        whole, size = self.steps * shape.train_flops(self.tokens, self.rank), shape.payload(self.rank)
        train = moving_mean(whole * work.train / (work.steps * flop) for work, flop in zip(history, flops, strict=True))
        down = moving_mean(size * work.down / (work.answers * shape.payload(work.rank)) for work in history)
        up = moving_mean(size * work.up / (work.answers * shape.payload(work.rank, work.depth)) for work in history)
        return train + down + up


@dataclass(frozen=True, slots=True)
class Regrouping:
    """Rule that asks `grouping` again when the drift of times is above `threshold`.

    Fields:
        grouping: makes the groups. One with a method `regrouped(before, members, seed)` is given the groups of before.
        threshold: drift of clients' times (`grouping.time_drift`) above which groups are made again.
        compared: basis on which clients are compared.
        seed: the run's.
    """

    grouping: Grouping
    threshold: float
    compared: Compared
    seed: int

    def learn(self, groups: Histories, below: TreeState, edge: ClientId, shape: Shape) -> dict[ClientId, GroupHistory]:
        """Take in what this edge reported last: measured times, and the work of members who have left since.

        That work goes to the group where they are now. Returns what is known of all groups from now on.
        """
        changed, members = dict(groups), member_histories(groups[edge])
        for work in groups[edge].statistics[-1].work:
            history: Sequence[MemberWork] = members[work.client]
            if (home := below.edge_of[work.client]) != edge:
                changed[home] = _with_past(changed[home], work.client, (work,))
                changed[edge] = _without_member(changed[edge], work.client)
                history = member_history(changed[home], work.client)
            if (took := self.compared.seconds(history, shape)) > 0:
                below.seconds[work.client] = took
        return changed

    def ask(self, below: TreeState, version: int) -> Regroup | None:
        """Make groups again after this version, if it is time; who moves is in `below.leaving`. Raises Refused for invalid groups."""
        now = estimated_seconds(below.grouped, below.seconds)
        if not (drift := time_drift(below.grouped, now)) > self.threshold:
            return None
        members = [replace(member, seconds=now[member.client]) for member in self.compared.members]
        before = target_groups(below)
        after = match_groups(before, validate_groups(self._groups(before, members), members))
        homes = {client: edge for edge, group in zip(below.edges, after, strict=True) for client in group}
        below.grouped = now
        below.leaving = {client: homes[client] for client in sorted(homes) if homes[client] != below.edge_of[client]}
        moves = tuple(Move(client, below.edge_of[client], to) for client, to in below.leaving.items())
        return Regroup(version, drift, self.threshold, moves)

    def _groups(self, before: Groups, members: Sequence[Member]) -> Groups:
        """Return new groups, made from those before where the grouping can do that."""
        regrouped = getattr(self.grouping, "regrouped", None)
        groups: Groups = regrouped(before, members, self.seed) if regrouped else self.grouping(members, self.seed)
        return groups


def target_groups(below: TreeState) -> Groups:
    """Return the groups as they were made last, also where a member has not moved yet: their sizes are those that were asked for."""
    groups: dict[ClientId, list[ClientId]] = {edge: [] for edge in below.edges}
    for client, edge in below.edge_of.items():
        groups[below.leaving.get(client, edge)].append(client)
    return tuple(map(tuple, groups.values()))


def member_histories(history: GroupHistory) -> dict[ClientId, list[MemberWork]]:
    """Return the work of each member, oldest first: `member_history` of all members at once."""
    members = {client: list(work) for client, work in history.past.items()}
    for statistics in history.statistics:
        for work in statistics.work:
            members.setdefault(work.client, []).append(work)
    return members


def estimated_seconds(before: Mapping[ClientId, float], measured: Mapping[ClientId, float]) -> dict[ClientId, float]:
    """Return the seconds of all clients now, from those before and those that were measured since.

    A client without a measurement has its seconds of before, times what the others turned out to take of theirs. So a factor that
    all have in common (shorter texts, smaller messages) is no drift.
    """
    ratios = [math.log(max(took, 1e-9) / max(before[client], 1e-9)) for client, took in measured.items()]
    common = math.exp(fmean(ratios)) if ratios else 1.0
    return {client: measured[client] if client in measured else common * was for client, was in before.items()}


def possible_moves(groups: Histories, below: TreeState) -> list[Move]:
    """Return the moves that can be done now, all together: from edges without a task, so that nothing of a member is under way.

    No edge loses its last member, nor the last of those that can be reached.
    """
    moves = [
        Move(client, below.edge_of[client], to)
        for client, to in below.leaving.items()
        if below.edges[below.edge_of[client]].server.outer is None
    ]
    while late := _emptying_move(moves, groups, below):
        moves.remove(late)
    return moves


def _emptying_move(moves: Sequence[Move], groups: Histories, below: TreeState) -> Move | None:
    """Return one of these moves that leaves an edge without a member, or without one that can be reached."""
    reachable = [move for move in moves if move.client in below.edges[move.edge].server.idle]
    for going, present in (
        (moves, {edge: len(history.members) for edge, history in groups.items()}),
        (reachable, {edge: len(state.server.idle) for edge, state in below.edges.items()}),
    ):
        after = Counter(present)
        after.update(move.to for move in going)
        after.subtract(move.edge for move in going)
        if late := next((move for move in going if not after[move.edge]), None):
            return late
    return None


def move_member(groups: Histories, below: TreeState, topology: Topology, move: Move) -> dict[ClientId, GroupHistory]:
    """Move a client to its new edge, with what the edges have counted of it; returns what is known of both groups from now on."""
    record = below.edges[move.edge].server.take_record(move.client)
    below.edges[move.to].server.add_record(move.client, record)
    before, after = groups[move.edge], groups[move.to]
    (profile,) = (one for one in before.members if one.client == move.client)
    after = _with_past(after, move.client, member_history(before, move.client))
    after = replace(after, members=(*after.members, profile))
    stay = tuple(one for one in before.members if one.client != move.client)
    before = replace(_without_member(before, move.client), members=stay)
    below.edge_of[move.client] = move.to
    del below.leaving[move.client]
    return {
        edge: replace(history, edge=topology.profile(edge, history.members)) if history.members else history
        for edge, history in ((move.edge, before), (move.to, after))
    }


def _with_past(history: GroupHistory, client: ClientId, work: Sequence[MemberWork]) -> GroupHistory:
    """Return the history with the work of a client in another group."""
    past = (*history.past.get(client, ()), *work)[-REMEMBERED_TASKS:]
    return replace(history, past={**history.past, client: past}) if past else history


def _without_member(history: GroupHistory, client: ClientId) -> GroupHistory:
    """Return the history with the work of a client who has left, but not whose it was."""
    statistics = tuple(
        replace(report, work=tuple(replace(work, client="") if work.client == client else work for work in report.work))
        for report in history.statistics
    )
    past = {name: work for name, work in history.past.items() if name != client}
    return replace(history, statistics=statistics, past=past)
