"""What an audit found: measurements, each beside what chance would give, and what could not be measured and why."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

from fedloom.audit.epsilon_estimate import ALARM, EpsilonEstimate

Adversary = Literal["server", "member", "reader"]
Attack = Literal["labels", "membership", "shadow adapters", "words"]
ATTACKS: tuple[Attack, ...] = get_args(Attack)
CLEARLY, PARTLY = 0.5, 0.2
"""Shares of the way from chance to certainty from which something is learnt clearly, or partly."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One attack by one adversary, as it came out.

    Fields:
        adversary: who: the curious server, another member, or a reader of the published model.
        attack: what is tried.
        measure: what the value is, in words.
        value: the figure, at most 1; the larger, the more was learnt.
        chance: the same figure for somebody who guesses.
        low, high: 95 % interval of the value.
        trials: what the value was computed from, in words.
    """

    adversary: Adversary
    attack: Attack
    measure: str
    value: float
    chance: float
    low: float
    high: float
    trials: str

    @property
    def verdict(self) -> str:
        """What was learnt, in a word: nothing where chance lies in the interval."""
        if not self.low > self.chance:
            return "nothing measurable"
        way = (self.value - self.chance) / (1 - self.chance)
        return "clearly" if way >= CLEARLY else "partly" if way >= PARTLY else "slightly"


@dataclass(frozen=True, slots=True)
class Unmeasured:
    """An attack that was not tried, and why: it is not known to be harmless."""

    adversary: Adversary
    attack: Attack
    reason: str


Outcome = Finding | Unmeasured


@dataclass(frozen=True, slots=True)
class NoiseCheck:
    """The run's noise, made again with canaries in it.

    Fields:
        unit: what is protected, "client" or "record".
        releases: noisy sums that each canary took part in.
        accounted: epsilon that the ledger would write for them.
        shown: what the canaries show.
        deviation: standard deviation of the noise over the declared one, of the tensor that has least.
        numbers: how many numbers the deviation was taken from.
    """

    unit: str
    releases: int
    accounted: float
    shown: EpsilonEstimate
    deviation: float
    numbers: int

    @property
    def sound(self) -> bool:
        """Whether neither the canaries nor the noise beside them contradict what was accounted."""
        least = 1 - ALARM / math.sqrt(2 * self.numbers)
        return not self.shown.contradicts(self.accounted) and self.deviation >= least


@dataclass(frozen=True, slots=True)
class RowGuesses:
    """Guesses of the curious server which rows were trained on, each of which a coin of its own had decided on.

    Fields:
        rows: rows that were scored.
        guesses: those that it was surest of, and guessed.
        right: right guesses.
        certified: lower bound of a record's epsilon that they show, with 95 % confidence.
    """

    rows: int
    guesses: int
    right: int
    certified: float


@dataclass(frozen=True, slots=True)
class AuditReport:
    """All that an audit found.

    Fields:
        name: of the run.
        planned: whether the run was made small for the audit, before it happens; else a run that has happened was audited.
        clients: how many clients took part in what was audited.
        versions: versions of it.
        outcomes: of the attacks.
        epsilon: what the ledger says, or for a planned run will say at most, of one unit (None: the run has no privacy).
        delta: the delta of all epsilons here.
        unit: what the epsilon protects, "client" or "record" ("": nothing).
        noise: the check of the noise by canaries (None: there is none).
        guesses: guesses of rows of a run that protects records (None: not measured).
        notes: what has to be known, as sentences.
    """

    name: str
    planned: bool
    clients: int
    versions: int
    outcomes: Sequence[Outcome]
    epsilon: float | None = None
    delta: float = 1e-5
    unit: str = ""
    noise: NoiseCheck | None = None
    guesses: RowGuesses | None = None
    notes: Sequence[str] = field(default=())

    def findings(self, adversary: Adversary) -> list[Finding]:
        """Return what this adversary found."""
        return [one for one in self.outcomes if isinstance(one, Finding) and one.adversary == adversary]

    def worst(self, adversary: Adversary) -> Finding | None:
        """Return the attack by which this adversary learnt most, as a share of the way from chance to certainty."""
        own = [one for one in self.findings(adversary) if one.low > one.chance]
        return max(own, key=lambda one: (one.value - one.chance) / (1 - one.chance), default=None)


ADVERSARIES: Mapping[Adversary, str] = {
    "server": "The curious server",
    "member": "Another member",
    "reader": "A reader of the published model",
}
