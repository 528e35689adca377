"""Labelled texts from a file, from the Hugging Face hub, or from any Python rows, always as a `Split`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass, replace
from pathlib import Path

from fedloom.core.errors import Refused
from fedloom.data.examples import Examples, Split, check_shares, limited, set_aside
from fedloom.data.file_formats import Given, Raw, by_number, column, gather, label_values, read


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Which columns hold what, and how training and test examples are told apart.

    `text` and `pair` name one column or several, as `"title+description"` or a tuple, joined by ". "; `test_text` names
    them in the test data where they differ. `labels` fixes the label names: a tuple lists the values in order, a
    mapping gives each value its name; by default they are the training values, sorted. `client` says where each example
    came from; test data may lack that column. Without test data a share `test_share` of each label is set aside.
    `limit` keeps that many random training examples.
    """

    text: str | tuple[str, ...] = "text"
    pair: str | tuple[str, ...] | None = None
    label: str = "label"
    client: str | None = None
    test_text: str | tuple[str, ...] | None = None
    labels: tuple[str, ...] | Mapping[str, str] | None = None
    test_share: float = 0.2
    limit: int | None = None

    def __post_init__(self) -> None:
        check_shares(self.test_share, self.limit)


@dataclass(frozen=True)
class Table(Layout):
    """A CSV, TSV, JSONL or Parquet file, told by its suffix; each may be gzipped (`.gz`).

    `quoted` says whether a quotation mark encloses a field; by default it does in `.csv` and is plain text in `.tsv`.
    """

    path: str | Path
    test: str | Path | None = None
    _: KW_ONLY
    quoted: bool | None = None

    def load(self, seed: int) -> Split:
        test = None if self.test is None else read(Path(self.test), self.quoted)
        return _split(self, read(Path(self.path), self.quoted), test, seed)


@dataclass(frozen=True)
class Hub(Layout):
    """A data set on the Hugging Face hub, with the names of its training split and of its test split, if it has one."""

    name: str
    config: str | None = None
    _: KW_ONLY
    train: str = "train"
    test: str | None = "test"

    def load(self, seed: int) -> Split:
        train, labels = self._fetch(self.train)
        test = None if self.test is None else self._fetch(self.test)[0]
        return _split(self, train, test, seed, labels)

    def _fetch(self, split: str) -> tuple[Raw, Mapping[str, str] | None]:
        """A split, and the data set's own names of its whole-number labels."""
        import datasets  # slow to import, and needed here only

        try:
            data = datasets.load_dataset(self.name, self.config, split=split)
            columns = data.to_dict()
        except Exception as error:  # the hub client raises errors of several libraries
            reason = str(error).strip().partition("\n")[0] or type(error).__name__
            remedy = f"cannot load split {split!r} ({reason}); check the name, config and split, and the network"
            raise Refused("data.name", self.name, remedy) from error
        feature = data.features.get(self.label)
        named = isinstance(feature, datasets.ClassLabel)
        names = {str(i): name for i, name in enumerate(feature.names)} if named else None
        return Raw(columns, f"{self.name}[{split}]"), names


@dataclass(frozen=True)
class Rows(Layout):
    """Any Python rows (mappings of column to value), or a function that gives them anew at each load."""

    rows: Given
    test: Given | None = None

    def load(self, seed: int) -> Split:
        test = None if self.test is None else gather(self.test, "the test rows")
        return _split(self, gather(self.rows, "the rows"), test, seed)


def _split(layout: Layout, train: Raw, test: Raw | None, seed: int, own: Mapping[str, str] | None = None) -> Split:
    """Both halves under one label map: the user's, else the data set's `own`, else the sorted training labels."""
    raw = label_values(train, "label", layout.label)
    known = _label_map(layout.labels or own, raw)
    learn = _examples(layout, layout.text, train, raw, known)
    if len(learn.names) < 2:
        raise Refused(
            "data.label", layout.label, f"there is one label only ({learn.names[0]}); nothing is to be learnt"
        )
    if test is None:
        return set_aside(learn, layout.test_share, layout.limit, seed)
    asked = layout if layout.client in test.columns else replace(layout, client=None)
    check = _examples(asked, layout.test_text or layout.text, test, label_values(test, "label", layout.label), known)
    return Split(limited(learn, layout.limit, seed), check)


def _texts(raw: Raw, field: str, names: str | tuple[str, ...]) -> tuple[str, ...]:
    """The texts of one column, or of several joined by ". "; none is empty. Raises Refused."""
    each = [column(raw, field, name) for name in (names.split("+") if isinstance(names, str) else names)]
    texts = []
    for number, parts in enumerate(zip(*each, strict=True), 1):
        words = [part for part in parts if isinstance(part, str)]
        if len(words) < len(parts):
            raise Refused(f"data.{field}", names, f"row {number} of {raw.where} holds {parts!r:.60}, not text")
        texts.append(". ".join(word for word in words if word.strip()))
        if not texts[-1]:
            raise Refused(
                f"data.{field}", names, f"the text in row {number} of {raw.where} is empty; fill or drop the row"
            )
    return tuple(texts)


def _label_map(given: tuple[str, ...] | Mapping[str, str] | None, raw: list[str]) -> Mapping[str, str]:
    """Each label value's name, in the order of the label numbers."""
    if isinstance(given, Mapping):
        known = {str(value): name for value, name in given.items()}
    else:
        values = given or sorted(set(raw), key=by_number)
        known = {str(value): str(value) for value in values}
    return known


def _examples(
    layout: Layout, text: str | tuple[str, ...], raw: Raw, labels: list[str], known: Mapping[str, str]
) -> Examples:
    """The columns as examples. Raises Refused for a label that the map lacks."""
    names = tuple(dict.fromkeys(known.values()))
    for number, value in enumerate(labels, 1):
        if value not in known:
            remedy = (
                f"row {number} of {raw.where} holds {value!r}, known are {', '.join(known)}; name all in data.labels"
            )
            raise Refused("data.label", layout.label, remedy)
    return Examples(
        texts=_texts(raw, "text", text),
        pairs=None if layout.pair is None else _texts(raw, "pair", layout.pair),
        labels=tuple(names.index(known[value]) for value in labels),
        names=names,
        clients=None if layout.client is None else tuple(map(str, column(raw, "client", layout.client))),
    )
