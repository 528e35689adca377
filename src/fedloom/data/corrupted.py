"""Texts made worse by a stated amount: the knob that says whether quality is the cause."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from fedloom.core.errors import Refused
from fedloom.core.seeds import rng
from fedloom.data.examples import Examples, Source, Split
from fedloom.data.tickets import Tickets

SENTENCE = re.compile(r"(?<=[.!?])\s+")


@dataclass(frozen=True)
class Corrupted:
    """A source with a seeded `share` of its training examples damaged; test examples stay clean.

    Of the context of a damaged example (its pair where there is one, else its text) a share `delete` of the sentences is left out
    and a share `shuffle` of the others changes places; words take the place of sentences where there is one only. With the chance
    `swap` it gets a wrong label, or another's reference answer where there are answers. An example's `quality` is 0 if it is
    untouched, and falls by the share that really was left out, by the share that really was moved, and by 1 for a wrong answer;
    damage to damaged examples adds up.
    """

    source: Source = field(default_factory=Tickets)
    share: float = 0.5
    delete: float = 0.5
    shuffle: float = 0.0
    swap: float = 0.0

    def __post_init__(self) -> None:
        for name in ("share", "delete", "shuffle", "swap"):
            if not 0 <= (value := getattr(self, name)) <= 1:
                raise Refused(f"data.{name}", value, "choose a share from 0 to 1")

    def load(self, seed: int) -> Split:
        """The source's split of this seed, its training examples damaged."""
        split = self.source.load(seed)
        return replace(split, train=self._damaged(split.train, seed))

    def _damaged(self, examples: Examples, seed: int) -> Examples:
        count = len(examples)
        texts, pairs = list(examples.texts), list(examples.pairs or ())
        quality = list(examples.quality or (0.0,) * count)
        hit = sorted(rng(seed, "corrupted").sample(range(count), round(self.share * count)))
        for i in hit:
            column = pairs if pairs and pairs[i].strip() else texts
            column[i], lost = damaged(column[i], self.delete, self.shuffle, rng(seed, "corrupted", i))
            quality[i] -= lost
        chosen = [i for i in hit if rng(seed, "corrupted", i, "swap").random() < self.swap]
        swapped = _swapped(examples, chosen, rng(seed, "corrupted", "swap"))
        for i in chosen:
            quality[i] -= _wanted(swapped)[i] != _wanted(examples)[i]
        told = None if examples.pairs is None else tuple(pairs)
        return replace(swapped, texts=tuple(texts), pairs=told, quality=tuple(quality))


def damaged(text: str, delete: float, shuffle: float, draw: random.Random) -> tuple[str, float]:
    """The text with a share of its sentences left out and a share of the others moved; and how much of it was (0 to 2).

    At least one sentence stays, and what moves really changes its place: a single one cannot.
    """
    parts = SENTENCE.split(text.strip())
    parts = parts if len(parts) > 1 else text.split()
    out = min(round(delete * len(parts)), max(len(parts) - 1, 0))
    kept = sorted(draw.sample(range(len(parts)), len(parts) - out))
    moved = sorted(draw.sample(range(len(kept)), round(shuffle * len(kept))))
    moved = moved if len(moved) > 1 else []
    order, turn = list(kept), draw.randrange(1, len(moved)) if moved else 0
    for place, source in zip(moved, moved[turn:] + moved[:turn], strict=True):
        order[place] = kept[source]
    if not out and not moved:
        return text, 0.0
    return " ".join(parts[i] for i in order), out / len(parts) + len(moved) / len(kept)


def _wanted(examples: Examples) -> Sequence[object]:
    """What is to be said of each example: its answer where there are answers, else its label."""
    return examples.answers if examples.answers is not None else examples.labels


def _swapped(examples: Examples, chosen: list[int], draw: random.Random) -> Examples:
    """Answers of the chosen handed round among them, or another label for each."""
    if examples.answers is not None:
        answers, order = list(examples.answers), draw.sample(chosen, len(chosen))
        for i, other in zip(order, order[1:] + order[:1], strict=True):
            answers[i] = examples.answers[other]
        return replace(examples, answers=tuple(answers))
    labels, kinds = list(examples.labels), len(examples.names)
    for i in chosen:
        labels[i] = (labels[i] + draw.randrange(1, kinds)) % kinds if kinds > 1 else labels[i]
    return replace(examples, labels=tuple(labels))
