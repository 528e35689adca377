"""Labelled texts from a file, from the Hugging Face hub, or from any Python rows, always as a `Split`.

A run names its columns (`Layout`). For `fedloom inspect` they are guessed from their names (`guess_columns`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass, replace
from pathlib import Path

from fedloom.core.errors import Refused
from fedloom.data.examples import Examples, Split, check_shares, limited, set_aside
from fedloom.data.file_formats import (
    RawTable,
    RowSource,
    by_number,
    complete_column,
    gather_rows,
    label_values,
    read_table_file,
)


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Columns of a table, and how training and test examples are separated.

    Fields:
        text: column of the text, or several, as `"title+description"` or a tuple, joined by ". ".
        pair: column or columns of a second text (default: none).
        label: column of the label.
        client: column of the client that an example came from (default: none); test data may lack it.
        test_text: column or columns of the text in the test data (default: as `text`).
        labels: label names; a tuple lists the values in order, a mapping gives each value its name (default: the training values,
            sorted).
        test_share: share of each label that is set aside to test on, where there is no test data.
        limit: number of random training examples to keep (default: all).
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
    """Labelled texts in a CSV, TSV, JSONL or Parquet file, by its suffix; each may be gzipped (`.gz`).

    Fields, besides those of `Layout`:
        path: file of the training examples, or of all.
        test: file of the test examples (default: a share of the first is set aside).
        quoted: whether a quotation mark encloses a field (default: in `.csv` it does, in `.tsv` it is plain text).
    """

    path: str | Path
    test: str | Path | None = None
    _: KW_ONLY
    quoted: bool | None = None

    def load(self, seed: int) -> Split:
        """Return the split; `seed` decides what is set aside and what `limit` keeps."""
        test = None if self.test is None else read_table_file(Path(self.test), self.quoted)
        return _split(self, read_table_file(Path(self.path), self.quoted), test, seed)


@dataclass(frozen=True)
class Hub(Layout):
    """Labelled texts of a data set on the Hugging Face hub.

    Fields, besides those of `Layout`:
        name: name of the data set.
        config: name of its configuration (default: the only one).
        train: name of its training split.
        test: name of its test split (None: a share of the training split is set aside).
    """

    name: str
    config: str | None = None
    _: KW_ONLY
    train: str = "train"
    test: str | None = "test"

    def load(self, seed: int) -> Split:
        """Return the split; `seed` decides what is set aside and what `limit` keeps."""
        train, labels = self._fetch(self.train)
        test = None if self.test is None else self._fetch(self.test)[0]
        return _split(self, train, test, seed, labels)

    def _fetch(self, split: str) -> tuple[RawTable, Mapping[str, str] | None]:
        """Load a split, and the data set's own names of its whole-number labels."""
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
        return RawTable(columns, f"{self.name}[{split}]"), names


@dataclass(frozen=True)
class Rows(Layout):
    """Labelled texts in Python rows (mappings of column to value), or from a function that returns rows at each load.

    Fields, besides those of `Layout`:
        rows: training rows, or all.
        test: test rows (default: a share of the first is set aside).
    """

    rows: RowSource
    test: RowSource | None = None

    def load(self, seed: int) -> Split:
        """Return the split; `seed` decides what is set aside and what `limit` keeps."""
        test = None if self.test is None else gather_rows(self.test, "the test rows")
        return _split(self, gather_rows(self.rows, "the rows"), test, seed)


def _split(
    layout: Layout, train: RawTable, test: RawTable | None, seed: int, hub_names: Mapping[str, str] | None = None
) -> Split:
    """Bring both halves under one label map: the user's, else the data set's own (`hub_names`), else the sorted training labels."""
    raw = label_values(train, "label", layout.label)
    names = _label_map(layout.labels or hub_names, raw)
    learn = _examples(layout, layout.text, train, raw, names)
    if len(learn.names) < 2:
        raise Refused(
            "data.label", layout.label, f"there is one label only ({learn.names[0]}); nothing is to be learnt"
        )
    if test is None:
        return set_aside(learn, layout.test_share, layout.limit, seed)
    test_layout = layout if layout.client in test.columns else replace(layout, client=None)
    check = _examples(
        test_layout, layout.test_text or layout.text, test, label_values(test, "label", layout.label), names
    )
    return Split(limited(learn, layout.limit, seed), check)


def _texts(raw: RawTable, field: str, names: str | tuple[str, ...]) -> tuple[str, ...]:
    """Read the texts of one column, or of several joined by ". "; raise Refused for one that is empty."""
    each = [complete_column(raw, field, name) for name in (names.split("+") if isinstance(names, str) else names)]
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


