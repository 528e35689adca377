"""Evaluation of an adapter: predictions of labels and answers, generated answers, and the metrics of both."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import TextStreamer

from fedloom.core.lora import Adapter
from fedloom.core.types import ClientId
from fedloom.data.partition import Shard
from fedloom.train import loss
from fedloom.train.base_model import Base, most_tokens
from fedloom.train.chat_template import PromptFormat
from fedloom.train.confusion import Confusion, commonest_label
from fedloom.train.engine import frozen_layers
from fedloom.train.engine.frozen_layers import ActivationCache, FrozenFeatures
from fedloom.train.library_messages import log_messages
from fedloom.train.settings import LARGEST_LOSS
from fedloom.train.tokenised import EncodedTexts

BATCH = 64
"""Examples predicted together; sorted by length, so padding is small."""

MOST_LOGITS = 2**26
"""Logits of one batch at most, answers' tokens times vocabulary: a quarter of a gigabyte."""


GENERATED_TOGETHER = 16
"""Answers generated together; a row that has ended waits for the others."""

NUMBER = re.compile(r"####\s*([-+]?[\d,.]*\d)")
"""The result of a worked answer, as GSM8K marks it (Cobbe et al., arXiv 2110.14168)."""


@dataclass(frozen=True, slots=True)
class Scores:
    """Predictions of labels.

    Fields:
        predicted: the predicted label of each example.
        labels: the true label of each.
        losses: the cross-entropy of each.
        classes: number of labels.
        margins: of two labels the logit of the second less that of the first, for each example (None: not known).
    """

    predicted: Tensor
    labels: Tensor
    losses: Tensor
    classes: int
    margins: Tensor | None = None

    def subset(self, indices: Sequence[int]) -> Scores:
        """Return the scores of these examples alone."""
        chosen = torch.tensor(list(indices), dtype=torch.long)
        margins = None if self.margins is None else self.margins[chosen]
        return Scores(self.predicted[chosen], self.labels[chosen], self.losses[chosen], self.classes, margins)

    def probabilities(self) -> tuple[float, ...]:
        """Return the probability of the right label of each example."""
        return _rounded(self.losses)

    def counts(self) -> tuple[int, int, float]:
        """Return the number of predictions, how many are right, and the sum of their cross-entropies."""
        return len(self.labels), int((self.predicted == self.labels).sum()), float(self.losses.double().sum())

    def confusion(self) -> Confusion:
        """Return the counts by true and predicted label."""
        size = self.classes
        counts = torch.bincount(self.labels * size + self.predicted, minlength=size * size).reshape(size, size)
        area = roc_auc(self.margins, self.labels == 1) if size == 2 and self.margins is not None else None
        return Confusion(tuple(map(tuple, counts.tolist())), area)

    def metrics(self) -> dict[str, float]:
        """Return accuracy, F1 (of two labels `f1`, that of the second; else `f1_macro`, the mean of all), mean cross-entropy."""
        counted = self.confusion()
        return {"accuracy": counted.accuracy(), **counted.f1_metrics(), "loss": float(self.losses.double().mean())}


def roc_auc(scores: Tensor, positive: Tensor) -> float | None:
    """Return the area under the ROC curve: how probably a random positive example scores above a random negative one.

    A tie counts half: the U of Mann and Whitney (1947) over its largest value (Hanley and McNeil 1982), exact.
    None where examples of one kind are lacking, or a score is not finite.
    """
    ours, others = scores[positive], scores[~positive].sort().values
    if not len(ours) or not len(others) or not bool(scores.isfinite().all()):
        return None
    below, not_above = (torch.searchsorted(others, ours, right=right) for right in (False, True))
    return int((below + not_above).sum()) / (2 * len(ours) * len(others))


def _rounded(losses: Tensor) -> tuple[float, ...]:
    """The probabilities of these cross-entropies to six digits, which keeps a trace small; 0 where a loss is no number."""
    return tuple(round(value, 6) for value in losses.double().neg().exp().nan_to_num(0.0, 0.0, 0.0).tolist())


