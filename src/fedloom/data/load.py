"""Labelled texts from a file, from the Hugging Face hub, or from any Python rows, always as a `Split`.

Files are read with pyarrow and the standard library instead of `datasets`: both refuse ragged rows by name, and neither
leaves a copy in a cache.
"""

from __future__ import annotations

import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import KW_ONLY, dataclass, replace
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet

from fedloom.data.examples import Examples, Split
from fedloom.errors import Refused
from fedloom.seeds import rng

Row = Mapping[str, object]
Columns = Mapping[str, list[object]]


class Raw(NamedTuple):
    """Columns as they were found, and where, for messages."""

    columns: Columns
    where: str


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
        if not 0 < self.test_share < 1:
            raise Refused("data.test_share", self.test_share, "choose a share between 0 and 1")
        if self.limit is not None and self.limit < 1:
            raise Refused("data.limit", self.limit, "choose a whole number of at least 1, or leave it out")


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
        test = None if self.test is None else _read(Path(self.test), self.quoted)
        return _split(self, _read(Path(self.path), self.quoted), test, seed)


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

    rows: Iterable[Row] | Callable[[], Iterable[Row]]
    test: Iterable[Row] | Callable[[], Iterable[Row]] | None = None

    def load(self, seed: int) -> Split:
        test = None if self.test is None else _gather(self.test, "the test rows")
        return _split(self, _gather(self.rows, "the rows"), test, seed)


def _read(path: Path, quoted: bool | None) -> Raw:
    """The columns of a file; every value of a CSV or TSV is text."""
    where, zipped = str(path), path.suffix.lower() == ".gz"
    suffix = (path.with_suffix("") if zipped else path).suffix.lower()
    if suffix not in (".csv", ".tsv", ".jsonl", ".parquet"):
        raise Refused("data.path", where, "use a .csv, .tsv, .jsonl or .parquet file, gzipped (.gz) or not")
    try:
        content = gzip.decompress(path.read_bytes()) if zipped else path.read_bytes()
        if not content.strip():
            raise Refused("data.path", where, "the file is empty")
        if suffix == ".jsonl":
            lines = content.decode("utf-8-sig").split("\n")
            return _gather([json.loads(line) for line in lines if line.strip()], where)
        if suffix == ".parquet":
            table = pa.parquet.read_table(io.BytesIO(content))
        else:
            table = _delimited(
                content, "\t" if suffix == ".tsv" else ",", suffix == ".csv" if quoted is None else quoted
            )
    except FileNotFoundError as error:
        raise Refused("data.path", where, "there is no such file") from error
    except json.JSONDecodeError as error:
        raise Refused("data.path", where, f"a line is not JSON ({error.msg}): {error.doc[:60]!r}") from error
    except (OSError, EOFError, zlib.error, UnicodeDecodeError, pa.ArrowException) as error:
        raise Refused("data.path", where, f"cannot be read ({str(error).partition(chr(10))[0]})") from error
    if len(set(table.column_names)) < table.num_columns:
        raise Refused("data.path", where, f"rename the repeated column in {', '.join(table.column_names)}")
    return Raw(table.to_pydict(), where)


def _delimited(content: bytes, delimiter: str, quoted: bool) -> pa.Table:
    """The table of a CSV or TSV file, all text, empty fields as empty texts."""
    parse = pa.csv.ParseOptions(delimiter=delimiter, quote_char='"' if quoted else False, newlines_in_values=quoted)
    reader = pa.csv.open_csv(io.BytesIO(content), parse_options=parse)
    types = dict.fromkeys(reader.schema.names, pa.string())
    convert = pa.csv.ConvertOptions(column_types=types, strings_can_be_null=False)
    return pa.csv.read_csv(io.BytesIO(content), parse_options=parse, convert_options=convert)


def _gather(rows: Iterable[Row] | Callable[[], Iterable[Row]], where: str) -> Raw:
    """Rows turned to columns; what a row lacks is None."""
    if isinstance(rows, Iterator):
        raise Refused(
            "data.rows", where, "an iterator can be read once only; give a list, or a function that returns one"
        )
    listed = list(rows() if callable(rows) else rows)
    for number, row in enumerate(listed, 1):
        if not isinstance(row, Mapping):
            raise Refused("data.path", where, f"row {number} is {row!r:.60}; give one object of columns per row")
    names = dict.fromkeys(name for row in listed for name in row)
    return Raw({name: [row.get(name) for row in listed] for name in names}, where)


