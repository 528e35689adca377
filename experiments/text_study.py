"""What the clients' texts do to local training and to the global model, measured in the rounds that are scored.

CLLoRA (Zhang et al. 2025, arXiv 2502.18910) divides texts along length, quality and amount, and asks of each what it does to the
clients' own models and to the one made of them. An effect is the difference to a run whose clients are alike, seed by seed.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from statistics import mean
from typing import TypeAlias

from fedloom.core.events import Command, Evaluate, Event
from fedloom.core.lora import Adapter
from fedloom.core.seeds import rng
from fedloom.core.types import ClientId, Task
from fedloom.data.client_summary import summarise
from fedloom.data.heterogeneity import measure_heterogeneity
from fedloom.data.skew import Skew
from fedloom.data.text_measures import words
from fedloom.runs.job import Job
from fedloom.runs.observation import RunObservation, TaskAnswered, TaskSent
from fedloom.train.engine.frozen_layers import ActivationCache
from fedloom.train.evaluate import AnswerScores, Scores, score
from fedloom.train.tokenised import EncodedTexts

Bins: TypeAlias = tuple[tuple[int, ...], ...]
"""Positions among some examples, bin by bin."""


@dataclass(frozen=True, slots=True)
class LocalScore:
    """A client's model after a task that began from `version`: accuracy and mean loss on the common test examples, accuracy on its
    `own` held-out ones (None: it has none).
    """

    version: int
    client: ClientId
    common: float
    own: float | None
    loss: float


@dataclass(frozen=True, slots=True)
class GlobalScore:
    """A version: accuracy and mean loss on the test examples, in each bin of them, and on the `common` ones alone."""

    version: int
    accuracy: float
    loss: float
    bins: tuple[float, ...]
    common: float
    bin_losses: tuple[float, ...]
    common_loss: float


@dataclass(frozen=True, slots=True)
class Round:
    """A scored version with the tasks that began from it; accuracies, and None where there is nothing to take the mean of.

    `local` is the mean over these tasks' clients on the common test examples, `own` that on their held-out parts, `gain` what local
    training made of the version: `local` less the version's own accuracy on the common examples. `local_loss` and `loss_rise` are the
    same of the mean loss.
    """

    version: int
    accuracy: float
    loss: float
    bins: tuple[float, ...]
    local: float | None
    own: float | None
    gain: float | None
    bin_losses: tuple[float, ...]
    local_loss: float | None
    loss_rise: float | None

    @property
    def worst(self) -> float:
        """The accuracy in the worst bin."""
        return min(self.bins)


@dataclass(frozen=True, slots=True)
class Study:
    """An observer that scores, by bins, the versions that the run scores, and what clients make of them; the run takes no notice.

    `bins` and `common` are positions among the examples that the run is tested on. A client's model is what it sent: where sides
    stay private, that is not what it runs. Cost: for each answer to a scored version from `since` on a pass over the common examples
    and the client's held-out part.
    """

    job: Job
    bins: Bins
    common: tuple[int, ...]
    caches: tuple[ActivationCache, ActivationCache]
    since: int = 0
    observation: RunObservation = field(default_factory=RunObservation)
    tasks: set[int] = field(default_factory=set)
    locals: list[LocalScore] = field(default_factory=list)
    versions: list[GlobalScore] = field(default_factory=list)

    @classmethod
    def of(cls, job: Job, along: Skew | None = None, common: int = 200, since: int = 0) -> Study:
        """Of this run: bins `along` an axis of the test examples (None: quarters by length), and so many `common` ones."""
        tested, size = job.split.test.take(job.tested), len(job.tested)
        chosen = rng(job.run.seed, "study", "common").sample(range(size), min(common, size))
        bins = binned((along or Skew(words, bins=4)).bin(tested).tolist())
        return cls(job, bins, tuple(sorted(chosen)), (job.cache.emptied(), job.cache.emptied()), since)

    def __call__(self, now: float, event: Event, commands: list[Command]) -> None:
        """Score what this event brought."""
        for fact in self.observation.read(now, event, commands):
            match fact:
                case Evaluate(version, model):
                    found = self._scores(model.adapter, model.fold, self.job.test_texts, self.job.tested)
                    self.versions.append(global_score(version, found, self.bins, self.common))
                case TaskSent(task) if self._scored(task.version):
                    self.tasks.add(task.id)
                case TaskAnswered(_, number, result, task, refused) if number in self.tasks:
                    self.tasks.remove(number)
                    if task and result and not refused:
                        self.locals.append(self._local(task, result.adapter))

    def rounds(self) -> list[Round]:
        """What was found so far, version by version."""
        return rounds(self.versions, self.locals)

    def _scored(self, version: int) -> bool:
        return version >= self.since and bool(self.versions) and self.versions[-1].version == version

    def _local(self, task: Task, adapter: Adapter) -> LocalScore:
        job, fold = self.job, task.start.fold
        common = self._scores(adapter, fold, job.test_texts, [job.tested[i] for i in self.common])
        held = next(shard.held_out for shard in job.shards if shard.client == task.client)
        own = accuracy(self._scores(adapter, fold, job.train_texts, held)) if held else None
        return LocalScore(task.version, task.client, accuracy(common), own, loss(common))

    def _scores(
        self, adapter: Adapter, fold: Adapter | None, texts: EncodedTexts, examples: Sequence[int]
    ) -> Scores | AnswerScores:
        kept = self.job.kept_activations(self.caches[texts is self.job.train_texts])
        return score(self.job.base, adapter, texts, examples, fold, kept)

    def figures(self) -> dict[str, object]:
        """Of all rounds, and the indices of how uneven the clients really are."""
        train = self.job.split.train
        found = measure_heterogeneity([summarise(shard.client, train.take(shard.train)) for shard in self.job.shards])
        indices = {"length": found.length, "quantity": found.quantity, "quality": found.quality}
        uneven = {name: round(index.value, 4) for name, index in indices.items() if index}
        return {"rounds": [asdict(one) for one in self.rounds()], "uneven": uneven}


def binned(numbers: Sequence[int]) -> Bins:
    """The positions that have each number, lowest number first."""
    return tuple(tuple(i for i, own in enumerate(numbers) if own == number) for number in sorted(set(numbers)))


def accuracy(scores: Scores | AnswerScores) -> float:
    """The share of labels, or of the answers' tokens, that are foreseen."""
    return scores.metrics()["accuracy"]


def loss(scores: Scores | AnswerScores) -> float:
    """The mean cross-entropy of a label, or of an answer's token."""
    return scores.metrics()["loss"]


def global_score(version: int, scores: Scores | AnswerScores, bins: Bins, common: Sequence[int]) -> GlobalScore:
    """A version's scores by bins of the examples."""
    by_bin, shared = [scores.subset(positions) for positions in bins], scores.subset(common)
    return GlobalScore(
        version,
        accuracy(scores),
        loss(scores),
        tuple(map(accuracy, by_bin)),
        accuracy(shared),
        tuple(map(loss, by_bin)),
        loss(shared),
    )


def rounds(versions: Sequence[GlobalScore], locals_: Sequence[LocalScore]) -> list[Round]:
    """Each version with the means of the tasks that began from it."""
    found = []
    for one in versions:
        begun = [task for task in locals_ if task.version == one.version]
        local, own = _mean(task.common for task in begun), _mean(task.own for task in begun)
        gain, after = None if local is None else local - one.common, _mean(task.loss for task in begun)
        rise = None if after is None else after - one.common_loss
        found.append(
            Round(one.version, one.accuracy, one.loss, one.bins, local, own, gain, one.bin_losses, after, rise)
        )
    return found


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return mean(known) if known else None
