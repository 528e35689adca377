"""Texts as token ids, and the batches of a task.

Each example is tokenised once. A batch is padded to its own longest text. Which examples share a batch is drawn by the client:
in buckets of similar length, so that little time goes into padding, or with texts of all lengths in each.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from fedloom.core.seeds import rng
from fedloom.core.text import without_surrogates
from fedloom.data.examples import Examples
from fedloom.train.chat_template import FitCounts, Span, special_token_pattern, tokenise_answers
from fedloom.train.settings import SHORTEST_TEXT

IGNORED = -100
"""The label of a token that is not to be predicted, as in torch and transformers."""

LONGEST_BY_DEFAULT = 1024
"""Tokens of a text at most where no `max_length` is given, as in TRL. Attention takes memory with the square of a text's length, and
the whole batch is as long as its longest: one text of 100,000 tokens should not decide on the memory that a run needs.
"""

MOST_CHOICES, EXAMPLES_OF_CHOICE = 32, 4
"""Where so few different answers are given, each to so many examples on average, a writer names labels."""

POOL = 8
"""Batches that are sorted by length together. Larger pools pad less and mix less; 8 keeps about 90 % of the tokens useful."""


@dataclass(frozen=True, slots=True)
class EncodedTexts:
    """Tokenised examples.

    Fields:
        ids: token ids of each example.
        extras: the tokenizer's other columns by name (segment ids), shaped like `ids`.
        labels: the label of each example.
        pad: the token id that fills a batch.
        pad_left: whether batches are padded on the left.
        answer_starts: where text is generated, the position at which the answer begins in each example; its tokens, the end mark
            included, are what is predicted (None: labels are predicted).
        fit_counts: numbers of examples that were changed on the way to tokens (None: not known).
        earlier_answers: where earlier answers stand in the same conversation; their tokens are predicted too (None: there are none).
        choices: tokens of the answers among which a writer chooses, where it names labels (empty: it writes freely).
    """

    ids: tuple[tuple[int, ...], ...]
    extras: dict[str, tuple[tuple[int, ...], ...]]
    labels: tuple[int, ...]
    pad: int
    pad_left: bool
    answer_starts: tuple[int, ...] | None = None
    fit_counts: FitCounts | None = None
    earlier_answers: tuple[tuple[Span, ...], ...] | None = None
    choices: tuple[tuple[int, ...], ...] = ()

    def targets(self, index: int) -> list[int]:
        """Return the tokens of an example that are to be predicted, each at its position, `IGNORED` elsewhere."""
        assert self.answer_starts is not None
        ids, start = self.ids[index], self.answer_starts[index]
        row = [*[IGNORED] * start, *ids[start:]]
        for begin, end in self.earlier_answers[index] if self.earlier_answers else ():
            row[begin:end] = ids[begin:end]
        return row

    def answer(self, index: int) -> tuple[int, ...]:
        """Return the tokens of an example's last answer, its end mark included."""
        assert self.answer_starts is not None
        return self.ids[index][self.answer_starts[index] :]

    def next_choices(self, index: int) -> list[tuple[int, ...]]:
        """Return, for each token of an example that is predicted, which tokens may stand there, ascending.

        In the last answer these are all with which a choice goes on that began as the answer did; elsewhere, and where none does, the
        token itself.
        """
        answer, found = self.answer(index), list[tuple[int, ...]]()
        for place, token in enumerate(self.targets(index)):
            if place and token != IGNORED:
                at = place - len(self.ids[index]) + len(answer)
                began = [one for one in self.choices if len(one) > at and one[:at] == answer[:at]] if at >= 0 else []
                found.append(tuple(sorted({one[at] for one in began})) or (token,))
        return found

    def target_count(self, index: int) -> int:
        """Return how many tokens of an example are to be predicted."""
        assert self.answer_starts is not None
        earlier = self.earlier_answers[index] if self.earlier_answers else ()
        return len(self.ids[index]) - self.answer_starts[index] + sum(end - begin for begin, end in earlier)

    def lengths(self, indices: Sequence[int]) -> list[int]:
        """Return the numbers of tokens of these examples."""
        return [len(self.ids[i]) for i in indices]

    def batch(self, indices: Sequence[int], device: torch.device) -> dict[str, Tensor]:
        """Make model inputs of these examples, padded to the longest, with `labels` (rows,), or (rows, tokens) to predict.

        Tokens to predict stay on the CPU, where their places are found without waiting for the device. A text's first token is none
        of them: nothing comes before it.
        """
        width = max(self.lengths(indices))
        mask = [self._pad([1] * len(self.ids[i]), width, 0) for i in indices]
        inputs = {"input_ids": [self._pad(self.ids[i], width, self.pad) for i in indices], "attention_mask": mask}
        for name, column in self.extras.items():
            inputs[name] = [self._pad(column[i], width, 0) for i in indices]
        if self.answer_starts is None:
            inputs["labels"] = [self.labels[i] for i in indices]  # type: ignore[misc]
        else:
            inputs["labels"] = [self._pad([IGNORED, *self.targets(i)[1:]], width, IGNORED) for i in indices]
        tensors = {name: torch.tensor(rows) for name, rows in inputs.items()}
        there = {name: copy_to(rows, device) for name, rows in tensors.items()}
        return there if self.answer_starts is None else there | {"labels": tensors["labels"]}

    def token_span(self, index: int, width: int) -> slice:
        """Return the place of this example's tokens in a row of `width`; the rest is padding."""
        length = len(self.ids[index])
        return slice(width - length, width) if self.pad_left else slice(0, length)

    def _pad(self, row: Sequence[int], width: int, value: int) -> list[int]:
        filler = [value] * (width - len(row))
        return [*filler, *row] if self.pad_left else [*row, *filler]


