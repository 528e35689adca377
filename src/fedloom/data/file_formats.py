"""Rows and columns as they stand in files or in Python, before it is said what a column means.

Files are read with pyarrow and the standard library instead of `datasets`: both refuse ragged rows by name, and neither
leaves a copy in a cache.
"""

from __future__ import annotations

import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple, TypeAlias

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet

from fedloom.core.errors import Refused

Row: TypeAlias = Mapping[str, object]
Columns: TypeAlias = Mapping[str, list[object]]
RowSource: TypeAlias = Iterable[Row] | Callable[[], Iterable[Row]]


class RawTable(NamedTuple):
    """Columns of a table, and where they came from, for messages."""

    columns: Columns
    where: str


def read_table_file(path: Path, quoted: bool | None) -> RawTable:
    """Read the columns of a file; every value of a CSV or TSV is text.

    Args:
        path: a .csv, .tsv, .jsonl or .parquet file, gzipped (.gz) or not.
        quoted: whether quotation marks enclose fields (None: in CSV they do, in TSV they do not).
    """
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
            return gather_rows([json.loads(line) for line in lines if line.strip()], where)
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
    return RawTable(table.to_pydict(), where)


def _delimited(content: bytes, delimiter: str, quoted: bool) -> pa.Table:
    """Read the table of a CSV or TSV file, all text, empty fields as empty texts."""
    parse = pa.csv.ParseOptions(delimiter=delimiter, quote_char='"' if quoted else False, newlines_in_values=quoted)
    reader = pa.csv.open_csv(io.BytesIO(content), parse_options=parse)
    types = dict.fromkeys(reader.schema.names, pa.string())
    convert = pa.csv.ConvertOptions(column_types=types, strings_can_be_null=False)
    return pa.csv.read_csv(io.BytesIO(content), parse_options=parse, convert_options=convert)


def gather_rows(rows: RowSource, where: str) -> RawTable:
    """Turn rows to columns; what a row lacks is None."""
    if isinstance(rows, Iterator):
        raise Refused(
            "data.rows", where, "an iterator can be read once only; give a list, or a function that returns one"
        )
    listed = list(rows() if callable(rows) else rows)
    for number, row in enumerate(listed, 1):
        if not isinstance(row, Mapping):
            raise Refused("data.path", where, f"row {number} is {row!r:.60}; give one object of columns per row")
    names = dict.fromkeys(name for row in listed for name in row)
    return RawTable({name: [row.get(name) for row in listed] for name in names}, where)


def complete_column(raw: RawTable, field: str, name: str) -> list[object]:
    """Return a column of which no value is missing; raise Refused where one is."""
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


def label_values(raw: RawTable, field: str, name: str) -> list[str]:
    """Return the values of a column of labels as text; raise Refused for one that is neither a word nor a whole number."""
    values = []
    for number, value in enumerate(complete_column(raw, field, name), 1):
        whole = int(value) if isinstance(value, float) and value.is_integer() else value
        if not isinstance(whole, int | str) or whole == "":
            remedy = f"row {number} of {raw.where} holds {value!r:.60}; a label is a word or a whole number"
            raise Refused(f"data.{field}", name, remedy)
        values.append(str(whole))
    return values


def by_number(value: str) -> tuple[float, str]:
    """Sort key: whole numbers by size, before words by letter."""
    return (float(value) if value.removeprefix("-").isdecimal() else float("inf")), value
