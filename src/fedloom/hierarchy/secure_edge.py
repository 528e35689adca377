"""An edge that never sees an answer: its members train as below any edge, and it learns the sum of their changes and nothing else.

Sources: Bonawitz et al., "Practical Secure Aggregation for Privacy-Preserving Machine Learning", CCS 2017; Bell et al., "Secure
Single-Server Aggregation with (Poly)Logarithmic Overhead", CCS 2020, for the sums themselves, which are made in
`privacy.secure_sum`. New here: mixed ranks without padding, and asynchrony above, since a group that sums is one client of the root.

A round. All members that can be reached start from one version, at ranks that enough of them share. Who has trained says so
(`PartsReady`); its parts stay where they are. When all are ready, or the deadline has passed with enough of them, the edge asks for
the sum (`OpenSum`): for each block of directions over those who hold it, so that no padding is sent and each block has its own least
number of holders. The sum comes (`SumOpened`) as whole numbers, so neither the order nor the masks matter: the driver of a simulation
adds them up, that of a deployment runs the protocol, and the bits are the same. Then each member in the sum counts as if it had
answered with the mean (`aggregate.shared.parts`), and the server inside the edge goes on as everywhere.

What may fail. Members fail or are lost before they are ready: they are left out, as are those of a rank of which too few are left,
and too few in all drop the round, with all its tasks. A block whose members became too few while the sum was opened is left out: its
directions count as not changed. A sum outside what its members can reach drops the round. After a restart a round that was under way
is dropped: nobody opens two sums of one task.

What is lost, by design: no check of single answers, no weights (all members weigh alike), no losses, no counts. What it does not
stop: members that lie within the bound of a number; a group of which all members but one work together.

State. As that of any edge, with `EdgeState.summing`. Promises. No event and no field holds a member's numbers.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace

import torch

from fedloom.aggregate.shared.parts import summed_answers
from fedloom.core.change_norms import NormLimits
from fedloom.core.codec import Summed
from fedloom.core.errors import Refused
from fedloom.core.events import (
    Cancel,
    ClientJoined,
    ClientLost,
    Command,
    Dispatch,
    Event,
    OpenSum,
    PartsReady,
    Reject,
    SlotBlock,
    SumFailed,
    SumOpened,
    TaskFailed,
    TaskReceived,
    UpdateArrived,
)
from fedloom.core.lora import Adapter, cut_adapter, named_tensors, server_rank
from fedloom.core.policies import BudgetRule, Fleet, Merge
from fedloom.core.server import Server
from fedloom.core.types import Budget, ClientId, Profile, Result, Task
from fedloom.hierarchy.edge import Edge, SumInProgress, steps_of_a_round
from fedloom.schedule.rounds import Rounds
from fedloom.schedule.shared.weights import uniform

SPARE = 1
"""Members of each rank beyond the fewest."""
LATE = "it was not ready in time to be summed, or too few of its rank were"
FEWEST = 3
"""Members of a sum at least: with two, each knows the other's numbers."""


@dataclass(frozen=True, slots=True)
class Secure:
    """How the members of a group are summed, so that the server sees none of their answers.

    Fields:
        least: fewest members that a sum may be opened over, for every direction (at least 3; default 5).
        threshold: share of a round's members that must be ready, and agree to the opening (above 0.5; default 0.6).
        bits: bits of a member's number; a sum has some more (4 to 24; default 16).
        bound: largest change of one number that counts in a round (default None: what the optimiser can do in its steps).
        deadline: seconds after which a round is closed with those who are ready (default None: it waits for all).
    """

    least: int = 5
    threshold: float = 0.6
    bits: int = 16
    bound: float | None = None
    deadline: float | None = None

    def __post_init__(self) -> None:
        if self.least < FEWEST:
            remedy = f"{FEWEST} or more: with two members, each takes its own numbers off the sum and has the other's"
            raise Refused("hierarchy.secure.least", self.least, remedy)
        if not 0.5 < self.threshold <= 1:
            remedy = "above 0.5, so that no two halves open a sum each; 0.6 is usual, 1.0 waits for everybody"
            raise Refused("hierarchy.secure.threshold", self.threshold, remedy)
        if not 4 <= self.bits <= 24:
            raise Refused("hierarchy.secure.bits", self.bits, "4 to 24; 16 loses nothing that can be measured")
        if self.bound is not None and not 0 < self.bound < math.inf:
            raise Refused(
                "hierarchy.secure.bound", self.bound, "a positive number, or None for what the optimiser can do"
            )
        if self.deadline is not None and not self.deadline > 0:
            raise Refused("hierarchy.secure.deadline", self.deadline, "give positive seconds, or None to wait for all")

    def enough(self, members: int) -> int:
        """Return how many of so many members a sum needs."""
        return max(self.least, math.ceil(self.threshold * members))


