"""Privacy beside every method and schedule: each pair runs with its promises, or is refused with the reason, before anything runs.

What a run with `Private` promises is checked from the server's commands alone, in storms of events: a `Release` stands before every
version and names just the clients that are in it, with their shares; nobody is merged more often, or sooner again, than it may
be; and what is spent is the sensitivity of its own merges, and at most what `client_event` says before the run.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter, defaultdict
from dataclasses import replace
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedloom.aggregate.fedit import FedIT
from fedloom.aggregate.ffa import FFA
from fedloom.aggregate.momentum import Momentum
from fedloom.aggregate.product_delta import ProductDelta
from fedloom.core.codec import Codec, DeltaInt8, Half
from fedloom.core.errors import Refused
from fedloom.core.events import Cancel, Command, Publish, Release
from fedloom.core.policies import Aggregator, Schedule, aggregator_layers
from fedloom.core.types import Budget
from fedloom.plan.budget import Plan
from fedloom.plan.rank import RandomRank
from fedloom.privacy.correlated_noise import pattern_sensitivity
from fedloom.privacy.private import Private
from fedloom.privacy.private_merge import PrivateMerge, require_plain_merge, require_plain_start
from fedloom.privacy.secret_noise import SecretNoise
from fedloom.runs.private_run import client_event
from fedloom.schedule.fedasync import FedAsync
from fedloom.schedule.fedbuff import FedBuff
from fedloom.schedule.fedfa import FedFa
from fedloom.schedule.rounds import Rounds
from fedloom.schedule.shared.weights import uniform
from tests.support import toys
from tests.support.oracle_cases import MORE
from tests.support.server_storm import NAMES, STORM, Storm
from tests.support.storms import tries

START = toys.graded([1.0, 0.5, 0.2])
RUNS = ("FedIT", "FFA", "RoLoRA", "ProductDelta", "FoldedDelta", "HLoRA", "FedSVD")
"""Methods that go with `Private`."""
AROUND = ("Momentum", "Adam", "FADAS", "Averaged")
"""Wrappers that go with it."""


def alike(schedule: Any) -> Schedule:
    """The schedule with equal weights, where it has weights."""
    return replace(schedule, weigh=uniform) if hasattr(schedule, "weigh") else schedule


SCHEDULES = [*map(alike, toys.schedules()), FedFa(window=1, max_in_flight=3)]
EVERY = [*toys.aggregators(), *MORE]


def why_refused(method: Aggregator, schedule: Schedule) -> str:
    """Why this pair is refused with `Private`; "": it is not."""
    try:
        require_plain_merge(method, schedule)
        require_plain_start(method.start(method.init(START), Budget(3, 1), 0).rules, type(method).__name__)
    except Refused as refused:
        return str(refused)
    return ""


@pytest.mark.parametrize("method", EVERY, ids=toys.called)
def test_every_method_runs_or_is_refused_by_name(method: Aggregator) -> None:
    layers = [type(layer).__name__ for layer in aggregator_layers(method)]
    fits = (
        layers[-1] in RUNS and all(name in AROUND for name in layers[:-1]) and "published_alpha=1" not in repr(method)
    )
    why = why_refused(method, Rounds(weigh=uniform))
    assert bool(why) != fits
    assert not why or any(name in why for name in layers)


@pytest.mark.parametrize("schedule", [*toys.schedules(), *SCHEDULES], ids=toys.called)
def test_every_schedule_runs_or_is_refused_by_name(schedule: Any) -> None:
    why = why_refused(FFA(), schedule)
    reused, weigh = getattr(schedule, "reuses_answers", False), getattr(schedule, "weigh", uniform)
    assert bool(why) == bool(reused or weigh is not uniform)
    assert ("window=1" in why) == bool(reused)


ALL = [pair for pair in itertools.product(EVERY, SCHEDULES) if not why_refused(*pair)]
FEW = [
    (FedIT(), FedBuff(2, 4, weigh=uniform)), (FFA(), FedAsync(max_in_flight=3)), (ProductDelta(), FedFa(window=1, max_in_flight=3)),
    (Momentum(FFA()), Rounds(2, weigh=uniform)),
]  # fmt: skip


RULES = st.tuples(
    st.integers(1, 4), st.integers(1, 3), st.sampled_from(("independent", "banded")), st.sampled_from((None, Half(), DeltaInt8()))
)  # fmt: skip
"""Answers of a client at most, how far apart, which noise, and how numbers travel."""


class PrivateStorm(Storm):
    """A storm whose releases and versions are added up, as a reader of the commands would."""

    def __init__(self, private: Private, schedule: Schedule, method: Aggregator, transfer: Codec | None = None) -> None:
        """A server with this privacy, and ranks of 1 to 3."""
        mechanism = PrivateMerge(private, SecretNoise(b"s" * 32, ("storm",)))
        more = {"mechanism": mechanism, "participation": private.participation, "transfer": transfer}
        super().__init__(schedule, method=method, start=START, assign=Plan(RandomRank(1, 3), 2), **more)
        self.private, self.release = private, cast(Release | None, None)
        self.counted, self.last, self.spent = Counter[str](), dict[str, int](), dict[str, float]()
        self.shares: dict[str, dict[int, float]] = defaultdict(dict)

    def follow(self, command: Command) -> None:
        """A version stands behind its release; tasks may be cancelled in between."""
        if isinstance(command, Release):
            assert self.release is None
            self.release = command
        elif isinstance(command, Publish):
            assert self.release is not None
            self.add_up(self.release, command)
            self.release = None
        else:
            assert self.release is None or isinstance(command, Cancel)
        super().follow(command)

    def add_up(self, release: Release, publish: Publish) -> None:
        """Nobody is merged too often or too soon, and what is said of a version is about just those who are in it."""
        private, answers = self.private, Counter(update.task.client for update in publish.updates)
        assert (release.version, release.shares.keys()) == (publish.version, answers.keys())
        assert max(release.shares.values()) == 1.0
        for client, count in answers.items():
            assert private.apart == 1 or count == 1
            assert publish.version - self.last.get(client, -math.inf) >= private.apart
            self.last[client] = publish.version
            self.shares[client][publish.version - 1] = release.shares[client]
        band = private.apart if private.noise == "banded" else 1
        for client, mu in release.spent.items():
            self.spent[client] = self.spent.get(client, 0.0) + mu**2
            told = pattern_sensitivity(band, publish.version, self.shares[client]) / private.multiplier
            assert math.sqrt(self.spent[client]) == pytest.approx(told)
        assert release.shares.keys() <= release.spent.keys()
        self.counted.update(answers)
        assert max(self.counted.values()) <= private.most_answers
        assert max(self.spent.values()) <= client_event(private, 12).mu ** 2 + 1e-9

    def run(self, script: list[tuple[str, int, float]]) -> None:
        """The whole storm, to the end of the run."""
        for event in script:
            self.step(*event)
        for client in NAMES:  # whoever is away may still have answers to give, so a run waits for it
            if client not in self.present:
                self.join(client)
        self.finish()
        assert self.counted == Counter(self.server.state.merged)


def check_storm(
    method: Aggregator, schedule: Schedule, script: list[Any], rule: tuple[int, int, Any, Codec | None]
) -> None:
    most, apart, noise, transfer = rule
    private = Private(clip=0.1, multiplier=2.0, most_answers=most, apart=apart, noise=noise)
    PrivateStorm(private, schedule, method, transfer).run(script)


@pytest.mark.parametrize(("method", "schedule"), FEW, ids=toys.called)
@given(script=STORM, rule=RULES)
@tries(10)
def test_a_storm(method: Aggregator, schedule: Schedule, script: list[Any], rule: Any) -> None:
    check_storm(method, schedule, script, rule)


@pytest.mark.slow
@pytest.mark.parametrize(("method", "schedule"), ALL, ids=toys.called)
@given(script=STORM, rule=RULES)
@tries(10)
def test_a_storm_of_every_pair(method: Aggregator, schedule: Schedule, script: list[Any], rule: Any) -> None:
    check_storm(method, schedule, script, rule)
