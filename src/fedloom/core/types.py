"""Data types that travel between server, clients and policies: profiles, budgets, tasks, results, models.

Everything here is frozen and almost free of behaviour, so that a schedule can be tested with a table, a run can be written down as
a trace, and a policy can be printed as a manifest. What happens and what must be done is in `events`, what a method implements in
`policies`.

Units: times are virtual or real seconds (the core does not know which), links are bits per second, memory and messages bytes,
compute FLOP per second.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal, TypeAlias

from torch import Tensor

from fedloom.core.codec import Codec
from fedloom.core.lora import Adapter
from fedloom.core.rate_by_rank import RateByRank

ClientId: TypeAlias = str
Side: TypeAlias = Literal["down", "up", "dense"]
"""A part of an adapter: one of the two factors of every layer, or all dense tensors (the head)."""


@dataclass(frozen=True, slots=True)
class Budget:
    """Work that one task may take: how large an adapter is trained, and for how long.

    Fields:
        rank: LoRA rank to train at.
        steps: local optimiser steps.
        depth: transformer blocks to train, counted from the output, with all adapted modules above them; the rest runs as a part of
            the base (default None: everything that is adapted).
        rounds: versions that an edge makes of one task before it reports; in each of them every member trains `steps // rounds`
            steps (at least 1; default 1).
        why: reason for this choice, in one sentence, for the report (default "": none).
        rate: how the learning rate of the factors follows the rank (default None: every rank has that of the run).
    """

    rank: int
    steps: int
    depth: int | None = None
    rounds: int = 1
    why: str = ""
    rate: RateByRank | None = None

    @property
    def rate_multiple(self) -> float:
        """Learning rate of the factors at this rank, as a multiple of the run's."""
        return 1.0 if self.rate is None else self.rate.multiple(self.rank)

    def at_most(self, limit: Budget | None) -> Budget:
        """Return this budget with rank, steps and depth no larger than those of `limit` (None: no limit).

        >>> Budget(8, 10).at_most(Budget(4, 20, depth=2))
        Budget(rank=4, steps=10, depth=2, rounds=1, why='', rate=None)
        """
        if limit is None:
            return self
        depths = [depth for depth in (self.depth, limit.depth) if depth is not None]
        rank, steps = min(self.rank, limit.rank), min(self.steps, limit.steps)
        return replace(self, rank=rank, steps=steps, depth=min(depths, default=None))


@dataclass(frozen=True, slots=True)
class Profile:
    """Facts that the server has about a client before it has trained.

    Fields:
        client: name of the client.
        examples: training examples that it holds.
        flops: compute speed (FLOP per second).
        up_bps: uplink (bits per second).
        down_bps: downlink (bits per second).
        memory: memory for training (bytes).
        tier: name of its class of devices.
        most: largest rank, depth and number of steps that it lets a task have (None: whatever the plan says).
        claimed: whether `examples` is the client's own word, which `registration` bounds; set by the server, whatever a client says.
    """

    client: ClientId
    examples: int
    flops: float = 1e10
    up_bps: float = 1e7
    down_bps: float = 1e7
    memory: float = 8e9
    tier: str = "default"
    most: Budget | None = None
    claimed: bool = False


@dataclass(frozen=True, slots=True)
class Pruning:
    """Rank self-pruning (HetLoRA): the last directions are penalised, and given up when they have become smaller.

    The loss gains `strength` * |up[:, t:]| * |down[t:]| for each layer (`up` without the scaling, as PEFT has it), t =
    floor(`keep` * rank). If the sum of these products is smaller after training than before, the client answers with
    max(`least`, t) directions and is never asked for more again.

    Fields:
        strength: weight of the penalty in the loss (lambda in the paper).
        keep: share of the rank that is not penalised (gamma in the paper; above 0, below 1).
        least: directions that a client keeps in any case.
    """

    strength: float = 1e-3
    keep: float = 0.99
    least: int = 1

    def rank_after(self, rank: int) -> int:
        """Return the rank after pruning, which is the index of the first penalised direction."""
        return max(self.least, int(self.keep * rank))


@dataclass(frozen=True, slots=True)
class Rules:
    """Instructions of a method to its clients; plain training needs only the defaults.

    Fields:
        frozen: sides that are neither trained nor sent back.
        private: sides that are trained and stay at the client; they replace what the server sends with the next task.
        select: number of directions, over all layers together, that the client trains: those that moved most in a trial (LoRA-A2;
            None: all).
        up_rate: learning rate of `up` relative to that of `down`.
        pruning: rank self-pruning (HetLoRA; None: no pruning).
    """

    frozen: tuple[Side, ...] = ()
    private: tuple[Side, ...] = ()
    select: int | None = None
    up_rate: float = 1.0
    pruning: Pruning | None = None

    @property
    def unchanged(self) -> frozenset[Side]:
        """Sides that must come back as they were sent."""
        return frozenset((*self.frozen, *self.private))