@dataclass(frozen=True, slots=True)
class AnswerScores:
    """Predictions of some reference answers, token by token from the right ones before it.

    Fields:
        hits: of each example, how many tokens of its answer are the likeliest.
        tokens: how many there are.
        losses: the sum of their cross-entropies.
        chosen: whether each answer is what greedy decoding writes where it may only write one of the data's answers (None: these are
            no labels).
    """

    hits: Tensor
    tokens: Tensor
    losses: Tensor
    chosen: Tensor | None = None

    def subset(self, indices: Sequence[int]) -> AnswerScores:
        """Return the scores of these examples alone."""
        rows = torch.tensor(list(indices), dtype=torch.long)
        chosen = None if self.chosen is None else self.chosen[rows]
        return AnswerScores(self.hits[rows], self.tokens[rows], self.losses[rows], chosen)

    def probabilities(self) -> tuple[float, ...]:
        """Return the probability of the right tokens of each answer: their geometric mean."""
        return _rounded(self.losses / self.tokens.clamp_min(1))

    def counts(self) -> tuple[int, int, float]:
        """Return the number of predicted tokens, how many are right, and the sum of their cross-entropies."""
        return int(self.tokens.sum()), int(self.hits.sum()), float(self.losses.double().sum())

    def metrics(self) -> dict[str, float]:
        """Return accuracy over all tokens, its standard error, mean cross-entropy and perplexity, and the share of exact answers.

        Where answers are labels there is also the share of those that are chosen among all labels.

        The error is of a ratio of sums over examples (delta method), since the tokens of one answer are not independent. An answer
        is exact where each of its tokens is the likeliest after those before it: then it is what greedy decoding writes.
        """
        named = {} if self.chosen is None else {"label_accuracy": float(self.chosen.double().mean())}
        total = max(1.0, float(self.tokens.sum()))
        accuracy, mean = float(self.hits.sum()) / total, float(self.losses.double().sum()) / total
        return {
            "accuracy": accuracy,
            "accuracy_error": float((self.hits - accuracy * self.tokens.double()).norm()) / total,
            "loss": mean,
            "perplexity": math.exp(min(mean, LARGEST_LOSS)),
            "exact_match": float((self.hits == self.tokens).double().mean()),
            **named,
            "tokens": int(total),
        }


@dataclass(frozen=True, slots=True)
class KeptActivations:
    """Outputs of layers that nobody trains, kept from one scoring of the same texts to the next.

    Fields:
        room: bytes of them at most (0: none are kept).
        depth: blocks, counted from the output, that the run trains (None: down to the lowest one to which the scored adapter or its
            fold adds something).
        cache: what is kept.
    """

    room: int
    depth: int | None = None
    cache: ActivationCache = field(default_factory=ActivationCache)


NOTHING_KEPT = KeptActivations(0)


def _features(
    base: Base,
    changes: Sequence[Adapter | None],
    texts: EncodedTexts,
    indices: Sequence[int],
    activations: KeptActivations,
) -> FrozenFeatures | None:
    """Return the inputs of the lowest block that training changes; None where all is computed from the texts."""
    if not activations.room:
        return None
    split = frozen_layers.split_top(base, activations.depth) if activations.depth else None
    if activations.depth is None and (
        changed := [n for one in changes if one for n in frozen_layers.changed_layers(one)]
    ):
        split = frozen_layers.split_layers(base, changed)
    if split is None or not split.form:
        return None
    return frozen_layers.frozen_features(base, texts, split, indices, changes, activations.cache, activations.room)


@torch.no_grad()
def score(
    base: Base,
    adapter: Adapter | None,
    texts: EncodedTexts,
    indices: Sequence[int],
    fold: Adapter | None = None,
    activations: KeptActivations = NOTHING_KEPT,
) -> Scores | AnswerScores:
    """Predict these examples with the adapter over base and fold, or the base alone; results are in the order of `indices`."""
    if adapter is not None:
        base.put(adapter, fold=fold)
    features = _features(base, (fold, adapter), texts, indices, activations)
    base.model.eval()
    lengths = texts.lengths(indices)
    order = sorted(range(len(indices)), key=lambda i: lengths[i])
    columns_by_batch: list[tuple[Tensor, ...]] = []
    with base.without_adapter() if adapter is None else nullcontext():
        for batch in _batches(texts, [indices[i] for i in order], base.vocabulary):
            inputs = texts.batch(batch, base.device)
            with features.starting_from(batch) if features else nullcontext():
                columns_by_batch.append(
                    _score_answers(base, inputs, texts, batch) if base.labels is None else _score_labels(base, inputs)
                )
    activations.cache.trim(activations.room)
    back = torch.tensor(order, dtype=torch.long).argsort()
    columns = [torch.cat(column).cpu()[back] for column in zip(*columns_by_batch, strict=True)]
    if base.labels is None:
        return AnswerScores(*columns)
    predicted, losses, margins = columns
    return Scores(predicted, torch.tensor([texts.labels[i] for i in indices]), losses, base.labels, margins)


