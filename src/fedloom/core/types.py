"""The words of the system as plain data: profiles, tasks, events, commands, merges, and the four protocols.

Everything here is frozen and free of behaviour, so that a schedule can be tested with a table, a run can be written down
as a trace, and a policy can be printed as a manifest. Times are virtual or real seconds (the core does not know which),
links are bits per second, memory and payloads bytes, compute FLOP per second.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal, TypeAlias

from torch import Tensor

from fedloom.core.codec import Codec
from fedloom.core.lora import Adapter

ClientId: TypeAlias = str
Side: TypeAlias = Literal["down", "up", "dense"]
"""A part of an adapter: one of the two factors of every layer, or all dense tensors (the head)."""


@dataclass(frozen=True, slots=True)
class Budget:
    """What one task may cost: the LoRA rank to train at and the number of local optimiser steps.

    `depth` is how many transformer blocks are trained, counted from the output, with all that is adapted above them (None: all
    that is adapted). What is not trained runs as a part of the base. `rounds` are the versions that an edge makes of one task before
    it reports: its members share the steps out among them. `why` says in a sentence what decided, where a rule weighed something.
    """

    rank: int
    steps: int
    depth: int | None = None
    rounds: int = 1
    why: str = ""


@dataclass(frozen=True, slots=True)
class Profile:
    """What the server knows of a client before it has trained: its data size, its speed, its links, its memory.

    `most` is the largest rank, depth and number of steps that it lets a task have (None: whatever the plan says).
    """

    client: ClientId
    examples: int
    flops: float = 1e10
    up_bps: float = 1e7
    down_bps: float = 1e7
    memory: float = 8e9
    tier: str = "default"
    most: Budget | None = None


@dataclass(frozen=True, slots=True)
class Pruning:
    """Rank self-pruning (HetLoRA): the last directions are penalised, and given up when they have become smaller.

    The loss gains `strength` * |up[:, t:]| * |down[t:]| for each layer (`up` without the scaling, as PEFT has it), t =
    floor(`keep` * rank); if the sum of these products is smaller after training than before, the client answers with
    max(`least`, t) directions and is never asked for more again.
    """

    strength: float = 1e-3
    keep: float = 0.99
    least: int = 1

    def tail(self, rank: int) -> int:
        """The first direction of the tail, which is the rank after pruning."""
        return max(self.least, int(self.keep * rank))


@dataclass(frozen=True, slots=True)
class Rules:
    """How a client trains what it received. The plain case is all defaults.

    `frozen` sides are neither trained nor sent back; `private` ones are trained, stay at the client and take the place of what the
    server sends the next time. `select` is the number of directions, over all layers together, that the client trains: those
    that moved most in a trial (LoRA-A2). `up_rate` is the learning rate of `up` relative to that of `down`.
    """

    frozen: tuple[Side, ...] = ()
    private: tuple[Side, ...] = ()
    select: int | None = None
    up_rate: float = 1.0
    pruning: Pruning | None = None

    @property
    def kept(self) -> frozenset[Side]:
        """Sides that must come back as they were sent."""
        return frozenset((*self.frozen, *self.private))


@dataclass(frozen=True, slots=True)
class Start:
    """What a client receives to train.

    `basis` names the coordinate system of the factors: while it stays the same, optimiser moments of an earlier task are
    still meaningful; when a merge rotated the factors it changes and they must be dropped. `scaling` is the alpha/r with
    which the client should parametrise; None, the rule, means the run's constant (a scaling that changes with the rank
    makes one adapter mean different functions on different clients). `fold` is added to the frozen base and not trained.
    `slots` are the server's directions that `train` holds (None: the first ones). `seeded` sides follow from the run's seed, so
    that nobody has to send them. `control` is the server's control variate (SCAFFOLD), of the shape of `train`. `codec` is how
    the numbers of the task travel (None: float32), and has been applied to what is here.
    """

    train: Adapter
    basis: str
    scaling: float | None = None
    fold: Adapter | None = None
    slots: tuple[int, ...] | None = None
    seeded: tuple[Side, ...] = ()
    control: Adapter | None = None
    rules: Rules = Rules()
    codec: Codec | None = None


@dataclass(frozen=True, slots=True)
class Task:
    """One piece of work for one client; `id` is never used twice, `sent` is the time of dispatch."""

    id: int
    client: ClientId
    version: int
    start: Start
    budget: Budget
    seed: int
    sent: float


@dataclass(frozen=True, slots=True)
class Result:
    """What a client returns: its trained adapter and what it took; `control`: the change of its control variate, if asked for."""

    adapter: Adapter
    examples: int
    tokens: int
    steps: int
    metrics: Mapping[str, float] = field(default_factory=dict)
    control: Adapter | None = None


@dataclass(frozen=True, slots=True)
class Update:
    """A result together with the task that it answers.

    `base` is the global model that the task was cut from (None: the one that is merged into). What the client means is that model
    with its change, even where it trained a part only and the server has gone on since.
    """

    task: Task
    result: Result
    base: Model | None = None


@dataclass(frozen=True, slots=True)
class Local:
    """What stays at a client between its tasks and is never sent.

    Optimiser `moments` and the `residual` of error feedback (what packing lost of earlier answers), valid for one `basis`; the
    trained adapter of which `private` sides are used again; the client's own `control` variate. These two are kept by the server's
    directions (`Start.slots`), also those that one task does not hold.
    """

    basis: str = ""
    moments: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)
    private: Adapter | None = None
    control: Adapter | None = None
    residual: Adapter | None = None


@dataclass(frozen=True, slots=True)
class MemberWork:
    """What a member did in one task of its edge, all its answers together: seconds on its links and in training, by what it did.

    `began` and `ended` are the loss of its first and of its last answer; None: it told none.
    """

    client: ClientId
    rank: int
    depth: int | None
    answers: int
    steps: int
    down: float
    train: float
    up: float
    began: float | None = None
    ended: float | None = None


@dataclass(frozen=True, slots=True)
class GroupStatistics:
    """What an edge tells the root beside its answer to a task with this `budget`, for plans that learn.

    `mass` is, by layer, the squared change of a member a step; `spread` the share of the members' squared changes that cancels in
    their mean; both of the last inner version. `energy` is that of each direction of the answer, largest first; `loss` the
    members' mean. `seconds` are those of the whole task, and of them `down` and `up` on the link of the edge, as the root saw them.
    """

    budget: Budget
    work: tuple[MemberWork, ...]
    mass: Mapping[str, float]
    spread: float
    energy: tuple[float, ...]
    loss: float | None
    seconds: float = 0.0
    down: float = 0.0
    up: float = 0.0


@dataclass(frozen=True, slots=True)
class GroupLog:
    """What the root knows of a group: its edge and its members before training, and what the edge told last, oldest first.

    `past` is what members who came from another group did before; in `told` a line of a member who has left names nobody.
    """

    edge: Profile
    members: tuple[Profile, ...]
    told: tuple[GroupStatistics, ...] = ()
    past: Mapping[ClientId, tuple[MemberWork, ...]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Model:
    """The global model: base + fold + adapter.

    `basis` counts how often the adapter's basis was rotated, `phase` the merges of a method that trains its sides in turn.
    `discarded` is the share of energy that the last merge cut off. `fold` belongs to the model but is not trained any more;
    `memory` is what a wrapper carries from merge to merge (momentum, control variates).
    """

    adapter: Adapter
    basis: int = 0
    discarded: float = 0.0
    phase: int = 0
    fold: Adapter | None = None
    memory: Mapping[str, Adapter] = field(default_factory=dict)


def within(budget: Budget, most: Budget | None) -> Budget:
    """The budget, made smaller where the client does not let a task be so large.

    >>> within(Budget(8, 10), Budget(4, 20, depth=2))
    Budget(rank=4, steps=10, depth=2, rounds=1, why='')
    """
    if most is None:
        return budget
    depths = [depth for depth in (budget.depth, most.depth) if depth is not None]
    rank, steps = min(budget.rank, most.rank), min(budget.steps, most.steps)
    return replace(budget, rank=rank, steps=steps, depth=min(depths, default=None))
