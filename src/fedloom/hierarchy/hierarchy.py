"""A hierarchy as a value: which clients are in which group, how a group works, how its edge is connected to the root.

Source: HierFedLoRA, arXiv 2503.21213, 2025. The groups' frequencies may differ, and be chosen anew for each task (`rounds`); their
depths come with `plan`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeAlias, cast

from fedloom.aggregate.shared.parts import CommonStart, why_not_summed
from fedloom.core.codec import Codec, Summed
from fedloom.core.errors import Refused
from fedloom.core.lora import server_rank
from fedloom.core.partial_depth import require_all_layers
from fedloom.core.policies import Aggregator, BudgetRule, Fleet, Schedule, aggregator_layers, require_trusted_client
from fedloom.core.server import Server
from fedloom.core.types import Budget, ClientId, GroupHistory, Profile
from fedloom.hierarchy.edge import Edge, MemberBudget, matching_phase
from fedloom.hierarchy.grouping import Grouping, Member, validate_groups
from fedloom.hierarchy.joint_plan.joint_plan import JointPlan
from fedloom.hierarchy.regrouping import Compared, Regrouping
from fedloom.hierarchy.root_server import RootServer
from fedloom.hierarchy.secure_edge import FEWEST, Secure, SecureEdge, SharedRanks, SumRounds
from fedloom.hierarchy.tree import Tree
from fedloom.hierarchy.tree_state import Link, Topology
from fedloom.privacy.secure_sum.field import WORD
from fedloom.schedule.rounds import Rounds
from fedloom.schedule.shared.weights import by_examples, uniform

InnerRounds: TypeAlias = Callable[[Profile, Fleet], int]
"""(profile of an edge, fleet of the root) -> versions that the edge makes of its next task."""


@dataclass(frozen=True, slots=True)
class Everybody:
    """Grouping that puts all clients into one group."""

    def __call__(self, members: Sequence[Member], seed: int) -> tuple[tuple[ClientId, ...], ...]:
        """Return all of them, by name."""
        return (tuple(sorted(member.client for member in members)),)


@dataclass(frozen=True, slots=True)
class EdgeBudget:
    """Budget rule of the root without a plan for groups: an edge trains the whole model, as many steps as the run's plan says.

    Rank and depth are not the plan's: what a weak member cannot hold, another one can, and each is asked for its own.

    Fields:
        plan: the run's plan, asked for steps alone.
        rank: rank of every edge's task.
        rounds: versions that an edge makes of a task, a number or a rule.
    """

    plan: BudgetRule
    rank: int
    rounds: int | InnerRounds

    def __call__(self, profile: Profile, fleet: Fleet) -> Budget:
        """Return the budget of this edge's next task; never more rounds than steps."""
        budget = self.plan(profile, fleet)
        rounds = self.rounds if isinstance(self.rounds, int) else self.rounds(profile, fleet)
        return replace(budget, rank=self.rank, rounds=max(1, min(rounds, budget.steps)), depth=None)


