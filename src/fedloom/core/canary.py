"""Canary: a version is scored on examples of the server before it is published, and answers that make it worse are set aside.

Source: our own combination. Scoring a candidate on a small set of the server's own examples is the validation of RONI ("reject on
negative impact", Nelson et al. 2008) and of Zeno (Xie et al., arXiv 1805.10032, 2019); leaving out one site at a time is how RONI
finds out which one it was.

How it goes, in `core.server`. A merge is made but not published: `CheckCanary` asks the driver for a score, and `CanaryScored` brings
it. Until then the published version stays the one that clients start from, and answers that arrive wait in their order. The score
is compared with the best of the last ten published versions that were scored, so that small losses do not add up. Below it by more
than the margin, the merge is made again without each of its sites, one at a time:

- The site whose absence helps most is left out. If the score then passes, its answers in this merge are set aside.
- If not, a second one is left out besides it, and so on, as long as half of the sites remain.
- If no half of the sites passes, all answers of the merge are set aside.

A site can also keep the model where it is, by just undoing what the others bring. So a merge that passes but gains nothing on the
best of the ten is tried without each of its sites too. What it would gain without a site is added up over such merges, never below
zero (the CUSUM of Page, 1954), so that small holds add up as well; a site whose sum is above the margin is set aside. A merge with
the site that does gain begins its sum anew. At a plateau scores lie below the best of ten, and sums stay at zero.

Answers that are set aside are as if they had never arrived: they leave the merge, the window of a schedule and, since nothing of the
candidate is kept, the memories of an aggregator. Then the schedule is asked again, and its next merge is scored as the first was.
With `every` above 1, versions between two checks are published unseen. So when no half of a merge passes, the published version is
scored by itself; if it fails too, the model goes back to the last version that passed, as a new version.

What it does not see: what does not show in the score of these examples (a backdoor for a word that none of them has), and losses
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
"""Published versions whose best score a new one is compared with."""


@dataclass(frozen=True, slots=True)
class Canary:
    """Score on examples of the server that a version must keep to be published.

    Fields:
        examples: how many of the server's test examples are taken for it; they are then no test examples any more (default 200).
        margin: how far a score may lie below the best of the last ten (accuracy: a share, 0.02 are two points; of a model that
            writes: nats of loss for each token; default 0.02).
        every: every n-th version is scored, and the last one (default 1: each).
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
        model: the model that the outstanding check scores.
        merge: how it was made (None: it is published already, and scored by itself).
        seen: accepted answers when the schedule decided on the merge; later ones wait.
        whole: score with all sites (None: not known yet).
        out: sites that are left out from now on.
        absent: site that is left out besides them in the outstanding check (None: none).
        scores: by site, the score without it and without `out`.
    """

    model: Model
    merge: Merge | None = None
    seen: int = 0
    whole: float | None = None
    out: tuple[ClientId, ...] = ()
    absent: ClientId | None = None
    scores: Mapping[ClientId, float] = field(default_factory=dict)

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
        checks: scores asked for so far; the number of the last check.
        scores: of the last published versions that were scored, oldest first, at most `COMPARED`.
        version: number of the last of them (-1: none).
        model: its model.
        set_aside: answers set aside since a version was published.
        held_back: by site, what merges would have gained without it, over those that gained nothing.
        trial: the model whose score is outstanding (None: none is).
    """

    checks: int = 0
    scores: tuple[float, ...] = ()
    version: int = -1
    model: Model | None = None
    set_aside: int = 0
    held_back: Mapping[ClientId, float] = field(default_factory=dict)
    trial: Trial | None = None

    @property
    def best(self) -> float:
        """The best of these scores."""
        return max(self.scores, default=-math.inf)

    def passed(self, version: int, model: Model, score: float, held_back: Mapping[ClientId, float]) -> CanaryRecord:
        """Return the record once a published version has this score."""
        scores = (*self.scores, score)[-COMPARED:]
        return CanaryRecord(self.checks, scores, version, model, held_back=held_back)


@dataclass(frozen=True, slots=True)
class Verdict:
    """What follows from a score.

    Fields:
        trial: the trial with the score.
        leave_out: site to leave out in the next check (None: no further check).
        set_aside: sites whose answers are set aside.
        score: the best score without them (None: no half of the sites passes).
        held_back: the sums of `CanaryRecord.held_back` from now on.

    Without both the merge is published, with all sites.
    """

    trial: Trial
    leave_out: ClientId | None = None
    set_aside: tuple[ClientId, ...] = ()
    score: float | None = None
    held_back: Mapping[ClientId, float] = field(default_factory=dict)


def score_of(metrics: Mapping[str, float]) -> float:
    """Return one number of a model's metrics, higher is better: accuracy, or of a model that writes minus the loss of a token (nats).

    A model whose loss is not a finite number has the lowest score there is, whatever it answers.
    """
    loss = metrics.get("loss", 0.0)
    if not math.isfinite(loss):
        return -math.inf
    return -loss if "perplexity" in metrics else metrics["accuracy"]


def judge(trial: Trial, score: float, record: CanaryRecord, margin: float) -> Verdict:
    """Return what follows from the score of the outstanding check of a merge."""
    best, sums = record.best, record.held_back
    scores = {} if trial.absent is None else {**trial.scores, trial.absent: score}
    trial = replace(trial, whole=score if trial.whole is None else trial.whole, scores=scores)
    assert trial.whole is not None
    fails = not trial.whole >= best - margin
    if not fails and (trial.whole > best or len(trial.sites) == 1):
        return Verdict(trial, held_back={site: held for site, held in sums.items() if site not in trial.sites})
    untried = [site for site in trial.sites if site not in trial.out and site not in trial.scores]
    if trial.scores and not untried:
        if not fails:
            sums = {**sums, **{site: max(0.0, sums.get(site, 0.0) + one - best) for site, one in trial.scores.items()}}
        compared = trial.scores if fails else {site: sums[site] for site in trial.scores}
        without = max(compared, key=compared.__getitem__)
        trial, reached = replace(trial, out=(*trial.out, without), scores={}), trial.scores[without]
        if reached >= best - margin if fails else sums[without] > margin:
            return Verdict(trial, set_aside=trial.out, score=reached, held_back=sums)
        if not fails:
            return Verdict(trial, held_back=sums)
        untried = [site for site in trial.sites if site not in trial.out]
    if not trial.scores and 2 * (len(untried) - 1) < len(trial.sites):
        return Verdict(trial, set_aside=trial.sites, held_back=sums)
    return Verdict(trial, leave_out=untried[0])


def without_sites(merge: Merge, sites: Collection[ClientId]) -> Merge | None:
    """Return the merge without the answers of these sites, its weights normalised (None: none is left)."""
    left = [(weight, update) for weight, update in merge.weighted_updates if update.task.client not in sites]
    if not left or len(left) == len(merge.weighted_updates):
        return merge if left else None
    total = sum(weight for weight, _ in left)
    shares = ((1 / len(left) if not total > 0 else weight / total, update) for weight, update in left)
    return replace(merge, weighted_updates=tuple(shares))


def why_set_aside(site: ClientId, verdict: Verdict, best: float) -> str:
    """Return the reason for which the answers of a site are set aside, in words."""
    whole = f"the canary score of a version with it is {verdict.trial.whole:.4f}, after {best:.4f}"
    if verdict.score is None:
        return f"{whole}, and no half of the answers gives a better one"
    others = [other for other in verdict.set_aside if other != site]
    besides = f" and without {', '.join(others)}" if others else ""
    return f"{whole}, and {verdict.score:.4f} without it{besides}"
