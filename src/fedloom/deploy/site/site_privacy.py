"""`[privacy]` in `site.toml`: whom a site protects whatever a server asks for, and how much may be spent on all answers together.

With unit "record" each row is protected: the site trains with noise (DP-SGD, `train.engine.record_gradients`), at least as much as
its owner says, and tells no losses, no counts of tokens and no scores. With unit "answer" the answer as a whole is clipped and gets
noise (`site_noise`). What the terms of a run ask for comes besides; of two noises in training the larger one is added.

Each answer is a line of the site's ledger, `spent.jsonl`, on the disk before it leaves. A task whose answer would go beyond the
budget of the owner, over all runs, or beyond that of the run's terms is refused before it is trained. So is every task while the
ledger lacks an answer that the site's record has: then it was lost, or put back from an older copy.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from fedloom.core.errors import Refused
from fedloom.deploy.messages.messages import TaskRequest
from fedloom.privacy.accounting import Gaussian, PrivacyEvent, epsilon_of
from fedloom.privacy.ledger import Ledger, LedgerEntry, Words, read_ledger, spent_by_unit
from fedloom.privacy.private import Private
from fedloom.privacy.record_draws import steps_cost

SPENT = "spent.jsonl"
"""Name of the ledger in the folder of a site."""
RECORDS, ANSWERS = "records", "answers"
"""Units of the ledger: a row of the site; all that its rows make of its answers."""


class SitePrivacy(BaseModel):
    """Clipping, noise and budget of a site.

    Fields:
        unit: "record": each row is protected, by noise in training; "answer": the whole answer, by noise on what is sent.
        clip: largest Euclidean norm of an answer's change, or of one row's gradient, over all tensors together (S). A run that
            protects records names its own; then this one is not used.
        multiplier: standard deviation of the noise relative to `clip` (z; default 0: clipping alone, or what the run says). If the
            run protects records, the larger one counts.
        epsilon: largest epsilon over all answers of the site to any run (default None: not limited).
        delta: its delta, far below one over the number of rows.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    unit: Literal["answer", "record"] = "answer"
    clip: float | None = Field(default=None, gt=0, le=1e6)
    multiplier: float = Field(default=0.0, ge=0, le=1e6)
    epsilon: float | None = Field(default=None, gt=0)
    delta: float | None = Field(default=None, gt=0, lt=1)

    @model_validator(mode="after")
    def _whole(self) -> SitePrivacy:
        if self.unit == "answer" and self.clip is None:
            raise ValueError("give clip, the largest norm of what an answer changes")
        if (self.epsilon is None) != (self.delta is None):
            raise ValueError("a budget is both epsilon and delta, as epsilon = 8.0 and delta = 1e-5")
        if self.unit == "answer" and self.epsilon is not None and not self.multiplier:
            raise ValueError("clipping alone has no epsilon: give multiplier, or leave epsilon out")
        return self

    @property
    def budget(self) -> tuple[float, float] | None:
        """The budget, (epsilon, delta); None: none."""
        return None if self.epsilon is None or self.delta is None else (self.epsilon, self.delta)


def noise_in_training(privacy: SitePrivacy | None, asked: Private | None) -> Private | None:
    """Return how a site trains for a run that asks for this; None: without noise.

    Raises Refused where neither the run nor the site says with which clip or noise.
    """
    if privacy is None or privacy.unit != "record":
        return asked
    multiplier = max(privacy.multiplier, asked.multiplier if asked else 0.0)
    if asked:
        return replace(asked, multiplier=multiplier)
    if privacy.clip is None or not multiplier:
        remedy = "the run does not train with noise, and this site only does ([privacy]): its owner can give clip and multiplier"
        raise Refused("privacy.unit", "record", remedy)
    return Private(privacy.clip, multiplier, most_answers=1, unit="record")


def noises_of(privacy: SitePrivacy | None, asked: Private | None) -> list[tuple[str, float, float]]:
    """Return what is clipped and gets noise for a run that asks for this, as (unit, clip, multiplier). Raises Refused."""
    records = noise_in_training(privacy, asked)
    found = [("record", records.clip, records.multiplier)] if records else []
    if privacy is not None and privacy.unit == "answer" and privacy.clip is not None:
        found.append(("answer", privacy.clip, privacy.multiplier))
    return found


def tells_scores(privacy: SitePrivacy | None, asked: Private | None) -> bool:
    """Whether the site may tell scores: not beside noise, since exact counts stand in no ledger. Raises Refused."""
    return not any(multiplier for _, _, multiplier in noises_of(privacy, asked))


def stored_run(run_hash: str, privacy: SitePrivacy | None, asked: Private | None) -> str:
    """Return the name under which the answers of a run are stored: another one for each clip and noise. Raises Refused.

    So an answer that was trained with less noise is never sent again, and no later one begins from what it left behind.
    """
    noises = noises_of(privacy, asked)
    return f"{run_hash}-{hashlib.sha256(repr(noises).encode()).hexdigest()[:12]}" if noises else run_hash


