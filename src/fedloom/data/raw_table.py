"""Rows and columns before it is said what a column means: from lists, frames of pandas or polars, Arrow tables, `datasets`."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import date, datetime, time
from decimal import Decimal
from enum import Enum
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, TypeAlias
from uuid import UUID

from fedloom.core.errors import Refused

Row: TypeAlias = Mapping[str, object]
Columns: TypeAlias = Mapping[str, Sequence[object]]
RowSource: TypeAlias = Iterable[Any] | Callable[[], Iterable[Any]]
"""Rows as mappings, a mapping of columns, a frame of pandas or polars, an Arrow table, a `datasets` object; or what returns one."""
TRAINING, TESTING = "train", "test"
INVISIBLE = "\u200b\u200c\u200d\u200e\u200f\u2060\ufeff\u00ad"
"""Characters without a width that `str.strip` leaves: zero-width spaces and joiners, marks of direction, a byte order mark."""
SHOWN = 10
"""Numbers of rows that a message lists at most."""


class RawTable(NamedTuple):
    """Columns of a table, and where they came from, for messages.

    Fields:
        columns: values of each column, as Python has them; None where one is missing.
        where: name of the file or the rows.
        notes: remarks for the report on how it was read.
        classes: names of the classes of a column, in their order, where the data bring them.
        numbers: number of each row in the source, from 1 (None: 1, 2, 3, ...).
        advice: what to do where a column that is looked for is not there; None where names of columns are no cells of the source.
    """

    columns: Mapping[str, list[object]]
    where: str
    notes: tuple[str, ...] = ()
    classes: Mapping[str, tuple[str, ...]] = MappingProxyType({})
    numbers: Sequence[int] | None = None
    advice: str | None = None

    def number(self, index: int) -> int:
        """Return the number of the row at this index, as messages give it."""
        return index + 1 if self.numbers is None else self.numbers[index]

    def rows(self, indices: Iterable[int]) -> str:
        """Return the numbers of the rows at these indices in words: "row 3", "rows 1, 2 and 7"."""
        numbers = [str(self.number(index)) for index in indices]
        if len(numbers) > SHOWN:
            return f"rows {', '.join(numbers[:SHOWN])} and {len(numbers) - SHOWN} more"
        return f"row {numbers[0]}" if len(numbers) == 1 else f"rows {', '.join(numbers[:-1])} and {numbers[-1]}"

    def select(self, indices: Iterable[int]) -> RawTable:
        """Return the rows at these indices, under the numbers that they have here."""
        at = list(indices)
        columns = {name: [cells[i] for i in at] for name, cells in self.columns.items()}
        return self._replace(columns=columns, numbers=[self.number(i) for i in at])


class TableRows(Sequence[Mapping[str, object]]):
    """Rows of a table as mappings, made when they are asked for; so a run's manifest tells their number and their hash."""

    def __init__(self, table: RawTable) -> None:
        self.table = table

    def __len__(self) -> int:
        return row_count(self.table)

    def __getitem__(self, index: Any) -> Any:
        columns = self.table.columns
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        return {name: cells[index] for name, cells in columns.items()}


class Tables(NamedTuple):
    """Training rows, or all, and test rows where the data separate them."""

    train: RawTable
    test: RawTable | None = None


def gather_tables(given: RowSource | RawTable, where: str) -> Tables:
    """Return the tables of Python rows, columns, a frame, an Arrow table, or a `datasets` object with splits or without.

    Raises:
        Refused: an iterator, which can be read once only; rows that are no mappings; columns of different lengths.
    """
    if isinstance(given, Iterator):
        raise Refused(
            "data.rows", where, "an iterator can be read once only; give a list, or a function that returns one"
        )
    if callable(given) and not isinstance(given, Mapping | Sequence):
        found = given()
        return gather_tables(list(found) if isinstance(found, Iterator) else found, where)
    if isinstance(given, Mapping) and _has_splits(given):
        return choose_splits({str(name): _one_table(part, where) for name, part in given.items()}, where)
    return Tables(_one_table(given, where))


