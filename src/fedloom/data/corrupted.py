"""Damage to texts by a stated amount, for experiments on whether quality is the cause of an effect."""

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

    The context of a damaged example is its pair where there is one, else its text. A share `delete` of its sentences is left out and
    a share `shuffle` of the others changes places. With one sentence only, words take their place. With the chance `swap` it gets a
    wrong label, or another's reference answer where there are answers. An example's `quality` is 0 if it is untouched. It falls by
    the share that really was left out, by the share that really was moved, and by 1 for a wrong answer. Repeated damage adds up.

    Fields:
        source: source of the examples.
        share: share of the training examples that are damaged.
        delete: share of a damaged example's sentences that are left out.
        shuffle: share of its other sentences that change places.
        swap: chance that it gets a wrong label or another's answer.
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
        """Load the source's split of this seed and damage its training examples."""
        split = self.source.load(seed)
        return replace(split, train=self._damaged(split.train, seed))

    def _damaged(self, examples: Examples, seed: int) -> Examples:
        count = len(examples)
        texts, pairs = list(examples.texts), list(examples.pairs or ())
        quality = list(examples.quality or (0.0,) * count)
        hit = sorted(rng(seed, "corrupted").sample(range(count), round(self.share * count)))
        for i in hit:
            column = pairs if pairs and pairs[i].strip() else texts
            column[i], lost = damage_text(column[i], self.delete, self.shuffle, rng(seed, "corrupted", i))
            quality[i] -= lost
        chosen = [i for i in hit if rng(seed, "corrupted", i, "swap").random() < self.swap]
        swapped = _swapped(examples, chosen, rng(seed, "corrupted", "swap"))
        for i in chosen:
            quality[i] -= _targets(swapped)[i] != _targets(examples)[i]
        second = None if examples.pairs is None else tuple(pairs)
        return replace(swapped, texts=tuple(texts), pairs=second, quality=tuple(quality))


def damage_text(text: str, delete: float, shuffle: float, draw: random.Random) -> tuple[str, float]:
    """Leave out a share of the sentences of a text and move a share of the others; also return how much of it was damaged (0 to 2).

    At least one sentence stays, and what moves really changes its place: a single one cannot.
    """
    parts = SENTENCE.split(text.strip())
    parts = parts if len(parts) > 1 else text.split()
    out = min(round(delete * len(parts)), max(len(parts) - 1, 0))
    left = sorted(draw.sample(range(len(parts)), len(parts) - out))
    moved = sorted(draw.sample(range(len(left)), round(shuffle * len(left))))
    moved = moved if len(moved) > 1 else []
    order, turn = list(left), draw.randrange(1, len(moved)) if moved else 0
    for place, source in zip(moved, moved[turn:] + moved[:turn], strict=True):
        order[place] = left[source]
    if not out and not moved:
        return text, 0.0
    return " ".join(parts[i] for i in order), out / len(parts) + len(moved) / len(left)


def _targets(examples: Examples) -> Sequence[object]:
    """Return the target of each example: its answer where there are answers, else its label."""
    return examples.answers if examples.answers is not None else examples.labels


def _swapped(examples: Examples, chosen: list[int], draw: random.Random) -> Examples:
    """Exchange the answers of the chosen among them, or give each another label."""
    if examples.answers is not None:
        answers, order = list(examples.answers), draw.sample(chosen, len(chosen))
        for i, other in zip(order, order[1:] + order[:1], strict=True):
            answers[i] = examples.answers[other]
        return replace(examples, answers=tuple(answers))
    labels, kinds = list(examples.labels), len(examples.names)
    for i in chosen:
        labels[i] = (labels[i] + draw.randrange(1, kinds)) % kinds if kinds > 1 else labels[i]
    return replace(examples, labels=tuple(labels))
