"""A hierarchy as a value: which clients are in which group, how a group works, how its edge hangs on the root.

Source: HierFedLoRA, arXiv 2503.21213, 2025. The groups' frequencies may differ, and be chosen anew for each task (`rounds`); their
depths come with `plan`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeAlias, cast

from fedloom.core.codec import Codec
from fedloom.core.errors import Refused
from fedloom.core.lora import server_rank
from fedloom.core.partial_depth import require_all_layers
from fedloom.core.policies import Aggregator, BudgetRule, Fleet, Schedule, aggregator_layers
from fedloom.core.server import Server
from fedloom.core.types import Budget, ClientId, GroupHistory, Profile
from fedloom.hierarchy.edge import MemberBudget, Edge
from fedloom.hierarchy.edge import matching_phase
from fedloom.hierarchy.grouping import Grouping, Member, validate_groups
from fedloom.hierarchy.joint_plan.joint_plan import JointPlan
from fedloom.hierarchy.regrouping import Compared, Regrouping
from fedloom.hierarchy.root_server import RootServer
from fedloom.hierarchy.tree import Tree
from fedloom.hierarchy.tree_state import Link, Topology
from fedloom.schedule.rounds import Rounds

InnerRounds: TypeAlias = Callable[[Profile, Fleet], int]
"""(an edge's profile, the root's fleet) -> the versions that the edge makes of its next task."""


@dataclass(frozen=True, slots=True)
class Everybody:
    """One group of all clients."""

    def __call__(self, members: Sequence[Member], seed: int) -> tuple[tuple[ClientId, ...], ...]:
        """All of them, by name."""
        return (tuple(sorted(member.client for member in members)),)


@dataclass(frozen=True, slots=True)
class EdgeBudget:
    """The plan of the root: an edge trains the whole model, for as many steps as `plan` says, in so many `rounds`.

    Rank and depth are not the plan's: what a weak member cannot hold, another one can, and each is asked for its own.
    """

    plan: BudgetRule
    rank: int
    rounds: int | InnerRounds

    def __call__(self, profile: Profile, fleet: Fleet) -> Budget:
        """The budget of this edge's next task; never more rounds than steps."""
        budget = self.plan(profile, fleet)
        rounds = self.rounds if isinstance(self.rounds, int) else self.rounds(profile, fleet)
        return replace(budget, rank=self.rank, rounds=max(1, min(rounds, budget.steps)), depth=None)