def held_rows(given: Any) -> Any:
    """Return what a source keeps of data in memory: frames, columns and data sets as `TableRows`, for each split if there are any.

    Paths, lists of rows and functions stay as they are. Raises Refused for what is no table.
    """
    if isinstance(given, RawTable):
        return TableRows(given)
    if given is None or isinstance(given, str | Path | list | tuple | TableRows | Iterator):
        return given
    if isinstance(given, Mapping) and _has_splits(given):
        return {str(name): held_rows(part) for name, part in given.items()}
    if callable(given) and not isinstance(given, Mapping):
        return given
    return TableRows(_one_table(given, "the rows"))


def _has_splits(given: Mapping[Any, Any]) -> bool:
    """Whether a mapping holds a table for each split, and not a list of values for each column."""
    if _is_a(given, "datasets", "DatasetDict") or (
        given and all(isinstance(part, TableRows) for part in given.values())
    ):
        return True
    parts = [
        part
        for part in given.values()
        if not isinstance(part, list | tuple) or not part or isinstance(part[0], Mapping)
    ]
    return TRAINING in given and len(parts) == len(given)


def gather_rows(given: RowSource | RawTable, where: str) -> RawTable:
    """Return one table; the test rows where `given` has splits of its own. Raises Refused as `gather_tables` does."""
    train, test = gather_tables(given, where)
    return test or train


def choose_splits(splits: Mapping[str, RawTable], where: str) -> Tables:
    """Return the splits named "train" and "test"; a note counts the rows of others. A single split is taken whatever its name.

    Raises:
        Refused: several splits, and none is named "train".
    """
    if len(splits) == 1:
        return Tables(next(iter(splits.values())))
    if TRAINING not in splits:
        remedy = f"it has the splits {', '.join(splits)} and none named {TRAINING!r}; give one of them alone"
        raise Refused("data.path", where, remedy)
    others = {name: table for name, table in splits.items() if name not in (TRAINING, TESTING)}
    note = tuple(f"The {row_count(table)} rows of the split {name!r} are not read." for name, table in others.items())
    train = splits[TRAINING]
    return Tables(train._replace(notes=(*train.notes, *note)), splits.get(TESTING))


def table_of_columns(
    columns: Mapping[str, Iterable[object]], where: str, classes: Mapping[str, tuple[str, ...]] | None = None
) -> RawTable:
    """Make a table of columns: whole numbers of a column with `classes` become their names, -1 (no label) is missing.

    Raises:
        Refused: columns of different lengths, or with the same name.
    """
    check_column_names([strip_blanks(name) for name in columns], where)
    plain = {strip_blanks(name): [plain_value(value) for value in cells] for name, cells in columns.items()}
    if len({len(cells) for cells in plain.values()}) > 1:
        raise Refused("data.path", where, "its columns are of different lengths; give as many values in each")
    classes = classes or {}
    for name, names in classes.items():
        plain[name] = [
            (names[value] if 0 <= value < len(names) else None) if isinstance(value, int) else value
            for value in plain[name]
        ]
    return RawTable(plain, where, classes=classes)


def table_of_rows(rows: Iterable[object], where: str) -> RawTable:
    """Make a table of rows; what a row lacks is None. Raises Refused for one that is no mapping."""
    listed = list(rows)
    if wrong := [number for number, row in enumerate(listed, 1) if not isinstance(row, Mapping)]:
        remedy = f"row {wrong[0]} is of type {type(listed[wrong[0] - 1]).__name__}; give one object of columns per row"
        raise Refused("data.path", where, remedy)
    rowed: list[Mapping[str, object]] = listed  # type: ignore[assignment]
    names = dict.fromkeys(name for row in rowed for name in row)
    return table_of_columns({str(name): [row.get(name) for row in rowed] for name in names}, where)


