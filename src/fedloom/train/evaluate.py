"""Evaluation of an adapter: predictions on tokenised texts and their metrics; and embeddings of texts by the base model."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from fedloom.core.lora import Adapter
from fedloom.core.types import ClientId
from fedloom.data.partition import Shard
from fedloom.train import loss
from fedloom.train.base_model import Base
from fedloom.train.engine import frozen_layers
from fedloom.train.engine.frozen_layers import ActivationCache
from fedloom.train.tokenised import EncodedTexts

BATCH = 64
"""Examples predicted together; sorted by length, so padding is small."""

MOST_LOGITS = 2**26
"""Logits of one batch at most, answers' tokens times vocabulary: a quarter of a gigabyte."""

EMBEDDED_ROWS = 32
"""Examples embedded together; of similar length."""

LARGEST_LOSS = 100.0
"""Loss at which perplexity is capped: a larger one tells nothing, and the exponential would soon be too large for a number."""


@dataclass(frozen=True, slots=True)
class Scores:
    """Predictions of labels.

    Fields:
        predicted: the predicted label of each example.
        labels: the true label of each.
        losses: the cross-entropy of each.
        classes: number of labels.
    """

    predicted: Tensor
    labels: Tensor
    losses: Tensor
    classes: int

    def subset(self, indices: Sequence[int]) -> Scores:
        """Return the scores of these examples alone."""
        chosen = torch.tensor(list(indices), dtype=torch.long)
        return Scores(self.predicted[chosen], self.labels[chosen], self.losses[chosen], self.classes)

    def counts(self) -> tuple[int, int, float]:
        """Return the number of predictions, how many are right, and the sum of their cross-entropies."""
        return len(self.labels), int((self.predicted == self.labels).sum()), float(self.losses.double().sum())

    def metrics(self) -> dict[str, float]:
        """Return accuracy, F1 (of label 1 for two classes, else the mean over classes), mean cross-entropy."""
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
    the likeliest, how many there are, and the sum of their cross-entropies.
    """

    hits: Tensor
    tokens: Tensor
    losses: Tensor

    def subset(self, indices: Sequence[int]) -> AnswerScores:
        """Return the scores of these examples alone."""
        chosen = torch.tensor(list(indices), dtype=torch.long)
        return AnswerScores(self.hits[chosen], self.tokens[chosen], self.losses[chosen])

    def counts(self) -> tuple[int, int, float]:
        """Return the number of predicted tokens, how many are right, and the sum of their cross-entropies."""
        return int(self.tokens.sum()), int(self.hits.sum()), float(self.losses.double().sum())

    def metrics(self) -> dict[str, float]:
        """Return accuracy over all tokens, its standard error, mean cross-entropy and perplexity.

        The error is of a ratio of sums over examples (delta method), since the tokens of one answer are not independent.
        """
        total = max(1.0, float(self.tokens.sum()))
        accuracy, mean = float(self.hits.sum()) / total, float(self.losses.double().sum()) / total
        return {
            "accuracy": accuracy,
            "accuracy_error": float((self.hits - accuracy * self.tokens.double()).norm()) / total,
            "loss": mean,
            "perplexity": math.exp(min(mean, LARGEST_LOSS)),
            "tokens": int(total),
        }


@torch.no_grad()
def score(
    base: Base,
    adapter: Adapter | None,
    texts: EncodedTexts,
    indices: Sequence[int],
    fold: Adapter | None = None,
    cache: ActivationCache | None = None,
    room: int = 0,
) -> Scores | AnswerScores:
    """Predict these examples with the adapter over base and fold, or the base alone; results are in the order of `indices`.

    Where only the top layers are adapted, the output of the layers below is kept in `cache` for next time if `room` (bytes) holds it.
    """
    split, features = None, None
    if adapter is not None:
        base.activate(adapter, fold=fold)
        split = frozen_layers.split_layers(base, [*adapter.factors]) if room else None
        features = (
            frozen_layers.frozen_features(base, texts, split, indices, fold, cache or ActivationCache(), room)
            if split
            else None
        )
    base.model.eval()
    lengths = texts.lengths(indices)
    order = sorted(range(len(indices)), key=lambda i: lengths[i])
    columns_by_batch: list[tuple[Tensor, ...]] = []
    with base.without_adapter() if adapter is None else nullcontext():
        for batch in _batches(texts, [indices[i] for i in order], base.vocabulary):
            inputs = texts.batch(batch, base.device)
            with split.starting_from(features.for_batch(batch)) if split and features else nullcontext():
                columns_by_batch.append(
                    _score_answers(base, inputs) if base.labels is None else _score_labels(base, inputs)
                )
    back = torch.tensor(order, dtype=torch.long).argsort()
    columns = [torch.cat(column).cpu()[back] for column in zip(*columns_by_batch, strict=True)]
    if base.labels is None:
        return AnswerScores(*columns)
    predicted, losses = columns
    return Scores(predicted, torch.tensor([texts.labels[i] for i in indices]), losses, base.labels)


def evaluate_held_out(
    base: Base, adapter: Adapter | None, texts: EncodedTexts, shards: Sequence[Shard], fold: Adapter | None = None
) -> dict[ClientId, Scores | AnswerScores]:
    """Score one adapter (None: the base alone) on the held-out part of each client, all of them in one pass."""
    scores, end, by_client = score(base, adapter, texts, [i for shard in shards for i in shard.held_out], fold), 0, {}
    for shard in shards:
        start, end = end, end + len(shard.held_out)
        by_client[shard.client] = scores.subset(range(start, end))
    return by_client


def evaluate_untrained(
    base: Base, texts: EncodedTexts, shards: Sequence[Shard]
) -> dict[ClientId, Scores | AnswerScores]:
    """Score what needs no training on the held-out part of each client: the baseline that its scores stand beside.

    Where text is written that is the base alone; where labels are chosen, the commonest label of the client's training examples,
    whatever is asked (with a cross-entropy of 0, since no probability is predicted).
    """
    if base.labels is None:
        return evaluate_held_out(base, None, texts, shards)
    by_client = dict[ClientId, Scores | AnswerScores]()
    for shard in shards:
        trained, wanted = ([texts.labels[i] for i in part] for part in (shard.train, shard.held_out))
        labels = torch.tensor(wanted)
        commonest = torch.full_like(labels, max(sorted(set(trained)), key=trained.count))
        by_client[shard.client] = Scores(commonest, labels, torch.zeros(len(labels)), base.labels)
    return by_client


def _batches(texts: EncodedTexts, indices: Sequence[int], words: int) -> Iterator[Sequence[int]]:
    """Cut into batches of at most `BATCH` examples whose logits fit."""
    begins, start = texts.answer_starts, 0
    while start < len(indices):
        batch = indices[start : start + BATCH]
        if begins is not None:
            longest = max(len(texts.ids[i]) - begins[i] for i in batch)
            batch = batch[: max(1, MOST_LOGITS // (words * max(1, longest)))]
        yield batch
        start += len(batch)


def _score_labels(base: Base, inputs: dict[str, Tensor]) -> tuple[Tensor, ...]:
    labels = inputs.pop("labels")
    logits = base.model(**inputs).logits.float()
    return logits.argmax(1), functional.cross_entropy(logits, labels, reduction="none")


def _score_answers(base: Base, inputs: dict[str, Tensor]) -> tuple[Tensor, ...]:
    answers = loss.answer_logits(base, inputs)
    right = (answers.logits.argmax(1) == answers.targets).long()
    return answers.sum_by_example(right), answers.counts(), answers.sum_by_example(answers.losses())


@torch.no_grad()
def embeddings(base: Base, texts: EncodedTexts, indices: Sequence[int]) -> Tensor:
    """Embed these examples without any adapter: means over tokens of the last hidden states, (examples, hidden size), float32.

    A last layer that computes one token only (`first_token`) has no states of the others; then the layer below it is used.
    """
    model, rows = base.model, dict[int, Tensor]()
    order = sorted(indices, key=lambda i: (len(texts.ids[i]), i))
    training = model.training
    model.eval()
    with base.without_adapter():
        for at in range(0, len(order), EMBEDDED_ROWS):
            batch = order[at : at + EMBEDDED_ROWS]
            inputs = texts.batch(batch, base.device)
            inputs.pop("labels")
            mask = inputs["attention_mask"][..., None]
            layers = model(**inputs, output_hidden_states=True).hidden_states
            states = next(layer for layer in reversed(layers) if layer.shape[1] == mask.shape[1])
            means = (states.float() * mask).sum(1) / mask.sum(1)
            rows |= dict(zip(batch, means.cpu(), strict=True))
    model.train(training)
    return torch.stack([rows[i] for i in indices]) if indices else torch.empty(0, 0)