@torch.no_grad()
def label_probabilities(base: Base, adapter: Adapter, texts: EncodedTexts) -> Tensor:
    """Return how probable the model with the adapter finds each label of each text, shaped (texts, labels)."""
    base.put(adapter)
    base.model.eval()
    order, rows = sorted(range(len(texts.ids)), key=lambda i: len(texts.ids[i])), list[Tensor]()
    for batch in _batches(texts, order, base.vocabulary):
        inputs = texts.batch(batch, base.device)
        inputs.pop("labels")
        rows.append(base.model(**inputs).logits.float().softmax(1).cpu())
    return torch.cat(rows)[torch.tensor(order).argsort()]


def evaluate_held_out(
    base: Base,
    adapter: Adapter | None,
    texts: EncodedTexts,
    shards: Sequence[Shard],
    fold: Adapter | None = None,
    activations: KeptActivations = NOTHING_KEPT,
) -> dict[ClientId, Scores | AnswerScores]:
    """Score one adapter (None: the base alone) on the held-out part of each client that has one, all of them in one pass."""
    held = [shard for shard in shards if shard.held_out]
    if not held:
        return {}
    indices, end, by_client = [i for shard in held for i in shard.held_out], 0, {}
    scores = score(base, adapter, texts, indices, fold, activations)
    for shard in held:
        start, end = end, end + len(shard.held_out)
        by_client[shard.client] = scores.subset(range(start, end))
    return by_client


def evaluate_untrained(
    base: Base, texts: EncodedTexts, shards: Sequence[Shard], activations: KeptActivations = NOTHING_KEPT
) -> dict[ClientId, Scores | AnswerScores]:
    """Score what needs no training on the held-out part of each client that has one: the baseline of its scores.

    Where text is written that is the base alone; where labels are chosen, the commonest label of the client's training examples,
    whatever is asked (with a cross-entropy of 0, since no probability is predicted).
    """
    if base.labels is None:
        return evaluate_held_out(base, None, texts, shards, activations=activations)
    by_client = dict[ClientId, Scores | AnswerScores]()
    for shard in (shard for shard in shards if shard.held_out):
        labels = torch.tensor([texts.labels[i] for i in shard.held_out])
        commonest = torch.full_like(labels, commonest_label([texts.labels[i] for i in shard.train]))
        by_client[shard.client] = Scores(commonest, labels, torch.zeros(len(labels)), base.labels)
    return by_client


