"""Labelled texts from a file or folder, from the Hugging Face hub, or from anything in Python, always as a `Split`.

A run names its columns (`Layout`). For `fedloom inspect` they are guessed from their names (`guess_columns`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, replace
from pathlib import Path
from typing import Literal

from fedloom.core.errors import Refused
from fedloom.core.settings_view import as_written
from fedloom.core.text import first_line
from fedloom.data import cells
from fedloom.data.delimited import FileFormat
from fedloom.data.examples import Examples, Split, check_row_options, limited, lost_clients, set_aside
from fedloom.data.file_formats import read_tables
from fedloom.data.raw_table import RawTable, RowSource, Tables, gather_rows, gather_tables, held_rows, row_count


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
        test_share: share of each label, or of each client, that is set aside to test on, where there is no test data.
        limit: number of random training examples to keep (default: all).
        missing: what happens to rows without a text, pair, label or client: "refuse", or "drop" (a note counts them).
    """

    text: str | tuple[str, ...] = "text"
    pair: str | tuple[str, ...] | None = None
    label: str = "label"
    client: str | None = None
    test_text: str | tuple[str, ...] | None = None
    labels: tuple[str, ...] | Mapping[str, str] | None = None
    test_share: float = 0.2
    limit: int | None = None
    missing: Literal["refuse", "drop"] = "refuse"

    def __post_init__(self) -> None:
        check_row_options(self.test_share, self.limit, self.missing)


@dataclass(frozen=True)
class Table(FileFormat, Layout):
    """Labelled texts in a CSV, JSON, Excel, Parquet or Arrow file, or in a folder of Parquet or Arrow files or saved by `datasets`.

    Fields, besides those of `Layout` and `FileFormat`:
        path: file of the training examples, or of all.
        test: file of the test examples (default: the split "test" of the data, else a share of the first is set aside).
    """

    path: str | Path
    test: str | Path | None = None

    def __post_init__(self) -> None:
        FileFormat.__post_init__(self)
        Layout.__post_init__(self)

    def load(self, seed: int) -> Split:
        """Return the split; `seed` decides what is set aside and what `limit` keeps."""
        tables = read_tables(self.path, self)
        if self.test is not None:
            test = read_tables(self.test, self)
            tables = Tables(tables.train, test.test or test.train)
        return layout_split(self, tables, seed)


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
        train = self._fetch(self.train)
        return layout_split(self, Tables(train, None if self.test is None else self._fetch(self.test)), seed)

    def _fetch(self, split: str) -> RawTable:
        """Load a split, with the data set's own names of its labels."""
        import datasets  # slow to import, and needed here only

        try:
            data = datasets.load_dataset(self.name, self.config, split=split)
        except Exception as error:  # the hub client raises errors of several libraries
            remedy = (
                f"cannot load split {split!r} ({first_line(error)}); check the name, config and split, and the network"
            )
            raise Refused("data.name", self.name, remedy) from error
        return gather_rows(data, f"{self.name}[{split}]")


@dataclass(frozen=True)
class Rows(Layout):
    """Labelled texts in Python: rows, columns, a frame of pandas or polars, an Arrow table, or a `datasets` object.

    Rows are mappings of column to value; columns are a mapping of column to values. A function that returns one of these is called at
    each load.

    Fields, besides those of `Layout`:
        rows: training rows, or all.
        test: test rows (default: the split "test" of the data, else a share of the first is set aside).
    """

    rows: RowSource
    test: RowSource | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("rows", "test"):
            object.__setattr__(self, name, held_rows(getattr(self, name)))

    def __repr__(self) -> str:
        """Return it without the data."""
        return as_written(self)

    def load(self, seed: int) -> Split:
        """Return the split; `seed` decides what is set aside and what `limit` keeps."""
        tables = gather_tables(self.rows, "the rows")
        if self.test is not None:
            tables = Tables(tables.train, gather_rows(self.test, "the test rows"))
        return layout_split(self, tables, seed)


def layout_split(layout: Layout, tables: Tables, seed: int) -> Split:
    """Bring both tables under one label map: the user's, else the names of the data's classes, else the sorted training labels.

    Raises:
        Refused: a missing column, missing or wrong cells, a column that does not hold classes.
    """
    learn, known, notes = _training_examples(layout, tables.train)
    if len(learn.names) < 2:
        raise Refused("data.label", layout.label, "all rows have the same label; nothing is to be learnt")
    if tables.test is None:
        split = set_aside(learn, layout.test_share, layout.limit, seed)
        return replace(split, notes=(*notes, *split.notes))
    client = layout.client if layout.client in tables.test.columns else None
    check, more = _examples(replace(layout, client=client, text=layout.test_text or layout.text), tables.test, known)
    rest = limited(learn, layout.limit, seed)
    notes = (*notes, *(note for note in more if note not in notes), *lost_clients(learn, rest))
    return Split(rest, check, notes)


def _training_examples(layout: Layout, raw: RawTable) -> tuple[Examples, Mapping[str, str], Sequence[str]]:
    """Return the training examples, the map of label values to names, and notes."""
    known = None if layout.labels is None else _given_labels(layout.labels, raw.classes.get(layout.label))
    if known is None and layout.label in raw.classes:
        known = {name: name for name in map(cells.identity, raw.classes[layout.label])}
        if not any(map(cells.NUMBER.fullmatch, known)):  # test rows may have the numbers of the classes
            known |= {str(number): name for number, name in enumerate(list(known))}
    examples, notes = _examples(layout, raw, known)
    return examples, known or {name: name for name in examples.names}, notes