@dataclass(frozen=True, slots=True)
class TaskStart:
    """Everything that a client receives to train on, besides the base model.

    Fields:
        train: adapter to train.
        basis: name of the coordinate system of the factors. While it stays the same, optimiser moments of an earlier task are still
            meaningful; a merge that rotates the factors changes it, and the moments must be dropped. Of a method in "product" space
            it begins with the number of the model's basis and a slash.
        scaling: alpha / r of the client's LoRA (None: the run's constant, which is usual; a scaling that changes with the rank makes
            one adapter a different function on each client).
        fold: adapter that is added to the frozen base and not trained (None: nothing).
        directions: indices of the server's directions that `train` holds (None: the first ones).
        seeded: sides that the client computes from the run's seed, so they are not sent.
        control: the server's control variate, of the shape of `train` (SCAFFOLD; None: the method has none).
        rules: instructions of the method.
        codec: encoding of the task's numbers, already applied to everything here (None: float32).
    """

    train: Adapter
    basis: str
    scaling: float | None = None
    fold: Adapter | None = None
    directions: tuple[int, ...] | None = None
    seeded: tuple[Side, ...] = ()
    control: Adapter | None = None
    rules: Rules = Rules()
    codec: Codec | None = None


@dataclass(frozen=True, slots=True)
class Task:
    """Work for one client: what it starts from, and how much it may do.

    Fields:
        id: number of the task, never used twice in a run.
        client: client that does it.
        version: global version that it starts from.
        start: what the client receives.
        budget: how much it may do.
        sent: time of dispatch (s).
    """

    id: int
    client: ClientId
    version: int
    start: TaskStart
    budget: Budget
    sent: float


@dataclass(frozen=True, slots=True)
class Result:
    """Answer of a client to a task.

    Fields:
        adapter: the trained adapter (the whole adapter, not its change).
        examples: training examples that the client holds.
        tokens: tokens trained on, padding not counted.
        steps: optimiser steps done.
        metrics: numbers that the client reports, `loss` among them.
        control: change of the client's control variate, where the task brought one.
    """

    adapter: Adapter
    examples: int
    tokens: int
    steps: int
    metrics: Mapping[str, float] = field(default_factory=dict)
    control: Adapter | None = None

    def with_seconds(self, total: float, down: float, train: float, up: float) -> Result:
        """Return this result with the seconds that the task took, and those of its download, training and upload."""
        seconds = {"seconds": total, "seconds_down": down, "seconds_train": train, "seconds_up": up}
        return replace(self, metrics={**self.metrics, **seconds})


@dataclass(frozen=True, slots=True)
class Update:
    """Accepted result, with the task that it answers and the model that the task was cut from.

    An answer stands for `base` plus the client's change, even if the client trained only a part and newer versions exist.

    Fields:
        task: the task as it was sent.
        result: the answer.
        base: global model that the task was cut from (None: the one that is merged into).
    """

    task: Task
    result: Result
    base: Model | None = None


@dataclass(frozen=True, slots=True)
class ClientState:
    """State that stays at a client between its tasks and is never sent.

    `private` and `control` are stored by the server's directions (`TaskStart.directions`), also those that one task does not hold.

    Fields:
        basis: coordinate system in which `moments` and `residual` are valid.
        moments: optimiser moments by tensor.
        private: trained adapter, of which the private sides are used again.
        control: the client's own control variate.
        residual: error feedback, which is what packing lost of earlier answers.
    """

    basis: str = ""
    moments: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)
    private: Adapter | None = None
    control: Adapter | None = None
    residual: Adapter | None = None


@dataclass(frozen=True, slots=True)
class MemberWork:
    """Work of one member in one task of its edge, all its answers together.

    Fields:
        client: name of the member.
        rank: rank at which it trained.
        depth: depth at which it trained (None: full).
        answers: accepted answers.
        steps: optimiser steps.
        down: seconds on its downlink.
        train: seconds of training.
        up: seconds on its uplink.
        first_loss: loss of its first answer (None: not reported).
        last_loss: loss of its last answer (None: not reported).
    """

    client: ClientId
    rank: int
    depth: int | None
    answers: int
    steps: int
    down: float
    train: float
    up: float
    first_loss: float | None = None
    last_loss: float | None = None


@dataclass(frozen=True, slots=True)
class GroupStatistics:
    """Report of an edge to the root, with its answer to a task, for plans that learn.

    Fields:
        budget: budget of the task.
        work: work of each member.
        mass: by layer and head tensor, the squared Frobenius norm of a member's change per step, averaged over the members
            that trained the layer, with their examples as weights; of the last inner version that trained it.
        spread: share of the members' squared changes that cancels in their mean, of the last inner version (0 to 1).
        energy: share of energy of each direction of the answer, largest first.
        loss: mean loss of the members (None: not reported).
        seconds: length of the whole task, as the root saw it.
        down: seconds of it on the edge's downlink.
        up: seconds of it on the edge's uplink.
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
class GroupHistory:
    """Facts that the root has about a group, before training and from its reports.

    Fields:
        edge: profile of the edge.
        members: profiles of its members.
        statistics: latest reports, oldest first; the work of a member that has left is ignored.
        past: by member who came from another group, its work there.
    """

    edge: Profile
    members: tuple[Profile, ...]
    statistics: tuple[GroupStatistics, ...] = ()
    past: Mapping[ClientId, tuple[MemberWork, ...]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Model:
    """The global model without the frozen base: adapter and fold.

    Fields:
        adapter: what clients train.
        basis: how often the adapter's basis was rotated.
        discarded: share of energy that the last merge cut off (None: it was not measured).
        phase: merges so far, for a method that alternates between sides.
        fold: what belongs to the model and is not trained any more (None: nothing).
        memory: what a wrapper carries from merge to merge, by name (momentum, control variates).
    """

    adapter: Adapter
    basis: int = 0
    discarded: float | None = 0.0
    phase: int = 0
    fold: Adapter | None = None
    memory: Mapping[str, Adapter] = field(default_factory=dict)