@dataclass(frozen=True, slots=True)
class Hierarchy:
    """Groups of clients, each behind an edge, which is a client of the run's server.

    An edge makes several versions of a task with its members, and reports the last one. In each of these rounds every member trains
    the steps of the task divided by the rounds. Its rank and depth are those of the run's plan, as without a hierarchy.

    Fields:
        groups: rule that divides clients into groups (default: one group of all clients).
        rounds: versions that an edge makes of a task, a number or a rule (default 2; a `plan` of groups chooses its own).
        schedule: when an edge merges and which members it starts (default None: synchronous rounds of the whole group).
        aggregator: how an edge merges (default None: the run's method, without what is wrapped around it).
        plan: budgets of edges (default None: the steps of the run's plan, at the server's rank). `JointPlan()` chooses rounds,
            steps, depth and rank for each group from what is known of all.
        link: link of an edge to the server (default None: the edges live on the server, and nothing travels).
        inner_speedup: how many times as fast a member's link to its edge is as its link to the server (default 1.0).
        topics: number of topics that clients are compared by, clustered from the base model's embeddings, for data without labels
            (default 0: by label counts).
        epsilon: privacy budget of the counts, differential privacy per example (`private_histogram.noised`; default 0: exact counts).
        regroup: drift of clients' times (`grouping.time_drift`) above which groups are made again after a version (default 0:
            never; 0.1: 10 %).
        secure: how members' answers are summed so that no party, the server included, sees a single one (default None: not summed).
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
    secure: Secure | None = None

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
        if self.secure is not None:
            self._check_beside_sums()

    def _check_beside_sums(self) -> None:
        """Raise Refused for what needs a member's own answer, or how long it takes."""
        seen = "nobody sees a member's own answer where a group is summed"
        if self.schedule is not None:
            remedy = f"{seen}: all members answer together; leave it out, and let the run's schedule be asynchronous over groups"
            raise Refused("hierarchy.schedule", type(self.schedule).__name__, remedy)
        if isinstance(self.plan, JointPlan):
            remedy = f"it learns from members' losses and changes, and {seen}; leave it or hierarchy.secure out"
            raise Refused("hierarchy.plan", "JointPlan", remedy)
        if self.regroup:
            remedy = f"it learns from how long single answers take, and {seen}; leave it or hierarchy.secure out"
            raise Refused("hierarchy.regroup", self.regroup, remedy)

    def grouped(self, members: Sequence[Member], seed: int) -> dict[ClientId, tuple[ClientId, ...]]:
        """Return the groups by the names of their edges. Raises Refused unless each client is in exactly one."""
        groups = validate_groups(self.groups(members, seed), members)
        width = len(str(len(groups) - 1))
        return {f"edge{k:0{width}d}": group for k, group in enumerate(groups)}

    def over(
        self, flat: Server, members: Mapping[ClientId, Sequence[Profile]], compared: Compared | None = None
    ) -> Tree:
        """Return the tree in the place of `flat`, which has done nothing yet. Raises Refused where methods do not go together.

        Args:
            flat: the server without a hierarchy, with the policies of the root.
            members: profiles of the members of each edge.
            compared: what groups are made again with (needed with `regroup`).
        """
        most = sum(map(len, members.values())) if self.regroup else 0
        require_trusted_client(flat.aggregator, members)
        edges = {name: self.edge(flat, len(group), len(members), most) for name, group in members.items()}
        root = self._root(flat, len(members), flat.transfer if self.link else None)
        tree = Tree(root, edges, Topology(members, self.link), self._regrouping(compared, flat.seed))
        self._check_plan(flat, tree.root.fleet())
        return tree

    def over_regions(self, flat: Server, regions: int) -> RootServer:
        """Return the server in the place of `flat` whose edges are elsewhere, so many of them. Raises Refused as `over` does."""
        root = RootServer(self._root(flat, regions, flat.transfer), trusted=False)
        able = Profile("region", 1, memory=math.inf)
        self._check_plan(flat, replace(root.fleet(), groups={able.client: GroupHistory(able, (able,))}))
        return root

    def _check_plan(self, flat: Server, fleet: Fleet) -> None:
        """Raise Refused where a plan of groups asks for what the method, the model or a client of these groups cannot have."""
        if isinstance(self.plan, JointPlan):
            require_all_layers(flat.aggregator, flat.aggregator.start(flat.state.model, Budget(1, 1), 0).rules)
            self.plan.check(fleet)

    def _root(self, flat: Server, edges: int, transfer: Codec | None) -> Server:
        """Return the server over so many edges, by a `transfer` of its own. Raises Refused where methods do not go together."""
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
            canary=flat.canary,
            largest_step=flat.norm_limits.largest_step,
        )

    def edge(self, flat: Server, size: int, edges: int, most: int = 0) -> Edge:
        """Return one of so many edges, over `size` members, who may become `most`."""
        if self.secure is not None:
            return SecureEdge(self._summing(flat, size, edges, self.secure), self.secure, flat.norm_limits.largest_step)
        weigh = (
            by_examples if flat.mechanism is None else uniform
        )  # what members hold is not told where they are private
        inner = self._inner(flat, size, edges, Rounds(cohort_size=max(size, most), weigh=weigh))
        return Edge(inner, isinstance(self.plan, JointPlan), self.regroup > 0)

    def _summing(self, flat: Server, size: int, edges: int, secure: Secure) -> Server:
        """Return the inner server of an edge that only sums. Raises Refused where its group is too small, or answers are needed."""
        check_sums(flat, self._method(flat), size, secure)
        everybody = Rounds(cohort_size=size, weigh=uniform)
        inner = self._inner(flat, size, edges, everybody)
        inner.aggregator, inner.budget_rule = (
            CommonStart(inner.aggregator),
            SharedRanks(inner.budget_rule, secure.least),
        )
        inner.schedule = SumRounds(secure.least, everybody)
        return inner

    def _regrouping(self, compared: Compared | None, seed: int) -> Regrouping | None:
        """Return when and how groups are made again (None: never). Raises ValueError without `compared`."""
        if not self.regroup:
            return None
        if compared is None:
            raise ValueError("groups are made again with what is known of all clients: say with what they are compared")
        return Regrouping(self.groups, self.regroup, compared, seed)

    def _method(self, flat: Server) -> Aggregator:
        """Return the method of the edges."""
        return self.aggregator or cast(Aggregator, list(aggregator_layers(flat.aggregator))[-1])

    def _inner(self, flat: Server, size: int, edges: int, everybody: Rounds) -> Server:
        """Return the inner server of an edge of this size. It gives a task up after its share of the failures that end the run."""
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
            largest_step=flat.norm_limits.largest_step,
            mechanism=flat.mechanism,
            participation=flat.participation,
        )