@dataclass(frozen=True, slots=True)
class SumRounds:
    """Schedule inside a group that sums: all members that can be reached start together, as soon as they are enough.

    Fields:
        least: fewest members of a round.
        everybody: rounds of the whole group, in which all weigh alike.
    """

    least: int
    everybody: Rounds = field(default_factory=lambda: Rounds(weigh=uniform))

    @property
    def max_in_flight(self) -> int:
        """The members of the group."""
        return self.everybody.max_in_flight

    def merge(self, fleet: Fleet) -> Merge | None:
        """Return the mean of the round, when it is complete."""
        return self.everybody.merge(fleet)

    def start(self, fleet: Fleet) -> Sequence[ClientId]:
        """Return a new cohort once the last round is closed and there are enough members."""
        return self.everybody.start(fleet) if len(fleet.idle) >= self.least else ()

    def wake(self, fleet: Fleet) -> float | None:
        """Return None: the edge closes its rounds itself."""
        return None


@dataclass(frozen=True, slots=True)
class SharedRanks:
    """Budget rule of a group that sums: what `plan` gives, at a rank at which at least `least` members train.

    So no direction is held by too few to be opened, and each member can ask that enough others got the very start that it got: a
    server that sends all but one a model that learns nothing would have that one's change for a sum (Pasquini et al., "Eluding
    Secure Aggregation in Federated Learning via Model Inconsistency", CCS 2022). A rank is lowered where too few share it.

    Fields:
        plan: the rule.
        least: fewest members of one rank in a sum; one more is asked for, who may drop out while it is opened.
    """

    plan: BudgetRule
    least: int

    def __call__(self, profile: Profile, fleet: Fleet) -> Budget:
        """Return the budget of this member's next task."""
        ranks = [task.budget.rank for task in fleet.busy.values()]
        ranks += [self._planned(fleet.idle[client], fleet).rank for client in fleet.idle]
        budget = self._planned(profile, fleet)
        rank = shared_rank(budget.rank, ranks, self.least + SPARE)
        if rank == budget.rank:
            return budget
        return replace(
            budget, rank=rank, why=f"fewer than {self.least + SPARE} members of the group train at rank {budget.rank}"
        )

    def _planned(self, profile: Profile, fleet: Fleet) -> Budget:
        return self.plan(profile, fleet).at_most(profile.most)


def shared_rank(rank: int, ranks: Sequence[int], least: int) -> int:
    """Return the rank at which a member trains so that at least `least` train at each rank, given the ranks of all members.

    From the highest rank down, members are lowered to the next rank until they are enough; too few at the lowest one take the next
    with them.

    >>> [shared_rank(rank, (8, 8, 4, 4, 4, 2), 3) for rank in (8, 4, 2)]
    [2, 2, 2]
    >>> [shared_rank(rank, (8, 8, 4, 2, 2, 2), 3) for rank in (8, 4, 2)]
    [4, 4, 2]
    """
    classes, pending = list[tuple[int, list[int]]](), list[int]()
    for one in sorted(ranks, reverse=True):
        if pending and one < pending[-1] and len(pending) >= least:
            classes.append((pending[-1], pending))
            pending = []
        pending.append(one)
    if classes and len(pending) < least:
        pending = classes.pop()[1] + pending
    lowest = {one: floor for floor, members in [*classes, (pending[-1], pending)] for one in members}
    return lowest[rank]


