"""Privacy of a whole run: what is refused beside `Run.privacy`, by name, and the parts of a server that carry it out."""

from __future__ import annotations

from dataclasses import dataclass

from fedloom.aggregate.adam import Adam
from fedloom.aggregate.fadas import FADAS
from fedloom.aggregate.lora_a2 import LoRAA2
from fedloom.aggregate.rolora import RoLoRA
from fedloom.core.errors import Refused
from fedloom.core.limits import Limits
from fedloom.core.participation import Participation
from fedloom.core.policies import Schedule, aggregator_layers
from fedloom.core.types import Rules
from fedloom.hierarchy.grouping import NearIID
from fedloom.hierarchy.joint_plan.joint_plan import JointPlan
from fedloom.plan.rank import RankByData
from fedloom.privacy.accounting import Gaussian, epsilon_of, multiplier_for
from fedloom.privacy.correlated_noise import largest_sensitivity
from fedloom.privacy.private import Private, client_level
from fedloom.privacy.private_merge import (
    PrivateMerge,
    added_in,
    private_limits,
    require_plain_merge,
    require_plain_start,
)
from fedloom.privacy.secret_noise import SecretNoise, random_words
from fedloom.runs.run import Run
from fedloom.schedule.fedasync import FedAsync
from fedloom.schedule.fedfa import FedFa
from fedloom.schedule.shared.staleness import CONSTANT

SIMULATED_SERVER = "server noise"
"""Name by which a simulation's seed makes the secret of its server's noise."""


@dataclass(frozen=True, slots=True)
class ServerPrivacy:
    """What a server needs of a run's privacy.

    Fields:
        limits: limits of the run, without those that compare clients' answers.
        mechanism: how versions are released (None: as they are merged).
        participation: how often a client may take part (None: as often as it is asked).
    """

    limits: Limits
    mechanism: PrivateMerge | None = None
    participation: Participation | None = None


def server_privacy(privacy: Private | None, limits: Limits, secret: bytes) -> ServerPrivacy:
    """Return what a server needs, given the secret of its noise."""
    if privacy is None:
        return ServerPrivacy(limits)
    if privacy.unit == "record":
        return ServerPrivacy(limits, None, privacy.participation)
    random_words(secret, "server noise", count=1)  # a missing library is said now, and not at the first version
    mechanism = PrivateMerge(privacy, SecretNoise(secret, ("server noise",)))
    return ServerPrivacy(private_limits(limits), mechanism, privacy.participation)


def check_private(run: Run) -> None:
    """Raise Refused for settings that are not accounted for beside the privacy of the run."""
    privacy, tree = run.privacy, run.hierarchy
    if privacy is None:
        return
    if privacy.unit == "record":
        if tree is not None and (isinstance(tree.plan, JointPlan) or isinstance(tree.groups, NearIID)):
            raise Refused(
                "hierarchy", _tree_name(run), "what groups report of their members' data is not noised; leave it out"
            )
        return
    require_plain_merge(run.aggregator, run.schedule)
    if run.canary is not None:
        remedy = 'which answers it sets aside tells of their clients; leave it out, or use unit="record"'
        raise Refused("canary", run.canary, remedy)
    if isinstance(run.plan.rank, RankByData):
        remedy = "clients do not say how many examples they hold in a run that is private to them; use another rule"
        raise Refused("plan.rank", "RankByData", remedy)
    if tree is not None:
        _check_tree(run, privacy)
    if privacy.noise == "banded":
        _check_banded(run)
    if privacy.budget is not None:
        check_budget(privacy, run.limits.versions)


def refuse_private_regions(run: Run) -> None:
    """Raise Refused for a deployment whose regions, and not its server, merge single clients: they have no secret and no ledger."""
    if client_level(run.privacy) and run.hierarchy is not None:
        remedy = 'a region makes no noise of its own yet; leave the regions out, or use unit="record", or simulate'
        raise Refused("privacy.unit", "client", remedy)


def check_private_start(run: Run, rules: Rules) -> None:
    """Raise Refused where a method's clients would send more than a change; `rules` are those of the starts that it hands out."""
    if client_level(run.privacy):
        require_plain_start(rules, type(run.aggregator).__name__)


def private_notes(run: Run) -> list[str]:
    """Notes on what a run does otherwise than its settings say, because it is private."""
    named = [f"limits.{name}" for name in ("norm_ratio", "step_ratio") if getattr(run.limits, name) is not None]
    if not client_level(run.privacy) or not named:
        return []
    return [
        f"{' and '.join(named)} are not used: to refuse an answer for its length would tell of it; it is clipped instead."
    ]