def _split(layout: Layout, train: Raw, test: Raw | None, seed: int, own: Mapping[str, str] | None = None) -> Split:
    """Both halves under one label map: the user's, else the data set's `own`, else the sorted training labels."""
    raw = _labels(train, layout.label)
    known = _label_map(layout.labels or own, raw)
    learn = _examples(layout, layout.text, train, raw, known)
    if len(learn.names) < 2:
        raise Refused(
            "data.label", layout.label, f"there is one label only ({learn.names[0]}); nothing is to be learnt"
        )
    if test is None:
        aside = _stratified(learn.labels, layout.test_share, seed)
        if not aside:
            remedy = f"too few of the {len(learn)} examples; choose a larger share or give test data"
            raise Refused("data.test_share", layout.test_share, remedy)
        check = learn.take(sorted(aside))
        learn = learn.take(i for i in range(len(learn)) if i not in aside)
    else:
        asked = layout if layout.client in test.columns else replace(layout, client=None)
        check = _examples(asked, layout.test_text or layout.text, test, _labels(test, layout.label), known)
    if layout.limit is not None and layout.limit < len(learn):
        learn = learn.take(sorted(rng(seed, "limit").sample(range(len(learn)), layout.limit)))
    return Split(learn, check)


def _column(raw: Raw, field: str, name: str) -> list[object]:
    """A column without missing values. Raises Refused."""
    if not any(raw.columns.values()):
        raise Refused("data.path", raw.where, "there are no rows")
    if name not in raw.columns:
        remedy = f"no such column in {raw.where}; the columns are {', '.join(raw.columns)}"
        raise Refused(f"data.{field}", name, remedy)
    for number, value in enumerate(raw.columns[name], 1):
        if value is None or (isinstance(value, float) and value != value):
            remedy = f"the value in row {number} of {raw.where} is missing; fill or drop the row"
            raise Refused(f"data.{field}", name, remedy)
    return raw.columns[name]


def _texts(raw: Raw, field: str, names: str | tuple[str, ...]) -> tuple[str, ...]:
    """The texts of one column, or of several joined by ". "; none is empty. Raises Refused."""
    each = [_column(raw, field, name) for name in (names.split("+") if isinstance(names, str) else names)]
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


def _labels(raw: Raw, name: str) -> list[str]:
    """The label values as text. Raises Refused."""
    labels = []
    for number, value in enumerate(_column(raw, "label", name), 1):
        whole = int(value) if isinstance(value, float) and value.is_integer() else value
        if not isinstance(whole, int | str) or whole == "":
            remedy = f"row {number} of {raw.where} holds {value!r:.60}; a label is a word or a whole number"
            raise Refused("data.label", name, remedy)
        labels.append(str(whole))
    return labels


def _label_map(given: tuple[str, ...] | Mapping[str, str] | None, raw: list[str]) -> Mapping[str, str]:
    """Each label value's name, in the order of the label numbers."""
    if isinstance(given, Mapping):
        known = {str(value): name for value, name in given.items()}
    else:
        values = given or sorted(set(raw), key=_by_number)
        known = {str(value): str(value) for value in values}
    return known


def _by_number(value: str) -> tuple[float, str]:
    """Sorts whole numbers by size, before words by letter."""
    return (float(value) if value.removeprefix("-").isdecimal() else float("inf")), value


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
        clients=None if layout.client is None else tuple(map(str, _column(raw, "client", layout.client))),
    )


def _stratified(labels: tuple[int, ...], share: float, seed: int) -> set[int]:
    """Indices of a random `share` of each label, rounded; each label keeps at least one example outside."""
    aside: set[int] = set()
    for label in set(labels):
        members = [i for i, other in enumerate(labels) if other == label]
        aside.update(rng(seed, "test_share", label).sample(members, min(round(share * len(members)), len(members) - 1)))
    return aside