def _batches(texts: EncodedTexts, indices: Sequence[int], words: int) -> Iterator[Sequence[int]]:
    """Cut into batches of at most `BATCH` examples whose logits fit."""
    start = 0
    while start < len(indices):
        batch = indices[start : start + BATCH]
        if texts.answer_starts is not None:
            longest = max(map(texts.target_count, batch))
            batch = batch[: max(1, MOST_LOGITS // (words * max(1, longest)))]
        yield batch
        start += len(batch)


def _score_labels(base: Base, inputs: dict[str, Tensor]) -> tuple[Tensor, ...]:
    labels = inputs.pop("labels")
    logits = base.model(**inputs).logits.float()
    return logits.argmax(1), functional.cross_entropy(logits, labels, reduction="none"), logits[:, -1] - logits[:, 0]


def _score_answers(
    base: Base, inputs: dict[str, Tensor], texts: EncodedTexts, batch: Sequence[int]
) -> tuple[Tensor, ...]:
    answers = loss.answer_logits(base, inputs)
    right = (answers.logits.argmax(1) == answers.targets).long()
    columns = (answers.sum_by_example(right), answers.counts(), answers.sum_by_example(answers.losses()))
    return (*columns, _chosen(answers, texts, batch)) if texts.choices else columns


def _chosen(answers: loss.AnswerLogits, texts: EncodedTexts, batch: Sequence[int]) -> Tensor:
    """Return of each example whether greedy decoding that may only write one of `texts.choices` writes its answer (rows,).

    It does where each token is the likeliest of those that may come next (decoding constrained to a prefix tree, De Cao et al. 2021,
    arXiv 2010.00904, section 3.2, with one beam). So the pass over the right answer tells it, and none over the others is needed.
    """
    allowed = [tokens for i in batch for tokens in texts.next_choices(i)]
    width = max(map(len, allowed))
    choices = torch.tensor([[*tokens, *tokens[-1:] * (width - len(tokens))] for tokens in allowed]).to(
        answers.logits.device
    )
    best = answers.logits.gather(1, choices).argmax(1, keepdim=True)
    wrong = answers.sum_by_example((choices.gather(1, best)[:, 0] != answers.targets).long())
    known = torch.tensor([texts.answer(i) in texts.choices for i in batch])
    return (wrong == 0) & known.to(wrong.device)


# Generated answers -----------------------------------------------------------------------------------------------------


@torch.no_grad()
def generate_answers(
    base: Base,
    adapter: Adapter | None,
    texts: EncodedTexts,
    indices: Sequence[int],
    most: int,
    fold: Adapter | None = None,
    on_text: Callable[[str], None] | None = None,
) -> list[str]:
    """Answer these examples' requests greedily in at most `most` tokens, with the adapter over base and fold, or the base alone.

    With `on_text` one after the other is answered, the shortest first, and it is called with each piece of text as it is written.
    """
    assert texts.answer_starts is not None
    requests = [texts.ids[i][: texts.answer_starts[i]] for i in indices]
    if adapter is None:
        with base.without_adapter():
            return _generate(base, requests, texts.pad, most, on_text)
    base.put(adapter, fold=fold)
    return _generate(base, requests, texts.pad, most, on_text)


class _Pieces(TextStreamer):
    """Calls `on_text` with an answer as it is written, word by word."""

    def __init__(self, tokenizer: Any, on_text: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.on_text = on_text

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.on_text(text)


def _generate(
    base: Base, requests: Sequence[Sequence[int]], pad: int, most: int, on_text: Callable[[str], None] | None
) -> list[str]:
    model: Any = base.model.eval().get_base_model()
    tokenizer: Any = base.tokenizer
    order = sorted(range(len(requests)), key=lambda i: len(requests[i]))
    answers, ends = dict[int, str](), _end_marks(model, tokenizer)
    together = 1 if on_text else GENERATED_TOGETHER
    for start in range(0, len(order), together):
        chosen = order[start : start + together]
        width = max(len(requests[i]) for i in chosen)
        filled = [[pad] * (width - len(requests[i])) + list(requests[i]) for i in chosen]
        mask = [[0] * (width - len(requests[i])) + [1] * len(requests[i]) for i in chosen]
        with log_messages():
            rows = model.generate(
                input_ids=torch.tensor(filled, device=base.device),
                attention_mask=torch.tensor(mask, device=base.device),
                max_new_tokens=min(most, most_tokens(base, width + most) - width),
                do_sample=False,
                num_beams=1,
                num_return_sequences=1,
                return_dict_in_generate=False,
                tokenizer=tokenizer,  # for `stop_strings`
                pad_token_id=pad,
                eos_token_id=ends or None,
                streamer=_Pieces(tokenizer, on_text) if on_text else None,
            )
        for i, row in zip(chosen, rows, strict=True):
            answers[i] = tokenizer.decode(row[width:], skip_special_tokens=True).strip()
    return [answers[i] for i in range(len(requests))]


def _end_marks(model: Any, tokenizer: Any) -> list[int]:
    """Return the marks that end an answer: the model's own, and those that the references end with."""
    model_marks = model.generation_config.eos_token_id
    return sorted(
        {
            *(model_marks if isinstance(model_marks, list) else [model_marks]),
            *PromptFormat.for_tokenizer(tokenizer).end_marks,
        }
        - {None}
    )


def answer_metrics(written: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """Return exact match and ROUGE-L (F1 of the longest common subsequence of words; Lin 2004, section 3), means over the answers."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"], tokenizer=_WordTokenizer())
    pairs = [*zip(written, references, strict=True)]
    overlaps = [scorer.score(reference, text)["rougeL"].fmeasure for text, reference in pairs]
    count = max(1, len(pairs))
    return {"exact_match": sum(exact_match(*pair) for pair in pairs) / count, "rouge_l": sum(overlaps) / count}


def exact_match(text: str, reference: str) -> bool:
    """Whether an answer is right: it has the number behind `####` where the reference has one, else the same words.

    >>> exact_match("2 + 2 = 4, so\\n#### 1,004.0", "#### 1004"), exact_match("Yes, Paris.", "yes paris")
    (True, True)
    >>> exact_match("42", "#### 42")
    False
    """
    wanted = worked_result(reference)
    if wanted is not None:
        return worked_result(text) == wanted
    return (scored_words(text) or text.split()) == (scored_words(reference) or reference.split())


def worked_result(text: str) -> float | None:
    """Return the number behind the last `####`; None where there is none."""
    numbers = NUMBER.findall(text)
    try:
        return float(numbers[-1].replace(",", "")) if numbers else None
    except ValueError:  # 1.2.3
        return None


def scored_words(text: str) -> list[str]:
    """Split a text of any script into words, without case and punctuation.

    >>> scored_words("It's  Zürich!")
    ['it', 's', 'zürich']
    """
    return re.findall(r"\w+", text.casefold())


class _WordTokenizer:
    """Our words for rouge_score, whose own tokenizer knows Latin letters only."""

    def tokenize(self, text: str) -> list[str]:
        return scored_words(text)
