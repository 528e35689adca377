"""What every data source gives: columns of text with whole-number labels, split in train and test."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class Examples:
    """Labelled texts, one tuple per column, all of one length.

    `pairs` holds second sentences (for tasks such as paraphrase), `clients` the client that each example came from;
    either is None where the data have no such column. `labels[i]` indexes `names`. Where text is to be generated, `answers` holds
    the reference answers, `texts` the requests, `pairs` the context that each request comes with (empty: none), and a label is the
    kind of task. `quality` says how good each text is, higher is better, on whatever scale its maker has; 0 is untouched where texts
    were damaged on purpose.
    """

    texts: tuple[str, ...]
    pairs: tuple[str, ...] | None
    labels: tuple[int, ...]
    names: tuple[str, ...]
    clients: tuple[str, ...] | None
    answers: tuple[str, ...] | None = None
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
            quality=None if self.quality is None else tuple(self.quality[i] for i in at),
        )


@dataclass(frozen=True)
class Split:
    """Training examples, to be divided over clients, and the global test examples, which no client sees."""

    train: Examples
    test: Examples


class Source(Protocol):
    """Anything that can produce a split; `seed` decides whatever the source draws (a test share, a limit)."""

    def load(self, seed: int) -> Split: ...