@dataclass(frozen=True, slots=True)
class Hierarchy:
    """Groups, each led by an edge, which is a client of the run's server.

    `groups` says who is with whom. An edge makes `rounds` versions of a task, a number or a rule, by the inner `schedule` (None:
    synchronous rounds of the whole group) and the inner `aggregator` (None: the run's method, without what is wrapped around it),
    and reports. `plan` says what an edge may do (None: the steps of the run's plan, at the server's rank); the run's plan says what
    each member may do, which shares the steps of a task out over its rounds. `Planned()` chooses rounds, steps, depth and rank for
    each group from what is known of all; `rounds` says nothing then. `link` is an edge's to the server (None: the edges
    live on the server, and nothing travels); a member's link to its edge is `inner_speedup` times as fast as to the server.
    Groups know how many examples of each label a client has; with `topics` how many of each of so many topics, which are found in
    what the base model makes of the texts: for data without labels. With `epsilon` a client tells no more than noisy counts, which
    are `epsilon`-differentially private for one example (`histogram.noised`); 0: the true ones. With `regroup` the groups are made
    again after a version of the server when clients' times have drifted by more than this share (`group.drift`); 0: never.
    """

    groups: Grouping = field(default_factory=Everybody)
    rounds: int | InnerRounds = 2
    schedule: Schedule | None = None
    aggregator: Aggregator | None = None
    plan: BudgetRule | None = None
    link: Link | None = None
    inner_speedup: float = 1.0
    topics: int = 0
    epsilon: float = 0.0
    regroup: float = 0.0

    def __post_init__(self) -> None:
        if isinstance(self.rounds, int) and self.rounds < 1:
            raise Refused("hierarchy.rounds", self.rounds, "an edge makes at least 1 version of a task")
        if not self.inner_speedup > 0:
            raise Refused("hierarchy.inner_speedup", self.inner_speedup, "1.0: as fast as to the server, 10: ten times")
        if self.topics < 0:
            raise Refused("hierarchy.topics", self.topics, "0: groups are told labels, 16: that many topics instead")
        if not self.epsilon >= 0:
            raise Refused("hierarchy.epsilon", self.epsilon, "0: groups are told true counts, 1.0: noisy ones")
        if not 0 <= self.regroup < math.inf:
            raise Refused(
                "hierarchy.regroup", self.regroup, "0: groups stay, 0.1: made again when times drifted by 10 %"
            )

    def grouped(self, members: Sequence[Member], seed: int) -> dict[ClientId, tuple[ClientId, ...]]:
        """The groups by the names of their edges. Raises Refused unless each client is in exactly one."""
        found = validate_groups(self.groups(members, seed), members)
        width = len(str(len(found) - 1))
        return {f"edge{k:0{width}d}": group for k, group in enumerate(found)}

    def over(
        self, flat: Server, members: Mapping[ClientId, Sequence[Profile]], compared: Compared | None = None
    ) -> Tree:
        """The tree in the place of `flat`, which has done nothing yet. `compared` is what groups are made again with.

        Raises Refused where the methods do not go together.
        """
        most = sum(map(len, members.values())) if self.regroup else 0
        edges = {name: self.edge(flat, len(own), len(members), most) for name, own in members.items()}
        root = self.root(flat, len(members), flat.transfer if self.link else None)
        tree = Tree(root, edges, Topology(members, self.link), self._regrouping(compared, flat.seed))
        self._check(flat, tree.root.fleet())
        return tree

    def over_regions(self, flat: Server, regions: int) -> RootServer:
        """The server in the place of `flat` whose edges are elsewhere, so many of them. Raises Refused as `over`."""
        made = RootServer(self.root(flat, regions, flat.transfer), trusted=False)
        able = Profile("region", 1, memory=math.inf)
        self._check(flat, replace(made.fleet(), groups={able.client: GroupHistory(able, (able,))}))
        return made

    def _check(self, flat: Server, fleet: Fleet) -> None:
        """Raise Refused where a plan of groups asks for what the method, the model or a client of these groups cannot have."""
        if isinstance(self.plan, JointPlan):
            require_all_layers(flat.aggregator, flat.aggregator.start(flat.state.model, Budget(1, 1), 0).rules)
            self.plan.check(fleet)

    def root(self, flat: Server, edges: int, transfer: Codec | None) -> Server:
        """The server over so many edges, by a `transfer` of its own. Raises Refused where the methods do not go together."""
        check_methods(flat, self._method(flat), edges)
        return Server(
            flat.state.model,
            flat.aggregator,
            flat.schedule,
            self.plan or EdgeBudget(flat.budget_rule, server_rank(flat.state.model.adapter), self.rounds),
            shape=flat.shape,
            limits=flat.limits,
            seed=flat.seed,
            transfer=transfer,
        )

    def edge(self, flat: Server, size: int, edges: int, most: int = 0) -> Edge:
        """One of so many edges, over `size` members, who may become `most`."""
        inner = self._inner(flat, size, edges, Rounds(cohort_size=max(size, most)))
        return Edge(inner, isinstance(self.plan, JointPlan), self.regroup > 0)

    def _regrouping(self, compared: Compared | None, seed: int) -> Regrouping | None:
        """Raises ValueError if nobody said how clients compare."""
        if not self.regroup:
            return None
        if compared is None:
            raise ValueError("groups are made again with what is known of all clients: say with what they are compared")
        return Regrouping(self.groups, self.regroup, compared, seed)

    def _method(self, flat: Server) -> Aggregator:
        """That of the edges."""
        return self.aggregator or cast(Aggregator, list(aggregator_layers(flat.aggregator))[-1])

    def _inner(self, flat: Server, size: int, edges: int, everybody: Rounds) -> Server:
        """The server of an edge with so many members. It gives a task up after its share of the failures that end the run."""
        failures = max(size, flat.limits.failures // edges)
        return Server(
            flat.state.model,
            self._method(flat),
            self.schedule or everybody,
            MemberBudget(flat.budget_rule),
            shape=flat.shape,
            limits=replace(flat.limits, seconds=None, failures=failures, evaluate_every=0),
            seed=flat.seed,
            transfer=flat.transfer,
        )


def check_methods(flat: Server, inner: Aggregator, edges: int) -> None:
    """Raise Refused where what an edge makes of a task would be no answer to it, or a method counts other clients than there are."""
    outer, model = flat.aggregator, flat.state.model
    names = f"{type(inner).__name__} below {type(outer).__name__}"
    for layer in aggregator_layers(outer):
        if getattr(layer, "clients", edges) != edges:
            remedy = f"give clients={edges}: the clients of the server are the edges"
            raise Refused("aggregator.clients", getattr(layer, "clients", 0), remedy)
    if any(getattr(layer, "clients", None) for layer in aggregator_layers(inner)):
        raise Refused("hierarchy.aggregator", names, "a method that knows each client by name belongs above the edges")
    for turn in (0, 1):
        start = outer.start(replace(model, phase=turn), Budget(server_rank(model.adapter), 1), 0)
        if start.control is not None:
            raise Refused("aggregator", type(outer).__name__, "an edge has no control variate; leave Scaffold out")
        if matching_phase(inner, inner.init(start.train), start) is None:
            sides = " and ".join(sorted(start.rules.unchanged))
            raise Refused("hierarchy.aggregator", names, f"above, {sides} must stay as sent; use the same method below")
    if outer.space == "factor" and inner.space == "product":
        remedy = "the edges would turn their factors, each in another way, and above they are averaged entry by entry"
        raise Refused("hierarchy.aggregator", names, f"{remedy}; use the same method below")


def need_lasting_groups(hierarchy: Hierarchy | None) -> None:
    """Raise Refused where groups are made again although members stay where they are: a deployment has regions."""
    if hierarchy and hierarchy.regroup:
        remedy = "sites stay with the region where they are; leave it out, or simulate"
        raise Refused("hierarchy.regroup", hierarchy.regroup, remedy)