def _label_map(labels: tuple[str, ...] | Mapping[str, str] | None, raw: list[str]) -> Mapping[str, str]:
    """Map each label value to its name, in the order of the label numbers."""
    if isinstance(labels, Mapping):
        return {str(value): name for value, name in labels.items()}
    return {str(value): str(value) for value in labels or sorted(set(raw), key=by_number)}


def _examples(
    layout: Layout, text: str | tuple[str, ...], raw: RawTable, labels: list[str], label_names: Mapping[str, str]
) -> Examples:
    """Make examples of the columns; raise Refused for a label that the map lacks."""
    names = tuple(dict.fromkeys(label_names.values()))
    for number, value in enumerate(labels, 1):
        if value not in label_names:
            remedy = f"row {number} of {raw.where} holds {value!r}, known are {', '.join(label_names)}; name all in data.labels"
            raise Refused("data.label", layout.label, remedy)
    return Examples(
        texts=_texts(raw, "text", text),
        pairs=None if layout.pair is None else _texts(raw, "pair", layout.pair),
        labels=tuple(names.index(label_names[value]) for value in labels),
        names=names,
        clients=None if layout.client is None else tuple(map(str, complete_column(raw, "client", layout.client))),
    )


LIKELY_NAMES: Mapping[str, tuple[str, ...]] = {
    "client": ("client", "client_id", "user", "user_id", "site", "hospital", "company", "device"),
    "text": (
        "text",
        "sentence",
        "sentence1",
        "question1",
        "premise",
        "instruction",
        "prompt",
        "request",
        "question",
        "title",
    ),
    "pair": ("sentence2", "question2", "hypothesis", "context", "input", "passage", "description"),
    "answer": ("answer", "response", "output", "completion", "target"),
    "label": ("label", "category", "intent", "class", "topic", "task"),
}
"""Roles of columns, and names that a column of each role often has, the likeliest first."""
MOST_LABELS = 200
"""A column with more values than this is not taken for one of labels, unless the user says so."""


def guess_columns(raw: RawTable, chosen: Mapping[str, str]) -> dict[str, str]:
    """Guess the column of each role by its name, unless it is `chosen`; a role without a column is left out.

    Raises:
        Refused: a role or a column that does not exist, or no column that would be the text.
    """
    have = {name.lower(): name for name in raw.columns}
    for role, name in chosen.items():
        if role not in LIKELY_NAMES:
            raise Refused("--column", f"{role}={name}", f"say what it is: one of {', '.join(LIKELY_NAMES)}")
        if name not in raw.columns:
            raise Refused("--column", name, f"no such column in {raw.where}; the columns are {', '.join(raw.columns)}")
    roles = dict(chosen)
    for role, names in LIKELY_NAMES.items():
        likely = next((have[name] for name in names if name in have and have[name] not in roles.values()), None)
        if role in roles or likely is None:
            continue
        if role != "label" or len(set(map(str, raw.columns[likely]))) <= MOST_LABELS:
            roles[role] = likely
    if "text" not in roles:
        remedy = f"none of {', '.join(raw.columns)} is known to be the text; say which with --column text=NAME"
        raise Refused("DATA", raw.where, remedy)
    return roles


def as_examples(raw: RawTable, roles: Mapping[str, str]) -> Examples:
    """Make examples of the rows by the columns of these roles; what is missing is an empty text.

    Raises:
        Refused: no rows, or a row without a client.
    """
    columns = {
        role: ["" if value is None else str(value) for value in raw.columns[name]] for role, name in roles.items()
    }
    if not columns["text"]:
        raise Refused("DATA", raw.where, "there are no rows")
    owners = columns.get("client")
    if owners is not None and not all(map(str.strip, owners)):
        row = next(row for row, name in enumerate(owners, 1) if not name.strip())
        raise Refused("--clients", roles["client"], f"row {row} names no client; fill or drop it")
    kinds = columns.get("label", [""] * len(columns["text"]))
    names = tuple(sorted(set(kinds)))
    number = {name: k for k, name in enumerate(names)}
    return Examples(
        texts=tuple(columns["text"]),
        pairs=tuple(columns["pair"]) if "pair" in columns else None,
        labels=tuple(number[kind] for kind in kinds),
        names=names,
        clients=None if owners is None else tuple(owners),
        answers=tuple(columns["answer"]) if "answer" in columns else None,
    )