def _given_labels(labels: tuple[str, ...] | Mapping[str, str], classes: tuple[str, ...] | None) -> dict[str, str]:
    """Return the name of each label value that the user gave; values may be the numbers of the data's own classes.

    Raises:
        Refused: a value that stands there twice, with different names.
    """
    pairs = labels.items() if isinstance(labels, Mapping) else [(value, str(value)) for value in labels]
    known: dict[str, str] = {}
    for value, name in pairs:
        key = cells.identity(value)
        if known.setdefault(key, name) != name:
            raise Refused("data.labels", key, 'it is named twice (1, 1.0 and "1" are one value); name it once')
    numbers = {str(number): cells.identity(name) for number, name in enumerate(classes or ())}
    return {numbers[key]: name for key, name in known.items()} if known.keys() <= numbers.keys() else known


def _examples(layout: Layout, raw: RawTable, known: Mapping[str, str] | None) -> tuple[Examples, Sequence[str]]:
    """Make examples of the columns, and notes; without a map of labels their names are their values, sorted. Raises Refused."""
    names: dict[str, Sequence[str]] = {"text": _columns(layout.text), "label": (layout.label,)}
    if layout.pair is not None:
        names["pair"] = _columns(layout.pair)
    if layout.client is not None:
        names["client"] = (layout.client,)
    cells.check_columns(raw, names)
    raw = cells.drop_missing(raw, names, layout.missing)
    labels = cells.column_identities(raw, "label", layout.label)
    if known is None:
        cells.check_classes(raw, "label", layout.label, labels.values)
        known = {value: value for value in sorted(set(labels.values), key=cells.by_number)}
        labels.notes.extend(cells.class_notes(raw, layout.label, labels.values))
    cells.refuse_unknown(raw, "label", layout.label, labels.values, known)
    clients = None if layout.client is None else cells.column_identities(raw, "client", layout.client)
    label_names = tuple(dict.fromkeys(known.values()))
    number = {name: k for k, name in enumerate(label_names)}
    examples = Examples(
        texts=cells.column_texts(raw, "text", names["text"]),
        pairs=None if layout.pair is None else cells.column_texts(raw, "pair", names["pair"]),
        labels=tuple(number[known[value]] for value in labels.values),
        names=label_names,
        clients=None if clients is None else tuple(clients.values),
    )
    return examples, (*raw.notes, *labels.notes, *(clients.notes if clients else ()))


def _columns(names: str | tuple[str, ...]) -> tuple[str, ...]:
    return tuple(names.split("+")) if isinstance(names, str) else names


LIKELY_NAMES: Mapping[str, tuple[str, ...]] = {
    "client": (
        "client",
        "client_id",
        "user",
        "user_id",
        "site",
        "hospital",
        "company",
        "device",
        "ward",
        "clinic",
        "department",
        "branch",
        "bank",
        "school",
        "organisation",
        "organization",
    ),
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
        "message",
        "note",
        "comment",
        "review",
        "body",
        "content",
    ),
    "pair": ("sentence2", "question2", "hypothesis", "context", "input", "passage", "description"),
    "answer": ("answer", "response", "output", "completion", "target"),
    "label": ("label", "category", "intent", "class", "topic", "task", "sentiment", "diagnosis"),
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
            raise Refused("--column", name, f"no such column in {raw.where}; {cells.describe_columns(raw)}")
    roles = dict(chosen)
    for role, names in LIKELY_NAMES.items():
        likely = next((have[name] for name in names if name in have and have[name] not in roles.values()), None)
        if role in roles or likely is None:
            continue
        if role != "label" or len(set(map(str, raw.columns[likely]))) <= MOST_LABELS:
            roles[role] = likely
    if "text" not in roles:
        remedy = f"no column is known to be the text ({cells.describe_columns(raw)}); say which with --column text=NAME"
        raise Refused("DATA", raw.where, remedy)
    return roles


def as_examples(raw: RawTable, roles: Mapping[str, str]) -> tuple[Examples, Sequence[str]]:
    """Make examples of the rows by the columns of these roles, and notes on how they are written; what is missing is an empty text.

    Raises:
        Refused: no rows, or rows without a client.
    """
    if not row_count(raw):
        raise Refused("DATA", raw.where, "there are no rows")
    texts = {
        role: tuple("" if cell is None else str(cell) for cell in raw.columns[roles[role]])
        for role in ("text", "pair", "answer")
        if role in roles
    }
    notes: list[str] = []
    names: dict[str, list[str]] = {}
    for role in ("label", "client"):
        if role in roles:
            filled = ["" if cells.is_missing(cell) else cell for cell in raw.columns[roles[role]]]
            named = cells.column_identities(raw._replace(columns={roles[role]: filled}), role, roles[role])
            names[role], notes = named.values, [*notes, *named.notes]
    labelled = raw.select(row for row, kind in enumerate(names.get("label", ())) if kind)
    try:
        cells.check_classes(
            labelled, "label", roles.get("label", ""), [kind for kind in names.get("label", ()) if kind]
        )
    except Refused as error:  # then they are cells, which nobody prints
        notes.append(f"The column {error.value!r} is not taken for labels: {error.remedy}.")
        del names["label"]
    if nameless := [row for row, owner in enumerate(names.get("client", ())) if not owner]:
        raise Refused(
            "--clients", roles["client"], f"{raw.rows(nameless)} of {raw.where} name no client; fill or drop them"
        )
    kinds = names.get("label", [""] * row_count(raw))
    known = tuple(sorted(set(kinds), key=cells.by_number))
    number = {name: k for k, name in enumerate(known)}
    examples = Examples(
        texts=texts["text"],
        pairs=texts.get("pair"),
        labels=tuple(number[kind] for kind in kinds),
        names=known,
        clients=tuple(names["client"]) if "client" in names else None,
        answers=texts.get("answer"),
    )
    return examples, notes