class SecureEdge(Edge):
    """An edge whose members' answers are only summed."""

    def __init__(self, server: Server, secure: Secure, largest_step: float | None) -> None:
        """Take over `server`, as `Edge` does; its schedule is `SumRounds`, its plan `SharedRanks`.

        Args:
            server: the inner server, which has done nothing yet.
            secure: how members are summed.
            largest_step: how far an optimiser step moves a number at most (None: not known, and `secure.bound` says it).
        """
        super().__init__(server)
        if secure.bound is None and largest_step is None:
            raise Refused("hierarchy.secure.bound", None, "how far a step moves a number is not known here: say it")
        self.secure, self.largest_step = secure, largest_step
        self.halved = server.transfer is not None and server.transfer.halved
        server.norm_limits = NormLimits()

    def handle(self, now: float, event: Event) -> list[Command]:
        """Return what to do about `event`, in the order in which it is to be done."""
        self._attach_state()
        self.server.advance(now)
        commands = self._forget_cancelled(now)
        match event:
            case PartsReady(client, number):
                commands += self._note_ready(now, client, number)
            case SumOpened():
                commands += self._take_sum(now, event)
            case SumFailed(number, reason):
                commands += self._drop_round(now, reason) if number == self.state.summing.asked != 0 else []
            case UpdateArrived(client, number, _):
                return [
                    *commands,
                    Reject(client, number, "members of this group are summed, no single answer is taken"),
                ]
            case ClientLost(client) if client in self._being_summed():
                self._set_lost(client, True)  # what it has sent may still be in the sum
            case TaskFailed(client, number, _) if self._being_summed().get(client) == number:
                pass  # as above: the sum tells whether it is in it
            case _:
                if isinstance(event, ClientJoined):
                    self._set_lost(event.profile.client, False)
                commands += self._inside(now, event)
        commands += self._close(now)
        times = [time for time in (self._due(), self.server.wake()) if time is not None]
        self.state.due = min(times, default=None)
        return commands

    def _inside(self, now: float, event: Event) -> list[Command]:
        """Let the edge handle an event as any other does; a new round has as many members as it starts."""
        outer = event.task if isinstance(event, TaskReceived) else self.state.server.outer
        if outer is not None:
            self.server.transfer = self._codec(outer)
        commands = super().handle(now, event)
        if started := sum(isinstance(command, Dispatch) for command in commands):
            self.state.summing = SumInProgress(started)
        return commands

    def _codec(self, outer: Task) -> Summed:
        """Return how numbers of members travel in this outer task."""
        bound = self.secure.bound
        if bound is None:
            bound = (self.largest_step or 0.0) * steps_of_a_round(outer.budget) * max(1.0, outer.start.rules.up_rate)
        members = max(1, len(self.state.server.idle) + len(self.state.server.working))
        return Summed(self.secure.bits, bound, members, self.halved)

    def _being_summed(self) -> dict[ClientId, int]:
        """Return the members whose sum was asked for, with their tasks."""
        summing, busy = self.state.summing, self.state.server.busy
        return {busy[number].client: number for number in summing.ready} if summing.asked else {}

    def _set_lost(self, client: ClientId, lost: bool) -> None:
        """Write down whether a member whose sum is being opened is gone."""
        others = [one for one in self.state.summing.lost if one != client]
        self.state.summing.lost = [*others, client] if lost else others

    def _forget_cancelled(self, now: float) -> list[Command]:
        """Forget the round whose tasks were cancelled from outside."""
        server, summing = self.state.server, self.state.summing
        if all(number in server.busy for number in summing.ready):
            return []
        self.state.summing = SumInProgress(summing.members)
        return [one for client in summing.lost for one in self._inside(now, ClientLost(client))]

    def _note_ready(self, now: float, client: ClientId, number: int) -> list[Command]:
        """Write down that a member has trained."""
        server, summing = self.state.server, self.state.summing
        working = server.working.get(client)
        if working is None or working[1] != number or summing.asked or number in summing.ready:
            return [Reject(client, number, f"task {number} is not outstanding at client {client!r}")]
        summing.ready.append(number)
        return []

    def _close(self, now: float) -> list[Command]:
        """Close the round if it is complete or overdue: ask for its sum, or drop it with too few members."""
        server, summing = self.state.server, self.state.summing
        summing.ready = [number for number in summing.ready if number in server.busy]
        if not server.busy or server.stopped or summing.asked:
            return []
        due = self._due()
        if len(summing.ready) < len(server.busy) and (due is None or now < due):
            return []
        summing.ready = same_starts([server.busy[number] for number in summing.ready], self.secure.least)
        blocks = sum_blocks([server.busy[number] for number in summing.ready], self.secure.least)
        if len(summing.ready) < self.secure.enough(summing.members):
            return self._drop_round(now, f"{len(summing.ready)} of {summing.members} members were ready to be summed")
        commands, codec = list[Command](), server.busy[summing.ready[0]].start.codec
        assert isinstance(codec, Summed)
        commands += self._give_up(now, server.busy.keys() - set(summing.ready), LATE)
        if self.state.server.stopped:  # these were too many failures
            return commands
        summing.asked = min(summing.ready)
        return [*commands, OpenSum(summing.asked, blocks, self.secure.least, self.secure.threshold, codec)]

    def _due(self) -> float | None:
        """Return when the round is closed whoever is missing (None: not before all are ready, or it is closed)."""
        sent = [task.sent for task in self.state.server.busy.values()]
        open_ = sent and not self.state.summing.asked
        return min(sent) + self.secure.deadline if open_ and self.secure.deadline is not None else None

    def _take_sum(self, now: float, event: SumOpened) -> list[Command]:
        """Let each member in the sum count as if it had answered with the mean, and drop the others' tasks."""
        state, summing = self.state, self.state.summing
        if not summing.asked or event.task != summing.asked:
            return []
        asked = {number: state.server.busy[number] for number in summing.ready}
        codec = asked[event.task].start.codec
        assert isinstance(codec, Summed)
        if reason := why_no_sum(event, list(asked.values()), self.secure.least, codec):
            return self._drop_round(now, reason)
        summed = [asked[number] for number in sorted(event.blocks[0].tasks)]
        answers = summed_answers(summed, event.sums, codec.step)
        commands = self._give_up(now, asked.keys() - answers.keys(), "it dropped out while the sum was opened")
        for task in sorted(summed, key=lambda task: task.client not in summing.lost):
            examples = max(1, state.server.registered.get(task.client, 1))
            result = Result(answers[task.id], examples, 0, task.budget.steps)
            commands += self._inside(now, UpdateArrived(task.client, task.id, result))
            commands += self._inside(now, ClientLost(task.client)) if task.client in summing.lost else []
        return commands

    def _drop_round(self, now: float, reason: str) -> list[Command]:
        """Drop the round: nothing of it is known, and its members begin another one."""
        return self._give_up(now, set(self.state.server.busy), reason)

    def _give_up(self, now: float, numbers: Collection[int], reason: str) -> list[Command]:
        """Fail these tasks, and cancel them at their clients."""
        commands, busy, lost = list[Command](), self.state.server.busy, self.state.summing.lost
        tasks = sorted((busy[number] for number in numbers), key=lambda task: (task.client not in lost, task.id))
        for task in tasks:  # those who are gone first: with the last one the next round begins
            if task.id in self.state.server.busy:  # after too many failures the edge has stopped
                commands.append(Cancel(task.id, task.client))
                commands += self._inside(now, TaskFailed(task.client, task.id, reason))
                commands += self._inside(now, ClientLost(task.client)) if task.client in lost else []
        return commands