def check_methods(flat: Server, inner: Aggregator, edges: int) -> None:
    """Raise Refused where what an edge makes of a task would be no answer to it, or a method counts other clients than there are."""
    outer, model = flat.aggregator, flat.state.model
    names = f"{type(inner).__name__} below {type(outer).__name__}"
    for layer in aggregator_layers(outer):
        if getattr(layer, "clients", edges) != edges:
            remedy = f"give clients={edges}: the clients of the server are the edges"
            raise Refused("aggregator.clients", getattr(layer, "clients", 0), remedy)
    if trusted := getattr(inner, "trusted_client", None):
        remedy = "it is in one group, and the others have nobody to judge by; use rule=MultiKrum() below, or trust an edge above"
        raise Refused("hierarchy.aggregator", trusted, remedy)
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


def check_sums(flat: Server, inner: Aggregator, size: int, secure: Secure) -> None:
    """Raise Refused where a group of this size, or what is merged in it and above it, needs more than a sum over its members."""
    if size < secure.least:
        remedy = f"a group has {size} members; make groups larger, or `least` smaller, but not below {FEWEST}"
        raise Refused("hierarchy.secure.least", secure.least, remedy)
    if (needed := Summed(secure.bits, 1.0, size).word_bits) > WORD:
        remedy = f"a sum over {size} members needs {needed} bits and has {WORD}; fewer bits, or smaller groups"
        raise Refused("hierarchy.secure.bits", secure.bits, remedy)
    for layer in aggregator_layers(flat.aggregator):
        if getattr(layer, "judges_answers", False):
            remedy = (
                "secrecy or robustness: a few liars are most of some group, and nobody sees who; leave one of them out"
            )
            raise Refused("hierarchy.secure", type(layer).__name__, remedy)
    depth = getattr(flat.budget_rule, "depth", None)
    if depth is not None:
        remedy = "members of a group that is summed train the same layers; leave plan.depth or hierarchy.secure out"
        raise Refused("plan.depth", type(depth).__name__, remedy)
    if reason := why_not_summed(inner, flat.state.model):
        raise Refused("hierarchy.secure", reason, "use FFA, FedSVD, RoLoRA, FedIT or ProductDelta, or leave it out")


def need_lasting_groups(hierarchy: Hierarchy | None) -> None:
    """Raise Refused where groups are made again although members stay where they are: a deployment has regions."""
    if hierarchy and hierarchy.regroup:
        remedy = "sites stay with the region where they are; leave it out, or simulate"
        raise Refused("hierarchy.regroup", hierarchy.regroup, remedy)