def table_below_header(header: Sequence[str], rows: Sequence[Sequence[object]], where: str) -> RawTable:
    """Make a table of rows of cells, as many in each as names in the header.

    Columns without a name are not read, and a note counts those that hold anything; the first one is an index. Rows that repeat the
    header, as in files that were put one after the other, are left out, and a note says which.

    Raises:
        Refused: columns with the same name.
    """
    unnamed = [k for k, name in enumerate(header) if not name or name.startswith("Unnamed: ")]
    named = [k for k in range(len(header)) if k not in unnamed]
    check_column_names([header[k] for k in named], where)
    table = table_of_columns({header[k]: [row[k] for row in rows] for k in named}, where)
    notes = []
    if filled := [k for k in unnamed if k and any(str(row[k]).strip() for row in rows)]:
        notes.append(f"{where}: {len(filled)} column(s) without a name are not read.")
    names = tuple(table.columns)
    repeated = {
        at for at, row in enumerate(zip(*table.columns.values(), strict=True)) if len(names) > 1 and row == names
    }
    if repeated:
        notes.append(
            f"{where}: rows that repeat the names of the columns are left out ({table.rows(sorted(repeated))})."
        )
        table = table.select(at for at in range(row_count(table)) if at not in repeated)
    return table._replace(notes=tuple(notes))


def strip_blanks(text: str) -> str:
    """Return a text without blanks at its ends, also those that nobody sees."""
    stripped = text.strip().strip(INVISIBLE)
    return stripped if stripped == text else strip_blanks(stripped)


def plain_value(value: object) -> object:
    """Return Python's own value of a scalar or list of numpy, pandas, torch or pyarrow, or of a member of an `Enum`.

    None for one that says it is missing. Bytes are text where they are UTF-8.
    """
    kind = type(value)
    if kind in (str, int, bool) or value is None:
        return value
    if isinstance(value, float | Decimal) and value != value:
        return None
    if isinstance(value, Enum):
        return plain_value(value.value)
    if isinstance(value, bytes):
        return _text_of_bytes(value)
    if kind.__name__ in ("NAType", "NaTType"):
        return None
    if hasattr(value, "as_py"):
        return plain_value(value.as_py())
    if hasattr(value, "tolist"):  # of numpy, torch and pandas: scalars and lists, also np.str_ and np.float64
        inner = value.tolist()
        return inner if type(inner) is kind else plain_value(inner)
    if isinstance(value, datetime | date | time):
        return value.isoformat()
    if isinstance(value, UUID):
        return str(value)
    return value


def _text_of_bytes(value: bytes) -> str | bytes:
    """Return the text that a column of bytes holds, as some writers of Parquet store it."""
    try:
        return value.decode("utf-8")
    except UnicodeDecodeError:
        return value


def row_count(raw: RawTable) -> int:
    """Return how many rows a table has."""
    return len(next(iter(raw.columns.values()), ()))


def check_column_names(names: Sequence[str], where: str) -> None:
    """Raise Refused for a name that several columns have; it is not shown, as it may be a cell of a table without names."""
    places = defaultdict[str, list[str]](list)
    for number, name in enumerate(names, 1):
        places[name].append(str(number))
    if twice := [numbers for numbers in places.values() if len(numbers) > 1]:
        raise Refused("data.path", where, f"columns {' and '.join(twice[0])} have the same name; rename one of them")


def arrow_table(table: Any, where: str) -> RawTable:
    """Make a table of an Arrow table, with the class names that `datasets` wrote into its schema.

    The index that pandas wrote as a column is left out.
    """
    check_column_names(table.column_names, where)
    names = [name for name in table.column_names if not name.startswith("__index_level_")]
    columns = {name: table.column(name).to_pylist() for name in names}
    ordered = {
        name: dict.fromkeys(
            category for chunk in table.column(name).chunks for category in chunk.dictionary.to_pylist()
        )
        for name in names
        if getattr(table.schema.field(name).type, "ordered", False)
    }
    return table_of_columns(columns, where, _present_classes(ordered, columns) | _classes_in_schema(table.schema))