def same_starts(tasks: Sequence[Task], least: int) -> list[int]:
    """Return the numbers of the tasks whose start at least `least` of them share: those of one rank."""
    ranks = Counter(server_rank(task.start.train) for task in tasks)
    return [task.id for task in tasks if ranks[server_rank(task.start.train)] >= least]


def sum_blocks(tasks: Sequence[Task], least: int) -> tuple[SlotBlock, ...]:
    """Return the blocks of directions with their holders, cut at the ranks in use; without those of fewer than `least` holders."""
    ranks, blocks, first = {task.id: server_rank(task.start.train) for task in tasks}, list[SlotBlock](), 0
    for last in sorted(set(ranks.values())):
        holders = tuple(sorted(number for number, rank in ranks.items() if rank >= last))
        if len(holders) >= least:
            blocks.append(SlotBlock(first, last, holders))
        first = last
    return tuple(blocks)


def why_no_sum(event: SumOpened, asked: Sequence[Task], least: int, codec: Summed) -> str | None:
    """Return why this is no sum of the parts of members that were asked; None: it is one. Cost: a pass over the sums."""
    blocks = {(block.first, block.last): set(block.tasks) for block in sum_blocks(asked, least)}
    if not event.blocks or event.blocks[0].first:
        return "too few members were left to open a sum"
    members = set(event.blocks[0].tasks)
    for block in event.blocks:
        if not set(block.tasks) <= blocks.get((block.first, block.last), set()) & members:
            return "a block was summed over others than were asked"
        if len(set(block.tasks)) < max(least, len(block.tasks)):
            return "a block was opened over too few members"
    whole = cut_adapter(max(asked, key=lambda task: server_rank(task.start.train)).start.train, event.blocks[-1].last)
    return _misshapen(event.sums, whole) or _out_of_reach(event, codec)


def _misshapen(sums: Adapter, whole: Adapter) -> str | None:
    """Return why sums have not the form of this adapter."""
    given, expected = named_tensors(sums), named_tensors(whole)
    if given.keys() != expected.keys() or any(given[name].shape != one.shape for name, one in expected.items()):
        return "the sums have another form than the parts"
    return None if all(one.dtype == torch.int64 for one in given.values()) else "the sums are no whole numbers"


def _out_of_reach(event: SumOpened, codec: Summed) -> str | None:
    """Return that a sum is larger than its members can make it: masks did not cancel, or somebody sent what is no part."""
    top = event.blocks[-1].last
    most = torch.zeros(top, dtype=torch.int64)
    for block in event.blocks:
        most[block.first : block.last] = len(block.tasks) * codec.largest
    for one in event.sums.factors.values():
        if bool((one.down.abs() > most[: one.rank, None]).any()) or bool((one.up.abs() > most[: one.rank]).any()):
            return "the sum is larger than its members can make it"
    dense = len(event.blocks[0].tasks) * codec.largest
    if any(bool((tensor.abs() > dense).any()) for tensor in event.sums.dense.values()):
        return "the sum is larger than its members can make it"
    return None