@dataclass(frozen=True, slots=True)
class TaskSpending:
    """What the answer to one task tells, and whether it may.

    Fields:
        folder: folder of the site.
        privacy: what the site's owner says (None: nothing).
        request: the task.
        digest: digest of the request.
        rows: rows that the site trains on.
        recorded: digests of the requests to which the site's record has answers with noise: each is in the ledger too.
    """

    folder: Path
    privacy: SitePrivacy | None
    request: TaskRequest
    digest: str
    rows: int
    recorded: Collection[str] = ()

    @property
    def records(self) -> Private | None:
        """How the task is trained. Raises Refused as `noise_in_training` does."""
        return noise_in_training(self.privacy, self.request.terms.records)

    def costs(self) -> dict[str, PrivacyEvent]:
        """Return what the answer tells, by unit of the ledger; nothing where nothing bounds it."""
        costs, batch_size = dict[str, PrivacyEvent](), self.request.terms.training.batch_size
        if records := self.records:
            costs[RECORDS] = steps_cost(records, self.rows, batch_size, self.request.task.budget.steps)
        if self.privacy is not None and self.privacy.unit == "answer" and self.privacy.multiplier:
            costs[ANSWERS] = Gaussian(1.0 / self.privacy.multiplier)
        return costs

    def noises(self) -> list[tuple[str, float, float]]:
        """Return what is clipped and gets noise, as (unit, clip, multiplier), for the record."""
        return noises_of(self.privacy, self.request.terms.records)

    def is_first(self) -> bool:
        """Whether the ledger has no answer to another task of this number in the run, nor to one of a higher number before.

        Then its coins were not used. The site's record says so too, but may have been moved away, which does not move the ledger.
        Raises Refused for a damaged ledger.
        """
        highest, asked = (0, ""), (self.request.task.id, self.digest)
        for entry in read_ledger(self.folder / SPENT):
            match entry.about:
                case {"run": self.request.terms.run_hash, "task": int(number), "request": str(digest)} if (
                    number > highest[0]
                ):
                    highest = number, digest
        return highest == asked or highest[0] < asked[0]

    def why_refused(self) -> str | None:
        """Return why the answer would be more than may be told; None if it would not. Raises Refused for a damaged ledger.

        An earlier answer to the same request does not count besides: it is the same one, or `note` refuses it.
        """
        costs, asked, run = self.costs(), self.request.terms.records, self.request.terms.run_hash
        if not costs:
            return None
        ledger = [*read_ledger(self.folder / SPENT)]
        if lost := {*self.recorded}.difference(entry.about.get("request") for entry in ledger):
            return f"{SPENT} lacks {len(lost)} answers that this site's record has: lost, or an older copy. Its owner can put it back"
        entries = [entry for entry in ledger if entry.about.get("request") != self.digest]
        if self.privacy is not None and self.privacy.budget is not None:
            unit = RECORDS if self.privacy.unit == "record" else ANSWERS
            if reason := _beyond(entries, unit, costs, self.privacy.budget):
                return f"{reason}, and its owner allows {self.privacy.budget[0]:g} in all runs together ([privacy] epsilon)"
        of_run = [entry for entry in entries if entry.about.get("run") == run]
        if asked and len(of_run) >= asked.most_answers:
            return f"this site has answered {len(of_run)} tasks of the run, which promises at most {asked.most_answers}"
        if asked and asked.budget and (reason := _beyond(of_run, RECORDS, costs, asked.budget)):
            return f"{reason}, and the run promises at most {asked.budget[0]:g}"
        return None

    def note(self, released: str) -> None:
        """Write down what the answer costs; it is on the disk when this returns, and the answer may leave.

        The same answer again costs nothing. Another answer to a request that was answered before would be drawn by the same coins,
        and is refused: both together may tell more than two tasks do.

        Args:
            released: tells the answer from any other.

        Raises OSError where there is no room, Refused for another answer or a ledger that cannot be used.
        """
        costs, task, run = self.costs(), self.request.task.id, self.request.terms.run_hash
        about: dict[str, Words] = {"run": run, "task": task, "request": self.digest, "released": released}
        if not costs:
            return
        with Ledger.opened(self.folder / SPENT) as ledger:
            for entry in read_ledger(self.folder / SPENT):
                if entry.about.get("request") == self.digest and entry.about.get("released") != released:
                    remedy = "it was answered before, from other rows or by other computation, and that answer is no longer stored"
                    raise Refused("task", task, remedy)
            ledger.write(LedgerEntry(about, costs))


def _beyond(
    entries: Iterable[LedgerEntry], unit: str, costs: Mapping[str, PrivacyEvent], budget: tuple[float, float]
) -> str | None:
    """Return what would be spent on this unit, in words, if that is more than the budget."""
    if unit not in costs:
        return None
    epsilon, delta = budget
    spent = spent_by_unit(entries).get(unit, ())
    after = epsilon_of((*spent, costs[unit]), delta)
    if after <= epsilon:
        return None
    return f"this site has spent epsilon {epsilon_of(spent, delta):.3g} at delta {delta:g}; the task would make it {after:.3g}"
