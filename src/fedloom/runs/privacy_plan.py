"""What a run promises, and what its noise does to what is learnt: figures before a run, that tell whether it makes sense.

Noise is compared with what it is added to. For unit "client" one version adds noise of norm z S m sqrt(n) to a sum whose norm is S at
most, where every answer says the same (S the clip, m the largest weight, n the numbers that get noise); for unit "record" one step of
training adds z S sqrt(n) to a sum of at most b S (b rows in a batch). Over a run the noise of independent draws grows as the root of
their number (of correlated ones less) and what is learnt as the number, so the ratio shrinks with the root. It is a figure for
comparing settings and units: no run whose ratio is far above 1 learns anything, and one far below 1 hardly notices the noise.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from fedloom.core.types import Budget, Model, Rules
from fedloom.hierarchy.grouping import NearIID
from fedloom.hierarchy.joint_plan.joint_plan import JointPlan
from fedloom.privacy.accounting import Gaussian, PrivacyEvent, epsilon_of, multiplier_for
from fedloom.privacy.correlated_noise import noise_in_sums
from fedloom.privacy.private import Private, client_level
from fedloom.privacy.private_merge import added_in
from fedloom.runs.job import Job
from fedloom.runs.private_run import client_event
from fedloom.runs.record_budget import largest_cost
from fedloom.runs.run import Run

EPSILON, DELTA = 8.0, 1e-5
"""Budget for which units are compared, where the run has none."""


@dataclass(frozen=True, slots=True)
class UnitPlan:
    """What protecting one kind of unit takes, in this run.

    Fields:
        unit: "client" or "record".
        multiplier: noise multiplier (z).
        epsilon: what one unit spends at most, at the delta that was asked for.
        once: noise over what it is added to, in one version, or in one step of training.
        whole: the same over the whole run.
        of: how many numbers get noise at once.
    """

    unit: str
    multiplier: float
    epsilon: float
    once: float
    whole: float
    of: int


def promised_events(job: Job) -> tuple[PrivacyEvent, ...]:
    """Return all that a run may release of one client, or of a record at its smallest client. Empty without privacy."""
    if job.run.privacy is None:
        return ()
    if client_level(job.run.privacy):
        return (client_event(job.run.privacy, job.run.limits.versions),)
    return largest_cost(job.run, job.run.privacy.multiplier, smallest_rows(job))


def smallest_rows(job: Job) -> int:
    """Return the rows of the client with fewest, whose records are in a step most often (1: no client is known)."""
    return max(1, min((len(shard.train) for shard in job.shards), default=1))


def client_plan(job: Job, delta: float, epsilon: float | None = None) -> UnitPlan:
    """Return what protecting clients takes: with the run's own noise, or with what keeps to this epsilon."""
    versions = job.run.limits.versions
    private = job.run.privacy
    if private is None or not client_level(private):
        private = Private(1.0, 1.0, _most_tasks(job.run))
    moved = client_event(private, versions).mu * private.multiplier
    z = private.multiplier
    if epsilon is not None:
        z = multiplier_for(epsilon, delta, lambda one: [Gaussian(moved / one)])
    count = noisy_numbers(job)
    once = z * math.sqrt(count) / answers_together(job)
    whole = once / math.sqrt(versions)
    if private.noise == "banded":
        whole *= noise_in_sums(private.apart, versions) / noise_in_sums(1, versions)
    return UnitPlan("client", z, epsilon_of([Gaussian(moved / z)], delta), once, whole, count)