def client_event(privacy: Private, versions: int) -> Gaussian:
    """Return all that a run of so many versions releases of one client, at most, as one event."""
    if privacy.noise == "banded":
        moved = largest_sensitivity(privacy.apart, versions, privacy.most_answers, privacy.apart)
    else:
        moved = privacy.most_answers**0.5
    return Gaussian(moved / privacy.multiplier)


def check_budget(privacy: Private, versions: int) -> None:
    """Raise Refused where the answers that a client may give spend more than its budget."""
    assert privacy.budget is not None
    epsilon, delta = privacy.budget
    event = client_event(privacy, versions)
    found = epsilon_of([event], delta)
    if found > epsilon:
        needed = multiplier_for(epsilon, delta, lambda z: [Gaussian(event.mu * privacy.multiplier / z)])
        fewer = "most_answers" if privacy.noise == "independent" else "most_answers or versions"
        remedy = f"a client's answers may spend {found:.3g} at delta {delta:g}; give multiplier={needed:.4g}, or fewer {fewer}"
        raise Refused("privacy.budget", epsilon, remedy)


def _check_tree(run: Run, privacy: Private) -> None:
    """Raise Refused for a hierarchy that tells more of its members than their sums."""
    tree = run.hierarchy
    assert tree is not None
    require_plain_merge(tree.aggregator or run.aggregator, tree.schedule or run.schedule, "hierarchy.aggregator")
    if getattr(tree, "secure", None) is not None:
        remedy = 'an edge that sees only sums cannot clip; choose one, or unit="record", which composes with it'
        raise Refused("hierarchy.secure", "Secure", remedy)
    if isinstance(tree.plan, JointPlan):
        remedy = (
            "it learns from what members changed and lost, which is not noised; choose rounds, steps and rank yourself"
        )
        raise Refused("hierarchy.plan", "JointPlan", remedy)
    if isinstance(tree.groups, NearIID):
        remedy = (
            "it groups by counts of clients' labels, which is not in the ledger; use RandomGroups, BySpeed or ByRegion"
        )
        raise Refused("hierarchy.groups", "NearIID", remedy)
    if tree.regroup:
        raise Refused("hierarchy.regroup", tree.regroup, "it needs reports of how members worked; leave it out")
    if privacy.apart > 1:
        remedy = (
            "an edge begins its versions anew with each task, so they are not apart by a number of them; give apart=1"
        )
        raise Refused("privacy.apart", privacy.apart, remedy)


def _check_banded(run: Run) -> None:
    """Raise Refused where noise of one version would not cancel with that of another: where what they add to differs.

    What a version tells is accounted whatever is merged; but elsewhere correlated noise would be more than independent noise.
    """
    assert run.privacy is not None
    layers = list(aggregator_layers(run.aggregator))
    if run.privacy.apart == 1:
        remedy = "noise is correlated over as many versions as a client's merges are apart: give apart=2 or more"
        raise Refused("privacy.apart", 1, remedy)
    if added_in(run.aggregator) == "product":
        remedy = "each merge cuts products to the rank, and noise that is cut off cannot cancel; use FedIT or FFA"
        raise Refused("aggregator", type(layers[-1]).__name__, remedy)
    for layer in layers:
        if isinstance(layer, RoLoRA | LoRAA2 | Adam | FADAS):
            why = "its versions move by turns or by steps of their own size, so noise cannot cancel between them"
            raise Refused("aggregator", type(layer).__name__, f'{why}; use FedIT or FFA, or noise="independent"')
    _check_equal_steps(run.schedule)
    if run.plan.depth is not None:
        remedy = 'layers that nobody trained are in some versions only, so noise cannot cancel; leave it out, or noise="independent"'
        raise Refused("plan.depth", type(run.plan.depth).__name__, remedy)


def _check_equal_steps(schedule: Schedule) -> None:
    """Raise Refused for a schedule whose versions are not a running sum with equal steps."""
    discount = getattr(schedule, "discount", CONSTANT)
    if discount != CONSTANT:
        remedy = "correlated noise cancels between versions of equal steps; give discount=Constant()"
        raise Refused("schedule.discount", discount, remedy)
    for name in ("steady", "delay_threshold"):
        if getattr(schedule, name, None) is not None:
            remedy = "correlated noise cancels between versions of equal steps; leave it out"
            raise Refused(f"schedule.{name}", getattr(schedule, name), remedy)
    if isinstance(schedule, FedAsync) or (isinstance(schedule, FedFa) and schedule.delta_rate is None):
        remedy = (
            "it averages models, so old noise fades by itself; use Rounds, FedBuff, Immediate or FedFa(delta_rate=...)"
        )
        raise Refused("schedule", type(schedule).__name__, remedy)


def _tree_name(run: Run) -> str:
    return type(run.hierarchy.plan or run.hierarchy.groups).__name__ if run.hierarchy else ""