def _classes_in_schema(schema: Any) -> dict[str, tuple[str, ...]]:
    """Names of the classes of each column of class labels, as `datasets` writes them into the schema of its files."""
    written = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
    features = written.get("info", {}).get("features", {})
    return {
        name: tuple(feature["names"])
        for name, feature in features.items()
        if isinstance(feature, dict) and feature.get("_type") == "ClassLabel"
    }


def data_set_table(data: Any, where: str) -> RawTable:
    """Make a table of a `datasets.Dataset` or `IterableDataset`, with the names of its class labels."""
    classes = {
        name: tuple(feature.names)
        for name, feature in (data.features or {}).items()
        if _is_a(feature, "datasets", "ClassLabel")
    }
    if _is_a(data, "datasets", "IterableDataset"):
        return table_of_columns(table_of_rows(data, where).columns, where, classes)
    return table_of_columns(data.with_format(None).to_dict(), where, classes)


def _frame_table(frame: Any, where: str) -> RawTable:
    """Make a table of a frame of pandas; an index that has a name is a column, as it is in the files that pandas writes."""
    named = [name for name in frame.index.names if name is not None and name not in frame.columns]
    frame = frame.reset_index(level=named) if named else frame
    names = [str(name) for name in frame.columns]
    check_column_names(names, where)
    columns = {name: frame.iloc[:, k].tolist() for k, name in enumerate(names)}
    ordered = {
        name: kind.categories for name, kind in zip(names, frame.dtypes, strict=True) if getattr(kind, "ordered", False)
    }
    return table_of_columns(columns, where, _present_classes(ordered, columns))


def _present_classes(ordered: Mapping[str, Iterable[object]], columns: Columns) -> dict[str, tuple[str, ...]]:
    """Return the categories of columns whose data set orders them, where they are words, without those that no row has."""
    listed = {name: list(categories) for name, categories in ordered.items()}
    return {
        name: tuple(str(category) for category in categories if category in set(columns[name]))
        for name, categories in listed.items()
        if all(isinstance(category, str) for category in categories)
    }


def _one_table(given: Any, where: str) -> RawTable:
    """Make the table of anything but splits."""
    if isinstance(given, TableRows | RawTable):
        return (given.table if isinstance(given, TableRows) else given)._replace(where=where)
    if _is_a(given, "datasets", "Dataset") or _is_a(given, "datasets", "IterableDataset"):
        return data_set_table(given, where)
    if _is_a(given, "pandas", "DataFrame"):
        return _frame_table(given, where)
    if _is_a(given, "polars", "LazyFrame"):
        given = given.collect()
    if _is_a(given, "polars", "DataFrame"):
        return table_of_columns(given.to_dict(as_series=False), where)
    if _is_a(given, "pyarrow", "Table") or _is_a(given, "pyarrow", "RecordBatch"):
        return arrow_table(given, where)
    if isinstance(given, Mapping):
        if wrong := [
            name for name, cells in given.items() if isinstance(cells, str | Mapping) or not isinstance(cells, Iterable)
        ]:
            raise Refused(
                "data.rows", where, f"the column {str(wrong[0])!r} is no list; give rows, or a list for each column"
            )
        return table_of_columns({str(name): cells for name, cells in given.items()}, where)
    if isinstance(given, str) or not isinstance(given, Iterable):
        kinds = "a list of rows, columns, a frame of pandas or polars, an Arrow table, a data set of `datasets`"
        raise Refused("data.rows", where, f"a value of type {type(given).__name__} is no table; give {kinds}")
    return table_of_rows(given, where)


def _is_a(value: object, package: str, name: str) -> bool:
    """Whether a value is of a class of a library, which is not imported for that."""
    return any(cls.__name__ == name and cls.__module__.partition(".")[0] == package for cls in type(value).__mro__)
