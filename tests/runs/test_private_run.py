"""Privacy of a whole run: each setting beside it that is not accounted for is refused by name, before a model is loaded."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fedloom import (
    ACE,
    FFA,
    Adam,
    Averaged,
    BySpeed,
    Canary,
    Clip,
    FedAsync,
    FedBuff,
    FedEx,
    FedFa,
    FedIT,
    FixedDepth,
    Hierarchy,
    HLoRA,
    Immediate,
    JointPlan,
    Limits,
    Momentum,
    NearIID,
    Plan,
    Private,
    ProductDelta,
    RandomGroups,
    RankByData,
    RoLoRA,
    Rounds,
    Scaffold,
)
from fedloom.core.errors import Refused
from fedloom.core.schema import jsonable
from fedloom.core.types import Pruning, Rules
from fedloom.privacy.accounting import epsilon_of
from fedloom.privacy.correlated_noise import band_coefficients
from fedloom.runs.manifest import settings_hash
from fedloom.runs.private_run import (
    check_private,
    check_private_start,
    client_event,
    private_notes,
    refuse_private_regions,
    server_privacy,
)
from fedloom.schedule.shared.staleness import CONSTANT
from fedloom.schedule.shared.weights import uniform
from tests.support.tiny_models import tiny_run

ALIKE = Rounds(cohort_size=2, weigh=uniform)
CLIENT = Private(clip=1.0, multiplier=1.0, most_answers=3)


def called(value: object) -> str:
    """Its repr without addresses, which differ between workers."""
    return re.sub(r" at 0x\w+", "", repr(value))


def private_run(**more: Any) -> Any:
    return tiny_run(Path("model"), **({"aggregator": FFA(), "schedule": ALIKE, "privacy": CLIENT} | more))


@pytest.mark.parametrize(
    "more",
    [
        {}, {"aggregator": FedIT()}, {"aggregator": ProductDelta()}, {"aggregator": HLoRA()},
        {"aggregator": Averaged(Momentum(FFA()))},
        {"schedule": FedFa(window=1)}, {"schedule": FedBuff()}, {"schedule": FedAsync()},
        {"hierarchy": Hierarchy(groups=BySpeed(2), schedule=FedBuff(2, 3))}, {"hierarchy": Hierarchy(groups=RandomGroups(2))},
    ],
    ids=called,
)  # fmt: skip
def test_what_goes_with_it(more: Any) -> None:
    check_private(private_run(**more))


@pytest.mark.parametrize(
    ("more", "field", "reason"),
    [
        ({"aggregator": FedEx()}, "aggregator", "more than the mean of changes"),
        ({"aggregator": HLoRA(published_alpha=16.0)}, "aggregator", "more than the mean of changes"),
        ({"aggregator": Clip(FFA())}, "aggregator", "looks at single answers"),
        ({"aggregator": ACE(FFA(), 6)}, "aggregator", "looks at single answers"),
        ({"aggregator": Averaged(Scaffold())}, "aggregator", "looks at single answers"),
        ({"schedule": FedFa(window=2)}, "schedule", "window=1"),
        ({"schedule": Rounds()}, "schedule.weigh", "weigh=uniform"),
        ({"plan": Plan(RankByData())}, "plan.rank", "how many examples they hold"),
        ({"canary": Canary(4)}, "canary", "tells of their clients"),
        ({"hierarchy": Hierarchy(groups=NearIID(2))}, "hierarchy.groups", "counts of clients' labels"),
        ({"hierarchy": Hierarchy(plan=JointPlan())}, "hierarchy.plan", "is not noised"),
        ({"hierarchy": Hierarchy(regroup=0.1)}, "hierarchy.regroup", "reports of how members worked"),
        ({"hierarchy": Hierarchy(aggregator=FedEx())}, "hierarchy.aggregator", "more than the mean of changes"),
        ({"hierarchy": Hierarchy(schedule=Rounds())}, "schedule.weigh", "weigh=uniform"),
        ({"hierarchy": Hierarchy(), "privacy": replace(CLIENT, apart=2)}, "privacy.apart", "begins its versions anew"),
        ({"privacy": replace(CLIENT, budget=(1.0, 1e-5))}, "privacy.budget", "give multiplier="),
    ],
    ids=called,
)
def test_what_is_not_accounted_for_is_refused_by_name(more: Any, field: str, reason: str) -> None:
    with pytest.raises(Refused, match=reason) as caught:
        check_private(private_run(**more))
    assert caught.value.field == field


BANDED = {"privacy": replace(CLIENT, noise="banded", apart=2), "schedule": FedBuff(discount=CONSTANT)}


@pytest.mark.parametrize(
    "more",
    [
        {}, {"aggregator": Momentum(FedIT())}, {"aggregator": Averaged(FFA())}, {"schedule": ALIKE},
        {"schedule": Immediate()}, {"schedule": FedFa(window=1, delta_rate=0.5)},
    ],
    ids=called,
)  # fmt: skip
def test_what_goes_with_correlated_noise(more: Any) -> None:
    check_private(private_run(**(BANDED | more)))


@pytest.mark.parametrize(
    ("more", "field", "reason"),
    [
        ({"privacy": replace(CLIENT, noise="banded")}, "privacy.apart", "apart=2 or more"),
        ({"aggregator": ProductDelta()}, "aggregator", "cut off cannot cancel"),
        ({"aggregator": Averaged(ProductDelta())}, "aggregator", "cut off cannot cancel"),
        ({"aggregator": RoLoRA()}, "aggregator", "by turns"),
        ({"aggregator": Adam(FFA())}, "aggregator", "steps of their own size"),
        ({"schedule": FedBuff()}, "schedule.discount", "equal steps"),
        ({"schedule": FedBuff(discount=CONSTANT, delay_threshold=2)}, "schedule.delay_threshold", "equal steps"),
        ({"schedule": Immediate(steady=3)}, "schedule.steady", "equal steps"),
        ({"schedule": FedAsync(discount=CONSTANT)}, "schedule", "old noise fades"),
        ({"schedule": FedFa(window=1)}, "schedule", "old noise fades"),
        ({"hierarchy": Hierarchy()}, "privacy.apart", "begins its versions anew"),
        ({"plan": Plan(depth=FixedDepth(1))}, "plan.depth", "some versions only"),
    ],
    ids=called,
)
def test_what_correlated_noise_does_not_go_with_is_refused_by_name(more: Any, field: str, reason: str) -> None:
    with pytest.raises(Refused, match=reason) as caught:
        check_private(private_run(**(BANDED | more)))
    assert caught.value.field == field


def test_a_run_with_correlated_noise_is_planned_by_its_worst_pattern() -> None:
    """30 versions, 3 answers 10 apart: three whole columns of the band. The budget is what the releases can add up to."""
    private = Private(clip=1.0, multiplier=4.0, most_answers=3, noise="banded", apart=10)
    column = math.hypot(*band_coefficients(10))
    assert client_event(private, 30).mu == pytest.approx(math.sqrt(3) * column / 4.0, rel=1e-12)
    assert client_event(private, 1).mu == pytest.approx(0.25, rel=1e-12)


@pytest.mark.parametrize(
    ("rules", "why"),
    [
        (Rules(private=("up",)), "keep what they train"),
        (Rules(select=3), "directions a client chose"),
        (Rules(pruning=Pruning()), "rank after pruning"),
    ],
)
def test_what_clients_would_show_beside_a_change_is_refused(rules: Rules, why: str) -> None:
    with pytest.raises(Refused, match=why):
        check_private_start(private_run(), rules)
    check_private_start(private_run(privacy=None), rules)


def test_the_multiplier_that_a_refusal_names_is_enough() -> None:
    """And the known value: z = 4, 10 answers, delta 1e-5 is 3.341409."""
    ten = Private(clip=1.0, multiplier=4.0, most_answers=10, budget=(3.3415, 1e-5))
    check_private(private_run(privacy=ten))
    assert epsilon_of([client_event(ten, 100)], 1e-5) == pytest.approx(3.341409, abs=2e-6)
    with pytest.raises(Refused) as caught:
        check_private(private_run(privacy=replace(ten, budget=(1.0, 1e-5))))
    named = float(str(caught.value).partition("give multiplier=")[2].partition(",")[0])
    check_private(private_run(privacy=replace(ten, budget=(1.0, 1e-5), multiplier=named * 1.01)))


def test_a_server_that_clips_compares_no_answers() -> None:
    """A refusal of an answer for how far it moved would tell of its client, and of the others it was compared with."""
    made = server_privacy(CLIENT, Limits(), b"s" * 32)
    assert (made.limits.norm_ratio, made.limits.step_ratio) == (None, None)
    assert made.mechanism is not None
    assert private_notes(private_run())[0].startswith("limits.norm_ratio and limits.step_ratio are not used")
    assert private_notes(private_run(privacy=None)) == []
    records = server_privacy(replace(CLIENT, unit="record"), Limits(), b"")
    assert (records.limits, records.mechanism) == (Limits(), None)
    assert records.participation is not None
    assert records.participation.tasks


def test_regions_make_no_noise_yet() -> None:
    with pytest.raises(Refused, match="a region makes no noise"):
        refuse_private_regions(private_run(hierarchy=Hierarchy()))
    refuse_private_regions(private_run())
    refuse_private_regions(private_run(hierarchy=Hierarchy(), privacy=replace(CLIENT, unit="record")))


def test_a_run_without_privacy_has_the_hash_that_it_had() -> None:
    run = private_run(privacy=None)
    settings = jsonable(run)
    assert isinstance(settings, dict)
    assert settings_hash(settings) == settings_hash({name: one for name, one in settings.items() if name != "privacy"})
    assert settings_hash(settings) != settings_hash(jsonable(private_run()))
