"""Checks of examples before anything is trained on them: repeated texts, test texts that were trained on, rare labels.

Counts and label names only, never a text.
"""

from __future__ import annotations

import unicodedata
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterator, Mapping, Sequence

from fedloom.core.text import list_some
from fedloom.data.cells import is_missing
from fedloom.data.examples import Examples
from fedloom.data.raw_table import RawTable

RARE = 8
"""Examples below which a label is rare: a share of a fifth to test on then leaves less than two."""
NAMED = 8
"""Labels that one sentence names at most."""


def missing_sentences(raw: RawTable, roles: Mapping[str, str]) -> Iterator[str]:
    """Say for each column in use how many of its cells are empty, and in which rows; `roles` give the column of each role."""
    for role, name in roles.items():
        cells = raw.columns[name]
        gaps = [row for row, cell in enumerate(cells) if is_missing(cell)]
        if gaps:
            yield f"{len(gaps)} of {len(cells)} cells of the column “{name}” ({role}) are empty: {raw.rows(gaps)}."


def label_sentences(examples: Examples) -> Iterator[str]:
    """Say which label is the commonest, which are rare, and which differ in capital letters, accents or blanks alone."""
    counts = Counter(examples.names[label] for label in examples.labels if examples.names[label])
    if len(counts) < 2:
        return
    (name, most), *_ = counts.most_common(1)
    share = 100 * most / counts.total()
    yield f"{len(counts)} labels; always answering the commonest, “{name}”, is right for {share:.1f} % of the examples."
    if rare := sorted(name for name, count in counts.items() if count < RARE):
        yield f"{len(rare)} of {len(counts)} labels have fewer than {RARE} examples: {_listed(rare)}."
    spellings: dict[str, list[str]] = defaultdict(list)
    for name in counts:
        spellings[_folded(name)].append(name)
    for alike in spellings.values():
        if len(alike) > 1:
            yield f"Labels that differ in capitals, accents or blanks alone: {_listed(sorted(alike))}. Is that one label?"


def repeat_sentences(examples: Examples) -> Iterator[str]:
    """Say how many examples stand there more than once, and how many texts with other labels or answers than before."""
    asked = _questions(examples)
    answers: dict[Hashable, set[object]] = defaultdict(set)
    for question, answer in zip(asked, _answers(examples), strict=True):
        answers[question].add(answer)
    if repeated := len(asked) - len(answers):
        yield f"{repeated} of {len(asked)} texts repeat an earlier one; keep one of each, or they count double."
    what = "answers" if examples.answers is not None else "labels"
    if several := sum(len(found) > 1 for found in answers.values()):
        yield f"{several} texts have different {what} in different rows."


def overlap_sentences(train: Examples, test: Examples) -> Iterator[str]:
    """Say how many test examples are among the training examples, whatever their label or answer, and how many labels are new."""
    trained = set(_questions(train))
    if both := sum(question in trained for question in _questions(test)):
        yield f"{both} of {len(test)} test examples are in the training data, too: their scores are too good."
    named = [test.names[label] for label in test.labels if test.names[label]]
    if len(train.names) > 1 and (new := sum(name not in train.names for name in named)):
        yield f"{new} of {len(test)} test examples have a label that no training example has."


def _questions(examples: Examples) -> list[Hashable]:
    """Return what is asked in each example: its text, its second text, and the conversation before."""
    pairs, before = examples.pairs or ("",) * len(examples), examples.before or ((),) * len(examples)
    return [*zip(map(_words, examples.texts), pairs, before, strict=True)]


def _answers(examples: Examples) -> Sequence[object]:
    return examples.labels if examples.answers is None else examples.answers


def _words(text: str) -> str:
    return " ".join(text.split())


def _folded(name: str) -> str:
    """A label without case, accents and blanks."""
    plain = unicodedata.normalize("NFKD", name.casefold())
    return "".join(sign for sign in plain if not unicodedata.combining(sign) and not sign.isspace())


def _listed(names: Sequence[str]) -> str:
    return list_some([f"“{name}”" for name in names], NAMED)