def copy_to(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor from the CPU to the device without waiting for it; on the CPU it is the tensor itself."""
    return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)


def encode_texts(
    examples: Examples, tokenizer: PreTrainedTokenizerBase, max_length: int, date: str | None = None
) -> EncodedTexts:
    """Tokenise single texts or pairs, cut at `max_length` tokens, or requests with their answers, shortened to as many.

    A chat template that writes the date is given this `date` (None: `chat_template.DATE`).
    """
    pad, left = tokenizer.pad_token_id or 0, tokenizer.padding_side == "left"
    if examples.answers is not None:
        found = tokenise_answers(examples, tokenizer, max_length, date)
        earlier = found.earlier if any(found.earlier) else None
        return EncodedTexts(found.ids, {}, examples.labels, pad, left, found.starts, found.counts, earlier)
    if not len(examples):
        return EncodedTexts((), {}, (), pad, left, fit_counts=FitCounts(0))
    texts = [tuple(map(without_surrogates, parts)) for parts in (examples.texts, examples.pairs or ())]
    pairs = list(texts[1]) if examples.pairs is not None else None
    columns = tokenizer(list(texts[0]), pairs, truncation=True, max_length=max_length, return_attention_mask=False)
    extras = {name: _tuples(rows) for name, rows in columns.items() if name != "input_ids"}
    ids = _tuples(columns["input_ids"])
    counts = _label_counts(examples, texts, tokenizer, ids, max_length)
    return EncodedTexts(ids, extras, examples.labels, pad, left, fit_counts=counts)


def _label_counts(
    examples: Examples,
    texts: Sequence[Sequence[str]],
    tokenizer: PreTrainedTokenizerBase,
    ids: Sequence[Sequence[int]],
    max_length: int,
) -> FitCounts:
    """Count the examples whose `texts` (of both columns) differ from what the model reads of them in at most `max_length` tokens."""
    given = [column for column in (examples.texts, examples.pairs) if column is not None]
    rows, mended = list(zip(*given, strict=True)), list(zip(*texts[: len(given)], strict=True))
    full = [i for i, row in enumerate(ids) if len(row) >= max_length]  # the others cannot have been cut
    whole = (
        tokenizer(*(list(column) for column in zip(*(mended[i] for i in full), strict=True)), verbose=False)
        if full
        else {}
    )
    special = special_token_pattern(tokenizer)
    cut = sum(len(row) > max_length for row in whole.get("input_ids", ()))
    return FitCounts(
        examples=len(rows),
        text=cut if tokenizer.truncation_side == "right" else 0,
        text_beginning=cut if tokenizer.truncation_side == "left" else 0,
        special_tokens=sum(any(map(special.search, parts)) for parts in rows),
        replaced_characters=sum(one != other for one, other in zip(rows, mended, strict=True)),
    )


def answer_choices(texts: EncodedTexts) -> tuple[tuple[int, ...], ...]:
    """Return the different answers of these examples, in order of their tokens, where they are few: labels told in words.

    They are few if there are at most `MOST_CHOICES`, and `EXAMPLES_OF_CHOICE` examples for each on average; else, or where nothing is
    written, empty.
    """
    if texts.answer_starts is None:
        return ()
    found = {texts.answer(i) for i in range(len(texts.ids))}
    return tuple(sorted(found)) if len(found) <= min(MOST_CHOICES, len(texts.ids) // EXAMPLES_OF_CHOICE) else ()


def longest_of(parts: Sequence[EncodedTexts], limit: int) -> int:
    """Return the number of tokens that is enough for all these texts, which were encoded in at most `limit`.

    Encoded with it instead, they would have the same tokens.
    """
    counts = [part.fit_counts for part in parts if part.fit_counts]
    if any(each.shortened for each in counts):
        return limit
    return max([SHORTEST_TEXT, *(len(row) for part in parts for row in part.ids)])


def _tuples(rows: Sequence[Sequence[int]]) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(row) for row in rows)


def plan_batches(
    lengths: Sequence[int], batch_size: int, steps: int, bucket: bool, seed: int, stratified: bool = False
) -> Iterator[list[int]]:
    """Yield `steps` batches, pass after pass, as indices into `lengths`.

    Every batch has `batch_size` examples, or all where there are fewer: a step on the one or two examples that a pass leaves over
    would weigh each of them as much as a whole batch, and tell as much of them. What a pass leaves over opens the next pass, in a
    batch filled up with others. So at any step all examples were used equally often within one, a step costs what it is estimated
    to cost, and none needs more memory than the batch size says. (Leaving the rest out, or spreading it over the other batches,
    lacks the first or the other two.)
    """
    size = min(batch_size, len(lengths))

    def batches() -> Iterator[list[int]]:
        left: list[int] = []
        for number in itertools.count():
            made, left = _pass_batches(lengths, size, bucket, rng(seed, "epoch", number), left, stratified)
            yield from made

    return itertools.islice(batches(), steps)


def _pass_batches(
    lengths: Sequence[int], size: int, bucket: bool, draw: random.Random, left: Sequence[int], stratified: bool
) -> tuple[list[list[int]], list[int]]:
    """Batches of one pass, the first with what the pass before left over; and what this one leaves over.

    Examples are shuffled, sorted by length inside pools of `POOL` batches, and the batches shuffled again. Stratified batches have
    one example of each stratum instead: of the shortest texts, the next longer ones, and so on.
    """
    order = list(range(len(lengths)))
    draw.shuffle(order)
    opening: list[list[int]] = []
    if left:
        before = set(left)
        others = [j for j in order if j not in before][: size - len(left)]
        opening, joined = [[*left, *others]], set(others)
        order = [j for j in order if j not in joined]
    full = len(order) - len(order) % size
    order, rest = order[:full], order[full:]
    if stratified:
        return opening + _stratified_batches(sorted(order, key=lambda j: lengths[j]), size, draw), rest
    if bucket:
        step = POOL * size
        pools = [sorted(order[i : i + step], key=lambda j: lengths[j]) for i in range(0, len(order), step)]
        order = [j for pool in pools for j in pool]
    batches = [order[i : i + size] for i in range(0, len(order), size)]
    if bucket:
        draw.shuffle(batches)
    return opening + batches, rest


def _stratified_batches(order: list[int], size: int, draw: random.Random) -> list[list[int]]:
    """Batches of this size that take one example from each of the consecutive strata of `order`, which fills them exactly."""
    count = len(order) // size
    batches: list[list[int]] = [[] for _ in range(count)]
    for start in range(0, len(order), count or 1):
        for batch, j in zip(draw.sample(batches, count), order[start : start + count], strict=True):
            batch.append(j)
    return batches
