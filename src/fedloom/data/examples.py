"""What every data source gives: columns of text with whole-number labels, split in train and test."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from fedloom.core.errors import Refused
from fedloom.core.seeds import rng


class Turn(NamedTuple):
    """What was said in a conversation: `role` is "system", "user" or "assistant"."""

    role: str
    content: str


@dataclass(frozen=True)
class Examples:
    """Labelled texts, one tuple per column, all of one length.

    `pairs` holds second sentences (for tasks such as paraphrase), `clients` the client that each example came from;
    either is None where the data have no such column. `labels[i]` indexes `names`. Where text is to be generated, `answers` holds
    the reference answers, `texts` the requests, `pairs` the context that each request comes with (empty: none), `before` the turns
    of the conversation that a request ends, and a label is the kind of task. `quality` says how good each text is, higher is better,
    on whatever scale its maker has; 0 is untouched where texts were damaged on purpose.
    """

    texts: tuple[str, ...]
    pairs: tuple[str, ...] | None
    labels: tuple[int, ...]
    names: tuple[str, ...]
    clients: tuple[str, ...] | None
    answers: tuple[str, ...] | None = None
    before: tuple[tuple[Turn, ...], ...] | None = None
    quality: tuple[float, ...] | None = None

    def __len__(self) -> int:
        return len(self.texts)

    def take(self, indices: Iterable[int]) -> Examples:
        """The examples at `indices`, in that order, with the same label names."""
        at = tuple(indices)
        return Examples(
            texts=tuple(self.texts[i] for i in at),
            pairs=None if self.pairs is None else tuple(self.pairs[i] for i in at),
            labels=tuple(self.labels[i] for i in at),
            names=self.names,
            clients=None if self.clients is None else tuple(self.clients[i] for i in at),
            answers=None if self.answers is None else tuple(self.answers[i] for i in at),
            before=None if self.before is None else tuple(self.before[i] for i in at),
            quality=None if self.quality is None else tuple(self.quality[i] for i in at),
        )


@dataclass(frozen=True)
class Split:
    """Training examples, to be divided over clients, and the global test examples, which no client sees.

    `notes` say what became of the rows that are in neither, for the reader of a report.
    """

    train: Examples
    test: Examples
    notes: tuple[str, ...] = ()


class Source(Protocol):
    """Anything that can produce a split; `seed` decides whatever the source draws (a test share, a limit)."""

    def load(self, seed: int) -> Split: ...


def check_shares(test_share: float, limit: int | None) -> None:
    """Raise Refused for what `set_aside` and `limited` cannot do."""
    if not 0 < test_share < 1:
        raise Refused("data.test_share", test_share, "choose a share between 0 and 1")
    if limit is not None and limit < 1:
        raise Refused("data.limit", limit, "choose a whole number of at least 1, or leave it out")


def set_aside(examples: Examples, share: float, limit: int | None, seed: int) -> Split:
    """A random `share` of each label to test on, rounded; each label keeps at least one example. Raises Refused if none."""
    aside: set[int] = set()
    for label in set(examples.labels):
        members = [i for i, other in enumerate(examples.labels) if other == label]
        aside.update(rng(seed, "test_share", label).sample(members, min(round(share * len(members)), len(members) - 1)))
    if not aside:
        remedy = f"too few of the {len(examples)} examples; choose a larger share or give test data"
        raise Refused("data.test_share", share, remedy)
    rest = examples.take(i for i in range(len(examples)) if i not in aside)
    return Split(limited(rest, limit, seed), examples.take(sorted(aside)))


def limited(examples: Examples, limit: int | None, seed: int) -> Examples:
    """At most `limit` random ones of the examples, in their order."""
    if limit is None or limit >= len(examples):
        return examples
    return examples.take(sorted(rng(seed, "limit").sample(range(len(examples)), limit)))
