"""How good an adapter is: predictions on encoded texts, and the figures made of them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from fedloom.core.lora import Adapter
from fedloom.train import loss
from fedloom.train.base_model import Base
from fedloom.train.engine import frozen_layers
from fedloom.train.engine.frozen_layers import Cache
from fedloom.train.tokenised import Encoded

BATCH = 64
"""Examples predicted together; sorted by length, so padding is small."""

LOGITS = 2**26
"""Numbers that say what comes next, of one batch at most: answers' tokens times vocabulary, a quarter of a gigabyte."""

LARGEST = 100.0
"""A loss above this has no perplexity that tells anything; the exponential would soon be too large for a number."""


@dataclass(frozen=True, slots=True)
class Scores:
    """Predictions of some examples: per example the predicted label (of so many `classes`), the true one and the cross-entropy."""

    predicted: Tensor
    labels: Tensor
    losses: Tensor
    classes: int

    def at(self, indices: Sequence[int]) -> Scores:
        """The scores of these examples alone."""
        chosen = torch.tensor(list(indices), dtype=torch.long)
        return Scores(self.predicted[chosen], self.labels[chosen], self.losses[chosen], self.classes)

    def figures(self) -> dict[str, float]:
        """Accuracy, F1 (of label 1 for two classes, else the mean over classes), mean cross-entropy."""
        classes = self.classes
        counts = torch.zeros(classes, classes, dtype=torch.float64)
        counts.index_put_(
            (self.labels, self.predicted), torch.ones(len(self.labels), dtype=torch.float64), accumulate=True
        )
        hits, wanted, given = counts.diagonal(), counts.sum(1), counts.sum(0)
        f1 = 2 * hits / (wanted + given).clamp_min(1.0)
        present = f1[(wanted + given) > 0]
        return {
            "accuracy": float(hits.sum() / counts.sum()),
            "f1": float(f1[1] if classes == 2 else present.mean()),
            "loss": float(self.losses.double().mean()),
        }


@dataclass(frozen=True, slots=True)
class AnswerScores:
    """Predictions of some reference answers, token by token from the right ones before it: per example how many of its tokens are
    the likeliest, how many there are, and the sum of their cross-entropies."""

    hits: Tensor
    tokens: Tensor
    losses: Tensor

    def at(self, indices: Sequence[int]) -> AnswerScores:
        """The scores of these examples alone."""
        chosen = torch.tensor(list(indices), dtype=torch.long)
        return AnswerScores(self.hits[chosen], self.tokens[chosen], self.losses[chosen])

    def figures(self) -> dict[str, float]:
        """Over all tokens: accuracy, its standard error, mean cross-entropy, perplexity.

        The error is of a ratio of sums over examples (delta method), since the tokens of one answer are not independent.
        """
        total = max(1.0, float(self.tokens.sum()))
        accuracy, mean = float(self.hits.sum()) / total, float(self.losses.double().sum()) / total
        return {
            "accuracy": accuracy,
            "accuracy_error": float((self.hits - accuracy * self.tokens.double()).norm()) / total,
            "loss": mean,
            "perplexity": math.exp(min(mean, LARGEST)),
            "tokens": int(total),
        }


@torch.no_grad()
def score(
    base: Base,
    adapter: Adapter | None,
    texts: Encoded,
    indices: Sequence[int],
    fold: Adapter | None = None,
    cache: Cache | None = None,
    room: int = 0,
) -> Scores | AnswerScores:
    """Predict these examples with the adapter over base and fold, or the base alone; results come in the order of `indices`.

    Where only the top layers are adapted, what comes out below them is kept in `cache` for the next time, if `room` (bytes) holds it.
    """
    place, below = None, None
    if adapter is not None:
        base.put(adapter, fold=fold)
        place = frozen_layers.tower(base, [*adapter.factors]) if room else None
        below = frozen_layers.features(base, texts, place, indices, fold, cache or Cache(), room) if place else None
    base.model.eval()
    lengths = texts.lengths(indices)
    order = sorted(range(len(indices)), key=lambda i: lengths[i])
    found: list[tuple[Tensor, ...]] = []
    with base.bare() if adapter is None else nullcontext():
        for batch in _batches(texts, [indices[i] for i in order], base.words):
            inputs = texts.batch(batch, base.device)
            with place.fed(below.of(batch)) if place and below else nullcontext():
                found.append(_answered(base, inputs) if base.labels is None else _labelled(base, inputs))
    back = torch.tensor(order, dtype=torch.long).argsort()
    columns = [torch.cat(column).cpu()[back] for column in zip(*found, strict=True)]
    if base.labels is None:
        return AnswerScores(*columns)
    predicted, losses = columns
    return Scores(predicted, torch.tensor([texts.labels[i] for i in indices]), losses, base.labels)


def _batches(texts: Encoded, indices: Sequence[int], words: int) -> Iterator[Sequence[int]]:
    """At most `BATCH` examples each, and so few that all their logits fit."""
    begins, start = texts.begins, 0
    while start < len(indices):
        batch = indices[start : start + BATCH]
        if begins is not None:
            longest = max(len(texts.ids[i]) - begins[i] for i in batch)
            batch = batch[: max(1, LOGITS // (words * max(1, longest)))]
        yield batch
        start += len(batch)


def _labelled(base: Base, inputs: dict[str, Tensor]) -> tuple[Tensor, ...]:
    labels = inputs.pop("labels")
    logits = base.model(**inputs).logits.float()
    return logits.argmax(1), functional.cross_entropy(logits, labels, reduction="none")


def _answered(base: Base, inputs: dict[str, Tensor]) -> tuple[Tensor, ...]:
    found = loss.answered(base, inputs)
    right = (found.logits.argmax(1) == found.wanted).long()
    return found.summed(right), found.counts(), found.summed(found.losses())
