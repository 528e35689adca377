"""Measures of examples: length, quality, label, or 1 for each. Any function like these is an axis of a skew."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

from fedloom.core.errors import Refused
from fedloom.data.examples import Examples

Measure: TypeAlias = Callable[[Examples], Sequence[float]]
"""One number per example. `fedloom.train.text_features.Tokens` counts tokens in the same way as `words` counts words."""


def ones(examples: Examples) -> Sequence[float]:
    """Measure each example as 1: the sum over a client's examples is their number."""
    return (1,) * len(examples)


def words(examples: Examples) -> Sequence[float]:
    """Count the words that a model reads of each example: request, context and reference answer."""
    return tuple(sum(len(text.split()) for text in parts) for parts in example_texts(examples))


def labels(examples: Examples) -> Sequence[float]:
    """Return the number of each example's label: an axis without an order, to be cut into `bins=None`."""
    return examples.labels


def quality(examples: Examples) -> Sequence[float]:
    """Return the quality that the examples bring with them.

    Raises:
        Refused: they bring none.
    """
    if examples.quality is None:
        remedy = "the examples bring no quality; damage some with Corrupted(source), or let a model judge them with Judged(source)"
        raise Refused("data.quality", None, remedy)
    return examples.quality


def example_texts(examples: Examples) -> list[tuple[str, ...]]:
    """Return the texts of each example, in the order in which a model reads them."""
    columns = (examples.texts, examples.pairs, examples.answers)
    each = zip(*(column for column in columns if column is not None), strict=True)
    before = examples.before or ((),) * len(examples)
    return [(*(turn.content for turn in turns), *parts) for turns, parts in zip(before, each, strict=True)]
