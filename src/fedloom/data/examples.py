"""Examples: columns of text with whole-number labels, split in training and test examples, as every source gives them."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import NamedTuple, Protocol

from fedloom.core.errors import Refused
from fedloom.core.seeds import rng


class Turn(NamedTuple):
    """One message of a conversation; `role` is "system", "user" or "assistant"."""

    role: str
    content: str


@dataclass(frozen=True)
class Examples:
    """Labelled texts, one tuple per column, all of one length; a column that the data lack is None.

    Fields:
        texts: texts; where text is to be generated, the requests.
        pairs: second sentences (for tasks such as paraphrase); for requests the context that each comes with (empty: none).
        labels: numbers of labels, indices of `names`; for requests the kind of task.
        names: names of the labels.
        clients: the client that each example came from.
        answers: reference answers, where text is to be generated.
        before: messages of the conversation that a request ends.
        quality: how good each text is, higher is better, on any scale; 0 is untouched where texts were damaged on purpose.
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
        """Select the examples at `indices`, in that order, with the same label names."""
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

    def with_names(self, names: tuple[str, ...]) -> Examples:
        """Number the labels in the order of `names`, which are the same names."""
        number = {name: at for at, name in enumerate(names)}
        return replace(self, names=names, labels=tuple(number[self.names[label]] for label in self.labels))


@dataclass(frozen=True)
class Split:
    """Training and test examples of a source.

    Fields:
        train: examples to be divided over clients.
        test: global test examples, which no client sees.
        notes: remarks for the report: how the data were read, and rows that are in neither.
    """

    train: Examples
    test: Examples
    notes: tuple[str, ...] = ()

    def with_names(self, names: tuple[str, ...]) -> Split:
        """Number the labels of all examples in the order of `names`, which are the same names."""
        return replace(self, train=self.train.with_names(names), test=self.test.with_names(names))


class Source(Protocol):
    """Anything that can produce a split."""

    def load(self, seed: int) -> Split:
        """Return the split; `seed` decides whatever the source draws, such as a test share or a limit."""
        ...


def check_row_options(test_share: float, limit: int | None, missing: str) -> None:
    """Raise Refused for a share or a limit that `set_aside` and `limited` cannot work with, or a wrong `missing`."""
    if not 0 < test_share < 1:
        raise Refused("data.test_share", test_share, "choose a share between 0 and 1")
    if limit is not None and limit < 1:
        raise Refused("data.limit", limit, "choose a whole number of at least 1, or leave it out")
    if missing not in ("refuse", "drop"):
        raise Refused("data.missing", missing, 'choose "refuse" or "drop"')


def set_aside(examples: Examples, share: float, limit: int | None, seed: int) -> Split:
    """Split off a random `share` of the examples as test examples; each label keeps at least one training example.

    Where the data name clients, the examples are drawn within them: of n examples of a client `share * n` are set aside, rounded up
    or down at random, and never all. Else they are drawn within each label, rounded. Notes count clients that are left without a
    training example.

    Raises:
        Refused: no example would be left to test on.
    """
    chosen = _drawn_within_clients(examples, share, seed) or _drawn_within_labels(examples, share, seed)
    if not chosen:
        remedy = f"too few of the {len(examples)} examples; choose a larger share or give test data"
        raise Refused("data.test_share", share, remedy)
    rest = limited(examples.take(i for i in range(len(examples)) if i not in chosen), limit, seed)
    return Split(rest, examples.take(sorted(chosen)), lost_clients(examples, rest))


def _drawn_within_labels(examples: Examples, share: float, seed: int) -> set[int]:
    """Draw a share of each label, all but one at most."""
    chosen: set[int] = set()
    for label in set(examples.labels):
        members = [i for i, other in enumerate(examples.labels) if other == label]
        chosen.update(
            rng(seed, "test_share", label).sample(members, min(round(share * len(members)), len(members) - 1))
        )
    return chosen


def _drawn_within_clients(examples: Examples, share: float, seed: int) -> set[int]:
    """Draw at even distances from all examples, sorted by client and by label within each (systematic sampling).

    No example of a client that has only one is drawn, and none where the data name no clients.
    """
    owners = examples.clients
    if owners is None:
        return set()
    sizes, members = Counter(owners), defaultdict[tuple[str, int], list[int]](list)
    for index, (owner, label) in enumerate(zip(owners, examples.labels, strict=True)):
        if sizes[owner] > 1:
            members[owner, label].append(index)
    order: list[int] = []
    for owner, label in sorted(members):
        rng(seed, "test_share", owner, label).shuffle(members[owner, label])
        order += members[owner, label]
    start = rng(seed, "test_share").random()
    places = (int((k + start) / share) for k in range(len(order)))
    chosen = {order[place] for place in places if place < len(order)}
    for group in (owners, examples.labels):
        left = {group[i] for i in range(len(examples)) if i not in chosen}
        last = {group[i]: i for i in chosen if group[i] not in left}  # one of each that would have none to train on
        chosen -= set(last.values())
    return chosen


def lost_clients(before: Examples, after: Examples) -> tuple[str, ...]:
    """Note how many clients have examples before a choice of training examples and none after it."""
    if lost := len(set(before.clients or ()) - set(after.clients or ())):
        return (f"{lost} client(s) of the data are left without a training example, by the test share or data.limit.",)
    return ()


def limited(examples: Examples, limit: int | None, seed: int) -> Examples:
    """Draw at most `limit` of the examples at random, in their order."""
    if limit is None or limit >= len(examples):
        return examples
    return examples.take(sorted(rng(seed, "limit").sample(range(len(examples)), limit)))


def without_training_examples(source: Source, seed: int) -> Split:
    """Load a source without its training examples, for the server of a deployment; their label names and columns are left.

    Where the training file is not on this machine and there is one with test examples, only that one is read.
    """
    split = _readable(source).load(seed)
    return replace(split, train=split.train.take(()))


def _readable(source: Source) -> Source:
    names: set[str] = {field.name for field in fields(source)} if is_dataclass(source) else set()
    path, test = (getattr(source, name, None) for name in ("path", "test"))
    if {"path", "test"} <= names and isinstance(path, str | Path) and test is not None and not Path(path).exists():
        test_alone: Source = replace(source, path=test)  # type: ignore[type-var]
        return test_alone
    return source
