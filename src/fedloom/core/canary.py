"""Canary: a version is scored on examples of the server before it is published, and answers that make it worse are set aside.

Source: our own combination. Scoring a candidate on a small set of the server's own examples, with an answer and without, is "reject
on negative impact" (RONI, Nelson et al. 2008), and for updates Zeno (Xie et al., arXiv 1805.10032, 2019).

How it goes, in `core.server`. A merge is made but not published: `CheckCanary` asks the driver for its scores, one for each example,
and `CanaryScored` brings them. The merge is then made again without each of its sites, one at a time, and these are scored too. Until
all scores are there the published version stays the one that clients start from, and answers that arrive wait in their order. Then:

- Where the merge is clearly better without a site, the answers of that site are set aside; of several sites, of the one whose
  absence helps most.
- Otherwise, where the merge is clearly worse than the best of the last ten published versions, all its answers are set aside.
- Otherwise it is published.

Clearly: the mean of the differences, example by example, is above the margin and above three of its standard errors. The examples are
the same, so what makes one of them hard cancels out, and few are enough. The second rule compares with the best of ten, so that small
losses do not add up. The first needs no loss: a site that just undoes what the others bring keeps every score where it is.

Answers that are set aside are as if they had never arrived: they leave the merge, the window of a schedule and, since nothing of the
candidate is kept, the memories of an aggregator. Then the schedule is asked again, and its next merge is scored as the first was: so
a second liar is found after the first.
With `every` above 1, versions between two checks are published unseen. So where all answers of a merge are set aside, the published
version is scored by itself; if it fails too, the model goes back to the last version that passed, as a new version.

What it does not see: what does not show in the scores of these examples (a backdoor for a word that none of them has), and losses
within the margin of the best of ten versions, which a patient site can repeat.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace

from fedloom.core.errors import Refused
from fedloom.core.policies import Merge
from fedloom.core.types import ClientId, Model, Update

COMPARED = 10
"""Published versions whose best a new one is compared with."""
STANDARD_ERRORS = 3.0
"""A mean difference below so many of its standard errors counts as chance; the best of ten is often so by chance, so not two."""


@dataclass(frozen=True, slots=True)
class Canary:
    """Score on examples of the server that a version must keep to be published.

    Fields:
        examples: how many of the server's test examples are taken for it; they are then no longer test examples (default 200).
        margin: how much a mean score may lose (0 to 1; default 0.02). The score of an example is the probability that the model gives
            to the right label. For a written answer it is the geometric mean over its tokens.
        every: every n-th version is scored, and the last one (default 1: each). Versions between are published without a score.
    """

    examples: int = 200
    margin: float = 0.02
    every: int = 1

    def __post_init__(self) -> None:
        if self.examples < 1:
            raise Refused("canary.examples", self.examples, "at least 1; a hundred or more, or chance decides")
        if not self.margin >= 0:
            raise Refused("canary.margin", self.margin, "0 or more; 0.02 lets a version lose two points")
        if self.every < 1:
            raise Refused("canary.every", self.every, "1 scores each version, n every n-th")


@dataclass(frozen=True, slots=True)
class Trial:
    """A model that is scored before it is published.

    Fields:
        model: the model that may be published.
        merge: how it was made (None: it is published already, and scored by itself).
        seen: accepted answers when the schedule decided on the merge; later ones wait.
        whole: its scores, one for each example (empty: not known yet).
        absent: site that is left out in the outstanding check (None: none).
        scores: by site, the scores without it.
    """

    model: Model
    merge: Merge | None = None
    seen: int = 0
    whole: tuple[float, ...] = ()
    absent: ClientId | None = None
    scores: Mapping[ClientId, tuple[float, ...]] = field(default_factory=dict)

    @property
    def updates(self) -> tuple[Update, ...]:
        """The answers of the merge."""
        return tuple(update for _, update in self.merge.weighted_updates) if self.merge else ()

    @property
    def sites(self) -> tuple[ClientId, ...]:
        """The sites whose answers are in the merge, in the order of their tasks."""
        return tuple(dict.fromkeys(update.task.client for update in self.updates))


@dataclass(frozen=True, slots=True)
class CanaryRecord:
    """What a server knows of its canary scores.

    Fields:
        checks: checks asked for so far; the number of the last one.
        scores: of the last published versions that were scored, oldest first, at most `COMPARED`; each has one for each example.
        version: number of the last of them (-1: none).
        model: its model.
        set_aside: answers set aside since a version was published.
        trial: the model whose scores are outstanding (None: none are).
    """

    checks: int = 0
    scores: tuple[tuple[float, ...], ...] = ()
    version: int = -1
    model: Model | None = None
    set_aside: int = 0
    trial: Trial | None = None

    @property
    def best(self) -> tuple[float, ...]:
        """The best of these scores (empty: there are none)."""
        return max(self.scores, key=mean_score, default=())

    def passed(self, version: int, model: Model, scores: tuple[float, ...]) -> CanaryRecord:
        """Return the record once a published version has these scores."""
        return CanaryRecord(self.checks, (*self.scores, scores)[-COMPARED:], version, model)


@dataclass(frozen=True, slots=True)
class Verdict:
    """What follows from the scores of a check.

    Fields:
        trial: the trial with them.
        leave_out: site to leave out in the next check (None: no further check).
        set_aside: sites whose answers are set aside.

    Without both the merge is published.
    """

    trial: Trial
    leave_out: ClientId | None = None
    set_aside: tuple[ClientId, ...] = ()


def mean_score(scores: tuple[float, ...]) -> float:
    """Return the mean of the scores of examples (0: there are none)."""
    return math.fsum(scores) / max(1, len(scores))


def clearly_better(scores: tuple[float, ...], others: tuple[float, ...], margin: float) -> bool:
    """Return whether these scores are higher than others of the same examples, by more than the margin and than chance.

    >>> clearly_better((0.9, 0.8, 0.7), (0.8, 0.7, 0.6), margin=0.02)
    True
    >>> clearly_better((0.9, 0.8, 0.7), (0.2, 0.9, 0.6), margin=0.02)
    False
    """
    gains = [one - other for one, other in zip(scores, others, strict=True)]
    mean = math.fsum(gains) / len(gains)
    variance = math.fsum((gain - mean) ** 2 for gain in gains) / max(1, len(gains) - 1)
    return mean > max(margin, STANDARD_ERRORS * math.sqrt(variance / len(gains)))


def judge(trial: Trial, scores: tuple[float, ...], record: CanaryRecord, margin: float) -> Verdict:
    """Return what follows from the scores of the outstanding check of a merge."""
    if trial.absent is None:
        trial = replace(trial, whole=scores)
    else:
        trial = replace(trial, absent=None, scores={**trial.scores, trial.absent: scores})
    untried = [site for site in trial.sites if site not in trial.scores]
    if untried and len(trial.sites) > 1:
        return Verdict(trial, leave_out=untried[0])
    without = max(trial.scores, key=lambda site: mean_score(trial.scores[site]), default=None)
    if without is not None and _harms(without, trial, record.scores[-1], margin):
        return Verdict(trial, set_aside=(without,))
    return Verdict(trial, set_aside=trial.sites if clearly_better(record.best, trial.whole, margin) else ())


def _harms(site: ClientId, trial: Trial, before: tuple[float, ...], margin: float) -> bool:
    """Whether a merge is clearly better without a site, and not only because the others then count for more.

    Its answer is also compared with none: the others at their weights, and the version before at its own (in a straight line).
    """
    assert trial.merge is not None
    weights = [(weight, update.task.client == site) for weight, update in trial.merge.weighted_updates]
    total = math.fsum(weight for weight, _ in weights)
    share = math.fsum(weight for weight, own in weights if own) / total if total > 0 else 0.0
    unchanged = tuple((1 - share) * one + share * old for one, old in zip(trial.scores[site], before, strict=True))
    return clearly_better(trial.scores[site], trial.whole, margin) and clearly_better(unchanged, trial.whole, 0.0)


def without_sites(merge: Merge, sites: Collection[ClientId]) -> Merge | None:
    """Return the merge without the answers of these sites, its weights normalised (None: none is left)."""
    left = [(weight, update) for weight, update in merge.weighted_updates if update.task.client not in sites]
    if not left or len(left) == len(merge.weighted_updates):
        return merge if left else None
    total = sum(weight for weight, _ in left)
    shares = ((1 / len(left) if not total > 0 else weight / total, update) for weight, update in left)
    return replace(merge, weighted_updates=tuple(shares))


def why_set_aside(site: ClientId, trial: Trial, best: tuple[float, ...], *, alone: bool) -> str:
    """Return the reason for which the answers of a site are set aside, `alone` or with all others, in words."""
    whole = f"the canary score of a version with it is {mean_score(trial.whole):.4f}"
    if alone and site in trial.scores:
        return f"{whole}, and {mean_score(trial.scores[site]):.4f} without it"
    return f"{whole}, after {mean_score(best):.4f}, and leaving out one site does not help"
