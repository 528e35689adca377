"""Fixed training and test texts that experiments share: the same rows for every method, seed and study.

A seed of an experiment divides the training rows over other clients; it draws no other rows. So what is computed once of a text
serves every cell, and scores of two seeds are of the same examples. Each pool has a second form to tune on: the same training
rows, scored on other rows of the training file, so that nothing is chosen by the test rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NamedTuple

from fedloom import Corrupted, Instructions, Rows
from fedloom.core.seeds import rng
from fedloom.data.delimited import FileFormat
from fedloom.data.examples import Source, Split
from fedloom.data.file_formats import read_table_file

DATA = Path(__file__).parents[2] / "shared" / "data"
TOPICS = ("world", "sports", "business", "technology")
"""The labels of AG News (Zhang et al. 2015), in one word each."""
REQUEST = f"Topic: {', '.join(TOPICS[:-1])} or {TOPICS[-1]}?"
TOLD_LENGTH = 128
"""Tokens of a request with its answer at most: one text in twenty is longer, and loses words in its middle."""
TOLD_TESTS = 500
"""Test rows of a model that writes topics: half of those of one that chooses them, since it takes longer for each."""

Row = Mapping[str, str]
Splits = Mapping[str, Sequence[Row]]


class Pool(NamedTuple):
    """Training rows, test rows, and other rows of the training file to tune on."""

    train: Sequence[Row]
    test: Sequence[Row]
    tuning: Sequence[Row]


def shuffled(file: str) -> list[Row]:
    """The rows of a file in one random order, always the same."""
    columns = read_table_file(DATA / file, FileFormat(quoted=False)).columns
    rows = [dict(zip(columns, map(str, cells), strict=True)) for cells in zip(*columns.values(), strict=True)]
    rng(0, "pool", file).shuffle(rows)
    return list(rows)


@cache
def topics() -> Pool:
    """News with their topics (AG News): 2,400 training rows, 1,000 of the test file, 500 to tune on."""

    def told(text: str, label: str) -> Row:
        return {"request": REQUEST, "text": text, "topic": TOPICS[int(label)]}

    known = [told(row["text"], row["label"]) for row in shuffled("agnews/train_part.tsv.gz")[:2900]]
    tests = shuffled("agnews/test.tsv.gz")[:1000]
    return Pool(
        known[:2400],
        [told(f"{row['title']} {row['description']}", row["label"]) for row in tests],
        known[2400:],
    )


@cache
def paraphrases() -> Pool:
    """Pairs of sentences (MRPC): 3,600 training rows, all 1,725 test rows, the other 476 of the training file to tune on."""
    known = shuffled("mrpc/train.tsv.gz")
    return Pool(known[:3600], shuffled("mrpc/test.tsv.gz"), known[3600:])


@cache
def questions() -> Pool:
    """Pairs of questions (QQP): 4,000 training rows, 1,500 test rows and 500 to tune on, all of one file, which has no parts."""
    rows = shuffled("qqp/dev_part.tsv.gz")
    return Pool(rows[:4000], rows[4000:5500], rows[5500:6000])


def topic_rows() -> Splits:
    """News to choose the topic of."""
    return {"train": topics().train, "test": topics().test}


def told_rows() -> Splits:
    """News to write the topic of."""
    return {"train": topics().train, "test": topics().test[:TOLD_TESTS]}


def topic_tuning_rows() -> Splits:
    """News to tune on."""
    return {"train": topics().train, "test": topics().tuning}


def paraphrase_rows() -> Splits:
    """Pairs of sentences."""
    return {"train": paraphrases().train, "test": paraphrases().test}


def paraphrase_tuning_rows() -> Splits:
    """Pairs of sentences to tune on."""
    return {"train": paraphrases().train, "test": paraphrases().tuning}


def question_rows() -> Splits:
    """Pairs of questions."""
    return {"train": questions().train, "test": questions().test}


def question_tuning_rows() -> Splits:
    """Pairs of questions to tune on."""
    return {"train": questions().train, "test": questions().tuning}


def chosen_topic(rows: Callable[[], Splits]) -> Rows:
    """News as texts with a label."""
    return Rows(rows, text="text", label="topic", labels=TOPICS)


def told_topic(rows: Callable[[], Splits]) -> Instructions:
    """News as requests to a model that writes; the kind of a request is its topic, so that a partition can skew it."""
    return Instructions(rows, instruction="request", context="text", answer="topic", kind="topic")


def same_meaning(rows: Callable[[], Splits]) -> Rows:
    """Pairs of sentences, and whether they say the same."""
    return Rows(rows, text="sentence1", pair="sentence2", label="label")


def same_question(rows: Callable[[], Splits]) -> Rows:
    """Pairs of questions, and whether they ask the same."""
    return Rows(rows, text="question1", pair="question2", label="label")


@dataclass(frozen=True)
class OneDraw:
    """A source that draws the same at every seed, so that what is computed of a damaged text serves every seed."""

    source: Source

    def load(self, seed: int) -> Split:
        """Return the split of seed 0."""
        return self.source.load(0)


TOPICS_CHOSEN, TOPICS_CHOSEN_TUNING = chosen_topic(topic_rows), chosen_topic(topic_tuning_rows)
TOPICS_TOLD, TOPICS_TOLD_TUNING = told_topic(told_rows), told_topic(topic_tuning_rows)
TOPICS_DAMAGED, TOPICS_DAMAGED_TUNING = (
    OneDraw(Corrupted(pool, 0.5, delete=0.2, swap=0.1)) for pool in (TOPICS_TOLD, TOPICS_TOLD_TUNING)
)
"""The same with half of the training texts damaged: a fifth of the sentences is gone, of the words where there is one sentence, and
a tenth of these texts has another's topic."""
PARAPHRASES, PARAPHRASES_TUNING = same_meaning(paraphrase_rows), same_meaning(paraphrase_tuning_rows)
QUESTIONS, QUESTIONS_TUNING = same_question(question_rows), same_question(question_tuning_rows)