def record_plan(job: Job, delta: float, epsilon: float | None = None) -> UnitPlan:
    """Return what protecting records of the smallest client takes: with the run's own noise, or with what keeps to this epsilon."""
    run, rows = job.run, smallest_rows(job)
    if run.privacy is None or run.privacy.unit != "record":
        run = replace(run, privacy=Private(1.0, 1.0, _most_tasks(run), unit="record"))
    assert run.privacy is not None
    z = run.privacy.multiplier
    if epsilon is not None:
        z = multiplier_for(epsilon, delta, lambda one: largest_cost(run, one, rows))
    count, batch = trained_numbers(job), min(rows, run.training.batch_size)
    once = z * math.sqrt(count) / batch
    draws = run.limits.versions * answers_together(job) * max(1, run.plan.local_steps)
    return UnitPlan("record", z, epsilon_of(largest_cost(run, z, rows), delta), once, once / math.sqrt(draws), count)


def _most_tasks(run: Run) -> int:
    """Tasks that one client may be given: as many as the run says, else one a version."""
    return run.privacy.most_answers if run.privacy is not None else run.limits.versions


def answers_together(job: Job) -> int:
    """Return how many answers one version is made of, as far as the schedule of those who see single clients says."""
    tree = job.run.hierarchy
    schedule = job.run.schedule if tree is None else tree.schedule
    sizes = [len(members) for members in job.server.manifest_sections().get("groups", {}).values()]
    named = [getattr(schedule, name, None) for name in ("cohort_size", "buffer_size", "window")]
    size = next((one for one in named if isinstance(one, int)), min(sizes, default=1))
    return max(1, min(size, len(job.profiles) or size))


def noisy_numbers(job: Job) -> int:
    """Return how many numbers the server adds noise to: factors, or with a method that adds products whole matrices."""
    tree = job.run.hierarchy
    method = (tree.aggregator if tree else None) or job.run.aggregator
    if added_in(method) == "factor":
        return trained_numbers(job)
    adapter = job.server.state.model.adapter
    matrices = sum(len(factor.up) * factor.down.shape[1] for factor in adapter.factors.values())
    return matrices + sum(tensor.numel() for tensor in adapter.dense.values())


def trained_numbers(job: Job) -> int:
    """Return how many numbers of the adapter are trained and sent, at the server's rank."""
    model, rules = job.server.state.model, rules_of(job)
    sides = {"down": 0, "up": 0, "dense": sum(tensor.numel() for tensor in model.adapter.dense.values())}
    for factor in model.adapter.factors.values():
        sides["down"] += factor.down.numel()
        sides["up"] += factor.up.numel()
    return sum(count for side, count in sides.items() if side not in rules.unchanged)


def rules_of(job: Job) -> Rules:
    """Return the method's instructions to its clients."""
    model: Model = job.server.state.model
    return job.run.aggregator.start(model, Budget(1, 1), 0).rules


def what_leaves(run: Run) -> Sequence[tuple[str, str]]:
    """Return what leaves a site in this run, and how much of it is hidden from whom."""
    private, tree = run.privacy, run.hierarchy
    secure = tree is not None and getattr(tree, "secure", None) is not None
    change = "exact, and visible to the server"
    if client_level(private):
        change = "exact to the server, which clips it and adds noise before anybody else sees a version"
    elif private is not None:
        change = "with noise from training (DP-SGD): protected from everybody, the server too"
    if secure:
        change = f"masked: the server sees sums over a group; {change if private else 'without noise, a sum is exact'}"
    measured = "not sent" if private is not None else "exact"
    counts: Mapping[bool, str] = {
        True: "with geometric noise, once" if tree is not None and tree.epsilon else "exact",
        False: "not sent",
    }
    scores = "exact" if run.held_out and private is None else "not sent"
    learns = tree is not None and isinstance(tree.plan, JointPlan)
    return (
        ("adapter update", change),
        ("training losses and token counts", measured),
        ("number of examples", "not sent" if client_level(private) else "exact"),
        ("scores on held-out examples", scores),
        ("counts of labels or topics, for grouping", counts[tree is not None and isinstance(tree.groups, NearIID)]),
        ("updates and losses of members of a group, for a plan", "exact" if learns else "not sent"),
        ("participation, and when it answered", "visible"),
    )
