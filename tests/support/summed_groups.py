"""Groups that are only summed: runs of the toy world, and an edge whose members are played by hand."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from fedloom import FixedRank, Limits, Plan, World
from fedloom.aggregate.ffa import FFA
from fedloom.aggregate.shared.parts import (
    add_part,
    block_part,
    empty_sums,
    flat_part,
    integer_parts,
    part_from_flat,
)
from fedloom.core.events import (
    ClientJoined,
    Command,
    Dispatch,
    Event,
    OpenSum,
    PartsReady,
    SumOpened,
    TaskReceived,
)
from fedloom.core.fingerprint import fingerprint
from fedloom.core.policies import Aggregator
from fedloom.core.types import Budget, ClientState, Profile, Task, TaskStart
from fedloom.hierarchy.hierarchy import Hierarchy
from fedloom.hierarchy.secure_edge import Secure, SecureEdge
from fedloom.simulate.client_presence import Presence
from fedloom.simulate.faults import Faults
from fedloom.simulate.simulation import HeldPart, Simulation
from tests.support import toys
from tests.support.masked_sums import masked_sum, round_terms
from tests.support.simulated_runs import QUADRATIC, Log

SECURE = Secure(least=3, bound=5.0)
RANKS = (4, 4, 4, 2, 2, 2, 4, 2)
Opener = Callable[[OpenSum, Mapping[int, HeldPart]], SumOpened]


def simulated(method: Aggregator, hierarchy: Hierarchy, ranks: Any = None, faults: Faults | None = None) -> Log:
    """A run over groups of five and six."""
    log, rank = Log(), ranks or FixedRank(4)
    tree = toys.tree(
        (5, 6), hierarchy, method=method, start=toys.fresh(4), assign=Plan(rank, 12), limits=Limits(versions=3)
    )
    presence = Presence(faults=faults)
    Simulation(tree, QUADRATIC, World(), toys.profiles(11), log.score, log, presence=presence).run()
    return log


@dataclass
class Group:
    """An edge with members c0, c1, ... whose task has begun, and what its members hold."""

    edge: SecureEdge
    tasks: dict[str, Task]
    held: dict[int, HeldPart] = field(default_factory=dict)

    def do(self, event: Event, now: float = 1.0) -> list[Command]:
        commands = self.edge.handle(now, event)
        self.tasks |= {command.task.client: command.task for command in commands if isinstance(command, Dispatch)}
        return commands

    def ready(self, *clients: str, now: float = 1.0) -> list[Command]:
        """These have trained; what follows from the last one."""
        commands: list[Command] = []
        for client in clients:
            task = self.tasks[client]
            result, local = QUADRATIC.train([(task, ClientState())])[0]
            self.held[task.id] = HeldPart(client, integer_parts(task.start, result.adapter), local)
            commands = self.do(PartsReady(client, task.id), now)
        return commands

    @property
    def model(self) -> str:
        return fingerprint(self.edge.state.server.model.adapter)


def group(
    ranks: Sequence[int] = RANKS, secure: Secure = SECURE, method: Aggregator | None = None, rounds: int = 3
) -> Group:
    """A group of members of these ranks that got a task of so many rounds."""
    how = method or FFA()
    start = toys.fresh(4)
    flat = toys.server(method=how, start=start, assign=toys_ranks(ranks))
    edge = Hierarchy(secure=secure).edge(flat, len(ranks), 2)
    assert isinstance(edge, SecureEdge)
    made = Group(edge, {})
    for k in range(len(ranks)):
        made.do(ClientJoined(Profile(f"c{k}", 10 + k)), 0.0)
    outer = how.start(how.init(start), Budget(4, 12), 0)
    made.do(TaskReceived(Task(99, "edge", 0, outer, Budget(4, 12, rounds=rounds), 0.0)), 0.5)
    return made


def toys_ranks(ranks: Sequence[int]) -> Any:
    def assign(profile: Profile, fleet: Any) -> Budget:
        return Budget(ranks[int(profile.client[1:])], 12)

    return assign


def asked(commands: Sequence[Command]) -> OpenSum:
    return next(command for command in commands if isinstance(command, OpenSum))


def with_masks(lost_after: Sequence[str] = ()) -> Opener:
    """The sums by the protocol itself: keys, masks, shares, an opening; one round a block."""

    def opener(wanted: OpenSum, held: Mapping[int, HeldPart]) -> SumOpened:
        top = held[wanted.blocks[-1].tasks[0]].part
        start = TaskStart(top, "", codec=wanted.codec)
        sums, blocks = empty_sums(start), []
        for block in wanted.blocks:
            numbers = {
                held[n].client: flat_part(start, block_part(held[n].part, block.first, block.last)) for n in block.tasks
            }
            length = len(next(iter(numbers.values())))
            terms = round_terms(len(numbers), length, wanted.least, wanted.codec.bits, members=tuple(sorted(numbers)))
            total, survivors = masked_sum(terms, numbers, lost_after=[one for one in lost_after if one in numbers])
            like = block_part(sums, block.first, block.last)
            add_part(sums, part_from_flat(start, like, total), block.first)
            blocks.append(replace(block, tasks=tuple(n for n in block.tasks if held[n].client in survivors)))
        return SumOpened(wanted.task, tuple(blocks), sums)

    return opener
